"""A planted marker in texts, pairs, prompts, models' names and tokens enters no log, whatever fails."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

import pytest

from server.serving.access.tokens import TokenFile
from server.serving.application import Service
from server.serving.completing import Completing
from server.serving.models import Plan
from shared.models.batches import Example
from tests.server.serving.live import Live, live

MARKER = "Zebrafink-4711"


@pytest.fixture(autouse=True)
def _everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpcore"):  # of the client, in this process
        logging.getLogger(name).setLevel(logging.CRITICAL)


def bodies() -> list[Any]:
    return [
        {"texts": [MARKER, f"a film {MARKER}"]},
        {"texts": [MARKER], "model": MARKER},
        {"pairs": [[MARKER, MARKER]]},
        {"images": [MARKER]},
        {MARKER: [MARKER]},
        {"texts": [MARKER * 9000]},
        {"texts": [f"\u202e{MARKER}\u0000\n"]},
        MARKER,
    ]


def everything(found: Live, token: str) -> None:
    for path in ("/v1/predict", "/v1/completions", "/v1/explain", f"/{MARKER}"):
        for body in [
            *bodies(),
            {"text": MARKER},
            {"text": MARKER, "label": MARKER},
            {"pair": [MARKER, MARKER]},
            {"prompt": MARKER},
            {"prompt": MARKER, "stream": True, "stop": MARKER},
        ]:
            found.post(path, body, token)
        found.ask("GET", f"{path}?{MARKER}={MARKER}", MARKER)
    with socket.create_connection(("127.0.0.1", found.port), timeout=5) as connection:
        connection.sendall(f"POST /v1/predict HTTP/1.1\r\n{MARKER}\r\n\r\n".encode())
        connection.recv(1000)


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])
def test_no_text_is_in_any_log(
    filled: Path,
    tmp_path: Path,
    broken: bool,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = TokenFile(tmp_path / "tokens.db", create=True)
    token = file.add("any", scopes=("predict", "completions", "explain"))
    with live("films", filled, tokens=file.path, plan=Plan("torch", explain=True)) as found:
        if broken:
            _break(found.service, monkeypatch)
        everything(found, token)
        if broken:
            assert found.post("/v1/predict", {"texts": [MARKER]}, token).status_code == 500
    written, errors = capfd.readouterr()
    said = caplog.text + written + errors
    assert MARKER not in said
    assert token not in said
    assert ("failed" in caplog.text) == broken


def test_no_prompt_is_in_any_log(
    writer: Live, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(writer.service.engine, Completing)
    for stream in (False, True):
        asked = {"prompt": MARKER, "max_tokens": 5, "stop": [MARKER], "stream": stream}
        assert writer.post("/v1/completions", asked).status_code == 200
        with monkeypatch.context() as patched:
            patched.setattr("server.serving.completing.choose_tokens", _fail)
            assert writer.post("/v1/completions", asked).status_code == 500
    written, errors = capfd.readouterr()
    assert MARKER not in caplog.text + written + errors
    assert "a step of writer failed" in caplog.text


class Panic(BaseException):
    """As a panic of a library in Rust reaches Python."""


def test_a_panic_ends_no_thread_and_says_nothing(
    filled: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(*given: Any) -> Any:
        raise Panic(f"byte index 3 is not a char boundary; it is inside {given!r} {MARKER}")

    with live("films", filled, plan=Plan("torch")) as found:
        model = found.service.following.model
        for place, name in ((type(model.task), "encode"), (type(model), "outputs")):
            with monkeypatch.context() as patched:
                patched.setattr(place, name, panic)
                for texts in ([MARKER], [MARKER * 9] * 40):
                    answer = found.post("/v1/predict", {"texts": texts})
                    assert answer.status_code == 500
                    assert answer.json()["error"]["code"]
        assert found.post("/v1/predict", {"texts": ["a film"]}).status_code == 200
        assert found.ask("GET", "/healthz").status_code == 200
    written, errors = capfd.readouterr()
    assert MARKER not in caplog.text + written + errors
    assert "Panicked" in caplog.text


def _break(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let encoding fail at one text, and computing at the others, with errors that quote what they got."""

    def outputs(self: Any, examples: list[Example]) -> Any:
        _fail(examples)

    monkeypatch.setattr(type(service.following.model), "outputs", outputs)
    real = type(service.following.model.runtime).encode

    def encode(self: Any, records: Any) -> Any:
        if len(records) > 1:
            _fail(records)
        return real(self, records)

    monkeypatch.setattr(type(service.following.model.runtime), "encode", encode)


def _fail(*given: Any) -> None:
    raise ValueError(f"{MARKER} in {given!r}")
