"""Accuracy at equal epsilon: ours and Opacus' hooks train the same model for the same number of steps at epsilon 8; and ours with
the last layer alone, in the demo's setting for all records at one place.

Ours computes in bfloat16 where the processor has it. Each side calibrates its noise with its own accountant. Pairs share split
and public seed of the model; sampling and noise are each side's own. Takes long, so it runs only by name or with --all.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Findings, Tell
from benchmarks.peers import Classifier, OpacusTraining
from shared.job.job import Job
from shared.models.batches import Example
from shared.privacy.plan import PrivacyPlan
from simulations.data.demo_data import load_movie_reviews, split_public_test

LAST, ALL = "ours, last layer", "ours, all layers"
EPSILON, MAX_LENGTH, NUM_TEST = 8.0, 128, 2000
LEARNING_RATE, MOMENTUM = 0.5, 0.9
_TRAINING = {"optimizer": "sgd", "momentum": MOMENTUM, "learning_rate": LEARNING_RATE}
_PRIVACY = {"noise_multiplier": None, "epsilon": EPSILON}
DEMO_RATE = 0.06
_DEMO = {"learning_rate": 1.5, "weight_decay": 0.02, "schedule": "linear"}
"""Rate, decay, schedule and sampling of the central-DP arm of simulations/demo.toml."""


def run_as_the_demo(tell: Tell) -> Findings:
    """Compare the demo's setting alone with Opacus, once."""
    return run(tell, seeds=1, sides=(LAST,))


def run(
    tell: Tell, *, seeds: int = 5, epochs: int = 2, batch: int = 256, sides: Sequence[str] = (LAST, ALL)
) -> Findings:
    """Train both sides under `seeds` seeds.

    Args:
        tell: told what is going on.
        seeds: repetitions; the seed also chooses the held-out sentences, the same for both sides.
        epochs: passes over the training sentences in expectation.
        batch: expected size of a Poisson sample with all layers.
        sides: what of ours is compared, `LAST` and `ALL`.
    """
    ours: dict[str, list[float]] = {side: [] for side in sides}
    theirs, noise_ours, noise_theirs = [], [], []
    for seed in range(seeds):
        train, test = split_public_test(load_movie_reviews(), num_test=NUM_TEST, seed=seed)
        batches = -(-len(train) // batch)
        all_layers = peers.same_job(
            max_length=MAX_LENGTH,
            training={**_TRAINING, "local_steps": epochs * batches},
            privacy={**_PRIVACY, "sample_rate": 1 / batches},
        )
        last_layer = peers.same_job(
            last_layers=1,
            max_length=MAX_LENGTH,
            training={**_TRAINING, **_DEMO, "local_steps": round(epochs / DEMO_RATE)},
            privacy={**_PRIVACY, "sample_rate": DEMO_RATE},
        )
        # One tokenizer, task and length: what one job encodes is every side's.
        runtime = peers.same_runtime(all_layers)
        examples, held_out = runtime.encode(train), runtime.encode(test)
        for side in sides:
            job = {LAST: last_layer, ALL: all_layers}[side]
            tell(f"seed {seed + 1} of {seeds}: {side}, {job.training.local_steps} steps")
            ours[side].append(trained_accuracy(job, examples, held_out))
        noise_ours.append(PrivacyPlan.from_job(all_layers).noise_multiplier)

        tell(f"seed {seed + 1} of {seeds}: Opacus")
        model = Classifier()
        private = OpacusTraining(
            model,
            peers.padded(examples, MAX_LENGTH),
            mode="hooks",
            batch_size=batch,
            poisson=True,
            epsilon=EPSILON,
            epochs=epochs,
            optimizer=torch.optim.SGD(model.trainable(), lr=LEARNING_RATE, momentum=MOMENTUM),
            # Padding changes no result, only time: the shortest that holds the batch.
            collate=peers.longest_of_batch,
        )
        for _ in range(epochs):
            for drawn in private.loader:
                private.step(drawn)
        theirs.append(accuracy(private.model, peers.padded(held_out, MAX_LENGTH)))
        noise_theirs.append(float(private.optimizer.noise_multiplier))
        reached_now = ", ".join(f"{side} {reached[-1]:.2%}" for side, reached in ours.items())
        tell(f"seed {seed + 1} of {seeds}: {reached_now}, Opacus {theirs[-1]:.2%}")
    details: dict[str, Any] = {
        "setting": f"epsilon {EPSILON:g}, delta 1e-5, {epochs} epochs, train b; batch {batch} with all layers",
        "Opacus hooks, all layers": theirs,
        "noise multiplier, ours (PLD), all layers": noise_ours,
        "noise multiplier, Opacus (PRV), all layers": noise_theirs,
    }
    for side, reached in ours.items():
        differences = [100 * (a - b) for a, b in zip(reached, theirs, strict=True)]
        details |= {side: reached, f"{side} - Opacus, points": differences}
        if seeds > 1:
            details[f"{side} - Opacus, standard deviation, points"] = round(statistics.stdev(differences), 3)
    return Findings({}, details)


def trained_accuracy(job: Job, examples: list[Example], held_out: list[Example]) -> float:
    """Return the share of right answers on `held_out` after one round of `job` at one place."""
    runtime = peers.same_runtime(job, precision="auto")
    runtime.warm_cache(examples)
    result = peers.local_round(runtime, job, examples)
    runtime.load({name: value + result.delta[name] for name, value in runtime.initial.items()})
    return runtime.evaluate(held_out).metrics["accuracy"] or 0.0


def accuracy(model: Any, data: tuple[Tensor, Tensor, Tensor]) -> float:
    """Return the share of right answers."""
    model.eval()
    right = 0
    with torch.no_grad():
        for ids, mask, labels in zip(*(torch.split(column, 256) for column in data), strict=True):
            length = int(mask.sum(dim=1).max())
            right += int((model(ids[:, :length], mask[:, :length]).argmax(dim=-1) == labels).sum())
    return right / len(data[0])
