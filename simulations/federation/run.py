"""A scenario as a real federation of processes on this machine, as `silotune federation` shows it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.node.status import read_status
from server.store.submission import Submission
from shared import terminal
from shared.errors import ConfigError, RunError
from shared.files.outputs import check_folder, make_folder
from shared.job.job import Job
from shared.models.images import image_network_sha256
from shared.privacy.filter import SpendingRule, filter_orders
from shared.privacy.plan import PrivacyPlan
from shared.stopping import saying
from simulations.federation.processes import Federation, now, summary
from simulations.running.engine import FEDERATED, check_early_stopping, check_min_sites, plan_arms
from simulations.scenario import Scenario

if TYPE_CHECKING:
    from rich.console import Console


def run_federation(scenario: Scenario, out: Path | None, *, as_json: bool) -> None:
    """Run a scenario's federated arm: a coordinator and one process for each site, over gRPC and TLS."""
    started = time.monotonic()
    console = terminal.console(as_json=as_json, soft_wrap=True)
    unit = scenario.job.privacy.unit
    if unit == "site":
        raise ConfigError(
            "silotune federation starts sites that protect their own data, but privacy.mechanism is 'central'; use `silotune "
            "simulate`."
        )
    kill, rounds = scenario.simulation.kill_in_round, scenario.job.training.rounds
    if kill is not None and kill > rounds:
        raise ConfigError(
            f"simulation.kill_in_round is {kill}, but the run has {rounds} rounds (training.rounds); name one of them, or "
            "remove the key."
        )
    folder = out or Path("runs") / f"federation-{now()}"
    check_folder(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty; choose another folder.")
    check_early_stopping(scenario, scenario.job)
    train, test = scenario.load_data()
    arm = next(arm for arm in plan_arms(scenario, folder, train) if arm.name == FEDERATED)
    check_min_sites(arm)
    budgets = _budgets_for(arm.job)
    make_folder(folder)
    # All processes share this machine's cores.
    federation = Federation(folder, environment={"OMP_NUM_THREADS": "1"})
    how_to_go_on = f"its processes are ended; what they left is in {folder}. Start again with another --out."
    with saying(lambda: how_to_go_on), contextlib.ExitStack() as closing:
        closing.callback(federation.stop)
        federation.found()
        for name, records in arm.sites.items():
            federation.join(
                name,
                records,
                **budgets,
                unit=unit,
                composition="adaptive",
                compute=scenario.compute,
                evaluation_share=scenario.data.evaluation_share,
                policy=_policy(arm.job),
            )
        console.print(
            f"CA, coordinator and {len(arm.sites)} sites made in {folder}; every key was made where it is used"
        )
        federation.start_coordinator()
        facts = federation.tls()
        console.print(f"link: gRPC over mutual {facts.tls_version}, ALPN {facts.alpn}, {facts.cipher}")
        for name in arm.sites:
            federation.start_site(name)
        submission = federation.submit(arm.job, test, compute=scenario.compute)
        console.print(f"job {submission.name}, signed by {federation.signer.verify_key.text}")
        _watch(federation, submission, list(arm.sites), console, kill_in_round=scenario.simulation.kill_in_round)
    state = submission.state()
    if state["state"] != "completed":
        raise RunError(f"the run {state['state']}: {state.get('problem') or 'see the logs in ' + str(folder)}")
    for name in arm.sites:
        for line in federation.log_of(name).splitlines():
            if "connected to" in line:
                console.print(f"{name}: {line.partition('silotune.node: ')[2]}")
    figures = summary(federation, submission, arm.job, list(arm.sites), facts)
    console.print(f"{time.monotonic() - started:.0f} s; report: {submission.run_folder / 'report.html'}")
    terminal.print_json(figures)


def _budgets_for(job: Job) -> dict[str, float]:
    """Return the caps that a run fits into."""
    alone = PrivacyPlan.from_job(job)
    if alone.honest is None:
        return {"epsilon": _budget_for(alone)}
    together = _budget_for(alone.of_sum)
    return {"epsilon": together, "epsilon_alone": max(_budget_for(alone), together)}


def _budget_for(plan: PrivacyPlan) -> float:
    """Return a cap that the run fits into, measured as real sites do: so that its results may decide what is run next."""
    budget = math.ceil(plan.epsilon())
    while True:
        rule = SpendingRule(
            composition="adaptive", delta=plan.delta, orders=filter_orders(epsilon=budget, delta=plan.delta)
        )
        if rule.epsilon(plan.events) <= budget:
            return float(budget)
        budget += 1


def _watch(
    federation: Federation, submission: Submission, sites: Sequence[str], console: Console, *, kill_in_round: int | None
) -> None:
    """Tell what happens until the job has ended.

    Args:
        kill_in_round: while this round runs, the last site's process is ended as by a power cut.
    """
    told: dict[str, object] = {}
    victim = sites[-1] if kill_in_round is not None else None

    def tell(key: str, value: object, text: str) -> None:
        if value is not None and told.get(key) != value:
            console.print(text)
        told[key] = value

    with console.status("the sites load the model") as spinner:
        while submission.is_open:
            state = submission.state()
            tell("waiting", state.get("waiting"), f"waiting: {state.get('waiting')}")
            tell("awaiting", state.get("awaiting") or None, f"waiting for approval: {state.get('awaiting')}")
            tell("refused", state.get("refused") or None, f"refused: {state.get('refused')}")
            tell("problem", state.get("problem"), f"problem: {state.get('problem')}")
            metrics = ", ".join(
                f"{name} {value:.4f}" for name, value in (state.get("metrics") or {}).items() if value is not None
            )
            tell("round", state.get("round"), f"round {state.get('round')}: {metrics}")
            if victim is not None and kill_in_round is not None and (state.get("round") or 0) >= kill_in_round - 1:
                federation.kill(victim)
                console.print(f"{victim} was killed in round {(state.get('round') or 0) + 1}")
                victim = None
            doing = ", ".join(f"{name} {read_status(federation.site(name))['state']}" for name in sites)
            spinner.update(f"round {state.get('round', 0)} done; {doing}")
            for name, process in federation.processes.items():
                if process.poll() is not None:
                    raise RunError(f"{name} ended by itself; its log says:\n{federation.log_of(name)[-2000:]}")
            time.sleep(0.2)


def _policy(job: Job) -> dict[str, Any]:
    """Return what the sites' engineers would change in their policies for this job: the metrics, and a network for images."""
    changes: dict[str, Any] = {"metrics": list(job.site_metrics.names)}
    if job.privacy.shares_noise:
        # One site's share may be small: what it protects by itself is capped by its own epsilon.
        changes["min_noise_multiplier"] = PrivacyPlan.from_job(job).noise_multiplier * 0.999
    if job.model.is_image_network:
        changes["backbones"] = {job.model.backbone: image_network_sha256(job.model)}
    return changes
