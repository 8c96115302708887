"""Models that an audit trains: one simulated site, alone, through the production trainer, on data that the audit chooses.

Guarantee (tests: tests/simulations/audit/test_run.py): the data of a simulated site is read, never written; its ledger is not
opened, for a simulation's data is public and what is trained here is not released.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.site.config import SiteConfig
from client.training.trainer import LocalWork, train_local_rounds
from shared.data.datasets import dataset_fingerprint, read_records
from shared.errors import RunError
from shared.files.atomic import write_bytes
from shared.job.parsing import load_toml, parse
from shared.models.batches import Example, collate, micro_batches
from shared.privacy.persons import Persons
from shared.privacy.randomness import SiteRandomness
from shared.privacy.sizes import declared_size
from shared.runtime.runtime import Runtime, load_runtime
from shared.tasks import Record, task_of
from simulations.audit.lira import audit_lira, lira_scores, logit_confidence
from simulations.audit.one_run import Training, audit_one_run, draw_coins
from simulations.audit.result import AuditResult
from simulations.audit.run import ALPHA, AuditedRun, Progress, check_simulation
from simulations.data.small_gpt2 import prepare_backbone
from simulations.running.sites import site_homes
from simulations.scenario import persons_of

Array = NDArray[np.float64]

CANARY_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class SimulatedSite:
    """One simulated site, for training outside of its run.

    Attributes:
        runtime: loaded model and task.
        records: the site's own records.
        pool: the records of all sites of the run, sites in the order of their names.
        declared_records: the site's public size.
        persons: whose record each of `records` is, if persons are the unit of privacy.
    """

    runtime: Runtime
    records: list[Record]
    pool: list[Record]
    declared_records: int
    persons: Persons | None


def open_site(run: AuditedRun) -> SimulatedSite:
    """Open the data of the audited site of a simulation for reading.

    Raises:
        RunError: if `run` is no simulation or its data is gone.
    """
    check_simulation(run)
    homes = site_homes(run.folder / "sites")
    configs = {
        home.parent.name: parse(SiteConfig, load_toml(home / "site.toml"), source=str(home / "site.toml"))
        for home in homes
    }
    if run.site not in configs:
        raise RunError(f"{run.folder} no longer holds the home of {run.site}; tiers 2 and 3 need its data.")
    data: dict[str, list[Record]] = {
        home.parent.name: list(read_records(configs[home.parent.name].data, base=home)) for home in homes
    }
    prepare_backbone(run.job.model.backbone)
    own = data[run.site]
    persons = persons_of(own, run.plan.unit)
    size = len(own) if persons is None else persons.count
    return SimulatedSite(
        runtime=load_runtime(run.job, configs[run.site].compute.of_each),
        records=own,
        pool=[record for records in data.values() for record in records],
        declared_records=configs[run.site].declared_records or max(declared_size(size), 1),
        persons=persons,
    )


def train_alone(
    run: AuditedRun,
    site: SimulatedSite,
    examples: Sequence[Example],
    *,
    persons: Persons | None = None,
) -> dict[str, Tensor]:
    """Train as the only site of the run, all its steps, and return the final adapter; `persons` own the `examples`."""
    state = dict(site.runtime.initial)
    moments: dict[str, Tensor] = {}
    rounds = max(1, run.plan.planned_steps // run.job.training.local_steps)
    for number in range(1, rounds + 1):
        work = LocalWork(
            examples=examples,
            declared_records=site.declared_records,
            randomness=SiteRandomness.from_os(),
            optimizer_state=moments,
            persons=persons,
        )
        (result,) = train_local_rounds(
            site.runtime, [work], state, training=run.job.training, plan=run.plan, round_number=number
        )
        state = {name: value + result.delta[name] for name, value in state.items()}
        moments = result.optimizer_state
    return state


def example_losses(runtime: Runtime, state: dict[str, Tensor], examples: Sequence[Example]) -> Array:
    """Return the task's loss of every example under an adapter, float64 [examples]."""
    runtime.load(state)
    losses = np.zeros(len(examples))
    lengths = [example.length for example in examples]
    for group in micro_batches(lengths, range(len(examples)), runtime.compute.micro_batch_tokens):
        chosen = [examples[index] for index in group]
        batch = collate(chosen, runtime.cache.get(chosen)).to(runtime.model.device)
        with torch.no_grad(), runtime.autocast():
            losses[group] = runtime.task.per_example_loss(runtime.model(batch), batch).double().cpu().numpy()
    return losses


# --- tier 2, text canaries ---


