"""Baselines: what each arm beside the federated one executes.

An arm without noise is the yardstick that the private runs are read against, so it must converge on any data without a hand.
It has settings of its own and not those of the job, which are made for noise (large samples, a learning rate for clipped
gradients): AdamW with a linear decay sees about `EXAMPLES` examples in three to thirty passes, ends when the loss on the public
records that decide has not fallen `PATIENCE` times, and keeps the adapter of the best evaluation. No figure is of these records
(`server.rounds.public_records`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from shared.errors import ConfigError
from shared.job.job import Job
from shared.job.privacy import OF_SHARES
from shared.privacy.plan import PrivacyPlan
from shared.tasks import task_of

EXAMPLES = 30_000
"""Examples that an arm without noise sees: small data sets are passed over more often."""
FEWEST_PASSES, MOST_PASSES = 3, 30
EVALUATIONS = 12
PATIENCE = 5
_LEARNING_RATE, _OF_LANGUAGE_MODELS, _OF_IMAGES = 2e-3, 1e-2, 5e-3
_FEDERATED_ROUNDS, _FEDERATED_STEPS = 40, 4
_NO_SHARES: Mapping[str, Any] = dict.fromkeys(OF_SHARES)


def arm_changes(name: str, job: Job, *, num_records: int, num_sites: int, evaluate_every: int) -> dict[str, Any]:
    """Return the job keys in which baseline `name` differs from the federated job, before those that the scenario changes.

    Args:
        num_records: of all sites.
        num_sites: at which the federated arm trains.
        evaluate_every: rounds between evaluations.

    Raises:
        ConfigError: if the arm makes no sense for this job.
    """
    if job.privacy.central and name == "central-dp":
        raise ConfigError(
            "the baseline central-dp protects single records of one data set, the job's mechanism 'central' whole sites: "
            "their epsilons cannot be compared. Leave it out of baselines.arms."
        )
    if name == "non-private-all-layers" and job.model.is_image_network:
        raise ConfigError(
            "the baseline non-private-all-layers puts LoRA into all layers, but a network for images is trained as a whole "
            "anyway; use non-private."
        )
    changes: dict[str, Any] = {}
    if name != "federated-non-private":
        changes["federation"] = {"min_sites": 1, "sites_per_round": None}
    if name == "central-dp":
        # All records at one place: its noise is no share of any.
        return changes | ({"privacy": _all_noise(job)} if job.privacy.shares_noise else {})
    alone = name != "federated-non-private"
    per_site = max(num_records if alone else num_records // num_sites, 1)
    passes = min(max(EXAMPLES / num_records, FEWEST_PASSES), MOST_PASSES)
    changes |= _without_noise(job, records=per_site, passes=passes, evaluate_every=evaluate_every)
    if not (alone or task_of(job).causal_lm or job.model.is_image_network):
        _average_gently(changes, passes=passes, evaluate_every=evaluate_every)
    if name == "non-private-all-layers":
        changes["lora"] = {"last_layers": None} | ({"train": "b"} if job.lora.train == "none" else {})
    if changes.get("lora", job.lora.model_dump())["last_layers"] is None and not job.model.is_image_network:
        changes["training"]["learning_rate"] /= 2
    return changes


def _all_noise(job: Job) -> dict[str, Any]:
    """Return settings under which one site adds as much noise as the honest sites of the federated sum together."""
    privacy: dict[str, Any] = {"mechanism": "dp-sgd", **_NO_SHARES}
    if job.privacy.noise_multiplier is not None:  # of a share
        privacy["noise_multiplier"] = PrivacyPlan.from_job(job).of_sum.noise_multiplier
    return privacy


def _without_noise(job: Job, *, records: int, passes: float, evaluate_every: int) -> dict[str, Any]:
    """Return settings that converge for sites with about so many records each."""
    batch = min(64, max(8, records // 30))
    sample_rate = min(1.0, round(batch / records, 6))
    rounds = EVALUATIONS * evaluate_every
    privacy: dict[str, Any] = {"mechanism": "none", "sample_rate": sample_rate}
    if job.privacy.central:
        privacy |= {"unit": "record", "central": None}
    if job.privacy.shares_noise:
        privacy |= dict(_NO_SHARES)
    return {
        "privacy": privacy,
        "site_metrics": {"names": []},
        "aggregation": {"server_optimizer": "none", "server_learning_rate": 1.0},
        "training": {
            "rounds": rounds,
            "local_steps": max(math.ceil(passes / sample_rate / rounds), 1),
            "optimizer": "adamw",
            "learning_rate": _learning_rate(job),
            "head_learning_rate_factor": 1.0,
            "weight_decay": 0.01,
            "momentum": 0.9,
            "schedule": "linear",
            "warmup_steps": 0,
            "early_stopping": {"patience": PATIENCE, "keep": "best", "metric": "loss"},
        },
    }


def _learning_rate(job: Job) -> float:
    if job.model.is_image_network:
        return _OF_IMAGES
    return _OF_LANGUAGE_MODELS if task_of(job).causal_lm else _LEARNING_RATE


def _average_gently(changes: dict[str, Any], *, passes: float, evaluate_every: int) -> None:
    """Let sites whose labels differ take few steps between two averages, by an optimiser that averages linearly.

    Adam takes steps of one length whatever the gradient, so each site walks towards its own labels (decision 0015).
    """
    rounds = math.ceil(_FEDERATED_ROUNDS / evaluate_every) * evaluate_every
    training = changes["training"]
    training |= {"rounds": rounds, "local_steps": _FEDERATED_STEPS, "optimizer": "sgd", "learning_rate": 0.1}
    training["early_stopping"] |= {"patience": 2 * PATIENCE}
    changes["privacy"]["sample_rate"] = min(1.0, round(passes / (rounds * _FEDERATED_STEPS), 6))


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of both, section by section; where both name one, `second` counts."""
    both = dict(first)
    for key, value in second.items():
        old = both.get(key)
        both[key] = {**old, **value} if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both
