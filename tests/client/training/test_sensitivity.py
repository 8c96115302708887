"""One record moves a step's sum by at most C, in floating point, whatever adapter a coordinator chose: all kinds of task, both
precisions, with and without cached activations, persons, and sites side by side.

The attack that this holds against: head rows of +-K turn rounding that depends on the company of a text, a thousandth of a
thousandth, into whole gradients. With every text computed in shapes of its own, there is no such rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from client.training.independence import keep_settled
from client.training.trainer import LocalWork, train_local_rounds
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.kinds import RULES
from shared.models.batches import Example
from shared.models.frozen_cache import FrozenCache
from shared.privacy.persons import Persons
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime.runtime import Runtime, choose_dtype, load_runtime
from tests.test_task_contract import CASES

PRECISIONS = ["float32", "bfloat16"]
STRENGTHS = [0.0, 1.0, 1e3, 1e6, 1e8]
C = 0.5
WITH_A_HEAD = [kind for kind in CASES if RULES[kind].has_head and kind != "image_classification"]  # type: ignore[index]
CENTRED = {"head_centre": "label-names"}
EMBEDDED = {"backbone": "embedded:all-minilm-l6-v2", "max_length": 64}

Sums = Callable[..., list[Tensor]]


@pytest.fixture
def sums_of(monkeypatch: pytest.MonkeyPatch) -> Sums:
    """Return a function that trains one step at every site and returns each site's sum, before the noise."""

    def train(
        runtime: Runtime,
        job: Job,
        start: Mapping[str, Tensor],
        sites: Sequence[Sequence[Example]],
        persons: Sequence[Persons | None] | None = None,
    ) -> list[Tensor]:
        captured: list[Tensor] = []

        def capture(self: PrivacyPlan, sums: Sequence[Tensor], stream: object) -> list[Tensor]:
            captured.append(torch.cat([total.flatten() for total in sums]).clone())
            return [torch.zeros_like(total) for total in sums]

        monkeypatch.setattr(PrivacyPlan, "add_noise", capture)
        works = [
            LocalWork(
                examples=examples,
                declared_records=8,
                randomness=SiteRandomness.injected(f"site {number}"),  # the same coins with and without the record
                persons=persons[number] if persons else None,
            )
            for number, examples in enumerate(sites)
        ]
        plan = PrivacyPlan.from_job(job)
        train_local_rounds(runtime, works, start, training=job.training, plan=plan, round_number=1)
        return captured

    return train


def hostile(runtime: Runtime, strength: float) -> dict[str, Tensor]:
    """An adapter with head rows of +-K, or of random values as large; 0: of a size that training gives."""
    generator = torch.Generator().manual_seed(5)
    start = {
        name: value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in sorted(runtime.initial.items())
    }
    if strength:
        for name, value in start.items():
            if name.startswith("head.") and value.ndim == 2:
                start[name] = torch.where(torch.arange(len(value)) % 2 == 0, strength, -strength)[:, None].expand_as(
                    value
                )
            elif not name.startswith("head.") and ("lora_B" in name or not runtime.tokenizer):
                start[name] = value * min(strength, 1e4)
    return {name: value.contiguous() for name, value in start.items()}


def job_of(task_job: Callable[..., Job], kind: str, *, sample_rate: float = 1.0, **sections: Any) -> Job:
    case = CASES[kind]
    privacy = {"noise_multiplier": 1.0, "sample_rate": sample_rate, "max_grad_norm": C}
    return task_job(
        {"kind": kind, **case.section, **sections.pop("task", {})},
        **{
            **case.sections,
            "training": {"rounds": 1, "local_steps": 1},
            **sections,
            "privacy": {**privacy, **sections.get("privacy", {})},
        },
    )


def runtime_of(job: Job, precision: Any, *, cached: bool = False, micro_batch_tokens: int = 2048) -> Runtime:
    runtime = load_runtime(
        job,
        ComputeConfig(
            device="cpu", precision=precision, cache_frozen_layers=cached, micro_batch_tokens=micro_batch_tokens
        ),
    )
    # As before any training: where this processor's products depend on the shape of a pass, as those of Intel's AMX in bfloat16
    # do, each example gets one of its own.
    keep_settled(runtime)
    return runtime


