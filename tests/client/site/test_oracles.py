"""What the coordinator sees must not tell one record's presence: every pair of data sets here differs in one, or in its kind.

Each pair is asked the same questions by somebody whose jobs a real, guarded site accepts. Whatever comes back is compared but
for the noised numbers themselves: kinds of answers, codes, texts, declared numbers, sizes on the wire, and what was charged.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import RecordDict

import client.site.held_out as held_out_module
import client.site.release as release_module
from client import commands
from client.check import check_site
from client.site.home import SiteHome
from client.site.site import Site
from shared.data.datasets import write_jsonl
from shared.errors import AdapterError, BudgetExceeded, DataError, ModelError, PolicyError
from shared.job.job import Job
from shared.models.backbones import backbone_sha256
from shared.trust.audit_log import Event
from shared.trust.signing import SigningKey
from shared.wire.messages import (
    WITHHELD,
    WITHHELD_REASON,
    MetricsReply,
    Refusal,
    SiteDescription,
    TrainReply,
    TrainRequest,
    pack_description,
    pack_refusal,
    pack_reply,
)
from simulations.federation.processes import change_toml
from tests.client.site.test_guard import World
from tests.conftest import LINES, Outcome

MakeWorld = Callable[..., World]
MARKER = "zyxomma"

ROWS = [{"text": f"{LINES[i % 6]} {i}", "label": ["good", "bad"][i % 2], "id": i % 20} for i in range(60)]


def rows_with(**change: Any) -> list[dict[str, Any]]:
    return [*ROWS[:7], ROWS[7] | change, *ROWS[8:]]


@pytest.fixture
def make_world(tmp_path: Path, tiny_bert: Path) -> MakeWorld:
    def make(rows: list[dict[str, Any]], *, unit: str = "record", **changes: Any) -> World:
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        place.mkdir()
        signer = SigningKey.generate()
        write_jsonl(place / "notes.jsonl", rows)
        columns = ["text=text", "label=label", *(["person=id"] if unit != "record" else [])]
        home = SiteHome(place / "north")
        commands.init(
            home.path,
            name="north",
            coordinator="127.0.0.1:9",
            data=place / "notes.jsonl",
            columns=columns,
            epsilon=50.0,
            unit=unit,  # type: ignore[arg-type]
            signer=[f"consortium={signer.verify_key.text}"],
        )
        change_toml(home.policy, backbones={str(tiny_bert): backbone_sha256(tiny_bert)}, metrics=["loss"])
        change_toml(home.config, compute={"device": "cpu", "precision": "float32"}, **changes)
        return World(home, signer, SigningKey.generate())

    return make


def size(content: RecordDict) -> int:
    """Return the bytes of a message's one record on the wire."""
    return len(content["silotune"].deflate())


def seen(answer: SiteDescription | TrainReply | MetricsReply | Refusal) -> tuple[str, dict[str, Any], int]:
    """Return what of an answer is no noised number: its kind, its other fields, its size on the wire."""
    if isinstance(answer, Refusal):
        return "refusal", asdict(answer), size(pack_refusal(answer))
    if isinstance(answer, SiteDescription):
        return "description", asdict(answer), size(pack_description(answer))
    if isinstance(answer, TrainReply):
        return "update", asdict(replace(answer, update=b"")), size(pack_reply(answer))
    shown = {name: len(counts) for name, counts in answer.counts.items()}
    # The noisy numbers are written in as many digits as they have.
    return "metrics", asdict(replace(answer, counts={})) | shown, 0


def questions(world: World, job: Job, request_for: Callable[..., TrainRequest]) -> list[object]:
    """Return what comes back to a coordinator that tries everything, and what was charged."""
    site, asked = world.site, world.order(request_for(job))
    found: list[object] = [seen(site.accept(world.signed(job)))]
    found.append(seen(site.answer(world.order(replace(asked, adapter=b"garbage")))))
    found += [seen(site.answer(asked)), seen(site.answer(asked)), seen(site.answer(world.order(request_for(job, 2))))]
    found.append(seen(site.answer_metrics(world.order(request_for(job, job.training.rounds + 1)))))
    return [*found, site.ledger().events()]


