"""Before the first private record is touched, the trainer proves on public tokens or pixels that it trains what it should.

Each check answers a failure that was seen elsewhere: hooks registered before a device move leave LoRA untrained, tied
weights corrupt per-example gradients, position ids broadcast as [1, T] lose the batch dimension, a head outside the
clip vector leaks.
"""

from __future__ import annotations

import torch

from client.training.backward import backward
from client.training.independence import keep_settled
from client.training.trainer import per_example_hooks
from shared.errors import PrivacyError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.models.batches import Example, collate
from shared.privacy.mechanism import CLIP_MARGIN, ClippedSum, per_example_gradients
from shared.privacy.persons import PersonSum
from shared.runtime.runtime import Runtime, load_runtime

_TINY_NORM = 1e-3
_ROUNDING = 1e-6  # of the joint norm: differences below are float32 rounding


def load_proven(job: Job, compute: ComputeConfig) -> Runtime:
    """Load the model and prove the trainer on it; reads no record."""
    runtime = load_runtime(job, compute)
    if not runtime.proven:
        prove_trainer(runtime)
        runtime.proven = True
    keep_settled(runtime)
    return runtime


def prove_trainer(runtime: Runtime) -> None:
    """Check the loaded model on synthetic tokens; leaves every value as it was.

    1. Every trainable parameter gets a gradient with a batch dimension, and not all of it is zero.
    2. Adapter and head are clipped as one vector: a lone clipped example has exactly the clipping norm.
    3. A batch of examples gives the same per-example gradients as the examples alone.
    4. One noiseless step changes the adapter; the frozen weights keep their hash.
    5. A person's records, however they are cut into micro-batches, have together exactly the clipping norm, and those of
       different persons add up: neither changes the other's part.

    Raises:
        PrivacyError: naming the check that failed. Nothing private was read.
    """
    model = runtime.model
    examples = _synthetic_examples(runtime)
    parameters = list(model.trainable().values())
    names = list(model.trainable())
    saved = [p.detach().clone() for p in parameters]
    frozen = model.frozen_sha256()

    # Away from the start, where B = 0 makes the gradient of A vanish.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.trainable().items():
            # From the public start: values that another round left here may be such that no gradient is long enough.
            drawn = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.copy_(runtime.initial[name] + drawn)
    try:
        together = _gradients(runtime, parameters, examples)
        for name, gradient in zip(names, together, strict=True):
            if not bool(gradient.abs().sum() > 0):
                raise PrivacyError(f"proof 1 failed: {name} gets no gradient, so it would never be trained.")
        alone = [_gradients(runtime, parameters, [example]) for example in examples]
        for index, single in enumerate(alone):
            _check_clip_vector(single)
            least = _ROUNDING * _joint_norm(single)
            for name, many, one in zip(names, together, single, strict=True):
                # By norms: single entries near zero carry any relative error, and a small gradient may not hide below
                # an absolute one.
                if not (many[index] - one[0]).norm() <= runtime_tolerance(runtime) * one[0].norm() + least:
                    raise PrivacyError(
                        f"proof 3 failed: the gradient of {name} for one example depends on the others in its batch, so "
                        "clipping would not bound one record's influence."
                    )
        _check_one_step(runtime, together, frozen)
        _check_persons(together)
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)


def runtime_tolerance(runtime: Runtime) -> float:
    """Return the relative error in norm at which two gradients count as equal in the runtime's precision."""
    return 1e-3 if runtime.autocast_dtype is None else 0.1


def _synthetic_examples(runtime: Runtime) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, runtime.max_length) for length in (5, 9, 7)]
    return [
        runtime.task.probe(torch.randint(0, runtime.num_values, (length,), generator=generator), index)
        for index, length in enumerate(lengths)
    ]


def _gradients(runtime: Runtime, parameters: list[torch.nn.Parameter], examples: list[Example]) -> list[torch.Tensor]:
    batch = collate(examples).to(runtime.model.device)
    with per_example_hooks(runtime.model) as hooks:
        backward(runtime, batch, hooks)
        gradients = per_example_gradients(parameters, len(examples))
    return [gradient.detach().clone().float() for gradient in gradients]


def _joint_norm(parts: list[torch.Tensor]) -> float:
    return float(torch.cat([part.flatten() for part in parts]).norm())


def _check_clip_vector(single: list[torch.Tensor]) -> None:
    total = ClippedSum([gradient.shape[1:] for gradient in single], _TINY_NORM)
    total.add(single)
    norm = _joint_norm(total.sums)
    if abs(norm - CLIP_MARGIN * _TINY_NORM) > 1e-3 * _TINY_NORM:
        raise PrivacyError(
            f"proof 2 failed: one clipped example has norm {norm:.3g} over adapter and head, expected {_TINY_NORM:.3g}."
        )


def _check_persons(gradients: list[torch.Tensor]) -> None:
    everyone = [[0, 1], [2]]
    # Records of both persons in one micro-batch, and one person's in two.
    cuts = ([[0, 2], [1]], [[2], [1], [0]], [[0, 1, 2]])
    first, second = _person_sum(gradients, [[0, 1]], [[1], [0]]), _person_sum(gradients, [[2]], [[2]])
    for part in (first, second):
        norm = _joint_norm(part)
        if abs(norm - CLIP_MARGIN * _TINY_NORM) > 1e-3 * _TINY_NORM:
            raise PrivacyError(
                f"proof 5 failed: all records of one person have norm {norm:.3g} after clipping, expected {_TINY_NORM:.3g}."
            )
    for cut in cuts:
        apart = [a + b for a, b in zip(first, second, strict=True)]
        difference = [a - b for a, b in zip(_person_sum(gradients, everyone, cut), apart, strict=True)]
        if not _joint_norm(difference) <= 1e-6 * _TINY_NORM:
            raise PrivacyError("proof 5 failed: records of different persons mix before they are clipped.")


def _person_sum(
    gradients: list[torch.Tensor], groups: list[list[int]], micro_batches: list[list[int]]
) -> list[torch.Tensor]:
    total = ClippedSum([gradient.shape[1:] for gradient in gradients], _TINY_NORM)
    by_person = PersonSum(total, groups)
    for rows in micro_batches:
        by_person.add([gradient[rows] for gradient in gradients], rows)
    by_person.close()
    return total.sums


def _check_one_step(runtime: Runtime, gradients: list[torch.Tensor], frozen: str) -> None:
    parameters = runtime.model.trainable()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for parameter, gradient in zip(parameters.values(), gradients, strict=True):
            parameter.sub_(gradient.sum(dim=0).to(parameter))
    for name, parameter in parameters.items():
        if torch.equal(parameter, before[name]):
            raise PrivacyError(f"proof 4 failed: one noiseless step left {name} unchanged.")
    if runtime.model.frozen_sha256() != frozen:
        raise PrivacyError(
            "proof 4 failed: a frozen weight changed while training; what leaves would not be accounted."
        )
