"""Planted faults: each breaks the real mechanism, trainer, ledger, accounting or task, and must be caught.

The audit runs the production trainer on a linear model whose per-example gradient is the record itself, and reads the
noisy sums where they are used: in the gradients with which the optimiser steps.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import client.ledger.file as ledger_file
import client.training.per_example as per_example_module
import client.training.trainer as trainer_module
import shared.privacy.plan as plan_module
from client.ledger.account import Account
from client.ledger.file import LedgerFile
from client.ledger.ledger import Budget, Charge, Ledger
from client.training.proof import prove_trainer
from shared.errors import BudgetExceeded, LedgerError, PrivacyError
from shared.job.compute import ComputeConfig
from shared.job.training import TrainingConfig
from shared.models.batches import Batch
from shared.privacy.accounting import GaussianSteps
from shared.privacy.filter import Composition
from shared.privacy.mechanism import CLIP_MARGIN, ClippedSum, add_gaussian_noise
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import KeyStream, SiteRandomness
from shared.runtime.runtime import load_runtime
from shared.tasks.causal_lm import CausalLanguageModelling
from shared.tasks.tokens import token_losses
from simulations.audit.mechanism import MechanismAudit, audit_mechanism
from simulations.audit.mechanism_release import TrainerRelease

DIMENSION = 64
STEPS = 3
COMPANIONS = {0: 0}  # set for each test by the fixture below
PLAN = PrivacyPlan(
    private=True,
    unit="record",
    sample_rate=0.25,
    noise_multiplier=1.1,
    max_grad_norm=0.5,
    delta=1e-5,
    planned_steps=STEPS,
)


# --- the production trainer on records that are their own gradients ---


@pytest.fixture(params=[0, 2], ids=["alone", "beside others"], autouse=True)
def companions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fault is planted in a site that is trained alone and in one that is trained beside others."""
    monkeypatch.setitem(COMPANIONS, 0, request.param)


def trainer_release(
    new_randomness: Callable[[], SiteRandomness], micro_batch: int = 24, optimizer: TrainingConfig | None = None
) -> TrainerRelease:
    return TrainerRelease(
        new_randomness,
        dimension=DIMENSION,
        steps=STEPS,
        micro_batch=micro_batch,
        companions=COMPANIONS[0],
        optimizer=optimizer,
    )


def injected(name: str) -> Callable[[], SiteRandomness]:
    counter = itertools.count()
    return lambda: SiteRandomness.injected(f"{name}/{next(counter)}")


def audit(
    name: str = "audit",
    plan: PrivacyPlan = PLAN,
    micro_batch: int = 24,
    optimizer: TrainingConfig | None = None,
    **options: Any,
) -> MechanismAudit:
    return audit_mechanism(
        trainer_release(injected(name), micro_batch, optimizer), plan, dimension=DIMENSION, **options
    )


def assert_violated(result: MechanismAudit, *tests: str) -> None:
    assert result.verdict == "violated", result.text()
    assert set(tests) <= set(result.failed), result.text()


# --- negative control ---


def test_correct_mechanism_passes_99_of_100_repeats() -> None:
    repeats = 25 if COMPANIONS[0] else 75  # all of so few
    results = [audit(f"control {n}", seed=n, micro_batch=(24, 1000)[n % 2]) for n in range(repeats)]
    assert sum(result.verdict == "consistent" for result in results) >= 0.99 * repeats
    # The p-values are not merely large: about as many are below one half as above.
    overall = [result.p_values["noise overall"] for result in results]
    assert 0.3 * repeats <= sum(p < 0.5 for p in overall) <= 0.7 * repeats
    inside = sum(r.noise_multiplier_interval[0] <= 1.1 <= r.noise_multiplier_interval[1] for r in results)
    assert inside >= 0.99 * repeats


def test_correct_mechanism_passes_with_randomness_of_the_operating_system() -> None:
    result = audit_mechanism(trainer_release(SiteRandomness.from_os), PLAN, dimension=DIMENSION)
    assert result.verdict == "consistent", result.text()


@pytest.mark.parametrize("change", [{"sample_rate": 1.0}, {"noise_multiplier": 0.4}, {"noise_multiplier": 5.0}])
def test_correct_mechanism_passes_under_other_plans(change: dict[str, float]) -> None:
    assert audit(plan=replace(PLAN, **change)).verdict == "consistent"