PAIRS = {
    "a label outside the job's list": (ROWS, [*ROWS, {"text": MARKER, "label": MARKER, "id": 5}]),
    "no record has a label of the job's": (ROWS, [row | {"label": MARKER} for row in ROWS]),
    "all have one label": (ROWS, [row | {"label": "good"} for row in ROWS]),
    "a long word": (ROWS, rows_with(text="x" * 5000)),
    "one record more": (ROWS, [*ROWS, {"text": "one more", "label": "bad", "id": 3}]),
}


@pytest.mark.parametrize("unit", ["record", "patient"])
@pytest.mark.parametrize("pair", PAIRS)
def test_answers_are_the_same_whatever_a_record_is(
    make_world: MakeWorld,
    private_job: Callable[..., Job],
    request_for: Callable[..., TrainRequest],
    pair: str,
    unit: str,
) -> None:
    persons = {"unit": unit, "records_per_person": 2} if unit == "patient" else {}
    metrics = {"names": ["loss"], "noise_multiplier": 5.0}
    job = private_job(federation={"min_sites": 2}, privacy=persons, site_metrics=metrics)
    one, other = (
        questions(make_world(rows, unit=unit, evaluation_share=0.2), job, request_for) for rows in PAIRS[pair]
    )
    assert one == other
    kinds = [kind for kind, *_ in one[:-1]]  # type: ignore[misc]
    assert kinds == ["description", "refusal", "update", "update", "update", "metrics"]


@pytest.mark.parametrize("num_records", [33, 50, 63])
def test_the_number_of_records_decides_nothing_that_is_answered(
    make_world: MakeWorld, private_job: Callable[..., Job], request_for: Callable[..., TrainRequest], num_records: int
) -> None:
    """A probing delta is judged by the declared size: 1 / 64 is the limit for everyone who declares 32."""
    world = make_world(ROWS[:num_records] if num_records <= 60 else [*ROWS, *ROWS[:3]], budget=LOOSE)
    answers = {}
    for delta in (1 / 63, 1 / 64, 1 / 65):
        job = private_job(privacy={"delta": delta}, federation={"min_sites": 2})
        request = world.order(replace(request_for(job), adapter=b"garbage"))
        answers[delta] = [world.site.accept(world.signed(job)), world.site.answer(request)]
    for delta in (1 / 63, 1 / 64):
        for answer in answers[delta]:
            assert isinstance(answer, Refusal)
            assert answer.code == "PolicyError"
            assert "declares 32 records and may have up to twice as many" in answer.reason
    assert isinstance(answers[1 / 65][0], SiteDescription)
    assert seen(answers[1 / 65][1])[1]["code"] == "AdapterError"
    assert world.site.ledger().events() == []


LOOSE = {"unit": "record", "epsilon": 8.0, "delta": 0.05, "composition": "adaptive"}

ERRORS = [
    DataError(MARKER),
    ModelError(MARKER),
    PolicyError(MARKER),
    AdapterError(MARKER),
    BudgetExceeded(MARKER, steps_affordable=3),
    RuntimeError(MARKER),
    MemoryError(MARKER),
]


