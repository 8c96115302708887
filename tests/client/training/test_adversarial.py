"""Adversarial training (`training.adversarial`): one vector of each record, which follows from it and the values alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import client.training.backward as backward_module
import client.training.per_example as per_example_module
import client.training.trainer as trainer_module
from client.training.backward import backward, steepest
from client.training.gradient import noisy_sums
from client.training.independence import check_adapter, settle_company, settle_stacks
from client.training.proof import prove_trainer
from client.training.trainer import LocalWork, clipped_sums, draw, per_example_hooks, pool_of
from server.rounds.observer import Observer
from shared.errors import AdapterError, ConfigError, PrivacyError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.models.batches import Example, collate
from shared.models.families import ARCHITECTURES
from shared.models.frozen_cache import FrozenCache
from shared.models.tunable import TunableModel
from shared.privacy.mechanism import per_example_gradients
from shared.privacy.persons import Persons
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime.runtime import Runtime, load_own_runtime
from shared.tasks.views import views_of
from simulations.running.engine import run_scenario
from simulations.scenario import load_scenario
from tests.client.training.test_trainer import COMBINATIONS, away_from_zero
from tests.shared.models.test_families import TASKS as FAMILY_TASKS
from tests.shared.models.test_families import job_of as family_job
from tests.test_task_contract import CASES
from tests.tiny_families import make_backbone

CPU = ComputeConfig(device="cpu", precision="float32", cache_frozen_layers=False)
RADIUS, WEIGHT = 0.2, 0.3
TRAINING = {"adversarial": {"radius": RADIUS, "weight": WEIGHT}}
TEXTS = [kind for kind in CASES if kind != "image_classification"]
C = 0.05

Records = list[dict[str, Any]]
JobOf = Callable[..., Job]


@pytest.fixture
def job_of(classification_job: JobOf, language_job: JobOf) -> JobOf:
    def build(kind: str = "classification", lora: dict[str, Any] | None = None, **sections: Any) -> Job:
        builder = classification_job if kind == "classification" else language_job
        return builder(**{"training": TRAINING, **sections}, lora=lora or {})

    return build


@pytest.fixture
def runtime(job_of: JobOf) -> Runtime:
    runtime = load_own_runtime(job_of(), CPU)
    runtime.load(away_from_zero(runtime))
    return runtime


def gradients(runtime: Runtime, examples: Sequence[Example]) -> Tensor:
    """Per-example gradients [n, coordinates] of one micro-batch."""
    with per_example_hooks(runtime.model) as hooks:
        backward(runtime, collate(examples).to(runtime.model.device), hooks)
        found = per_example_gradients(list(runtime.model.trainable().values()), len(examples))
    return torch.cat([part.flatten(1) for part in found], dim=1)


def looped(runtime: Runtime, examples: Sequence[Example]) -> Tensor:
    """The same by plain autograd, example by example: the formula of `client.training.backward` as it stands there."""
    model = runtime.model
    assert isinstance(model, TunableModel)
    assert runtime.adversarial is not None
    parameters = list(model.trainable().values())
    rows = []
    for example in examples:
        batch = collate([example])
        e = model.frozen(batch.input_ids, batch.attention_mask).requires_grad_()

        def loss(hidden: Tensor, example: Example = example) -> Tensor:
            with runtime.autocast():
                batch = replace(collate([example]), hidden=hidden)
                return runtime.task.per_example_loss(model(batch), batch)[0]

        (g,) = torch.autograd.grad(loss(e), e)
        r = runtime.adversarial.radius * e.norm() * g / g.norm()
        mixed = (1 - runtime.adversarial.weight) * loss(e.detach()) + runtime.adversarial.weight * loss(
            (e + r).detach()
        )
        rows.append(torch.cat([part.flatten() for part in torch.autograd.grad(mixed, parameters)]))
    return torch.stack(rows)


def error(found: Tensor, expected: Tensor) -> float:
    """Largest error of an example, relative to its norm."""
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


def by_the_batch(entering: Tensor, gradient: Tensor, lengths: list[int], radius: float) -> Tensor:
    """Planted: how far a record is moved follows from all records of its pass."""
    return radius * entering.norm() * gradient / gradient.norm()


# --- the gradient ---


@pytest.mark.parametrize("last_layers", [None, 1])
@pytest.mark.parametrize(("task", "train"), COMBINATIONS)
def test_gradients_equal_those_of_a_loop(
    job_of: JobOf,
    records: Records,
    task: str,
    train: str,
    last_layers: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = load_own_runtime(job_of(task, {"train": train, "last_layers": last_layers}), CPU)
    examples = runtime.encode(records[:7])
    assert len({example.length for example in examples}) > 1  # padding takes part
    runtime.load(away_from_zero(runtime))
    expected = looped(runtime, examples)
    found = gradients(runtime, examples)
    assert error(found, expected) <= 1e-4
    # The comparison can fail: the move matters, and so does whose norms it has.
    assert error(gradients(replace(runtime, adversarial=None), examples), expected) > 1e-2
    monkeypatch.setattr(backward_module, "steepest", by_the_batch)
    assert error(gradients(runtime, examples), expected) > 1e-3


@pytest.mark.parametrize("kind", TEXTS)
def test_every_task_on_texts_has_them(task_job: JobOf, kind: str) -> None:
    case = CASES[kind]
    runtime = load_own_runtime(task_job({"kind": kind, **case.section}, **case.sections, training=TRAINING), CPU)
    prove_trainer(runtime)
    runtime.load(away_from_zero(runtime))
    examples = runtime.encode(case.records[:5])
    assert error(gradients(runtime, examples), looped(runtime, examples)) <= 1e-4


@pytest.mark.parametrize("train", ["b", "none"])
def test_cached_activations_and_checkpoints_change_nothing(job_of: JobOf, records: Records, train: str) -> None:
    job = job_of(lora={"train": train, "last_layers": 1})
    plain, cached, recomputing = (
        load_own_runtime(job, compute)
        for compute in (
            CPU,
            CPU.model_copy(update={"cache_frozen_layers": True}),
            CPU.model_copy(update={"gradient_checkpointing": True}),
        )
    )
    cached.cache = FrozenCache()
    examples = plain.encode(records[:6])
    cached.warm_cache(examples)
    start = away_from_zero(plain)
    for one in (plain, cached, recomputing):
        one.load(start)
    expected = gradients(plain, examples)
    assert torch.equal(gradients(recomputing, examples), expected)
    batch = collate(examples, cached.cache.get(examples))
    assert batch.hidden is not None
    with per_example_hooks(cached.model) as hooks:
        backward(cached, batch, hooks)
        found = per_example_gradients(list(cached.model.trainable().values()), len(examples))
    assert torch.equal(torch.cat([part.flatten(1) for part in found], dim=1), expected)


def test_no_direction_is_no_move(runtime: Runtime, records: Records) -> None:
    entering = torch.ones(1, 10, 3)
    gradient = torch.zeros(1, 10, 3)
    gradient[0, 2:4], gradient[0, 4], gradient[0, 5:7], gradient[0, 7:] = 1.0, torch.nan, torch.inf, 1e-42
    moves = steepest(entering, gradient, [2, 2, 1, 2, 3], 0.1)[0]
    norms = [float(part.norm()) for part in moves.split([2, 2, 1, 2, 3])]
    assert norms == pytest.approx([0, 0.1 * 6**0.5, 0, 0, 0.1 * 9**0.5])
    # A head of zeros lets nothing through: the loss is flat where texts are moved.
    runtime.load({n: torch.zeros_like(t) if n.startswith("head.") else t for n, t in away_from_zero(runtime).items()})
    examples = runtime.encode(records[:3])
    assert error(gradients(runtime, examples), gradients(replace(runtime, adversarial=None), examples)) <= 1e-6


# --- the sum ---


def sums(runtime: Runtime, job: Job, *works: LocalWork) -> list[Tensor]:
    """The clipped sum of each site, flat, with a bound of C."""
    plan = replace(PrivacyPlan.from_job(job), max_grad_norm=C, sample_rate=1.0)
    if works[0].persons is not None:
        plan = replace(plan, unit="patient", records_per_person=9)
    values = {
        parameter: parameter.detach().repeat(len(works), *[1] * parameter.ndim)
        for parameter in runtime.model.trainable().values()
    }
    with per_example_hooks(runtime.model, values if len(works) > 1 else None) as hooks:
        drawn = [draw(plan, replace(work, randomness=SiteRandomness.injected("coins")), 1, 0) for work in works]
        totals, _ = clipped_sums(runtime, pool_of(works), works, drawn, plan, hooks)
    return [torch.cat([part.flatten() for part in total.sums]) for total in totals]


def work_of(examples: Sequence[Example], **options: Any) -> LocalWork:
    randomness = SiteRandomness.injected("adversarial")
    return LocalWork(examples=examples, declared_records=len(examples), randomness=randomness, **options)


def test_views_of_persons_with_class_weights(job_of: JobOf, records: Records) -> None:
    """The mean of whole vectors, clean and adversarial parts together, is clipped once."""
    job = job_of(training={**TRAINING, "augmentation": {"views": 3}}, task={"class_weights": [1.0, 0.25]})
    runtime = load_own_runtime(job, CPU.model_copy(update={"micro_batch_tokens": 64}))
    runtime.load(away_from_zero(runtime))
    examples = runtime.encode(records[:5])
    views = views_of(examples, job, runtime.tokenizer)
    persons = Persons.from_ids(["a", "b", "a", "c", "b"])
    (found,) = sums(runtime, job, work_of(examples, views=views, persons=persons))
    expected = torch.zeros_like(found)
    for group in ([0, 2], [1, 4], [3]):
        mean = (
            looped(runtime, [one for r in group for one in (examples[r], *views[2 * r : 2 * r + 2])]).double().mean(0)
        )
        expected += mean * min(1.0, C / float(mean.norm()))
    assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())


def test_sites_side_by_side_get_what_they_get_alone(runtime: Runtime, job_of: JobOf, records: Records) -> None:
    works = [work_of(runtime.encode(part)) for part in (records[:3], records[5:10])]
    together = sums(runtime, job_of(), *works)
    for work, found in zip(works, together, strict=True):
        (alone,) = sums(runtime, job_of(), work)
        assert float((found - alone).norm()) <= 1e-5 * float(alone.norm())


def test_fault_the_two_gradients_are_clipped_one_by_one(
    runtime: Runtime, job_of: JobOf, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_of(runtime.encode(records[:1]))
    assert 0.99 * C < float(sums(runtime, job_of(), work)[0].norm()) <= C

    def beside(parameter: Tensor, found: Tensor) -> None:
        if parameter.requires_grad:
            earlier = getattr(parameter, "grad_sample", None)
            parameter.grad_sample = found if earlier is None else torch.cat([earlier, found])  # type: ignore[attr-defined]

    monkeypatch.setattr(per_example_module, "_add", beside)
    # Two rows of one record do not get through as they are.
    with pytest.raises(PrivacyError, match="per-example gradient"):
        sums(runtime, job_of(), work)
    monkeypatch.setattr(
        trainer_module, "per_example_gradients", lambda parameters, count: per_example_gradients(parameters, 2 * count)
    )
    assert float(sums(runtime, job_of(), work)[0].norm()) > 1.5 * C


def test_a_share_of_the_noise_is_added_to_the_same_sum(job_of: JobOf, records: Records) -> None:
    """Where sites add shares of the noise, at one coin and one key: what adversarial training changes is the sum."""
    privacy = {"mechanism": "distributed", "max_colluding": 1, "epsilon_alone": 8.0}
    sections = {"privacy": privacy, "federation": {"min_sites": 3}}
    plain, adversarial = (job_of(training={"local_steps": 1, **extra}, **sections) for extra in ({}, TRAINING))
    words = []
    for job in (plain, adversarial, adversarial):
        runtime = load_own_runtime(job, CPU)
        work = work_of(runtime.encode(records[:8]))
        plan = PrivacyPlan.from_job(job)
        (found,) = noisy_sums(runtime, [work], away_from_zero(runtime), plan=plan, round_number=1, attempt=1)
        words.append(found.words)
    assert (words[1] == words[2]).all()
    assert (words[0] != words[1]).any()


# --- company ---


@pytest.mark.parametrize("kind", TEXTS)
def test_company_does_not_show(task_job: JobOf, kind: str) -> None:
    """To the last bit, under heads that turn the last bit into a whole gradient, and beside other sites' values.

    In float32: `test_every_family_has_them`.
    """
    case = CASES[kind]
    job = task_job({"kind": kind, **case.section}, **case.sections, training=TRAINING)
    runtime = load_own_runtime(job, ComputeConfig(device="cpu", precision="bfloat16", cache_frozen_layers=False))
    shared = runtime.compute.micro_batch_tokens
    settle_company(runtime)
    settle_stacks(runtime)
    check_adapter(runtime, away_from_zero(runtime))
    assert runtime.compute.micro_batch_tokens == shared > 1


def test_fault_the_norms_of_the_batch_are_found(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward_module, "steepest", by_the_batch)
    with pytest.raises(PrivacyError, match="proof 3 failed"):
        prove_trainer(runtime)
    with pytest.raises(AdapterError, match="depends on the records beside it"):
        check_adapter(runtime, away_from_zero(runtime))
    settle_company(runtime)
    assert runtime.compute.micro_batch_tokens == 1


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": 0}, "greater than 0"),
        ({"radius": 1.5}, "less than or equal to 1"),
        ({"weight": 1}, "less than 1"),
        ({"steps": 3}, "steps"),
    ],
)
def test_settings_that_will_not_do(job_of: JobOf, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job_of(training={"adversarial": settings})


def test_images_are_refused(task_job: JobOf) -> None:
    case = CASES["image_classification"]
    with pytest.raises(
        ConfigError, match=r"training\.adversarial moves what enters the trained part of a language model"
    ):
        task_job({"kind": "image_classification", **case.section}, **case.sections, training={"adversarial": {}})


def test_what_opacus_samples_is_refused(runtime: Runtime, records: Records) -> None:
    runtime.model.head.norm = nn.LayerNorm(4)
    with pytest.raises(PrivacyError, match="samplers of Opacus keep one pass"):
        gradients(runtime, runtime.encode(records[:2]))


def test_the_plan_and_other_jobs_stay_as_they_are(job_of: JobOf) -> None:
    plain, adversarial, again = job_of(training={}), job_of(), job_of(training={"adversarial": None})
    assert PrivacyPlan.from_job(adversarial) == PrivacyPlan.from_job(plain)
    assert "adversarial" not in plain.canonical_json()
    assert plain.sha256 == again.sha256 != adversarial.sha256


def test_a_run_with_it_spends_and_states_what_one_without_does(
    scenario_file: Callable[..., Path], tmp_path: Path
) -> None:
    told = []
    for name, more in (("plain", {}), ("adversarial", {"adversarial": {}})):
        arms = ["non-private"] if more else []
        path = scenario_file(
            training={"rounds": 1, **more},
            baselines={"arms": arms},
            partition={"num_sites": 2},
            model={"max_length": 24},
        )
        folder = tmp_path / name
        run_scenario(load_scenario(path), folder, observer=lambda arm: Observer())
        for arm in (".", *(f"baselines/{arm}" for arm in arms)):
            state = load_file(folder / arm / "checkpoint.safetensors")
            assert all(value.isfinite().all() for value in state.values())
        spent = [json.loads(file.read_text())["epsilon_spent"] for file in sorted(folder.glob("sites/*/privacy.json"))]
        told.append((len(spent), spent, json.loads((folder / "statement.json").read_text())))
    assert told[0] == told[1]


@pytest.mark.parametrize(("kind", "bits"), [*((kind, 32) for kind in ARCHITECTURES), ("bert", 8), ("gpt2", 8)])
def test_every_family_has_them(kind: str, bits: int, tiny_bert: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    """Down to the embeddings: all layers are adapted."""
    lora: dict[str, Any] = {"last_layers": None, "train": "b"}
    backbone = make_backbone(tmp_path / kind, kind, tiny_gpt2 if ARCHITECTURES[kind].causal else tiny_bert)
    job = family_job(
        backbone, kind, "sequence_classification", lora=lora, training=TRAINING, model={"backbone_bits": bits}
    )
    runtime = load_own_runtime(job, CPU)
    runtime.load(away_from_zero(runtime))
    examples = runtime.encode(FAMILY_TASKS["sequence_classification"][1])[:4]
    assert error(gradients(runtime, examples), looped(runtime, examples)) <= 1e-4
    shared = runtime.compute.micro_batch_tokens
    settle_company(runtime)
    assert runtime.compute.micro_batch_tokens == shared
