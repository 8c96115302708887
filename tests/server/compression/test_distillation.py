"""A student learns to answer like its teacher, from nothing but the texts that it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.compression.cutting import with_layers
from server.compression.distillation import Place, Progress, Recipe, Teacher, distil
from server.compression.network import Network
from shared.job.job import Job
from shared.models.batches import Example
from shared.runtime.export.compression import Agreement
from shared.runtime.export.exporting import read_model
from shared.runtime.export.parts import Parts
from tests.server.compression.kinds import KINDS, new_run

CPU, KEPT = Place(torch.device("cpu"), None), (0, 2)
RECIPE = Recipe(epochs=12, learning_rate=1e-3)


def _examples(count: int, seed: int, size: int) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    return [Example(torch.randint(5, size, (length,), generator=generator)) for length in lengths]


def _parts(folder: Path, kind: str, task_job: Callable[..., Job]) -> Parts:
    found = read_model(new_run(folder / "run", kind, task_job))
    assert isinstance(found, Parts)
    return found


def _distilled(
    parts: Parts, recipe: Recipe = RECIPE, *, cache: int = 1 << 20, labels: int = 0, count: int = 120
) -> tuple[dict[str, Tensor], int, Agreement, Agreement, list[Progress]]:
    size, told = min(150, int(parts.config["vocab_size"])), list[Progress]()

    def given(count: int, seed: int) -> list[Example]:
        examples = _examples(count, seed, size)
        if parts.by_token or parts.job.task.kind == "replies":  # a target for each token
            return [replace(one, target=torch.full((one.length,), labels)) for one in examples]
        return [replace(one, target=labels) for one in examples]

    student = Network(with_layers(parts, KEPT))
    teacher = Teacher(Network(parts), KEPT, CPU, cache)
    steps, before, after = distil(student, teacher, given(count, 0), given(40, 1), recipe, CPU, told.append)
    return student.state_dict(), steps, before, after, told


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_to_answer_like_its_teacher(kind: str, task_job: Callable[..., Job], tmp_path: Path) -> None:
    _, steps, before, after, told = _distilled(_parts(tmp_path, kind, task_job))
    assert after.divergence < 0.6 * before.divergence
    assert [progress.steps for progress in told] == list(range(1, steps + 1))
    assert told[-1].total == 12 * 4
    assert (after.same_answers is None) == (kind == "ratings")


def test_the_same_again_gives_the_same_student_whatever_the_labels(
    task_job: Callable[..., Job], tmp_path: Path
) -> None:
    parts = _parts(tmp_path, "classification", task_job)
    recipe = replace(RECIPE, epochs=6)
    first, second = _distilled(parts, recipe), _distilled(parts, recipe, labels=1)
    assert all(torch.equal(value, second[0][name]) for name, value in first[0].items())
    other = _distilled(parts, replace(recipe, seed=1))
    assert any(not torch.equal(value, other[0][name]) for name, value in first[0].items())


def test_without_room_the_teacher_thinks_anew_and_says_the_same(task_job: Callable[..., Job], tmp_path: Path) -> None:
    parts = _parts(tmp_path, "classification", task_job)
    kept, anew = (_distilled(parts, RECIPE, cache=room) for room in (1 << 20, 0))
    assert anew[3].divergence == pytest.approx(kept[3].divergence, rel=0.05)  # what is kept is rounded to float16


def test_it_ends_with_what_agreed_best_and_stops_when_nothing_helps(
    task_job: Callable[..., Job], tmp_path: Path
) -> None:
    parts = _parts(tmp_path, "classification", task_job)
    weights, steps, before, after, _ = _distilled(parts, replace(RECIPE, epochs=50, learning_rate=0.5))
    assert after.divergence <= before.divergence
    assert steps < 50 * 4
    if after == before:
        start = Network(with_layers(parts, KEPT)).state_dict()
        assert all(torch.equal(value, start[name]) for name, value in weights.items())
