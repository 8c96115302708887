"""A slice of one epoch over movie reviews: Opacus' hooks with padded texts and its Poisson loader against ours.

Sampling rate, noise, clipping, optimiser and number of steps are equal. A whole epoch (135 steps) takes minutes, so equal slices
of it are timed. Three comparisons:

* the same layers on both sides: the last one, as in the demo, for two epochs of which the first fills our cache of frozen layers;
  and all six, where there is nothing to cache.
* ours as the demo trains (the last layer) against Opacus with B in all layers, as PEFT adapts by default: not the same model.
  Section `accuracy` compares all three.
* a later epoch of ours with the last two of six layers adapted and the cache warm, against our epoch with all layers, and against
  the same two layers without the cache.

Ours computes in what `compute.precision = "auto"` chooses: bfloat16 on a processor that has it, else float32 like the peers.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from benchmarks import peers
from benchmarks.harness import Findings, Tell, alternate, seconds
from benchmarks.peers import Classifier, OpacusTraining
from shared.job.job import Job
from shared.models.batches import Example
from shared.models.frozen_cache import FrozenCache
from shared.runtime.runtime import Runtime
from simulations.data.demo_data import load_movie_reviews, split_public_test

BATCH, MAX_LENGTH, NUM_TEST = 64, 128, 2000


def run(tell: Tell, *, runs: int = 5, steps: int = 6) -> Findings:
    """Time `steps` steps of an epoch in every run."""
    tell("encoding the reviews")
    runtime = peers.same_runtime(_job(1, steps, None))
    train, _ = split_public_test(load_movie_reviews(), num_test=NUM_TEST, seed=0)
    examples = runtime.encode(train)
    # Opacus' rate: one over the number of its loader's batches.
    batches = -(-len(examples) // BATCH)
    ours = training(_job(batches, steps, None), examples)
    padded, shorter, last = (
        f"Opacus hooks, all layers, padded to {MAX_LENGTH}",
        "Opacus hooks, all layers, padded to the longest of the batch",
        f"Opacus hooks, last layer, padded to {MAX_LENGTH}",
    )
    opacus = {
        padded: opacus_slice(examples, steps, None),
        shorter: opacus_slice(examples, steps, peers.longest_of_batch),
        last: opacus_slice(examples, steps, None, last_layers=1),
    }
    tell("warming up")
    ours()
    timed = {name: partial(seconds, action) for name, action in opacus.items()}
    whole = alternate({name: timed[name] for name in (padded, shorter)}, lambda: seconds(ours), runs=runs, tell=tell)
    own = random.Random(0).sample(examples, steps * BATCH)
    demo = alternate({name: timed[name] for name in (padded, last)}, lambda: two_epochs(own) / 2, runs=runs, tell=tell)
    # Halves of the records, so that nothing that one keeps in memory serves the other.
    first, second = examples[0::2], examples[1::2]
    job = _job(-(-len(second) // BATCH), steps, 2)
    without = training(job, first, cached=False)
    warm_runtime = peers.same_runtime(job, precision="auto")
    tell("filling the prefix cache")
    started = time.perf_counter()
    warm_runtime.warm_cache(second)
    fill = time.perf_counter() - started
    warm = training(job, second)
    without(), warm()
    name = "ours, last 2 layers, no prefix cache"
    every = "ours, all layers"
    later = alternate(
        {every: lambda: seconds(ours), name: lambda: seconds(without)}, lambda: seconds(warm), runs=runs, tell=tell
    )

    details: dict[str, Any] = {
        "slice": f"{steps} of {batches} steps of an epoch, expected batch {len(examples) / batches:.1f}",
        "tokens of a sentence": round(sum(example.length for example in examples) / len(examples), 1),
        **{f"{peer}, seconds": whole[peer].peer for peer in (padded, shorter)},
        f"{last}, seconds": demo[last].peer,
        f"{every}, seconds": [value for pair in whole.values() for value in pair.ours] + later[every].peer,
        "ours, last layer, cache filled on the way, seconds": [value for pair in demo.values() for value in pair.ours],
        f"{shorter} / ours, all layers": whole[shorter].peer_over_ours(),
        f"{name}, seconds": later[name].peer,
        "ours, last 2 layers, prefix cache warm, seconds": [value for pair in later.values() for value in pair.ours],
        f"seconds to fill the prefix cache with {len(second):,} records once": round(fill, 2),
    }
    headlines = {
        "epoch_speedup_vs_opacus": demo[last].peer_over_ours(),
        "epoch_speedup_all_layers": whole[padded].peer_over_ours(),
        "epoch_speedup_as_the_demo": demo[padded].peer_over_ours(),
        "prefix_cache_speedup": later[every].peer_over_ours(),
        "prefix_cache_speedup_same_layers": later[name].peer_over_ours(),
    }
    return Findings(headlines, details)


def training(job: Job, examples: list[Example], *, cached: bool = True) -> Callable[..., object]:
    """Return one local round of ours over `examples`; it takes another runtime of the job if there is one."""
    own: Runtime = peers.same_runtime(job, precision="auto", cached=cached)
    return lambda runtime=own: peers.local_round(runtime, job, examples)


def two_epochs(examples: list[Example]) -> float:
    """Return the seconds of two epochs over `examples`, the last layer adapted, with a cache that is empty at first."""
    steps = len(examples) // BATCH
    job = _job(steps, 2 * steps, 1)
    train = training(job, examples)
    runtime = replace(peers.same_runtime(job, precision="auto"), cache=FrozenCache())

    def run_both() -> None:
        runtime.warm_cache(examples)
        train(runtime)

    return seconds(run_both)


def opacus_slice(
    examples: list[Example], steps: int, collate: Any, *, last_layers: int | None = None
) -> Callable[[], None]:
    """Return `steps` steps of Opacus on Poisson samples of its own loader."""
    private = OpacusTraining(
        Classifier(last_layers=last_layers),
        peers.padded(examples, MAX_LENGTH),
        mode="hooks",
        batch_size=BATCH,
        poisson=True,
        noise_multiplier=1.0,
        collate=collate,
    )

    def run_slice() -> None:
        for batch in islice(private.loader, steps):
            private.step(batch)

    return run_slice


def _job(batches: int, steps: int, last_layers: int | None) -> Job:
    return peers.same_job(
        last_layers=last_layers,
        max_length=MAX_LENGTH,
        training={"local_steps": steps},
        privacy={"sample_rate": 1 / batches},
    )