@pytest.mark.parametrize("sample_rate", [1.0, 0.6])
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", CASES)
def test_a_record_moves_the_sum_by_what_it_is_alone(
    task_job: Callable[..., Job], sums_of: Sums, kind: str, precision: str, strength: float, sample_rate: float
) -> None:
    """Not only at most C: the others' part of the sum stays the same to the last bit, so any number of them adds nothing."""
    job = job_of(task_job, kind, sample_rate=sample_rate)
    runtime = runtime_of(job, precision)
    examples = runtime.encode(CASES[kind].records)
    start = hostile(runtime, strength)
    moved = 0
    for number in (3, 6, 14):
        rest = examples[:number]
        (without,) = sums_of(runtime, job, start, [rest])
        (with_it,) = sums_of(runtime, job, start, [examples[: number + 1]])
        change = with_it - without
        assert bool(change.isfinite().all())
        assert float(change.norm()) <= C
        if float(change.norm()):
            moved += 1
            alone_job = job_of(task_job, kind)
            (alone,) = sums_of(runtime, alone_job, start, [examples[number : number + 1]])
            assert torch.equal(change, alone)
    if strength <= 1 and sample_rate == 1:
        assert moved == 3


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("kind", "pooling"), [*((kind, "mean") for kind in WITH_A_HEAD), ("sequence_classification", "first")]
)
def test_a_head_alone_learns_of_a_record_what_it_is_alone(
    task_job: Callable[..., Job], sums_of: Sums, kind: str, precision: str, pooling: str
) -> None:
    """Whether what the backbone says of the texts was kept of none, of some or of all the others."""
    sections = CASES[kind].sections
    job = job_of(
        task_job,
        kind,
        model={**sections.get("model", {}), "pooling": pooling},
        lora={**sections.get("lora", {}), "train": "none"},
    )
    runtime = runtime_of(job, precision)
    examples = runtime.encode(CASES[kind].records)[:15]
    start = hostile(runtime, 1e6)
    (whole,) = sums_of(runtime, job, start, [examples])
    for kept in (0, 5, 14):
        other = replace(runtime_of(job, precision, cached=True, micro_batch_tokens=40), cache=FrozenCache())
        other.warm_cache(examples[:kept])
        (without,) = sums_of(other, job, start, [examples[:14]])
        (alone,) = sums_of(other, job, start, [examples[14:]])
        assert 0 < float(alone.norm()) <= C
        assert torch.equal(whole - without, alone)


