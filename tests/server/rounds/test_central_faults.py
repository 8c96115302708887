"""Planted faults of central DP: each breaks the real coordinator and must be caught.

Three audits see only what a round releases and what is charged: `audit` judges noise, clipping, divisor and coins on canary
sites (the audit that also judges the trainer), `audit_pair` the noise on updates and count together, and `audit_charges`
whether every drawn noise was charged, whenever the process died.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import server.rounds.central as central_module
import shared.privacy.central as mechanism_module
import shared.privacy.plan as plan_module
from server.rounds.central import LEDGER_FILE, CentralLedger, CentralPrivacy, SitesRound
from server.rounds.central_release import DECLARED_SITES, SitesRelease
from server.rounds.loop import run_rounds
from server.store.checkpoint import Checkpoint
from shared.errors import PrivacyError, RunError
from shared.job.federation import AggregationConfig
from shared.privacy.central import CentralPlan, CentralRound, ClippedSites, SitesSum
from shared.privacy.mechanism import PlainSum, add_gaussian_noise
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import KeyStream, SiteRandomness
from shared.tensors.adapters import Shapes
from shared.tensors.grid_sum import GridSum
from shared.wire.messages import SiteDescription
from simulations.audit.mechanism import MechanismAudit, audit_mechanism
from tests.server.rounds.central_sites import SHAPES, coordinator, grid_of, make_job
from tests.server.rounds.central_sites import released as released_by

DIMENSION = 64
ROUNDS = 3
PLAN = PrivacyPlan(
    private=True,
    unit="site",
    sample_rate=0.25,
    noise_multiplier=1.1,
    max_grad_norm=0.5,
    delta=1e-5,
    planned_steps=ROUNDS,
)
Monkey = pytest.MonkeyPatch


def injected(name: str) -> Callable[[], SiteRandomness]:
    counter = itertools.count()
    return lambda: SiteRandomness.injected(f"{name}/{next(counter)}")


def audit(name: str = "central", plan: PrivacyPlan = PLAN, **options: Any) -> MechanismAudit:
    release = SitesRelease(
        options.pop("new_randomness", injected(name)),
        dimension=DIMENSION,
        rounds=ROUNDS,
        optimizer=options.pop("optimizer", None),
    )
    return audit_mechanism(release, plan, dimension=DIMENSION, **options)


def assert_violated(result: MechanismAudit, *tests: str) -> None:
    assert result.verdict == "violated", result.text()
    assert set(tests) <= set(result.failed), result.text()


# --- negative control ---


def test_correct_mechanism_passes_99_of_100_repeats() -> None:
    results = [audit(f"control {repeat}", seed=repeat) for repeat in range(50)]  # all of so few
    assert sum(result.verdict == "consistent" for result in results) >= 0.99 * len(results)
    overall = [result.p_values["noise overall"] for result in results]
    assert 15 <= sum(p < 0.5 for p in overall) <= 35


@pytest.mark.parametrize("change", [{"sample_rate": 1.0}, {"noise_multiplier": 0.4}, {"noise_multiplier": 5.0}])
def test_correct_mechanism_passes_under_other_plans(change: dict[str, float]) -> None:
    assert audit(plan=replace(PLAN, **change)).verdict == "consistent"


def test_correct_mechanism_passes_with_randomness_of_the_operating_system() -> None:
    assert audit(new_randomness=SiteRandomness.from_os).verdict == "consistent"


# --- noise and divisor ---


@pytest.mark.parametrize("factor", [0.5, 0.85, 0.0])
def test_fault_sigma_too_small(monkeypatch: Monkey, factor: float) -> None:
    monkeypatch.setattr(
        mechanism_module, "add_gaussian_noise", lambda s, std, stream: add_gaussian_noise(s, factor * std, stream)
    )
    assert_violated(audit(), "noise overall")


def remember_arrived(monkeypatch: Monkey) -> list[int]:
    """Return a list whose last item is the number of updates of the round at hand."""
    arrived, plain_sum, plain_add = [0], CentralPlan.new_sum, ClippedSites.add

    def new_sum(plan: CentralPlan, shapes: Shapes, clip: float) -> ClippedSites:
        arrived.append(0)
        return plain_sum(plan, shapes, clip)

    def add(total: ClippedSites, update: Mapping[str, Tensor]) -> None:
        arrived[-1] += 1
        plain_add(total, update)

    monkeypatch.setattr(CentralPlan, "new_sum", new_sum)
    monkeypatch.setattr(ClippedSites, "add", add)
    return arrived


def test_fault_noise_scaled_by_the_arrived_count(monkeypatch: Monkey) -> None:
    arrived = remember_arrived(monkeypatch)
    expected = PLAN.sample_rate * DECLARED_SITES
    monkeypatch.setattr(
        mechanism_module,
        "add_gaussian_noise",
        lambda s, std, stream: add_gaussian_noise(s, std * arrived[-1] / expected, stream),
    )
    assert_violated(audit(), "noise")


def test_fault_divided_by_the_arrived_count(monkeypatch: Monkey) -> None:
    """With fewer sites than expected this adds noise, and lets who answered scale everybody's update."""
    arrived = remember_arrived(monkeypatch)
    monkeypatch.setattr(CentralPlan, "expected_sites", property(lambda plan: max(arrived[-1], 1)))
    assert_violated(audit(), "sensitivity")