@pytest.mark.parametrize("where", ["usable_records", "train_local_rounds", "cast_votes"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_fails_on_records_has_one_code_and_one_text(
    make_world: MakeWorld,
    private_job: Callable[..., Job],
    request_for: Callable[..., TrainRequest],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: Exception,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    world = make_world(ROWS, evaluation_share=0.2)
    job = private_job(federation={"min_sites": 2}, site_metrics={"names": ["loss"], "noise_multiplier": 5.0})
    monkeypatch.setattr(held_out_module if where == "usable_records" else release_module, where, fail)
    if where == "cast_votes":
        answer = world.site.answer_metrics(world.order(request_for(job, 4)))
    else:
        answer = world.site.answer(world.order(request_for(job)))
    assert answer == Refusal(site="north", code=WITHHELD, reason=WITHHELD_REASON)
    noted = world.entries(Event.REQUEST_REFUSED)[-1].details
    assert noted["reason_sent"] is False
    assert noted["code"] != WITHHELD, "the site's own log tells which error it was"


def test_the_site_s_own_people_are_told_what_a_job_cannot_use(
    make_world: MakeWorld, private_job: Callable[..., Job], caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_with(label=MARKER)
    world, job = make_world(rows), private_job(federation={"min_sites": 2})
    with caplog.at_level(logging.WARNING, logger="silotune.site"):
        assert isinstance(world.site.accept(world.signed(job)), SiteDescription)
    noted = world.entries(Event.RECORDS_LEFT_OUT)[-1].details
    for told in (caplog.text, noted["reason"], str(world.site.left_out)):
        assert (
            "of 60 records cannot be used and are left out; record 8: has a label that is not among task.labels" in told
        )
    assert noted["job"] == job.sha256
    assert MARKER not in caplog.text + str(noted)


def test_nothing_is_said_where_all_records_can_be_used(
    make_world: MakeWorld, private_job: Callable[..., Job], caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world(ROWS)
    assert isinstance(world.site.accept(world.signed(private_job(federation={"min_sites": 2}))), SiteDescription)
    assert not world.entries(Event.RECORDS_LEFT_OUT)
    assert not world.site.left_out
    assert "cannot be used" not in caplog.text


# --- what the site declares decides, and may be told ---


def test_a_job_without_a_declared_label_is_refused_whatever_the_records_are(
    make_world: MakeWorld, private_job: Callable[..., Job]
) -> None:
    job = private_job(federation={"min_sites": 2})
    declared = ["good", "bad", "unclear"]
    for rows in (ROWS, rows_with(label="unclear")):
        world = make_world(rows, labels=declared)
        answer = world.site.accept(world.signed(job))
        assert isinstance(answer, Refusal)
        assert (answer.code, "declares the label 'unclear'" in answer.reason) == ("PolicyError", True)
        wider = private_job(federation={"min_sites": 2}, task={"labels": declared})
        assert isinstance(world.site.accept(world.signed(wider)), SiteDescription)


def test_site_check_judges_delta_by_the_number_that_there_is(make_world: MakeWorld) -> None:
    """No answer to the coordinator does; 60 records are declared as 32, and delta 1/62 passes there."""
    for delta, outcome in ((1 / 60, "warning"), (1 / 61, "ok")):
        home = make_world(ROWS, budget=LOOSE | {"delta": delta}).home
        found = {finding.name: finding for finding in check_site(home, passphrase=None, connect=False)}
        assert found["data"].outcome == outcome
        assert ("it must be below 1/n = 1.7e-02" in found["data"].text) == (outcome == "warning")


def test_a_job_that_needs_a_column_that_is_not_declared_is_refused(
    make_world: MakeWorld, task_job: Callable[..., Job]
) -> None:
    pairs = {"kind": "pair_matching", "labels": ["bad", "good"]}
    job = task_job(pairs, privacy={"noise_multiplier": 1.0}, federation={"min_sites": 2})
    world = make_world(ROWS)
    answer = world.site.accept(world.signed(job))
    assert isinstance(answer, Refusal)
    assert answer.code == "PolicyError"
    assert "site north has no column for pair, which a job of task.kind 'pair_matching' needs" in answer.reason


def test_a_site_without_a_usable_record_adds_noise_alone(
    make_world: MakeWorld, private_job: Callable[..., Job], request_for: Callable[..., TrainRequest]
) -> None:
    world = make_world([row | {"label": MARKER} for row in ROWS])
    site: Site = world.site
    request = world.order(request_for(private_job(federation={"min_sites": 2})))
    reply = site.answer(request)
    assert isinstance(reply, TrainReply)
    assert reply.declared_records == 32
    assert "60 of 60 records cannot be used" in str(site.left_out)
    assert "the site has no records" in str(site.left_out)
    assert sum(event.steps for event in site.ledger().events()) == 2


def test_site_check_tells_before_a_job_comes_what_it_could_not_use(
    make_world: MakeWorld, private_job: Callable[..., Job], tmp_path: Path, silotune: Callable[..., Outcome]
) -> None:
    job = private_job(federation={"min_sites": 2})
    file = tmp_path / "job.json"
    file.write_text(job.canonical_json())
    for rows, label, text in (
        (ROWS, [], "test can use all 60 records"),
        (rows_with(label=MARKER), [], "1 of 60 records cannot be used and are left out; record 8: has a label"),
        (ROWS, ["good", "bad", "unclear"], "declares the label 'unclear' for its records"),
    ):
        world = make_world(rows, labels=label)
        done = silotune("site", "check", world.home.path, "--offline", "--json", "--job", file)
        (found,) = [finding for finding in json.loads(done.out) if finding["name"] == "job"]
        assert text in found["text"]
        assert MARKER not in done.out + done.err
        assert not world.entries(Event.RECORDS_LEFT_OUT)


def test_site_check_tells_before_a_job_comes_which_rule_it_breaks(
    make_world: MakeWorld, private_job: Callable[..., Job], tmp_path: Path, silotune: Callable[..., Outcome]
) -> None:
    world, file = make_world(ROWS), tmp_path / "job.json"
    change_toml(world.home.policy, max_steps=1, max_epsilon_per_job=0.001)
    file.write_text(private_job(federation={"min_sites": 2}).canonical_json())
    done = silotune("site", "check", world.home.path, "--offline", "--json", "--job", file)
    (found,) = [finding for finding in json.loads(done.out) if finding["name"] == "job"]
    assert (found["outcome"], done.status) == ("failed", 1)
    assert found["text"].startswith("test would be refused: max_epsilon_per_job asks epsilon ")
    assert "max_steps asks 6, accepted is at most 1" in found["text"]
    change_toml(world.home.policy, max_steps=1900, max_epsilon_per_job=8.0, metrics=[])
    asked = private_job(federation={"min_sites": 2}, site_metrics={"names": ["loss"], "noise_multiplier": 5.0})
    file.write_text(asked.canonical_json())
    done = silotune("site", "check", world.home.path, "--offline", "--json", "--job", file)
    (found,) = [finding for finding in json.loads(done.out) if finding["name"] == "job"]
    assert found["outcome"] == "warning"
    assert found["text"].endswith("it would be trained, and no metrics released: metrics asks loss, accepted is none")


def test_site_check_refuses_a_sum_in_which_too_few_sites_are_known(
    make_world: MakeWorld, private_job: Callable[..., Job], tmp_path: Path, silotune: Callable[..., Outcome]
) -> None:
    world, file = make_world(ROWS), tmp_path / "job.json"
    peers = {name: f"{number:064x}" for number, name in enumerate(("south", "west"))}
    change_toml(world.home.policy, peers=peers, max_epsilon_per_job=900.0)
    shared = {"mechanism": "distributed", "max_colluding": 1, "noise_multiplier": 1.0}
    asked = private_job(federation={"min_sites": 7}, privacy=shared, training={"rounds": 2, "local_steps": 1})
    file.write_text(asked.canonical_json())
    done = silotune("site", "check", world.home.path, "--offline", "--json", "--job", file)
    (found,) = [finding for finding in json.loads(done.out) if finding["name"] == "job"]
    assert (found["outcome"], done.status) == ("failed", 1)
    told = "would be refused: the job needs 7 sites that are known here, [peers] names 3 with this one"
    assert found["text"].endswith(told)
