"""Whether an example's gradient is the same to the last bit in any company, tried out on this machine with public numbers.

`shared.models.packing` lets an example be computed in shapes that follow from itself alone. That a library then adds up in one
order is a property of the library, the processor and the number of threads, so it is tried out where it is relied on.

Guarantees (tests: tests/client/training/test_independence.py)
    * After `settle_company`, either examples share passes and were found to owe nothing to each other, or each gets a pass of
      its own, which is slower and independent by construction. On a device that does not even repeat itself nothing is trained.
      `keep_settled` repeats it when the number of threads has changed, and forgets activations that were computed before.
    * After `settle_stacks` the same holds where sites of a simulation share passes, each example beside its own site's values.
    * Activation functions are tried out by themselves: where a vector ends follows from the size of a pass, and a few passes do
      not have all sizes (test_a_function_that_rounds_two_ways_parts_the_examples).
    * Texts of every padded length that can share a pass with one like it are tried out, up to the job's `max_length`.
    * An adapter for which `check_adapter` finds a difference on this machine is refused before anything is charged.

No adapter can look harmless here and be harmful later: libraries choose the order of a sum by shapes, strides and
processor, never by values. Equal bits for numbers in general position, and for a head that turns the last bit into a whole
gradient, mean the same order for all numbers. The probes come from a public seed; no record is read. See
docs/decisions/0017.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from client.training.backward import backward
from client.training.per_example import most_examples
from client.training.trainer import per_example_hooks
from shared.errors import AdapterError, PrivacyError
from shared.models.activations import activations_of, rounds_one_way
from shared.models.batches import Example, collate
from shared.models.packing import padded_length
from shared.privacy.mechanism import per_example_gradients
from shared.runtime.runtime import Runtime

_LOG = logging.getLogger("silotune.site")

_LENGTHS = (5, 20, 9, 33, 2, 16, 17, 48, 8, 64, 25, 3)
_MOST_TOKENS = 256
"""Tokens of all probes of `settle_company`, and 30 of `check_adapter`: a tenth of a second of MiniLM in float32."""
_SHORT = 30
_SHARP = 1e6

Take = Callable[[Sequence[Example], Sequence[int]], Tensor]
"""Per-example gradients of examples, each with a number that tells its site where there are several."""


def keep_settled(runtime: Runtime) -> None:
    """`settle_company`, unless it has been done for this number of threads: by it a library cuts its sums."""
    threads = torch.get_num_threads()
    if runtime.settled_threads == threads:
        return
    if runtime.settled_threads:
        _LOG.warning("the number of threads went from %d to %d", runtime.settled_threads, threads)
        # Some texts' activations from before, beside others' from now, would depend on who was there.
        runtime.cache.forget()
        runtime.tried_adapter = ""
        runtime.settled_stacks = False
    settle_company(runtime)
    runtime.settled_threads = threads
    # Before any record's: else how long a round's check takes, and a refusal with it, would tell whether records fill the cache.
    if runtime.compute.micro_batch_tokens > 1:
        runtime.warm_cache(_company(runtime))


def settle_company(runtime: Runtime) -> None:
    """Find out whether examples may share a pass on this machine; if not, give each its own. Leaves all values as they were.

    Raises:
        PrivacyError: if one and the same pass gives different gradients when it is repeated.
    """

    if not _rounds_one_way(runtime):
        _part(runtime)
        return
    with _restored(runtime), _passes(runtime) as take:
        probes = _probes(runtime, _MOST_TOKENS)
        for start in (_noisy(runtime), _sharp(runtime)):
            runtime.load(start)
            alone = [take([probe], [number])[0] for number, probe in enumerate(probes)]
            if not all(_same(take([probe], [0])[0], one) for probe, one in zip(probes[:2], alone, strict=False)):
                raise PrivacyError(
                    "this device gives different gradients when the same pass is repeated, so one record's influence cannot be "
                    "bounded; set compute.device = 'cpu'."
                )
            if not _independent(runtime, probes, alone, take):
                _part(runtime)
                return
        # In which order a library adds up does not follow from values: for long texts, which take time, one start is enough.
        if not _independent_when_long(runtime, probes, take):
            _part(runtime)


def settle_stacks(runtime: Runtime) -> None:
    """The same for sites that are trained side by side: each example meets its own site's values, in products of another kind."""
    if runtime.settled_stacks:
        return
    runtime.settled_stacks = True
    if runtime.compute.micro_batch_tokens == 1:
        return
    sites = (_noisy(runtime), _sharp(runtime))
    stacks: dict[Tensor, Tensor] = {
        parameter: torch.stack([values[name] for values in sites]).to(parameter)
        for name, parameter in runtime.model.trainable().items()
    }

    with _restored(runtime), _passes(runtime, stacks, sites=len(sites)) as take:
        probes = _probes(runtime, _MOST_TOKENS)
        alone = [take([probe], [number])[0] for number, probe in enumerate(probes)]
        if not _independent(runtime, probes, alone, take) or not _independent_when_long(runtime, probes, take):
            _part(runtime)


def _part(runtime: Runtime) -> None:
    """Give each example a pass of its own, and forget what was computed in company."""
    threads, hint = torch.get_num_threads(), ""
    if runtime.model.device.type == "cpu" and threads.bit_count() > 1:
        # By three threads a row is cut where no vector of the processor ends; see docs/decisions/0017.
        fewer = 1 << (threads.bit_length() - 1)
        hint = f" That may follow from its {threads} threads: try {fewer} (OMP_NUM_THREADS={fewer}, or simulation.threads)."
    _LOG.warning(
        "on this machine a gradient depends on the examples beside it; each example is computed by itself, which is three to "
        "four times as slow.%s",
        hint,
    )
    runtime.compute = runtime.compute.model_copy(update={"micro_batch_tokens": 1})
    runtime.cache.forget()