def test_the_result_names_claim_bound_and_verdict_and_never_verified() -> None:
    result = audit()
    low, high = result.noise_multiplier_interval
    assert low < 1.1 < high < 1.1 * 2
    assert 0 < result.epsilon_lower_bound < result.claim == PLAN.epsilon()
    text = result.text()
    assert "CLAIM" in text
    assert "LOWER BOUND" in text
    assert "consistent" in text
    assert "verified" not in text


def test_more_noise_than_claimed_is_inconclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        plan_module, "add_gaussian_noise", lambda s, std, stream: add_gaussian_noise(s, 2 * std, stream)
    )
    result = audit()
    assert result.verdict == "inconclusive"
    (reason,) = result.result("the trainer").reasons
    assert "above the claimed 1.1000. That refutes nothing" in reason


def test_too_few_steps_are_inconclusive_and_say_what_to_do() -> None:
    release = TrainerRelease(injected("few"), dimension=16, steps=1, companions=COMPANIONS[0])
    result = audit_mechanism(release, replace(PLAN, planned_steps=1), dimension=16)
    assert result.verdict == "inconclusive"
    (reason,) = result.result("the trainer").reasons
    assert "noisy steps are too few" in reason
    assert "--tier 2" in reason


def test_an_audit_of_nothing_is_refused() -> None:
    with pytest.raises(PrivacyError, match="adds no noise"):
        audit(plan=replace(PLAN, private=False))
    with pytest.raises(PrivacyError, match="alpha"):
        audit(alpha=0.05)


# --- noise ---


