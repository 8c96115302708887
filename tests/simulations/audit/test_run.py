"""`silotune audit`: a run's claim through all tiers, what is refused, and the faults that guesses about canaries see."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import shared.privacy.plan as plan_module
from server.rounds.observer import Observer
from shared.errors import PrivacyError, RunError
from shared.privacy.mechanism import ClippedSum, add_gaussian_noise
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import KeyStream, SiteRandomness
from simulations.audit.canaries import train_on_gradient_canaries
from simulations.audit.mechanism_release import TrainerRelease
from simulations.audit.models import audit_shadow_models, audit_text_canaries, open_site
from simulations.audit.one_run import audit_one_run
from simulations.audit.result import AuditResult
from simulations.audit.run import (
    audit_gradient_canaries,
    audit_run_mechanism,
    check_simulation,
    open_run,
)
from simulations.running.engine import run_scenario
from simulations.scenario import load_scenario

Silotune = Callable[..., Any]


@pytest.fixture(scope="module")
def finished(write_scenario: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished simulation with a baseline that is not private; no test may change it outside of `audit/`."""
    folder = tmp_path_factory.mktemp("audited")
    words = ["good", "bad", "plot", "cast", "film", "dull", "warm", "end"]
    rng = np.random.default_rng(0)
    rows = [(" ".join(rng.choice(words, 6)), ["good", "bad"][i % 2]) for i in range(160)]
    baselines = {"arms": ["federated-non-private"]}
    path = write_scenario(folder, rows=rows, training={"rounds": 2}, partition={"num_sites": 2}, baselines=baselines)
    run_scenario(load_scenario(path), folder / "run", observer=lambda arm: Observer())
    return folder / "run"


