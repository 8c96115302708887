"""JSON lines of a log."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from shared.service.logs import about, formatter, log_file

log = logging.getLogger("silotune.test_logs")


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter("json", site="st-anna"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    yield stream
    log.removeHandler(handler)
    log.propagate = True


def lines(written: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.getvalue().split("\n") if line]


def test_a_line_is_an_object_with_its_time_and_what_it_is_about(written: io.StringIO) -> None:
    with about(job="0001-demo"):
        log.warning("round %d", 3, extra={"round": 3, "site": "b"})
        with about(round=4):
            log.info("goes on")
    log.info("over")
    first, second, third = lines(written)
    said = datetime.fromisoformat(first.pop("time"))
    assert abs((datetime.now(UTC) - said).total_seconds()) < 60
    assert first == {
        "level": "WARNING",
        "logger": "silotune.test_logs",
        "message": "round 3",
        "job": "0001-demo",
        "round": 3,
        "site": "b",
    }
    assert (second["job"], second["round"], second["site"]) == ("0001-demo", 4, "st-anna")
    assert {"job", "round"}.isdisjoint(third)


def test_what_one_thread_is_about_is_not_what_another_is(written: io.StringIO) -> None:
    with about(job="a"):
        other = threading.Thread(target=log.info, args=("from elsewhere",))
        other.start()
        other.join()
    assert "job" not in lines(written)[0]


@pytest.mark.parametrize("end", ["\n", "\r", "\u2028", "\u0085", "\x0b", "\x1b[2J", "\x00", '"}\n{"level": "ERROR'])
def test_no_message_forges_a_line(written: io.StringIO, end: str) -> None:
    log.info("a%sb", end, extra={"site": f"x{end}y"})
    text = written.getvalue()
    assert text.isascii()
    assert len(text.splitlines()) == 1
    assert all(character.isprintable() for character in text[:-1])
    (line,) = lines(written)
    assert (line["message"], line["site"], line["level"]) == (f"a{end}b", f"x{end}y", "INFO")


def test_an_exception_is_part_of_its_line(written: io.StringIO) -> None:
    try:
        raise ValueError("bad\nluck")
    except ValueError:
        log.exception("it ended")
    (line,) = lines(written)
    assert (line["message"], line["level"]) == ("it ended", "ERROR")
    assert line["error"].startswith("Traceback")
    assert line["error"].endswith("ValueError: bad\nluck")


def test_what_json_does_not_know_is_shown_as_text(written: io.StringIO) -> None:
    log.info("x", extra={"job": Path("/a")})
    assert lines(written)[0]["job"] == "/a"


def test_a_file_has_the_same_form(tmp_path: Path) -> None:
    handler = log_file(tmp_path / "log.txt", "json", backups=1)
    log.addHandler(handler)
    try:
        with about(job="j"):
            log.warning("kept")
    finally:
        log.removeHandler(handler)
        handler.close()
    assert json.loads((tmp_path / "log.txt").read_text())["job"] == "j"