def audit_text_canaries(
    run: AuditedRun,
    *,
    num_canaries: int = 1000,
    trainings: int = 5,
    alpha: float = ALPHA,
    seed: int = 0,
    progress: Progress = lambda done, total, what: None,
) -> tuple[AuditResult, list[Training]]:
    """Guess from the final adapter which canary texts one site trained on, beside its own records.

    Canaries are random token sequences with random labels; the score is how far training lowered a canary's loss. Where
    persons are the unit of privacy, each canary is a person of its own with this one record.
    Training t has the public seed `seed` + t.
    """
    site = open_site(run)
    runtime = site.runtime
    own = runtime.encode(site.records)
    done = []
    for number in range(trainings):
        progress(number, trainings, f"trainings of {run.site} with canaries")
        canaries = runtime.encode(canary_records(run, runtime, num_canaries, seed=seed + number))
        runtime.warm_cache([*own, *canaries])
        included = draw_coins(num_canaries, seed=seed + number)
        inside = [canary for canary, coin in zip(canaries, included, strict=True) if coin]
        persons = None if site.persons is None else site.persons.with_strangers(len(inside))
        state = train_alone(run, site, [*own, *inside], persons=persons)
        before = example_losses(runtime, runtime.initial, canaries)
        done.append(Training(scores=before - example_losses(runtime, state, canaries), included=included))
    progress(trainings, trainings, f"trainings of {run.site} with canaries")
    result = audit_one_run(
        done,
        run.steps,
        claim=run.claim,
        delta=run.plan.delta,
        alpha=alpha,
        audited=f"{trainings} trainings of {run.site} alone, {run.plan.planned_steps} steps on its {len(own)} simulated records "
        f"and half of {num_canaries} canary texts; the guesser sees the final adapter",
    )
    return result, done


def canary_records(run: AuditedRun, runtime: Runtime, count: int, *, seed: int) -> list[Record]:
    """Return `count` records of random tokens or pixels with random labels, from a public seed."""
    rng = np.random.default_rng([seed, 2])
    task = run.job.task
    if task.pixel_range is not None:
        images = rng.uniform(*task.pixel_range, size=(count, task.num_pixels))
        return [{"pixels": image, "label": str(rng.choice(task.labels))} for image in images]
    special = set(runtime.tokenizer.all_special_ids)
    ordinary = np.array([token for token in range(len(runtime.tokenizer)) if token not in special])
    length = min(CANARY_TOKENS, max(runtime.max_length - 2, 1))
    records: list[Record] = []
    for _ in range(count):
        record: dict[str, str] = {"text": runtime.tokenizer.decode(rng.choice(ordinary, size=length).tolist())}
        if "label" in task_of(run.job).roles:
            record["label"] = str(rng.choice(run.job.task.labels))
        records.append(record)
    return records


# --- tier 3 ---


def audit_shadow_models(
    run: AuditedRun,
    *,
    shadows: int = 64,
    targets: int = 5,
    num_records: int = 2000,
    alpha: float = ALPHA,
    seed: int = 0,
    progress: Progress = lambda done, total, what: None,
) -> tuple[AuditResult, list[Training]]:
    """Attack `targets` models by LiRA with `shadows` shadow models; each trains on its own random half of the records.

    Every model's losses are kept in `audit/tier3/` as soon as they are known, so a second call continues. Model j, shadow
    models first, has the public seed `seed` + j.
    """
    site = open_site(run)
    if site.persons is not None:
        raise RunError(
            f"tier 3 attacks single records, but this run protects each {run.plan.unit} with all their records; what it found "
            "would not be about the claim. Use tier 1 or 2."
        )
    # Half of them is what a site has.
    count = min(num_records, 2 * site.declared_records, len(site.pool))
    chosen = np.sort(np.random.default_rng([seed, 3]).choice(len(site.pool), size=count, replace=False))
    records = [site.pool[index] for index in chosen]
    examples = site.runtime.encode(records)
    site.runtime.warm_cache(examples)
    mark = _fingerprint(run, records, site.declared_records)
    losses, coins = [], []
    for number in range(shadows + targets):
        progress(number, shadows + targets, "shadow and target models")
        path = run.folder / "audit" / "tier3" / f"model-{seed + number:05d}.npz"
        included = draw_coins(count, seed=seed + number)
        known = _load_losses(path, mark, count)
        if known is None:
            inside = [example for example, coin in zip(examples, included, strict=True) if coin]
            known = example_losses(site.runtime, train_alone(run, site, inside), examples)
            _save_losses(path, mark, known)
        losses.append(known)
        coins.append(included)
    progress(shadows + targets, shadows + targets, "shadow and target models")
    confident = np.stack(losses)
    confident = logit_confidence(confident) if "label" in task_of(run.job).roles else -confident
    kept = np.stack(coins)
    attacked = [
        Training(scores=lira_scores(confident[j], confident[:shadows], kept[:shadows]), included=kept[j])
        for j in range(shadows, shadows + targets)
    ]
    result = audit_lira(
        attacked,
        run.steps,
        claim=run.claim,
        delta=run.plan.delta,
        alpha=alpha,
        audited=f"{targets} trainings of one site alone, {run.plan.planned_steps} steps, each on its own half of {count} "
        f"simulated records, against {shadows} shadow models; the attacker sees the final adapter",
    )
    return result, attacked


def _fingerprint(run: AuditedRun, records: Sequence[Record], declared: int) -> str:
    parts = (run.job.sha256, dataset_fingerprint(records), str(declared), str(run.plan.planned_steps))
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def _save_losses(path: Path, mark: str, losses: Array) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, mark=np.array(mark), losses=losses)
    write_bytes(path, buffer.getvalue())


def _load_losses(path: Path, mark: str, count: int) -> Array | None:
    """Return the losses of a model that was trained before for the same question, or None."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            losses: Array = stored["losses"]
            same = str(stored["mark"]) == mark and losses.shape == (count,)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return losses if same else None