@pytest.fixture
def run_copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run to be changed."""
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("audit"))
    return tmp_path / "run"


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return all files of a run but those of its audits."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if "audit" not in p.relative_to(folder).parts}


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what a run claims ---


def test_tier_1_audits_the_plan_of_the_run_and_leaves_a_record(finished: Path) -> None:
    before = snapshot(finished)
    audit = audit_run_mechanism(finished)
    claims = [json.loads(p.read_text())["epsilon_spent"] for p in finished.glob("sites/*/privacy.json")]
    assert audit.verdict == "consistent", audit.text()
    assert audit.claim == max(claims)
    assert audit.steps == 4
    assert audit.noise_multiplier == 1.0
    stored = json.loads((finished / "audit" / "tier1.json").read_text())
    assert stored["verdict"] == "consistent"
    assert stored["lower_bound"] < stored["claim"] < stored["ceiling"]
    assert stored["seeds"] == [0]
    assert {"date", "version", "job_sha256", "alpha", "delta", "audited"} <= stored.keys()
    assert snapshot(finished) == before


def test_tier_1_sees_a_claim_that_is_lower_than_what_was_executed(run_copy: Path) -> None:
    for path in run_copy.glob("sites/*/privacy.json"):
        change_json(path, epsilon_spent=json.loads(path.read_text())["epsilon_spent"] * 0.9)
    audit = audit_run_mechanism(run_copy)
    assert audit.verdict == "violated"
    assert audit.failed == ("accounting",)


def test_a_record_of_another_mechanism_is_refused(run_copy: Path) -> None:
    for path in run_copy.glob("sites/*/privacy.json"):
        change_json(path, events=[{"noise_multiplier": 0.5, "sample_rate": 0.25, "steps": 4}])
    with pytest.raises(RunError, match="do not belong together"):
        open_run(run_copy)


@pytest.mark.parametrize("changes", [{"randomness": "injected"}, {"private": False}])
def test_a_run_without_epsilon_is_refused(run_copy: Path, changes: dict[str, object]) -> None:
    change_json(next(run_copy.glob("sites/*/privacy.json")), **changes)
    with pytest.raises(RunError, match="has no epsilon"):
        audit_run_mechanism(run_copy)
    assert not (run_copy / "audit").exists()


def test_a_run_that_is_not_private_unfinished_or_none_is_refused(
    finished: Path, run_copy: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="is not private"):
        open_run(finished / "baselines" / "federated-non-private")
    for path in run_copy.glob("sites/*/privacy.json"):
        path.unlink()
    with pytest.raises(RunError, match="finish the run first"):
        open_run(run_copy)
    with pytest.raises(RunError, match="expected the folder of a run"):
        open_run(tmp_path)


def test_a_federation_is_audited_by_tier_1_only(run_copy: Path) -> None:
    change_json(run_copy / "run.json", mode="federation")
    run = open_run(run_copy)
    for train in (check_simulation, open_site, audit_text_canaries, audit_shadow_models):
        with pytest.raises(RunError, match="is a federation"):
            train(run)
    shutil.rmtree(run_copy / "sites" / run.site / "home")
    assert audit_run_mechanism(run_copy).verdict == "consistent"


# --- trainings on simulated data ---


def test_text_canaries_on_a_simulated_site(finished: Path) -> None:
    before = snapshot(finished)
    result, trainings = audit_text_canaries(open_run(finished), num_canaries=64, trainings=2)
    assert result.verdict in ("consistent", "inconclusive")
    assert result.lower_bound < result.claim
    assert [len(training.scores) for training in trainings] == [64, 64]
    assert np.isfinite(np.concatenate([training.scores for training in trainings])).all()
    assert np.concatenate([training.scores for training in trainings]).std() > 0
    assert snapshot(finished) == before, "an audit writes nothing at a site, least of all into its ledger"


def test_shadow_models_are_kept_and_used_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, run = snapshot(finished), open_run(finished)
    told: list[int] = []
    result, attacked = audit_shadow_models(
        run, shadows=14, targets=2, progress=lambda done, total, what: told.append(done)
    )
    models = sorted((finished / "audit" / "tier3").glob("model-*.npz"))
    assert len(models) == 16
    assert told == list(range(17))
    assert result.tier == 3
    assert result.verdict in ("consistent", "inconclusive")
    assert 0 <= result.details["tpr_at_0.1%_fpr"] <= 1
    assert len(attacked) == 2
    assert snapshot(finished) == before
    models[3].write_bytes(b"cut off")
    times = {path: path.stat().st_mtime_ns for path in models}
    again, _ = audit_shadow_models(run, shadows=14, targets=2)
    changed = [path for path in models if path.stat().st_mtime_ns != times[path]]
    assert changed == [models[3]], "only what is missing or damaged is trained again"
    assert again.details["members"] == result.details["members"]
    # Another question (here: other records) does not take old answers.
    audit_shadow_models(run, shadows=14, targets=1, num_records=40, seed=7)
    assert len(list((finished / "audit" / "tier3").glob("model-*.npz"))) > 16


# --- the faults that tier 2 sees, through the production trainer ---

PLAN = PrivacyPlan(
    private=True,
    unit="record",
    sample_rate=0.25,
    noise_multiplier=1.1,
    max_grad_norm=0.5,
    delta=1e-5,
    planned_steps=3,
)


def guess_canaries(seed: int = 0, *, plan: PrivacyPlan = PLAN, size: int = 256) -> AuditResult:
    release = TrainerRelease(SiteRandomness.from_os, dimension=size, steps=plan.planned_steps, micro_batch=64)
    done = [train_on_gradient_canaries(release, plan, num_canaries=size, seed=5 * seed + number) for number in range(5)]
    steps = plan.mechanism(plan.planned_steps)
    return audit_one_run(done, steps, claim=plan.epsilon(), delta=plan.delta, alpha=1e-3, audited="canary gradients")


def test_correct_trainer_is_consistent_99_of_100_times() -> None:
    results = [guess_canaries(seed) for seed in range(100)]
    assert sum(result.verdict == "consistent" for result in results) >= 99
    assert max(result.lower_bound for result in results) > 0


@pytest.mark.parametrize("factor", [1 / 16, 0.0])
def test_fault_noise_divided_by_the_batch_or_missing(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    monkeypatch.setattr(plan_module, "add_gaussian_noise", lambda s, std, r: add_gaussian_noise(s, factor * std, r))
    result = guess_canaries()
    assert result.verdict == "violated", result.text()


class ClippedAfterAveraging(ClippedSum):
    """Clips the average and turns it into a sum again."""

    def add(self, gradients: Sequence[Tensor]) -> None:
        for total, part in zip(self._sums, gradients, strict=True):
            total += part.double().sum(dim=0)
        self.num_examples += len(gradients[0])

    @property
    def sums(self) -> list[Tensor]:
        norm = float(torch.cat([total.flatten() for total in self._sums]).norm()) / max(self.num_examples, 1)
        return [total * min(1.0, self._max_grad_norm / max(norm, 1e-30)) for total in self._sums]


class HeadUnclipped(ClippedSum):
    """Clips the adapter and adds the head as it is."""

    def add(self, gradients: Sequence[Tensor]) -> None:
        inner = ClippedSum([part.shape[1:] for part in gradients[:-1]], self._max_grad_norm)
        inner.add(gradients[:-1])
        for total, part in zip(self._sums, [*inner.sums, gradients[-1].double().sum(dim=0)], strict=True):
            total += part


@pytest.mark.parametrize("broken", [ClippedAfterAveraging, HeadUnclipped])
def test_fault_in_clipping(monkeypatch: pytest.MonkeyPatch, broken: type[ClippedSum]) -> None:
    monkeypatch.setattr(plan_module, "ClippedSum", broken)
    result = guess_canaries(plan=replace(PLAN, noise_multiplier=1.5))
    assert result.verdict == "violated", result.text()


def test_fault_every_record_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def everybody(num_records: int, sample_rate: float, stream: KeyStream) -> np.ndarray:
        return np.arange(num_records)

    monkeypatch.setattr(plan_module, "poisson_sample", everybody)
    # The rarer a record should be drawn, the further the truth lies above the claim: here by 6 deviations of the bound.
    result = guess_canaries(plan=replace(PLAN, sample_rate=0.05))
    assert result.verdict == "violated", result.text()


def test_an_adapter_that_moved_by_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    step = torch.optim.SGD.step

    def pushed(self: torch.optim.SGD, *arguments: Any) -> None:
        step(self, *arguments)
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(0.01)

    monkeypatch.setattr(torch.optim.SGD, "step", pushed)
    with pytest.raises(PrivacyError, match="moved by something else"):
        guess_canaries()


# --- the command ---


def test_command_prints_one_json_line_and_leaves_a_figure(silotune: Silotune, finished: Path) -> None:
    for tier, options in ((1, ()), (2, ("--num-canaries", "64", "--trainings", "2")), (3, ("--seed", "50"))):
        outcome = silotune("audit", finished, "--tier", tier, "--json", *options)
        assert outcome.status == 0, outcome.err
        (line,) = outcome.out.splitlines()
        assert json.loads(line) == json.loads((finished / "audit" / f"tier{tier}.json").read_text())
        assert (finished / "audit" / f"tier{tier}.png").read_bytes().startswith(b"\x89PNG")


def test_command_prints_a_table_that_never_says_verified(silotune: Silotune, finished: Path) -> None:
    outcome = silotune("audit", finished)
    assert outcome.status == 0, outcome.err
    for word in ("CLAIM", "LOWER BOUND", "CEILING", "consistent", "figure:"):
        assert word in outcome.out
    assert "verified" not in outcome.out


def test_command_ends_with_status_3_if_the_claim_is_violated(silotune: Silotune, run_copy: Path) -> None:
    for path in run_copy.glob("sites/*/privacy.json"):
        change_json(path, epsilon_spent=0.5)
    outcome = silotune("audit", run_copy)
    assert outcome.status == 3
    assert "the test of accounting failed" in outcome.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tier", "4"), "--tier is 4"),
        (("--tier", "2", "--canaries", "paper"), "'gradient' or 'text'"),
        (("--tier", "2", "--num-canaries", "3"), "--num-canaries is 3"),
        (("--tier", "3", "--shadows", "8"), "--shadows is 8"),
        (("--alpha", "0.05"), "alpha in (0, 0.001]"),
    ],
)
def test_command_explains_a_bad_option(
    silotune: Silotune, finished: Path, options: tuple[str, ...], message: str
) -> None:
    outcome = silotune("audit", finished, *options)
    assert outcome.status in (1, 2)
    assert message in outcome.err


def test_gradient_canaries_of_a_run_say_what_was_audited(finished: Path) -> None:
    result, _ = audit_gradient_canaries(open_run(finished), num_canaries=64, trainings=2)
    assert "2 trainings of 4 steps" in result.audited
    assert result.tier == 2


def test_the_table_of_faults_names_tests_that_exist() -> None:
    root = Path(__file__).resolve().parents[3]
    table = set(re.findall(r"`(test_\w+)`", (root / "docs" / "auditing.md").read_text()))
    client = root / "tests" / "client" / "training"
    files = [client / "test_faults.py", client / "test_person_faults.py", Path(__file__)]
    defined = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), flags=re.MULTILINE)}
    assert table
    assert table <= defined
