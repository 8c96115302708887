"""The same records under a second name are noticed at the site, and nobody without its key can ask what was charged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.check import check_site
from client.site.charged_records import RECORDS_FILE, ChargedRecords
from shared.data.datasets import write_jsonl
from shared.data.overlap import content_key, num_shared
from shared.errors import LedgerError
from shared.job.job import Job
from shared.trust.audit_log import Event
from shared.trust.keystore import Seal, new_key
from shared.wire.messages import TrainReply, TrainRequest
from simulations.federation.processes import change_toml
from tests.client.site.test_guard import World
from tests.client.site.test_oracles import ROWS, make_world  # noqa: F401 (a fixture)
from tests.conftest import Outcome

MakeWorld = Callable[..., World]
MARKER = "zyxomma"


def finding(world: World, name: str, **options: Any) -> tuple[str, str]:
    for found in check_site(world.home, passphrase=None, connect=False, **options):
        if found.name == name:
            return found.outcome, found.text
    raise AssertionError(name)


def charged(world: World, job: Job, request_for: Callable[..., TrainRequest]) -> World:
    """Return the site after a round."""
    assert isinstance(world.site.answer(world.order(request_for(job))), TrainReply)
    return world


def renamed(world: World, dataset: str, rows: list[dict[str, Any]] | None = None) -> World:
    change_toml(world.home.config, dataset=dataset)
    if rows is not None:
        write_jsonl(world.home.path.parent / "notes.jsonl", rows)
    world.opened.clear()
    return world


@pytest.fixture
def job(private_job: Callable[..., Job]) -> Job:
    return private_job(federation={"min_sites": 2})


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (list(reversed(ROWS)), "60 of the 60 records were charged as the data set 'north-records' before"),
        ([row | {"label": "bad", "text": f" {row['text'].upper()} "} for row in ROWS], "60 of the 60 records"),
        ([*ROWS[:7], *({"text": f"new {i}", "label": "bad"} for i in range(40))], "7 of the 47 records"),
        ([{"text": f"new {i}", "label": ["good", "bad"][i % 2]} for i in range(40)], None),
    ],
    ids=["shuffled", "relabelled", "a few", "others"],
)
def test_a_second_name_for_the_same_records_is_told_at_the_site(
    make_world: MakeWorld,  # noqa: F811
    job: Job,
    request_for: Callable[..., TrainRequest],
    rows: list[dict[str, Any]],
    told: str | None,
) -> None:
    world = charged(make_world(ROWS), job, request_for)
    assert finding(world, "records")[0] == "ok"
    renamed(world, "fresh", rows)
    outcome, text = finding(world, "records")
    assert outcome == ("warning" if told else "ok")
    assert (told or "not charged under another name here") in text
    # The budget is the owner's to keep: it is told, not refused.
    charged(world, job, request_for)


def test_another_spelling_of_the_name_is_the_same_account(
    make_world: MakeWorld,  # noqa: F811
    job: Job,
    request_for: Callable[..., TrainRequest],
    private_job: Callable[..., Job],
) -> None:
    world = charged(make_world(ROWS), job, request_for)
    spent = world.site.ledger().spent_epsilon()
    renamed(world, "NORTH-records")
    assert finding(world, "records")[0] == "ok"
    charged(world, private_job(name="second", federation={"min_sites": 2}), request_for)
    assert world.site.ledger().spent_epsilon() > spent > 0


def test_what_was_taken_out_of_a_data_set_stays_charged(
    make_world: MakeWorld,  # noqa: F811
    job: Job,
    request_for: Callable[..., TrainRequest],
    private_job: Callable[..., Job],
) -> None:
    world = charged(make_world(ROWS), job, request_for)
    others = [{"text": f"new {i}", "label": ["good", "bad"][i % 2]} for i in range(40)]
    renamed(world, "north-records", others)
    charged(world, private_job(name="second", federation={"min_sites": 2}), request_for)
    renamed(world, "fresh", [*ROWS[:3], *others])
    assert "43 of the 43 records were charged as the data set 'north-records' before" in finding(world, "records")[1]


def test_the_ledger_knows_an_unchanged_data_set_without_the_file(
    make_world: MakeWorld,  # noqa: F811
    job: Job,
    request_for: Callable[..., TrainRequest],
) -> None:
    world = charged(make_world(ROWS), job, request_for)
    (world.home.path / RECORDS_FILE).unlink()
    renamed(world, "fresh", list(reversed(ROWS)))
    assert "60 of the 60 records were charged as the data set 'north-records' before" in finding(world, "records")[1]


def test_neither_file_nor_log_answers_who_has_no_key(
    make_world: MakeWorld,  # noqa: F811
    job: Job,
    request_for: Callable[..., TrainRequest],
) -> None:
    world = charged(make_world(ROWS), job, request_for)
    path = world.home.path / RECORDS_FILE
    assert b"north-records" not in path.read_bytes()
    assert (path.stat().st_mode & 0o077) == 0
    noted = [e.details["payload"] for e in world.entries(Event.LEDGER_ENTRY) if e.details["kind"] == "reserve"]
    (fingerprint,) = {payload["records"] for payload in noted}
    stranger = Seal(new_key())
    other = ChargedRecords(path, seal=stranger, dataset="x", records=[{"text": r["text"]} for r in ROWS])
    assert other.fingerprint != fingerprint, "without the key the records themselves do not give the fingerprint"
    with pytest.raises(LedgerError, match="cannot be read"):
        other.warnings([])


def test_the_node_says_so_when_it_starts(
    make_world: MakeWorld,  # noqa: F811
    job: Job,
    request_for: Callable[..., TrainRequest],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from client.node.node import Node

    world = renamed(charged(make_world(ROWS), job, request_for), "fresh")
    node = Node(world.home, passphrase=None)
    node.stop()
    with caplog.at_level(logging.WARNING):
        node.run()
    assert "60 of the 60 records were charged as the data set 'north-records' before" in caplog.text


def test_public_records_that_are_the_site_s_own_are_counted_at_the_site(
    make_world: MakeWorld,  # noqa: F811
    tmp_path: Path,
    silotune: Callable[..., Outcome],
) -> None:
    world = make_world([*ROWS, {"text": MARKER, "label": "bad"}])
    file = tmp_path / "public.jsonl"
    write_jsonl(file, [{"note": f"{MARKER.upper()} ", "label": "good"}, {"note": "something else", "label": "good"}])
    asked = ("site", "check", world.home.path, "--offline", "--public", file)
    done = silotune(*asked, "--public-column", "text=note")
    assert f"1 of the 61 records stand in {file} as well" in " ".join(done.out.split())
    assert MARKER not in done.out.casefold()
    write_jsonl(file, [{"text": "something else", "label": "good"}])
    assert f"ok       public records: 0 of the 61 records stand in {file}" in silotune(*asked).out
    for wrong, text in (
        ((*asked, "--public-column", "text= "), "--public-column 'text= ' is not of the form"),
        ((*asked, "--public-column", "text=a", "--public-column", "text=b"), "names 'text' twice"),
        ((*asked[:-1], "n\udce9.csv"), "path: expected text that is valid UTF-8"),
    ):
        refused = silotune(*wrong)
        assert refused.status in (1, 2)
        assert text in refused.err


def test_what_counts_as_the_same_record() -> None:
    assert content_key({"text": " A  b\nc ", "label": "x"}) == "a b c"
    assert content_key({"text": "e\u0301t\u00e9", "person": "a much longer id than the text"}) == "\u00e9t\u00e9"
    assert content_key({"pixels": [1, 2, 3], "label": "x"}) == content_key({"pixels": [1, 2, 3], "label": "yes"})
    assert content_key({}) == ""
    assert num_shared([{"text": "a long text"}, {"text": "b"}], [{"note": "A LONG TEXT", "stars": 3}]) == 1
