"""A site whose budget protects persons: which jobs it takes, what it declares and charges, and that no id ever shows."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import client.site.release as release_module
from client.site.site import Site
from client.training.trainer import LocalWork, train_local_rounds
from shared.errors import ConfigError, DataError, LedgerError, PolicyError, PrivacyError
from shared.job.job import Job
from shared.job.training import TrainingConfig
from shared.models.batches import Example
from shared.privacy.persons import Persons
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.trust.signing import SigningKey
from shared.wire.messages import Refusal, TrainReply, TrainRequest
from simulations.audit.mechanism_release import canary_runtime

MakeHome = Callable[..., Path]
MakeJob = Callable[..., Job]
MakeRequest = Callable[..., TrainRequest]

COLUMNS = {"text": "text", "label": "label", "person": "mrn"}
BUDGET = {"unit": "patient", "epsilon": 50.0, "delta": 1e-5}
MARKER = "zyxomma"


@pytest.fixture
def person_home(site_home: MakeHome, records: list[dict[str, Any]]) -> MakeHome:
    """Return a writer of sites with 60 records of 12 patients, one of whom has 20; keyword arguments as in `site_home`."""
    counts = [1, 1, 2, 3, 3, 4, 4, 5, 5, 6, 6, 20]
    ids = [f"{MARKER}-{person}" for person, count in enumerate(counts) for _ in range(count)]

    def write(**changes: Any) -> Path:
        rows = changes.pop("rows", [record | {"mrn": one} for record, one in zip(records, ids, strict=True)])
        data = {"path": "data.jsonl", "columns": COLUMNS}
        return site_home(rows=rows, **{"data": data, "budget": BUDGET, **changes})

    return write


@pytest.fixture
def person_job(private_job: MakeJob) -> MakeJob:
    """Return a builder of private jobs whose unit is the patient."""

    def build(**sections: Any) -> Job:
        privacy = {"unit": "patient", "records_per_person": 4, **sections.pop("privacy", {})}
        return private_job(**sections, privacy=privacy)

    return build


def test_persons_are_declared_charged_and_trained_on(
    person_home: MakeHome, person_job: MakeJob, request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[LocalWork] = []

    def traced(runtime: Any, works: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(works)
        return train_local_rounds(runtime, works, *args, **kwargs)

    monkeypatch.setattr(release_module, "train_local_rounds", traced)
    site = Site(person_home())
    assert site.describe().declared_records == 8  # of 12 patients, not of 60 records
    reply = site.answer(request_for(person_job()))
    assert isinstance(reply, TrainReply), reply
    assert (reply.declared_records, reply.steps) == (8, 2)
    (work,) = seen
    assert work.persons is not None
    assert (work.declared_records, work.persons.count, work.persons.most_records) == (8, 12, 20)
    entries = site.ledger().entries()
    assert {entry.payload["unit"] for entry in entries} == {"patient"}
    assert [entry.kind for entry in entries][-2:] == ["reserve", "commit"]
    site.anticipate()


def test_no_id_stays_in_memory_or_shows_anywhere(
    person_home: MakeHome, person_job: MakeJob, request_for: MakeRequest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    home = person_home()
    site = Site(home)
    reply = site.update.make(request_for(person_job()))
    assert MARKER not in repr(vars(site))
    assert MARKER not in caplog.text
    assert MARKER.encode() not in repr(reply).encode()
    kept = [path for path in home.rglob("*") if path.is_file() and path.name != "data.jsonl"]
    assert len(kept) >= 3
    assert not [path for path in kept if MARKER.encode() in path.read_bytes()]


def test_ids_are_dropped_where_the_unit_is_the_record(person_home: MakeHome) -> None:
    site = Site(person_home(budget={"epsilon": 50.0}))
    assert MARKER not in repr(vars(site))
    assert site.describe().declared_records == 32


# --- which jobs ---


@pytest.mark.parametrize(
    ("own", "asked", "reason"),
    [
        ("record", "patient", "keeps its budget by the record, but the job's privacy.unit is 'patient'."),
        ("patient", "record", "keeps its budget by the patient, but the job's privacy.unit is 'record'."),
        ("patient", "customer", "accepts only jobs with privacy.unit = 'patient'."),
    ],
)
def test_a_job_of_another_unit_is_refused_with_the_reason(
    person_home: MakeHome,
    private_job: MakeJob,
    person_job: MakeJob,
    request_for: MakeRequest,
    own: str,
    asked: str,
    reason: str,
) -> None:
    site = Site(person_home(budget=BUDGET | {"unit": own}))
    job = private_job() if asked == "record" else person_job(privacy={"unit": asked})
    answer = site.answer(request_for(job))
    assert isinstance(answer, Refusal)
    assert answer.code == "PolicyError"
    assert reason in answer.reason
    assert "no id column" not in answer.reason
    assert not (site.home / "ledger.db").exists()


def test_a_site_without_an_id_column_says_so(
    site_home: MakeHome, person_job: MakeJob, request_for: MakeRequest
) -> None:
    answer = Site(site_home()).answer(request_for(person_job()))
    assert isinstance(answer, Refusal)
    assert "Its data has no id column, so it cannot tell which records are one patient's." in answer.reason


def test_a_job_without_noise_must_match_too(
    person_home: MakeHome, private_job: MakeJob, request_for: MakeRequest
) -> None:
    site = Site(person_home(allow_non_private=True))
    with pytest.raises(PolicyError, match=r"privacy.unit = 'patient'"):
        site.update.make(request_for(private_job(privacy={"mechanism": "none"})))


def test_a_weak_delta_is_judged_by_the_declared_number_of_persons(
    person_home: MakeHome, person_job: MakeJob, request_for: MakeRequest
) -> None:
    site = Site(person_home(budget=BUDGET | {"delta": 0.5}))
    # 12 patients, declared as 8, which may stand for up to 16.
    with pytest.raises(PolicyError, match=r"declares 8 patients and may have up to twice as many"):
        site.update.make(request_for(person_job(privacy={"delta": 1 / 16})))
    assert site.update.make(request_for(person_job(privacy={"delta": 0.06}))).steps == 2


def test_the_unit_cannot_change_once_something_was_charged(
    person_home: MakeHome, person_job: MakeJob, private_job: MakeJob, request_for: MakeRequest
) -> None:
    Site(person_home()).update.make(request_for(person_job()))
    with pytest.raises(LedgerError, match="was charged by the unit 'patient'"):
        Site(person_home(budget={"epsilon": 50.0})).update.make(request_for(private_job()))


# --- the id column ---


def test_a_unit_of_persons_needs_an_id_column(site_home: MakeHome) -> None:
    with pytest.raises(ConfigError, match=r"budget.unit is 'patient', but data.columns names no id column"):
        Site(site_home(budget=BUDGET))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mrn": "  "}, "column 'mrn' is blank at row 2"),
        ({"mrn": 1.5}, "1 of 60 records have no usable person id"),
        ({}, "column 'mrn' is blank at row 2"),
    ],
)
def test_an_id_column_with_gaps_is_refused_without_showing_an_id(
    person_home: MakeHome, records: list[dict[str, Any]], change: dict[str, Any], message: str
) -> None:
    rows = [record | {"mrn": f"{MARKER}-{row}"} for row, record in enumerate(records)]
    rows[1] = records[1] | change
    with pytest.raises(DataError, match=message) as refused:
        Site(person_home(rows=rows))
    assert MARKER not in str(refused.value)


def test_a_missing_id_column_is_named(person_home: MakeHome) -> None:
    data = {"path": "data.jsonl", "columns": COLUMNS | {"person": "mnr"}}
    with pytest.raises(DataError, match=r"has no column 'mnr'.* Did you mean 'mrn'"):
        Site(person_home(data=data))


# --- the trainer, whole ---


def noiseless_sum(gradients: torch.Tensor, owners: np.ndarray[Any, Any], micro_batch: int) -> torch.Tensor:
    """Return the sum with which the production trainer steps, before noise, all persons with all their records."""
    plan = PrivacyPlan(
        private=True, unit="patient", records_per_person=20, sample_rate=1.0, noise_multiplier=0.0, max_grad_norm=0.5,
        delta=1e-5, planned_steps=1,
    )  # fmt: skip
    runtime = canary_runtime(gradients.shape[1], micro_batch)
    runtime.model.records = gradients  # type: ignore[assignment]
    result = train_local_rounds(
        runtime,
        [
            LocalWork(
                examples=[Example(torch.tensor([row])) for row in range(len(gradients))],
                declared_records=1,
                randomness=SiteRandomness.injected("whole"),
                persons=Persons(owners),
            )
        ],
        runtime.initial,
        training=TrainingConfig(rounds=1, local_steps=1, optimizer="sgd", momentum=0.0, learning_rate=1.0),
        plan=plan,
        round_number=1,
    )[0]
    return torch.cat([value.flatten() for _, value in sorted(result.delta.items())]).double()


@pytest.mark.parametrize("seed", range(5))
def test_removing_a_person_moves_what_the_trainer_sums_by_at_most_the_bound(seed: int) -> None:
    """1 to 20 records a person, through production batching, hooks, clipping and optimiser."""
    rng = np.random.default_rng(seed)
    sizes = [20, *rng.integers(1, 21, size=6).tolist()]
    owners = np.repeat(np.arange(7), sizes)
    directions = rng.normal(size=(7, 8))[owners]  # a person's records point one way: the worst case
    gradients = torch.tensor(directions * rng.choice([0.1, 1.0, 30.0], size=(len(owners), 1))).float()
    everyone = noiseless_sum(gradients, owners, micro_batch=int(rng.integers(1, 30)))
    moved = []
    for person in range(7):
        rest = owners != person
        _, renumbered = np.unique(owners[rest], return_inverse=True)
        without = noiseless_sum(gradients[torch.from_numpy(rest)], renumbered, micro_batch=int(rng.integers(1, 30)))
        moved.append(float((everyone - without).norm()))
    assert max(moved) <= 0.5 * (1 + 1e-5)  # the optimiser steps in float32
    assert max(moved) > 0.49


def test_the_trainer_refuses_a_plan_and_persons_that_do_not_belong_together(person_job: MakeJob) -> None:
    plan = PrivacyPlan.from_job(person_job())
    with pytest.raises(PrivacyError, match="the unit of privacy is the patient, but no persons are known"):
        plan.check_persons(None)
    plan.check_persons(Persons(np.array([0])))


# --- what the engineer sees ---


def test_site_check_and_ledger_speak_of_patients(
    silotune: Callable[..., Any], tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    data, home = tmp_path / "notes.jsonl", tmp_path / "north"
    rows = [record | {"mrn": f"{MARKER}-{row % 9}"} for row, record in enumerate(records)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def init(folder: Path, *columns: str, unit: str = "patient") -> Any:
        return silotune(
            "site", "init", folder, "--name", "north", "--coordinator", "localhost:9092", "--data", data, "--unit", unit,
            "--signer", f"lead={SigningKey.generate().verify_key.text}",
            "--column", "text=text", "--column", "label=label", *columns,
        )  # fmt: skip

    refused = init(tmp_path / "without")
    assert refused.status != 0
    assert "budget.unit is 'patient', but data.columns names no id column" in refused.err + refused.out
    assert init(home, "--column", "person=mrn").status == 0

    def finding(name: str) -> tuple[str, str]:
        shown = silotune("site", "check", home, "--offline", "--json")
        assert MARKER not in shown.out + shown.err
        return next((f["outcome"], f["text"]) for f in json.loads(shown.out) if f["name"] == name)

    outcome, text = finding("data")
    assert outcome == "ok"
    assert text.startswith("60 records, columns text as text, label as label, mrn as person, longest text ")
    assert text.endswith(", 9 patients with up to 7 records")
    assert "for each patient" in finding("settings")[1]
    data.write_text("".join(json.dumps(row | {"mrn": number}) + "\n" for number, row in enumerate(rows)))
    outcome, text = finding("data")
    assert outcome == "warning"
    assert "is it the patient's id and not the record's?" in text
    data.write_text("".join(json.dumps(row | {"mrn": [MARKER]}) + "\n" for row in rows))
    assert finding("data") == ("failed", finding("data")[1])
    settings = (home / "site.toml").read_text()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "site.toml").write_text(settings.replace('unit = "patient"', 'unit = "record"'))
    outcome, text = finding("data")
    assert outcome == "warning"
    assert "the id column is not used" in text
    (home / "site.toml").write_text(settings)
    shown = silotune("site", "ledger", home)
    assert "epsilon 0.0000 of 8 spent at delta 1e-05 for each patient" in " ".join(shown.out.split())
    assert json.loads(silotune("site", "ledger", home, "--json").out)["unit"] == "patient"