@pytest.mark.parametrize("factor", [0.5, 0.85, 0.0])
def test_fault_sigma_halved(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    monkeypatch.setattr(
        plan_module, "add_gaussian_noise", lambda s, std, stream: add_gaussian_noise(s, factor * std, stream)
    )
    result = audit()
    assert_violated(result, "noise overall")
    if factor == 0.5:
        assert result.noise_multiplier_interval[1] < 0.8
        assert result.epsilon_lower_bound > result.claim


def test_fault_noise_divided_by_batch_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    expected_batch = PLAN.expected_batch_size(64)
    monkeypatch.setattr(
        plan_module, "add_gaussian_noise", lambda s, std, stream: add_gaussian_noise(s, std / expected_batch, stream)
    )
    assert_violated(audit(), "noise", "noise overall")


def test_fault_noise_divided_by_the_drawn_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is divided by the size of the sample, so the sum is not the plan's whenever the sample is not average."""
    drawn = {}
    sample, noise = PrivacyPlan.sample, PrivacyPlan.add_noise

    def sampled(self: PrivacyPlan, num_records: int, stream: KeyStream) -> np.ndarray:
        indices = sample(self, num_records, stream)
        drawn["size"] = max(len(indices), 1)
        return indices

    def divided(self: PrivacyPlan, sums: Sequence[Tensor], stream: KeyStream) -> list[Tensor]:
        return [value * 16 / drawn["size"] for value in noise(self, sums, stream)]

    monkeypatch.setattr(PrivacyPlan, "sample", sampled)
    monkeypatch.setattr(PrivacyPlan, "add_noise", divided)
    assert audit().verdict != "consistent"


@pytest.mark.parametrize("last", [STEPS - 1, 0])
def test_fault_no_noise_on_the_last_virtual_step(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    call = itertools.count()

    def forgetful(sums: Sequence[Tensor], std: float, stream: KeyStream) -> list[Tensor]:
        step = next(call) // (COMPANIONS[0] + 1)  # the sites of a step take their noise one after the other
        return add_gaussian_noise(sums, 0.0 if step % STEPS == last else std, stream)

    monkeypatch.setattr(plan_module, "add_gaussian_noise", forgetful)
    assert_violated(audit(), "noise")


@pytest.mark.parametrize("noised", ["several micro-batches", "one micro-batch", "not empty"])
def test_fault_noise_only_on_some_structure_of_micro_batches(monkeypatch: pytest.MonkeyPatch, noised: str) -> None:
    counts: dict[int, int] = {}
    micro_batch = 8
    new_sum, add = PrivacyPlan.new_sum, ClippedSum.add
    wanted = {"several micro-batches": lambda n: n > 1, "one micro-batch": lambda n: n <= 1, "not empty": bool}[noised]

    def counted_sum(self: PrivacyPlan, shapes: Sequence[torch.Size]) -> ClippedSum:
        total = new_sum(self, shapes)
        counts[id(total._sums)] = 0
        return total

    def counted_add(self: ClippedSum, gradients: Sequence[Tensor]) -> None:
        # By records, for a site beside others adds those of several micro-batches at once.
        counts[id(self._sums)] += -(-len(gradients[0]) // micro_batch)
        add(self, gradients)

    def noise(sums: Sequence[Tensor], std: float, stream: KeyStream) -> list[Tensor]:
        return add_gaussian_noise(sums, std if wanted(counts[id(sums)]) else 0.0, stream)

    monkeypatch.setattr(PrivacyPlan, "new_sum", counted_sum)
    monkeypatch.setattr(ClippedSum, "add", counted_add)
    monkeypatch.setattr(plan_module, "add_gaussian_noise", noise)
    assert_violated(audit(micro_batch=micro_batch), "noise")


def test_fault_no_noise_on_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    def adapter_only(sums: Sequence[Tensor], std: float, stream: KeyStream) -> list[Tensor]:
        return [add_gaussian_noise(sums[:1], std, stream)[0], *sums[1:]]

    monkeypatch.setattr(plan_module, "add_gaussian_noise", adapter_only)
    assert_violated(audit(), "noise overall")


def test_fault_fixed_noise_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SiteRandomness, "from_os", classmethod(lambda cls: cls(bytes(32), "os")))
    result = audit_mechanism(trainer_release(lambda: SiteRandomness.from_os()), PLAN, dimension=DIMENSION)
    assert_violated(result, "independence", "inclusion")


def test_fault_same_noise_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SiteRandomness.stream
    monkeypatch.setattr(
        SiteRandomness,
        "stream",
        lambda self, purpose, *, round_number, step: stream(self, purpose, round_number=1, step=0),
    )
    with pytest.raises(PrivacyError, match="was used before"):
        audit()
    # Also without that refusal.
    monkeypatch.setattr(
        SiteRandomness,
        "stream",
        lambda self, purpose, **where: stream(SiteRandomness(self._key, "injected"), purpose, round_number=1, step=0),
    )
    assert_violated(audit(), "independence", "inclusion")


def test_fault_a_step_more_than_accounted(monkeypatch: pytest.MonkeyPatch) -> None:
    release = trainer_release(injected("more"))
    release.training = release.training.model_copy(update={"local_steps": STEPS + 1})
    assert_violated(audit_mechanism(release, PLAN, dimension=DIMENSION), "steps", "accounting")


# --- what comes after the noise: every state of every optimiser ---

OPTIMIZERS = {
    "adamw": TrainingConfig(
        rounds=1, optimizer="adamw", weight_decay=0.3, head_learning_rate_factor=0.5, schedule="cosine"
    ),
    "momentum": TrainingConfig(rounds=1, optimizer="sgd", momentum=0.9, weight_decay=0.3, warmup_steps=2),
    "sgd": TrainingConfig(rounds=1, optimizer="sgd", momentum=0.0, weight_decay=0.3, schedule="linear"),
}
# Of a site with canaries every second step or so is empty.
RARE = replace(PLAN, sample_rate=0.02)
assert_moved_otherwise = pytest.raises(PrivacyError, match="moved by something else than the noisy sums")


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("plan", [PLAN, RARE], ids=["usual", "rare"])
def test_the_correct_mechanism_passes_with_every_optimiser(optimizer: TrainingConfig, plan: PrivacyPlan) -> None:
    result = audit(plan=plan, optimizer=optimizer)
    assert result.verdict == "consistent", result.text()


def watch(monkeypatch: pytest.MonkeyPatch) -> list[ClippedSum]:
    """Return a list that grows by the sum of every site and step when its noise is drawn."""
    seen: list[ClippedSum] = []
    made: dict[int, ClippedSum] = {}
    new_sum, add_noise = PrivacyPlan.new_sum, PrivacyPlan.add_noise

    def remembered(self: PrivacyPlan, shapes: Sequence[torch.Size]) -> ClippedSum:
        total = new_sum(self, shapes)
        made[id(total.sums)] = total
        return total

    def watched(self: PrivacyPlan, sums: list[Tensor], stream: KeyStream) -> list[Tensor]:
        seen.append(made[id(sums)])
        return add_noise(self, sums, stream)

    monkeypatch.setattr(PrivacyPlan, "new_sum", remembered)
    monkeypatch.setattr(PrivacyPlan, "add_noise", watched)
    return seen


@pytest.mark.parametrize(
    ("optimizer", "moment"), [("adamw", "exp_avg"), ("adamw", "exp_avg_sq"), ("momentum", "momentum_buffer")]
)
@pytest.mark.parametrize("only_last", [False, True], ids=["every step", "last step"])
def test_fault_a_moment_is_fed_the_mean_without_noise(
    monkeypatch: pytest.MonkeyPatch, optimizer: str, moment: str, only_last: bool
) -> None:
    """Moments stay at the site and come back in the next step and round: what they hold is released then."""
    seen, build = watch(monkeypatch), trainer_module.build_optimizer

    def leaking(trainable: Any, head: set[str], training: TrainingConfig) -> torch.optim.Optimizer:
        made = build(trainable, head, training)
        steps = itertools.count(1)

        def feed(*_: Any) -> None:
            if next(steps) < STEPS and only_last:
                return
            for place, stack in enumerate(trainable.values()):
                clean = seen[-1].sums[place] / PLAN.expected_batch_size(64)
                made.state[stack][moment][-1].add_(clean - stack.grad[-1])

        made.register_step_post_hook(feed)
        return made

    monkeypatch.setattr(trainer_module, "build_optimizer", leaking)
    with assert_moved_otherwise:
        audit(optimizer=OPTIMIZERS[optimizer])


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_fault_the_learning_rate_follows_the_clipped_share(
    monkeypatch: pytest.MonkeyPatch, optimizer: TrainingConfig
) -> None:
    seen, set_rate = watch(monkeypatch), trainer_module.set_learning_rate

    def adaptive(made: torch.optim.Optimizer, training: TrainingConfig, step: int) -> None:
        set_rate(made, training, step)
        for group in made.param_groups:
            group["lr"] *= 1 - 0.01 * seen[-1].num_clipped / max(seen[-1].num_examples, 1)

    monkeypatch.setattr(trainer_module, "set_learning_rate", adaptive)
    with assert_moved_otherwise:
        audit(optimizer=optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("what", ["weight_decay", "lr"])
def test_fault_an_empty_sample_changes_the_step(
    monkeypatch: pytest.MonkeyPatch, optimizer: TrainingConfig, what: str
) -> None:
    """Decay, or the step itself, is left out when nobody was drawn: whether somebody was is then seen without noise."""
    seen, set_rate = watch(monkeypatch), trainer_module.set_learning_rate

    def skipping(made: torch.optim.Optimizer, training: TrainingConfig, step: int) -> None:
        set_rate(made, training, step)
        for group in made.param_groups:
            group[what] = (training.weight_decay if what == "weight_decay" else group["lr"]) * bool(
                seen[-1].num_examples
            )

    monkeypatch.setattr(trainer_module, "set_learning_rate", skipping)
    with assert_moved_otherwise:
        audit(plan=RARE, optimizer=optimizer)


# --- clipping ---


class ClippedAfterAveraging(ClippedSum):
    """Averages first; then clips the average (times the number of examples: a sum again)."""

    times_count = True

    def add(self, gradients: Sequence[Tensor]) -> None:
        for total, part in zip(self._sums, gradients, strict=True):
            total += part.double().sum(dim=0)
        self.num_examples += len(gradients[0])

    @property
    def sums(self) -> list[Tensor]:
        count = max(self.num_examples, 1)
        norm = float(torch.cat([total.flatten() for total in self._sums]).norm()) / count
        factor = min(1.0, CLIP_MARGIN * self._max_grad_norm / max(norm, 1e-30)) / count
        return [total * factor * (count if self.times_count else 1) for total in self._sums]


@pytest.mark.parametrize("times_count", [True, False])
def test_fault_clip_after_averaging(monkeypatch: pytest.MonkeyPatch, times_count: bool) -> None:
    monkeypatch.setattr(ClippedAfterAveraging, "times_count", times_count)
    monkeypatch.setattr(plan_module, "ClippedSum", ClippedAfterAveraging)
    assert_violated(audit(), "sensitivity")


@pytest.mark.parametrize("micro_batch", [24, 1000])
def test_fault_clip_per_micro_batch(monkeypatch: pytest.MonkeyPatch, micro_batch: int) -> None:
    add = ClippedSum.add
    monkeypatch.setattr(
        ClippedSum, "add", lambda self, parts: add(self, [part.sum(dim=0, keepdim=True) for part in parts])
    )
    assert_violated(audit(micro_batch=micro_batch), "sensitivity")


def _add_without_head(self: ClippedSum, gradients: Sequence[Tensor]) -> None:
    """Clip all but the last parameter; add that as it is."""
    *adapter, head = gradients
    inner = ClippedSum([part.shape[1:] for part in adapter], self._max_grad_norm)
    CLIPPED_ADD(inner, adapter)
    for total, part in zip(self._sums, [*inner._sums, head.double().sum(dim=0)], strict=True):
        total += part
    self.num_examples += len(head)


CLIPPED_ADD = ClippedSum.add


def test_fault_head_left_unclipped(monkeypatch: pytest.MonkeyPatch, classification_job: Callable[..., Any]) -> None:
    monkeypatch.setattr(ClippedSum, "add", _add_without_head)
    assert_violated(audit(), "sensitivity")
    with pytest.raises(PrivacyError, match="proof 2 failed"):
        prove_trainer(load_runtime(classification_job(), ComputeConfig(device="cpu", precision="float32")))


def test_fault_head_clipped_by_itself(monkeypatch: pytest.MonkeyPatch, classification_job: Callable[..., Any]) -> None:
    """Adapter and head each within C: together up to sqrt(2) C."""

    def apart(self: ClippedSum, gradients: Sequence[Tensor]) -> None:
        for total, part in zip(self._sums, gradients, strict=True):
            inner = ClippedSum([total.shape], self._max_grad_norm)
            CLIPPED_ADD(inner, [part])
            total += inner.sums[0]

    monkeypatch.setattr(ClippedSum, "add", apart)
    assert_violated(audit(), "sensitivity")
    with pytest.raises(PrivacyError, match="proof 2 failed"):
        prove_trainer(load_runtime(classification_job(), ComputeConfig(device="cpu", precision="float32")))


def test_fault_no_clipping_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "ClippedSum", lambda shapes, norm: plan_module.PlainSum(shapes))
    assert_violated(audit(), "sensitivity")


def test_fault_a_record_that_is_not_finite_poisons_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    def naive(self: ClippedSum, gradients: Sequence[Tensor]) -> None:
        norms = torch.stack([part.flatten(1).double().norm(dim=1) for part in gradients]).norm(dim=0)
        scale = CLIP_MARGIN * self._max_grad_norm / norms.clamp(min=CLIP_MARGIN * self._max_grad_norm)
        for total, part in zip(self._sums, gradients, strict=True):
            total += torch.einsum("i,i...->...", scale, part.double())

    monkeypatch.setattr(ClippedSum, "add", naive)
    assert_violated(audit(), "sensitivity")


def test_fault_gradients_of_earlier_micro_batches_are_added_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that is counted in two rows is clipped twice to C: its influence is 2 C."""
    take, slices = trainer_module.per_example_gradients, per_example_module.slices_by_owner
    if COMPANIONS[0]:
        monkeypatch.setattr(per_example_module, "slices_by_owner", lambda owners: [*slices(owners), *slices(owners)])
    else:
        doubled = lambda p, n: [torch.cat([g, g]) for g in take(p, n)]  # noqa: E731
        monkeypatch.setattr(trainer_module, "per_example_gradients", doubled)
    assert_violated(audit(), "signal", "sensitivity")


# --- sampling and accounting ---


def test_fault_shuffle_accounted_as_poisson(monkeypatch: pytest.MonkeyPatch) -> None:
    epoch: list[int] = []

    def shuffled(num_records: int, sample_rate: float, stream: KeyStream) -> np.ndarray:
        size = round(num_records * sample_rate)
        if len(epoch) < size:
            epoch[:] = np.argsort(stream.uint64(num_records)).tolist()
        taken = [epoch.pop() for _ in range(size)]
        return np.array([i for i in taken if i < num_records], dtype=np.intp)

    monkeypatch.setattr(plan_module, "poisson_sample", shuffled)
    assert_violated(audit(), "inclusion")


def test_fault_fixed_size_sample_accounted_as_poisson(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        plan_module,
        "poisson_sample",
        lambda n, q, stream: np.sort(np.argsort(stream.uint64(n))[: round(n * q)]),
    )
    assert_violated(audit(), "inclusion")


def test_fault_every_record_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "poisson_sample", lambda n, q, stream: np.arange(n))
    assert_violated(audit(), "inclusion")


def test_fault_epsilon_claimed_too_low(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_violated(audit(claim=PLAN.epsilon() * 0.9), "accounting")
    monkeypatch.setattr(PrivacyPlan, "epsilon", lambda self, steps=None: 0.1)
    assert_violated(audit(), "accounting")


# --- ledger ---


def spend_and_restart(path: Path) -> float:
    """Charge most of a cap, restart, and charge as much again; return epsilon after the restart."""
    budget = Budget(epsilon=3.0, delta=1e-5)
    event = GaussianSteps(noise_multiplier=1.0, sample_rate=0.05, steps=60)
    charge = Charge(job_id="job", round=1, request_sha256="a" * 64, mechanism=event)
    for _ in range(2):
        ledger = Ledger(path, dataset="notes", unit="record", budget=budget)
        try:
            ledger.reserve(charge)
            spent = ledger.spent_epsilon()
        finally:
            ledger.close()
    return spent


def test_restart_keeps_the_charges(tmp_path: Path) -> None:
    with pytest.raises(BudgetExceeded):
        spend_and_restart(tmp_path / "ledger.db")


def test_fault_ledger_reset_on_restart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a file made anew at every start the second charge passes: the check of the test above sees it."""
    create = ledger_file._create_private_file

    def anew(path: Path) -> None:
        path.unlink(missing_ok=True)
        create(path)

    monkeypatch.setattr(ledger_file, "_create_private_file", anew)
    assert spend_and_restart(tmp_path / "ledger.db") < 3.0


def test_fault_ledger_emptied_on_restart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the entries dropped at every start, the chain's head no longer fits: the ledger refuses to open."""
    check = LedgerFile._check_or_create_schema

    def emptied(self: LedgerFile) -> None:
        check(self)
        self._connection.execute("DROP TRIGGER IF EXISTS no_delete")
        self._connection.execute("DELETE FROM entries")

    monkeypatch.setattr(LedgerFile, "_check_or_create_schema", emptied)
    with pytest.raises(LedgerError, match="cannot be trusted"):
        spend_and_restart(tmp_path / "ledger.db")


@pytest.mark.parametrize("composition", ["fixed", "adaptive"])
def test_charges_of_other_jobs_count(tmp_path: Path, composition: Composition) -> None:
    assert jobs_that_fit(tmp_path / "ledger.db", composition) == 1


@pytest.mark.parametrize("composition", ["fixed", "adaptive"])
def test_fault_only_the_charges_of_this_job_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, composition: Composition
) -> None:
    """With every job on an account of its own, each passes under the cap: the check of the test above sees it."""
    counted = Account.counted

    def of_this_job(
        self: Account, composition: Composition, further: Charge | None = None, **how: Any
    ) -> list[GaussianSteps]:
        own = {number: made for number, made in self.charges.items() if further and made.job_id == further.job_id}
        return counted(replace(self, charges=own), composition, further, **how)

    monkeypatch.setattr(Account, "counted", of_this_job)
    assert jobs_that_fit(tmp_path / "ledger.db", composition) == 4


def jobs_that_fit(path: Path, composition: Composition) -> int:
    """Charge the same for one job after the other, each alone within the cap and two of them not; return how many pass."""
    ledger = Ledger(
        path, dataset="notes", unit="record", budget=Budget(epsilon=1.31, delta=1e-5, composition=composition)
    )
    event = GaussianSteps(noise_multiplier=2.0, sample_rate=0.05, steps=80)
    passed = 0
    try:
        for number in range(4):
            with contextlib.suppress(BudgetExceeded):
                ledger.reserve(Charge(job_id=f"job {number}", round=1, request_sha256="a" * 64, mechanism=event))
                passed += 1
    finally:
        ledger.close()
    return passed


# --- task ---


@pytest.mark.parametrize("train", ["b", "both"])
def test_fault_token_mean_loss_across_the_batch(
    monkeypatch: pytest.MonkeyPatch, language_job: Callable[..., Any], train: str
) -> None:
    def coupled(self: CausalLanguageModelling, outputs: Tensor, batch: Batch) -> Tensor:
        nll, real = token_losses(*self._shifted(outputs, batch))
        return nll.sum(dim=1) * len(nll) / real.sum()

    runtime = load_runtime(language_job(lora={"train": train}), ComputeConfig(device="cpu", precision="float32"))
    prove_trainer(runtime)
    monkeypatch.setattr(CausalLanguageModelling, "per_example_loss", coupled)
    with pytest.raises(PrivacyError, match="proof 3 failed"):
        prove_trainer(runtime)
