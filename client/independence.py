"""Whether an example's gradient is the same to the last bit in any company, tried out on this machine with public numbers.

`shared.packing` lets an example be computed in shapes that follow from itself alone. That a library then adds up in one order is
a property of the library, the processor and the number of threads, so it is tried out where it is relied on.

Guarantees (tests: tests/client/test_independence.py)
    * After `settle_company`, either examples share passes and were found to owe nothing to each other, or each gets a pass of
      its own, which is slower and independent by construction. On a device that does not even repeat itself nothing is trained.
    * An adapter for which `check_adapter` finds a difference on this machine is refused before anything is charged.

No adapter can look harmless here and be harmful later: libraries choose the order of a sum by shapes, strides and
processor, never by values. Equal bits for numbers in general position, and for a head that turns the last bit into a whole
gradient, mean the same order for all numbers. The probes come from a public seed; no record is read. See
docs/decisions/0017.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from client.trainer import per_example_hooks
from shared.batches import Example, collate
from shared.errors import AdapterError, PrivacyError
from shared.privacy.mechanism import per_example_gradients
from shared.runtime import Runtime

_LOG = logging.getLogger("silotune.site")

_LENGTHS = (5, 20, 9, 33, 2, 16, 17, 48, 8, 64, 25, 3)
_MOST_TOKENS = 256
"""Tokens of all probes of `settle_company`, and 30 of `check_adapter`: a tenth of a second of MiniLM in float32."""
_SHORT = 30
_SHARP = 1e6


def settle_company(runtime: Runtime) -> None:
    """Find out whether examples may share a pass on this machine; if not, give each its own. Leaves all values as they were.

    Raises:
        PrivacyError: if one and the same pass gives different gradients when it is repeated.
    """
    with _restored(runtime):
        probes = _probes(runtime, _MOST_TOKENS)
        companies = [[*reversed(range(len(probes)))], [*range(0, len(probes), 2)]]
        for start in (_noisy(runtime), _sharp(runtime)):
            runtime.load(start)
            alone = [_gradients(runtime, [probe])[0] for probe in probes]
            if not all(
                _same(_gradients(runtime, [probe])[0], one) for probe, one in zip(probes[:2], alone, strict=False)
            ):
                raise PrivacyError(
                    "this device gives different gradients when the same pass is repeated, so one record's influence cannot be "
                    "bounded; set compute.device = 'cpu'."
                )
            found = all(_agree(runtime, probes, alone, company) for company in companies)
            if not found or not _agree_in_full(runtime, probes, alone):
                _LOG.warning(
                    "on this machine a gradient depends on the examples beside it; each example is computed by itself, which is "
                    "three to four times as slow."
                )
                runtime.compute = runtime.compute.model_copy(update={"micro_batch_tokens": 1})
                return


def check_adapter(runtime: Runtime, start: Mapping[str, Tensor]) -> None:
    """Try out this round's own adapter, in the precision and with the kernels of the round.

    Raises:
        AdapterError: if what one example adds depends on those beside it. The text speaks of the adapter alone.
    """
    if runtime.compute.micro_batch_tokens == 1:
        return
    with _restored(runtime):
        runtime.load(start)
        probes = _probes(runtime, _SHORT)
        alone = [_gradients(runtime, [probe])[0] for probe in probes]
        company = [*probes, _probe(runtime, 64, len(probes))]
        together = _gradients(runtime, company)
        if not all(_same(one, beside) for one, beside in zip(alone, together, strict=False)):
            raise AdapterError(
                "with this adapter what one record adds depends on the records beside it, so its influence would not be bounded; "
                "nothing was trained. An adapter that rounds of the job have led to does not do this."
            )


@contextmanager
def _restored(runtime: Runtime) -> Iterator[None]:
    """Put the trainable values back as they were."""
    parameters = list(runtime.model.trainable().values())
    saved = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)


def _agree(runtime: Runtime, probes: Sequence[Example], alone: Sequence[Tensor], company: Sequence[int]) -> bool:
    together = _gradients(runtime, [probes[index] for index in company])
    return all(_same(alone[index], beside) for index, beside in zip(company, together, strict=True))


def _agree_in_full(runtime: Runtime, probes: Sequence[Example], alone: Sequence[Tensor]) -> bool:
    """Return whether probes come out as alone at the end of the largest pass that training makes."""
    longest = min(max(_LENGTHS), runtime.max_length) if runtime.tokenizer is not None else runtime.max_length
    room = runtime.compute.micro_batch_tokens - sum(probe.length for probe in probes)
    others = [_probe(runtime, longest, number) for number in range(max(room // longest, 0))]
    together = _gradients(runtime, [*others, *probes])[len(others) :]
    return all(_same(one, beside) for one, beside in zip(alone, together, strict=True))


def _gradients(runtime: Runtime, examples: Sequence[Example]) -> Tensor:
    """Return the per-example gradients of adapter and head, float32 [examples, coordinates]."""
    batch = collate(examples).to(runtime.model.device)
    parameters = list(runtime.model.trainable().values())
    with per_example_hooks(runtime.model):
        with runtime.autocast():
            losses = runtime.task.per_example_loss(runtime.model(batch), batch)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        gradients = per_example_gradients(parameters, len(examples))
    return torch.cat([gradient.detach().flatten(1).float() for gradient in gradients], dim=1)


def _same(first: Tensor, second: Tensor) -> bool:
    return bool(((first == second) | (first.isnan() & second.isnan())).all())


def _probes(runtime: Runtime, most_tokens: int) -> list[Example]:
    """Return examples of different lengths, two at least, with about `most_tokens` tokens together."""
    probes: list[Example] = []
    tokens = 0
    for number, wanted in enumerate(_LENGTHS):
        probe = _probe(runtime, wanted, number)
        tokens += probe.length
        if len(probes) >= 2 and tokens > max(most_tokens, 3 * probe.length):
            break
        probes.append(probe)
    return probes


def _probe(runtime: Runtime, length: int, number: int) -> Example:
    length = runtime.max_length if runtime.tokenizer is None else min(length, runtime.max_length)
    generator = torch.Generator().manual_seed(number)
    return runtime.task.probe(torch.randint(0, runtime.num_values, (length,), generator=generator), number)


def _noisy(runtime: Runtime) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: value + 0.02 * torch.randn(value.shape, generator=generator)
        for name, value in sorted(runtime.initial.items())
    }


def _sharp(runtime: Runtime) -> dict[str, Tensor]:
    """Return a head of +-1e6 in every row: on a normalised vector, whose sum is zero but for rounding, a tie of all classes."""
    return {
        name: torch.where(torch.arange(len(value)) % 2 == 0, _SHARP, -_SHARP)[:, None].expand_as(value)
        if name.startswith("head.") and value.ndim == 2
        else value
        for name, value in _noisy(runtime).items()
    }