def check_adapter(runtime: Runtime, start: Mapping[str, Tensor]) -> None:
    """Try out this round's own adapter, in the precision and with the kernels of the round.

    Raises:
        AdapterError: if what one example adds depends on those beside it. The text speaks of the adapter alone.
    """
    if runtime.compute.micro_batch_tokens == 1:
        return
    company = _company(runtime)
    probes = company[:-1]
    # As in the round: no adapter changes what the frozen layers below it computed, so they need not do it in every round.
    runtime.warm_cache(company)
    with _restored(runtime), _passes(runtime, cached=True) as take:
        runtime.load(start)
        alone = [take([probe], [0])[0] for probe in probes]
        together = take(company, range(len(company)))
        if not all(_same(one, beside) for one, beside in zip(alone, together, strict=False)):
            raise AdapterError(
                "with this adapter what one record adds depends on the records beside it, so its influence would not be bounded; "
                "nothing was trained. An adapter that rounds of the job have led to does not do this."
            )


def fingerprint(runtime: Runtime, start: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the gradients of public probes at an adapter; leaves the trainable values as they were.

    Processes that return the same add up in the same order, so it does not show which of them an example was given to.
    """
    probes = [*_company(runtime), _probe(runtime, runtime.max_length, 0)]
    digest = hashlib.sha256()
    with _restored(runtime), _passes(runtime) as take:
        runtime.load(start)
        for number, probe in enumerate(probes):
            digest.update(take([probe], [number])[0].cpu().numpy().tobytes())
    return digest.hexdigest()


def _company(runtime: Runtime) -> list[Example]:
    """Return what `check_adapter` tries out: short probes, and last a longer one."""
    probes = _probes(runtime, _SHORT)
    return [*probes, _probe(runtime, 64, len(probes))]


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


def _rounds_one_way(runtime: Runtime) -> bool:
    """Return whether no activation function shows where a number stands; passes of a few sizes would not show all such places."""
    dtype = runtime.autocast_dtype or torch.float32
    return all(rounds_one_way(function, runtime.model.device, dtype) for function in activations_of(runtime.model))


def _independent(runtime: Runtime, probes: Sequence[Example], alone: Sequence[Tensor], take: Take) -> bool:
    """Return whether probes come out as alone in two companies, and at the end of the largest pass that training makes."""
    for company in ([*reversed(range(len(probes)))], [*range(0, len(probes), 2)]):
        together = take([probes[number] for number in company], company)
        if not all(_same(alone[number], beside) for number, beside in zip(company, together, strict=True)):
            return False
    longest = _probe(runtime, max(_LENGTHS), 0).length
    room = runtime.compute.micro_batch_tokens - sum(probe.length for probe in probes)
    most = most_examples(runtime.model.trainable().values()) - len(probes)
    others = [_probe(runtime, longest, number) for number in range(min(room // longest, most))]
    together = take([*others, *probes], [*range(len(others)), *range(len(probes))])[len(others) :]
    return all(_same(one, beside) for one, beside in zip(alone, together, strict=True))


def _independent_when_long(runtime: Runtime, probes: Sequence[Example], take: Take) -> bool:
    """Return whether a text of each greater padded length comes out as alone beside one of the same and some short ones."""
    for length in _long_lengths(runtime):
        one, other = (_probe(runtime, length, number) for number in range(2))
        together = take([*probes[:2], other, one], [1, 0] * 2)
        if not _same(take([one], [0])[0], together[-1]):
            return False
    return True


def _long_lengths(runtime: Runtime) -> list[int]:
    """Return a length beyond those of the probes for each padded length of which two fit into a pass."""
    if runtime.tokenizer is None:  # all images have one size
        return []
    most = min(runtime.max_length, runtime.compute.micro_batch_tokens // 2)
    by_padded = {padded_length(length): length for length in range(max(_LENGTHS) + 1, most + 1)}
    return [*by_padded.values()]


@contextmanager
def _passes(
    runtime: Runtime, stacks: Mapping[Tensor, Tensor] | None = None, *, sites: int = 1, cached: bool = False
) -> Iterator[Take]:
    """Give a function that returns the per-example gradients of adapter and head, float32 [examples, coordinates].

    Args:
        stacks: values of several sites, see `client.training.per_example`; None if the model's own are meant.
        sites: how many there are in them; an example belongs to the site of its number, modulo this.
        cached: what the frozen layers computed is taken from the cache, where it is there.
    """
    parameters = list(runtime.model.trainable().values())
    with per_example_hooks(runtime.model, stacks) as hooks:

        def take(examples: Sequence[Example], numbers: Sequence[int]) -> Tensor:
            batch = collate(examples, runtime.cache.get(examples) if cached else None).to(runtime.model.device)
            if stacks is not None:
                owners = [number % sites for number in numbers]
                hooks.owners = torch.tensor(owners, device=runtime.model.device)
            backward(runtime, batch, hooks)
            gradients = per_example_gradients(parameters, len(examples))
            return torch.cat([gradient.detach().flatten(1) for gradient in gradients], dim=1)

        yield take


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
        name: value + 0.02 * torch.randn(value.shape, generator=generator) for name, value in runtime.initial.items()
    }


def _sharp(runtime: Runtime) -> dict[str, Tensor]:
    """Return a head of +-1e6 in every row: on a normalised vector, whose sum is zero but for rounding, a tie of all classes."""
    return {
        name: torch.where(torch.arange(len(value)) % 2 == 0, _SHARP, -_SHARP)[:, None].expand_as(value)
        if name.startswith("head.") and value.ndim == 2
        else value
        for name, value in _noisy(runtime).items()
    }
