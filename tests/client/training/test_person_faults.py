"""Planted faults of the person path, each caught by the mechanism audit on persons with several records, or by a check.

As in tests/client/training/test_faults.py, the audit runs the production trainer; here every canary is a person with four
records, of which three enter a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import client.training.trainer as trainer_module
from client.training.proof import prove_trainer
from client.training.trainer import LocalWork
from shared.errors import PrivacyError
from shared.job.compute import ComputeConfig
from shared.models.batches import Example
from shared.privacy.mechanism import ClippedSum
from shared.privacy.persons import Persons, PersonSum
from shared.privacy.randomness import SiteRandomness
from shared.runtime.runtime import Runtime, load_runtime
from tests.client.training.test_faults import PLAN, assert_violated, audit

PERSON_PLAN = replace(PLAN, unit="patient", records_per_person=3)


@pytest.mark.parametrize("micro_batch", [1, 7, 1000])
def test_the_correct_person_path_passes(micro_batch: int) -> None:
    repeats = 2 if micro_batch == 1 else 4  # one record a pass takes as long as many
    results = [audit(f"persons {n}", plan=PERSON_PLAN, seed=n, micro_batch=micro_batch) for n in range(repeats)]
    assert {result.verdict for result in results} == {"consistent"}, results[0].text()


class ClippedPerRecord(PersonSum):
    """Every record is clipped by itself and added: a person moves the sum by up to G C."""

    def add(self, gradients: Sequence[Tensor], rows: Sequence[int]) -> None:
        self._total.add(gradients)

    def close(self) -> None:
        pass


class ClippedPerMicroBatch(PersonSum):
    """What a person has in one micro-batch is averaged and clipped, without waiting for the rest."""

    def add(self, gradients: Sequence[Tensor], rows: Sequence[int]) -> None:
        part = PersonSum(
            self._total, [[r for r in rows if self._owner[r] == p] for p in {self._owner[r] for r in rows}]
        )
        part.add(gradients, rows)

    def close(self) -> None:
        pass


class AddedUp(PersonSum):
    """The records of all persons in the step are one person: others are pushed out of the common bound, or let in."""

    def __init__(self, total: ClippedSum, groups: Sequence[Sequence[int]]) -> None:
        super().__init__(total, [[row for group in groups for row in group]])


@pytest.mark.parametrize("micro_batch", [7, 1000])
def test_fault_clip_per_record_instead_of_per_person(
    monkeypatch: pytest.MonkeyPatch, micro_batch: int, classification_job: Callable[..., Any]
) -> None:
    monkeypatch.setattr(trainer_module, "PersonSum", ClippedPerRecord)
    assert_violated(audit(plan=PERSON_PLAN, micro_batch=micro_batch), "sensitivity")
    assert_proof_fails(monkeypatch, classification_job, ClippedPerRecord)


def test_fault_a_person_is_clipped_in_each_micro_batch(
    monkeypatch: pytest.MonkeyPatch, classification_job: Callable[..., Any]
) -> None:
    monkeypatch.setattr(trainer_module, "PersonSum", ClippedPerMicroBatch)
    assert_violated(audit(plan=PERSON_PLAN, micro_batch=2), "sensitivity")
    assert_proof_fails(monkeypatch, classification_job, ClippedPerMicroBatch)


def test_fault_all_persons_are_clipped_as_one(
    monkeypatch: pytest.MonkeyPatch, classification_job: Callable[..., Any]
) -> None:
    monkeypatch.setattr(trainer_module, "PersonSum", AddedUp)
    assert_violated(audit(plan=PERSON_PLAN), "sensitivity")
    assert_proof_fails(monkeypatch, classification_job, AddedUp)


def test_fault_records_are_sampled_instead_of_persons(monkeypatch: pytest.MonkeyPatch) -> None:
    """A person with four records has four chances to enter: 1 - (1 - q)^4 instead of q."""

    def by_record(self: Persons, drawn: Sequence[int], most: int, stream: Any) -> list[list[int]]:
        coins = np.flatnonzero(stream.bernoulli(len(self.owners), PLAN.sample_rate))
        return [mine for p in range(self.count) if (mine := [int(r) for r in coins if self.owners[r] == p][:most])]

    monkeypatch.setattr(Persons, "choose", by_record)
    assert_violated(audit(plan=PERSON_PLAN), "inclusion")


def test_the_records_of_a_person_are_chosen_by_a_stream_of_their_own() -> None:
    """Persons by the coins, their records by "records": nobody's being drawn tells which of their records came."""
    persons = Persons(np.arange(40) % 8)
    work = LocalWork(
        examples=[Example(torch.tensor([row])) for row in range(40)],
        declared_records=8,
        randomness=SiteRandomness.injected("own"),
        persons=persons,
    )
    for step in range(4):
        fresh = SiteRandomness.injected("own")
        drawn = PERSON_PLAN.sample(8, fresh.stream("sampling", round_number=3, step=step)).tolist()
        expected = persons.choose(drawn, 3, fresh.stream("records", round_number=3, step=step))
        assert trainer_module.draw(PERSON_PLAN, work, 3, step) == expected
        assert all(len(rows) == 3 for rows in expected)


def test_fault_the_records_of_a_person_are_chosen_by_the_coins(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SiteRandomness.stream
    monkeypatch.setattr(
        SiteRandomness,
        "stream",
        lambda self, purpose, **where: stream(self, "sampling" if purpose == "records" else purpose, **where),
    )
    with pytest.raises(PrivacyError, match="was used before"):
        audit(plan=PERSON_PLAN)


def test_fault_a_person_comes_in_two_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every record a person of its own, as without an id column: each is clipped to C."""
    choose = Persons.choose
    monkeypatch.setattr(Persons, "choose", lambda *a: [[row] for group in choose(*a) for row in group])
    assert_violated(audit(plan=PERSON_PLAN), "sensitivity")


def test_fault_a_repeated_record_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    take = trainer_module.per_example_gradients
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "per_example_gradients", lambda p, n: [torch.cat([g, g]) for g in take(p, n)])
        with pytest.raises(PrivacyError, match="cannot be told apart"):
            audit(plan=PERSON_PLAN)
    batches = Runtime.grouped_batches

    def twice(self: Runtime, examples: Any, groups: Any, *bound: Any) -> Any:
        yield from batches(self, examples, groups, *bound)
        yield from batches(self, examples, groups, *bound)

    monkeypatch.setattr(Runtime, "grouped_batches", twice)
    with pytest.raises(PrivacyError, match="came twice"):
        audit(plan=PERSON_PLAN)


def test_fault_a_record_that_never_comes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Runtime.grouped_batches

    def forgetful(self: Runtime, examples: Any, groups: Any, *bound: Any) -> Any:
        yield from list(batches(self, examples, groups, *bound))[:-1]

    monkeypatch.setattr(Runtime, "grouped_batches", forgetful)
    with pytest.raises(PrivacyError, match="never came"):
        audit(plan=PERSON_PLAN)


def assert_proof_fails(
    monkeypatch: pytest.MonkeyPatch, classification_job: Callable[..., Any], broken: type[PersonSum]
) -> None:
    runtime = load_runtime(classification_job(), ComputeConfig(device="cpu", precision="float32"))
    runtime.load(runtime.initial)  # the model is shared: an earlier test may have trained it until no gradient was left
    prove_trainer(runtime)
    monkeypatch.setattr("client.training.proof.PersonSum", broken)
    with pytest.raises(PrivacyError, match="proof 5 failed"):
        prove_trainer(runtime)