def test_fault_no_noise_when_nobody_answers(monkeypatch: Monkey) -> None:
    plain = CentralPlan.add_noise

    def skipping(plan: CentralPlan, total: SitesSum, clip: float, randomness: SiteRandomness, number: int) -> SitesSum:
        return plain(plan, total, clip, randomness, number) if any(part.any() for part in total.updates) else total

    monkeypatch.setattr(CentralPlan, "add_noise", skipping)
    assert_violated(audit(), "noise")


def test_fault_noise_seed_fixed() -> None:
    """Everyone who has the source can remove the noise; two rounds with the same number share it."""
    assert_violated(audit(new_randomness=lambda: SiteRandomness.injected("constant")), "independence", "inclusion")


def test_fault_noise_from_the_public_seed(monkeypatch: Monkey) -> None:
    def seeded(sums: Sequence[Tensor], std: float, stream: KeyStream) -> list[Tensor]:
        generator = torch.Generator().manual_seed(make_job().seed)
        return [part + std * torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in sums]

    monkeypatch.setattr(mechanism_module, "add_gaussian_noise", seeded)
    assert_violated(audit(), "independence")


# --- the server optimiser ---

OPTIMIZERS = {
    "none": AggregationConfig(server_learning_rate=0.7),
    "momentum": AggregationConfig(server_optimizer="momentum", server_momentum=0.8),
    "adam": AggregationConfig(server_optimizer="adam", server_learning_rate=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_correct_mechanism_passes_with_every_server_optimiser(optimizer: AggregationConfig) -> None:
    assert audit(optimizer=optimizer).verdict == "consistent"


@pytest.mark.parametrize(("optimizer", "moment"), [("momentum", "m"), ("adam", "m"), ("adam", "v")])
@pytest.mark.parametrize("last", [False, True], ids=["every round", "last round"])
def test_fault_a_server_moment_is_fed_the_mean_without_noise(
    monkeypatch: Monkey, optimizer: str, moment: str, last: bool
) -> None:
    clean: list[SitesSum] = []
    add_noise, apply_update = CentralPlan.add_noise, central_module.apply_update

    def watched(plan: CentralPlan, total: SitesSum, clip: float, randomness: SiteRandomness, number: int) -> SitesSum:
        clean.append(total)
        return add_noise(plan, total, clip, randomness, number)

    def leaking(current: Any, mean: Any, state: Any, config: AggregationConfig) -> Any:
        following, moments = apply_update(current, mean, state, config)
        if not last or len(clean) % ROUNDS == 0:
            for name, total in zip(mean, clean[-1].updates, strict=True):
                moments[f"{name}|{moment}"] += 0.1 * (
                    total.float() / PLAN.expected_batch_size(DECLARED_SITES) - mean[name]
                )
        return following, moments

    monkeypatch.setattr(CentralPlan, "add_noise", watched)
    monkeypatch.setattr(central_module, "apply_update", leaking)
    with pytest.raises(PrivacyError, match="moved by something else than the noisy mean"):
        audit(optimizer=OPTIMIZERS[optimizer])


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_fault_the_server_learning_rate_follows_who_answered(monkeypatch: Monkey, optimizer: AggregationConfig) -> None:
    arrived, apply_update = remember_arrived(monkeypatch), central_module.apply_update
    monkeypatch.setattr(
        central_module,
        "apply_update",
        lambda current, mean, state, config: apply_update(
            current,
            mean,
            state,
            config.model_copy(update={"server_learning_rate": config.server_learning_rate * (1 + arrived[-1] / 1000)}),
        ),
    )
    with pytest.raises(PrivacyError, match="moved by something else than the noisy mean"):
        audit(optimizer=optimizer)


# --- clipping ---


class NotClipped(PlainSum):
    """Adds updates as they are, like ordinary averaging."""

    def __init__(self, shapes: Sequence[torch.Size], max_grad_norm: float) -> None:
        super().__init__(shapes)


def test_fault_clip_after_averaging(monkeypatch: Monkey) -> None:
    arrived, plain = remember_arrived(monkeypatch), ClippedSites.total

    def mean_first(sites: ClippedSites) -> SitesSum:
        total, clip = plain(sites), sites._clip_norm
        length = float(torch.cat([part.flatten() for part in total.updates]).norm()) / max(arrived[-1], 1)
        factor = min(1.0, clip / length) if length else 1.0
        return replace(total, updates=[part * factor for part in total.updates])

    monkeypatch.setattr(mechanism_module, "ClippedSum", NotClipped)
    monkeypatch.setattr(ClippedSites, "total", mean_first)
    assert_violated(audit(), "sensitivity")


def test_fault_not_clipped(monkeypatch: Monkey) -> None:
    monkeypatch.setattr(mechanism_module, "ClippedSum", NotClipped)
    assert_violated(audit(), "sensitivity")


def test_fault_head_clipped_on_its_own(monkeypatch: Monkey) -> None:
    plain = CentralPlan.new_sum

    class Apart:
        def __init__(self, plan: CentralPlan, shapes: Shapes, clip: float) -> None:
            self.parts = [plain(plan, {name: shape}, clip) for name, shape in shapes.items()]

        def add(self, update: Mapping[str, Tensor]) -> None:
            for part in self.parts:
                part.add(update)

        def total(self) -> SitesSum:
            totals = [part.total() for part in self.parts]
            return SitesSum(updates=[total.updates[0] for total in totals], count=totals[0].count)

    monkeypatch.setattr(CentralPlan, "new_sum", lambda plan, shapes, clip: Apart(plan, shapes, clip))
    assert_violated(audit(), "sensitivity")


def test_fault_rounded_up_on_a_coarse_grid(monkeypatch: Monkey) -> None:
    """A grid that rounds away from zero makes clipped updates longer than the bound."""

    class Upwards(GridSum):
        def __init__(self, shapes: Shapes, *, reach: float, **options: Any) -> None:
            super().__init__(shapes, reach=reach * 2.0**44, **options)
            self._round = lambda values, out: np.copysign(np.ceil(np.abs(values)), values, out=out)

    monkeypatch.setattr(mechanism_module, "GridSum", Upwards)
    assert_violated(audit(), "sensitivity")


# --- coins ---


def test_fault_a_fixed_number_of_sites(monkeypatch: Monkey) -> None:
    def fixed(count: int, rate: float, stream: KeyStream) -> np.ndarray:
        return np.sort(np.argsort(stream.uint64(count))[: round(rate * count)])

    monkeypatch.setattr(plan_module, "poisson_sample", fixed)
    assert_violated(audit(), "inclusion")


def test_fault_every_site_in_turn(monkeypatch: Monkey) -> None:
    turn = itertools.count()

    def shuffle(count: int, rate: float, stream: KeyStream) -> np.ndarray:
        return np.flatnonzero((np.arange(count) + next(turn)) % round(1 / rate) == 0)

    monkeypatch.setattr(plan_module, "poisson_sample", shuffle)
    assert_violated(audit(), "inclusion")


def test_fault_sites_drawn_by_the_public_seed(monkeypatch: Monkey) -> None:
    def public(attempt: SitesRound, sites: Mapping[int, SiteDescription]) -> list[int]:
        coins = np.random.default_rng([0, attempt._round_number]).random(len(sites))
        return [node for node, coin in zip(sites, coins, strict=True) if coin < attempt.plan.plan.sample_rate]

    monkeypatch.setattr(SitesRound, "draw", public)
    assert_violated(audit(), "inclusion")


def test_fault_sites_drawn_more_often_than_accounted(monkeypatch: Monkey) -> None:
    plain = PrivacyPlan.sample
    monkeypatch.setattr(
        PrivacyPlan, "sample", lambda plan, n, s: plain(replace(plan, sample_rate=min(1, plan.sample_rate * 1.5)), n, s)
    )
    assert_violated(audit(), "inclusion")


# --- the pair of updates and count ---


@dataclass(frozen=True)
class PairAudit:
    """p-values of "updates and count carry the noise that the pair is accounted with" and the reach of one site."""

    updates: float
    count: float
    independent: float
    reach: float

    @property
    def failed(self) -> set[str]:
        """What refutes the claim at 1e-3; the reach is exact."""
        found = {name for name in ("updates", "count", "independent") if getattr(self, name) < 1e-3 / 3}
        return found | ({"reach"} if self.reach > 1 + 1e-9 else set())


def audit_pair(name: str = "pair", *, rounds: int = 250) -> PairAudit:
    """Read sum and count off what production rounds release, and compare their noise with what z needs.

    `needed` is worked out here, from z and the noise on the count that the job names, not by the code under test.
    """
    z, count_noise, rate, share = 1.1, 0.8, 0.2, 0.5
    plan = replace(PLAN, sample_rate=1.0, noise_multiplier=z)
    central = CentralPlan(
        plan=plan, num_sites=100, target_quantile=share, clip_learning_rate=rate, count_noise=count_noise
    )
    needed = 1 / math.sqrt(1 / z**2 - 1 / (2 * count_noise) ** 2)
    inside = {name: torch.full(shape, 1e-3) for name, shape in SHAPES.items()}
    outside = {name: torch.full(shape, 1e3) for name, shape in SHAPES.items()}
    job, new_randomness = make_job(), injected(name)

    def released(updates: Sequence[Mapping[str, Tensor]]) -> tuple[np.ndarray, float]:
        attempt = SitesRound(central, _Uncharged(), job.aggregation, new_randomness(), 1)  # type: ignore[arg-type]
        following, state = released_by(attempt, updates)
        total = torch.cat([following[name].double().flatten() for name in SHAPES]).numpy() * 100
        moved = -math.log(float(state["|clip_norm"]) / plan.max_grad_norm) / rate + share - 0.5
        return total / plan.max_grad_norm, moved * 100

    noise, counts = [], []
    for _ in range(rounds):
        total, count = released([inside] * 3)
        noise.append((total - 3 * 1e-3 / plan.max_grad_norm) / needed)
        counts.append((count - 1.5) / count_noise)
    updates, count_scores = np.concatenate(noise), np.array(counts)
    independent = _independence_p_value(np.array(noise), count_scores)
    # Without noise, what does one site move?
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mechanism_module, "add_gaussian_noise", lambda sums, std, stream: list(sums))
        empty = released([])
        reach = max(
            z * math.hypot(np.linalg.norm(one[0] - empty[0]) / needed, (one[1] - empty[1]) / count_noise)
            for one in (released([inside]), released([outside]))
        )
    return PairAudit(
        updates=float(stats.chi2.cdf((updates**2).sum(), updates.size)),
        count=float(stats.chi2.cdf((count_scores**2).sum(), count_scores.size)),
        independent=independent,
        reach=float(reach) / (1 + 1e-5),
    )


def _independence_p_value(noise: np.ndarray, counts: np.ndarray) -> float:
    """Return the p-value of "no coordinate goes with the count, nor its square with that of the count"."""
    if not np.ptp(counts):
        return 0.0
    found = [stats.pearsonr(coordinate**power, counts**power).pvalue for coordinate in noise.T for power in (1, 2)]
    return min(1.0, float(min(found)) * len(found))


class _Uncharged:
    def charge(self, round_number: int, origin: str) -> None:
        """Charge nothing."""


def test_correct_pair_passes() -> None:
    for repeat in range(20):
        assert audit_pair(f"pair {repeat}", rounds=60).failed == set()
    assert audit_pair().failed == set()


def test_fault_count_without_noise(monkeypatch: Monkey) -> None:
    monkeypatch.setattr(
        mechanism_module,
        "add_gaussian_noise",
        lambda s, std, stream: list(s) if len(s) == 1 else add_gaussian_noise(s, std, stream),
    )
    assert "count" in audit_pair().failed


@pytest.mark.parametrize("factor", [0.5, 0.75])
def test_fault_count_with_too_little_noise(monkeypatch: Monkey, factor: float) -> None:
    monkeypatch.setattr(
        mechanism_module,
        "add_gaussian_noise",
        lambda s, std, stream: add_gaussian_noise(s, std * factor if len(s) == 1 else std, stream),
    )
    assert "count" in audit_pair().failed


def test_fault_count_that_costs_nothing(monkeypatch: Monkey) -> None:
    """The updates keep the noise multiplier z although the count is released beside them."""
    monkeypatch.setattr(CentralPlan, "update_noise_multiplier", property(lambda plan: plan.plan.noise_multiplier))
    assert "updates" in audit_pair().failed


def test_fault_count_shares_the_noise_of_the_updates(monkeypatch: Monkey) -> None:
    monkeypatch.setattr(mechanism_module, "_COUNT", mechanism_module._UPDATES)
    with pytest.raises(PrivacyError, match="was used before"):
        audit_pair()
    # Also without that refusal.
    stream = SiteRandomness.stream
    monkeypatch.setattr(
        SiteRandomness,
        "stream",
        lambda self, purpose, **where: stream(SiteRandomness(self._key, "injected"), purpose, **where),
    )
    assert "independent" in audit_pair().failed


def test_fault_whole_bits_instead_of_halves(monkeypatch: Monkey) -> None:
    """Bits of 0 and 1 reach twice as far as the formula allows."""
    plain = ClippedSites.total

    def whole(sites: ClippedSites) -> SitesSum:
        total = plain(sites)
        return replace(total, count=2 * total.count)

    monkeypatch.setattr(ClippedSites, "total", whole)
    assert "reach" in audit_pair().failed


def test_fault_bound_moved_by_the_exact_count(monkeypatch: Monkey) -> None:
    """The noisy count is released, but the next bound follows the true one."""
    exact: list[float] = [0.0]
    plain_total, plain_finish = ClippedSites.total, CentralPlan.finish

    def noted(sites: ClippedSites) -> SitesSum:
        total = plain_total(sites)
        exact.append(total.count)
        return total

    def leaking(plan: CentralPlan, noisy: SitesSum, shapes: Shapes, clip: float) -> CentralRound:
        return plain_finish(plan, replace(noisy, count=exact[-1]), shapes, clip)

    monkeypatch.setattr(ClippedSites, "total", noted)
    monkeypatch.setattr(CentralPlan, "finish", leaking)
    assert "count" in audit_pair().failed


# --- the account ---


class Killed(BaseException):
    """The process died."""


def audit_charges(folder: Path, monkeypatch: Monkey) -> bool:
    """Return whether every noise that was drawn is charged, in a run whose process dies at each point of its second round.

    Noise counts as drawn when its generator gave the first number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draws, job = [0], make_job(training={"rounds": 20, "local_steps": 2})
    moment, stop_at = [""], [0]
    plain_add, plain_finish = mechanism_module.add_gaussian_noise, CentralPlan.finish

    def die(here: str) -> None:
        if moment[0] == here and stop_at[0] > 0:
            stop_at[0] = 0
            raise Killed

    def counted(sums: Sequence[Tensor], std: float, stream: KeyStream) -> list[Tensor]:
        draws[0] += len(sums) > 1  # one for each pair
        noisy = plain_add(sums, std, stream)
        die("noise")
        return noisy

    def finish(plan: CentralPlan, noisy: SitesSum, shapes: Shapes, clip: float) -> CentralRound:
        die("finish")
        return plain_finish(plan, noisy, shapes, clip)

    monkeypatch.setattr(mechanism_module, "add_gaussian_noise", counted)
    monkeypatch.setattr(CentralPlan, "finish", finish)
    saved: list[Checkpoint] = []

    def save(checkpoint: Checkpoint) -> None:
        if checkpoint.round_number:
            die("save")
        saved.append(checkpoint)

    for where in ("noise", "finish", "save", "nowhere"):
        moment[0], stop_at[0] = where, 1
        start = saved[-1] if saved else None
        done = start.round_number if start else 0
        with contextlib.suppress(Killed):
            run_rounds(grid_of(), coordinator(job, folder, save=save), start, stop_after=done + 1)
    central = CentralPrivacy(job, folder)
    return central.release().steps >= draws[0] > 3


def test_every_drawn_noise_is_charged(tmp_path: Path, monkeypatch: Monkey) -> None:
    assert audit_charges(tmp_path, monkeypatch)


def test_fault_a_recomputed_round_is_not_charged(tmp_path: Path, monkeypatch: Monkey) -> None:
    plain = CentralLedger.charge

    def once(ledger: CentralLedger, round_number: int, origin: Any) -> None:
        if round_number not in ledger.rounds:
            plain(ledger, round_number, origin)

    monkeypatch.setattr(CentralLedger, "charge", once)
    assert not audit_charges(tmp_path, monkeypatch)


def test_fault_charged_after_the_release(tmp_path: Path, monkeypatch: Monkey) -> None:
    """The account is written with the next adapter: what a process drew before it died is forgotten."""
    plain_charge, plain_release = CentralLedger.charge, SitesRound.release

    def late(attempt: SitesRound, *arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(CentralLedger, "charge", lambda *ignored: None)
            result = plain_release(attempt, *arguments)
        plain_charge(attempt._ledger, attempt._round_number, attempt._randomness.origin)
        return result

    monkeypatch.setattr(SitesRound, "release", late)
    assert not audit_charges(tmp_path, monkeypatch)


def test_fault_account_only_in_memory(tmp_path: Path, monkeypatch: Monkey) -> None:
    monkeypatch.setattr(central_module, "write_json", lambda path, value: None)
    monkeypatch.setattr(CentralLedger, "check", lambda ledger, checkpoint: None)
    assert not audit_charges(tmp_path, monkeypatch)


def test_fault_account_begun_anew_on_restart(tmp_path: Path, monkeypatch: Monkey) -> None:
    monkeypatch.setattr(CentralLedger, "_read", lambda ledger: [])
    monkeypatch.setattr(CentralLedger, "check", lambda ledger, checkpoint: None)
    assert not audit_charges(tmp_path, monkeypatch)


def test_an_account_begun_anew_is_noticed(tmp_path: Path, monkeypatch: Monkey) -> None:
    """The same fault without its accomplice: the checkpoint knows which rounds were completed."""
    job = make_job()
    last = run_rounds(grid_of(), coordinator(job, tmp_path), None, stop_after=2)
    (tmp_path / LEDGER_FILE).unlink()
    with pytest.raises(RunError, match="does not hold the charge of round 1"):
        run_rounds(grid_of(), coordinator(job, tmp_path), last)


def test_an_audit_of_no_noise_is_refused() -> None:
    with pytest.raises(PrivacyError, match="adds no noise"):
        audit(plan=replace(PLAN, private=False))