@pytest.mark.parametrize("train", ["b", "none"])
@pytest.mark.parametrize("sample_rate", [1.0, 0.6])
@pytest.mark.parametrize("strength", [0.0, 1e3, 1e8])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_centre_that_is_taken_off_changes_nothing_of_it(
    task_job: Callable[..., Job], sums_of: Sums, precision: str, strength: float, sample_rate: float, train: str
) -> None:
    """It follows from the names of labels in the job, so it is the same for every record, cached or not, and side by side."""
    lora = {**CASES["sequence_classification"].sections.get("lora", {}), "train": train}
    job, alone_job = (
        job_of(task_job, "sequence_classification", sample_rate=rate, task=CENTRED, lora=lora)
        for rate in (sample_rate, 1.0)
    )
    examples = runtime_of(job, precision).encode(CASES["sequence_classification"].records)
    moved = 0
    for cached in (False, True):
        runtime = replace(runtime_of(job, precision, cached=cached), cache=FrozenCache())
        start = hostile(runtime, strength)
        for number in (3, 6, 14):
            runtime.warm_cache(examples[:number])
            (without,) = sums_of(runtime, job, start, [examples[:number]])
            (with_it,) = sums_of(runtime, job, start, [examples[: number + 1]])
            change = with_it - without
            assert float(change.norm()) <= C
            if float(change.norm()):
                moved += 1
                assert torch.equal(change, sums_of(runtime, alone_job, start, [examples[number : number + 1]])[0])
    if not strength and sample_rate == 1:
        assert moved == 6
    sites = [examples[:4], examples[4:5]]
    before, after = (sums_of(runtime, job, start, [*sites, others]) for others in (examples[5:9], examples[5:12]))
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("strength", [0.0, 1e6])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_of_a_real_backbone_whether_activations_are_cached_or_not(
    classification_job: Callable[..., Job], sums_of: Sums, precision: str, strength: float
) -> None:
    """The attack as it was found: many texts of one length, and one that is a token longer; in passes of many shapes."""
    job = classification_job(
        model=EMBEDDED,
        lora={"last_layers": 1, "train": "b"},
        training={"rounds": 1, "local_steps": 1},
        privacy={"noise_multiplier": 1.0, "sample_rate": 1.0, "max_grad_norm": C},
    )
    generator = torch.Generator().manual_seed(0)
    emulated = precision == "bfloat16" and choose_dtype(ComputeConfig(), torch.device("cpu")) is None
    if emulated and not strength:
        pytest.skip("bfloat16 is emulated by this processor, which takes a minute; the hostile head shows any rounding")
    # As many as it was found with, under a head that shows any rounding; fewer without one, and where processors without
    # bfloat16, which would not choose it, take a minute for each pass.
    alike = 40 if strength and not emulated else 8
    lengths = [31] * alike + [7, 64, 3, 40, 16, 32]
    runtime = runtime_of(job, precision)
    examples = [
        runtime.task.probe(torch.randint(1000, 2000, (length,), generator=generator), number)
        for number, length in enumerate(lengths)
    ]
    start = hostile(runtime, strength)
    (whole,) = sums_of(runtime, job, start, [examples])

    def with_other(**compute: Any) -> Runtime:
        if runtime.compute.micro_batch_tokens == 1:  # found out before: each example needs a pass of its own
            compute.pop("micro_batch_tokens", None)
        return replace(runtime, compute=runtime.compute.model_copy(update=compute), cache=FrozenCache())

    for other, kept in ((runtime, len(examples) - 1), (with_other(cache_frozen_layers=True), alike)):
        other.warm_cache(examples[:kept][::-1])
        (without,) = sums_of(other, job, start, [examples[:kept]])
        parts = [sums_of(other, job, start, [[example]])[0] for example in examples[kept:]]
        assert float(parts[-1].norm()) <= C
        assert torch.equal(whole - without, torch.stack(parts).sum(dim=0))
    for tokens in (1, 100, 16 * alike):  # one text in a pass, three, half of them
        (cut,) = sums_of(with_other(micro_batch_tokens=tokens), job, start, [examples])
        assert torch.equal(cut, whole)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_person_moves_the_sum_by_what_they_are_alone(
    task_job: Callable[..., Job], sums_of: Sums, precision: str
) -> None:
    kind = "token_classification"
    job = job_of(task_job, kind, privacy={"unit": "patient", "records_per_person": 3})
    runtime = runtime_of(job, precision, micro_batch_tokens=40)
    examples = runtime.encode(CASES[kind].records)
    owners = np.array([0, 0, 1, 1, 1, 2, 0, 2, 3, 3, 1, 2, 3, 3, 3, 0])
    start = hostile(runtime, 1e6)
    (everyone,) = sums_of(runtime, job, start, [examples], [Persons(owners)])
    rest = [row for row in range(len(examples)) if owners[row] != 3]
    (without,) = sums_of(runtime, job, start, [[examples[row] for row in rest]], [Persons(owners[rest])])
    assert 0 < float((everyone - without).norm()) <= C


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", CASES)
def test_sites_side_by_side_owe_nothing_to_each_other(
    task_job: Callable[..., Job], sums_of: Sums, kind: str, precision: str
) -> None:
    """A record more at one site moves that site's sum by at most C, and no other site's at all."""
    job = job_of(task_job, kind)
    runtime = runtime_of(job, precision)
    examples = runtime.encode(CASES[kind].records)
    start = hostile(runtime, 1e6)
    sites = [examples[:4], examples[4:5], examples[5:9]]
    before = sums_of(runtime, job, start, sites)
    after = sums_of(runtime, job, start, [*sites[:2], examples[5:12]])
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    one_more = sums_of(runtime, job, start, [*sites[:2], examples[5:10]])
    assert float((one_more[2] - before[2]).norm()) <= C


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", CASES)
def test_a_record_moves_the_sum_by_at_most_the_bound_on_a_gpu(
    task_job: Callable[..., Job], sums_of: Sums, kind: str, precision: str
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    job = job_of(task_job, kind)
    runtime = load_runtime(job, ComputeConfig(device="cuda", precision=precision, cache_frozen_layers=False))
    examples = runtime.encode(CASES[kind].records)
    for strength in STRENGTHS:
        start = hostile(runtime, strength)
        (without,) = sums_of(runtime, job, start, [examples[:-1]])
        (with_it,) = sums_of(runtime, job, start, [examples])
        assert float((with_it - without).norm()) <= C
