"""Records that a job cannot use are left out one by one, for every kind of task, and told by row and reason only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from client.site.usable import usable_records
from shared.errors import ModelError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.models.batches import Example
from shared.privacy.persons import Persons
from shared.runtime.runtime import Runtime, load_runtime
from shared.tasks import TASKS
from tests.test_task_contract import CASES

COMPUTE = ComputeConfig(device="cpu", precision="float32")


@pytest.fixture
def runtime_of(task_job: Callable[..., Job]) -> Callable[[str], Runtime]:
    def load(kind: str) -> Runtime:
        chosen = CASES[kind]
        return load_runtime(task_job({"kind": kind, **chosen.section}, **chosen.sections), COMPUTE)

    return load


def same(one: list[Example], other: list[Example]) -> bool:
    return [e.input_ids.tolist() for e in one] == [e.input_ids.tolist() for e in other] and [
        np.asarray(e.target).tolist() for e in one
    ] == [np.asarray(e.target).tolist() for e in other]


@pytest.mark.parametrize("kind", list(TASKS))
def test_a_record_that_cannot_be_used_changes_nothing_of_the_others(
    kind: str, runtime_of: Callable[[str], Runtime]
) -> None:
    runtime, case = runtime_of(kind), CASES[kind]
    good = case.records[:9]
    alone = usable_records(runtime, good, rows=range(1, 10), persons=None)
    assert len(alone.examples) == 9
    assert not alone.left_out.rows
    for change, message in case.bad:
        for place in (0, 4, 9):
            rows = [*good[:place], case.records[1] | change, *good[place:]]
            found = usable_records(runtime, rows, rows=range(100, 110), persons=None)
            assert same(found.examples, alone.examples), message
            ((reason, at),) = found.left_out.rows.items()
            assert at == [100 + place]
            assert "secret" not in str(found.left_out)
            assert not reason.startswith("record ")


@pytest.mark.parametrize("kind", list(TASKS))
def test_a_value_of_any_kind_is_left_out_and_never_quoted(kind: str, runtime_of: Callable[[str], Runtime]) -> None:
    runtime, case = runtime_of(kind), CASES[kind]
    role = runtime.task.roles[0]
    for value in ({"secret": 1}, [["secret"]], object(), b"secret\xff"):
        rows = [case.records[0], case.records[1] | {role: value}, case.records[2]]
        found = usable_records(runtime, rows, rows=[1, 2, 3], persons=None)
        assert len(found.examples) in (2, 3), "it can be used as text, or it is left out; nothing else happens"
        assert "secret" not in str(found.left_out)


def test_persons_stay_whose_records_can_be_used(runtime_of: Callable[[str], Runtime]) -> None:
    runtime, case = runtime_of("sequence_classification"), CASES["sequence_classification"]
    bad = {"label": "secret"}
    rows = [case.records[i] | (bad if i in (0, 2, 3) else {}) for i in range(6)]
    persons = Persons.from_ids(["a", "a", "b", "b", "c", "a"])
    found = usable_records(runtime, rows, rows=range(1, 7), persons=persons)
    assert found.persons is not None
    # Of "a" two records are left, of "b" none.
    assert found.persons.owners.tolist() == [0, 1, 0]
    assert (found.persons.count, len(found.examples)) == (2, 3)
    nobody = usable_records(runtime, [row | bad for row in rows], rows=range(1, 7), persons=persons)
    assert nobody.persons is not None
    assert (nobody.persons.count, nobody.examples) == (0, [])


def test_a_fault_of_the_backbone_is_raised_whatever_the_records_are(runtime_of: Callable[[str], Runtime]) -> None:
    runtime = runtime_of("replies")

    def deaf(text: Any, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [] if text == "\n" else [5, 6]}

    deaf.eos_token_id = 0  # type: ignore[attr-defined]
    without = Runtime(**{**vars(runtime), "tokenizer": deaf})
    for rows in ([], CASES["replies"].records[:3]):
        with pytest.raises(ModelError, match="knows no line end"):
            usable_records(without, rows, rows=range(len(rows)), persons=None)


@pytest.mark.parametrize("kind", [kind for kind, case in CASES.items() if case.alike])
def test_a_lone_label_is_doubted_only_where_sites_step_by_themselves(
    kind: str, runtime_of: Callable[[str], Runtime]
) -> None:
    """In a sum of gradients it costs nothing (docs/decisions/0027); a site without records is doubted all the same."""
    runtime, alike = runtime_of(kind), CASES[kind].alike

    def told(rows: list[Any], *, summed: bool) -> str:
        return str(usable_records(runtime, rows, rows=range(len(rows)), persons=None, summed=summed).left_out)

    doubt = told(alike, summed=False)
    assert "one and the same" in doubt
    assert not doubt.endswith("."), "whoever logs it ends the sentence"
    assert "partition" not in doubt, "a real site has no scenario"
    assert told(alike, summed=True) == ""
    assert told([], summed=True) == told([], summed=False) == "the site has no records; it cannot take part"


def test_many_reasons_and_rows_are_cut_short(runtime_of: Callable[[str], Runtime]) -> None:
    runtime, case = runtime_of("sequence_classification"), CASES["sequence_classification"]
    rows = [case.records[i % 6] | {"label": "secret"} for i in range(2000)]
    told = str(usable_records(runtime, rows, rows=range(1, 2001), persons=None).left_out)
    assert (
        "2,000 of 2,000 records cannot be used and are left out; record 1, 2, 3, 4, 5 and 1,995 more: has a label"
        in told
    )
    assert len(told) < 600
