"""Run a scenario: make the sites, run the federated arm, then the baselines, all through production code."""

from __future__ import annotations

import functools
import logging
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
import torch

from client.app import make_client_app
from server.aggregation.mean import DIVERGED
from server.app import Run, make_server_app
from server.records.results import DIVERGED_FILE, Diverged
from server.reports.run import write_report_if_possible
from server.rounds.early_stopping import is_over, require_public_records
from server.rounds.loop import TooFewSites
from server.rounds.observer import Observer
from server.runs.folder import check_run_folder
from server.store.checkpoint import Checkpoint
from shared.data.datasets import PERSON_ROLE, dataset_fingerprint, write_jsonl
from shared.data.overlap import num_shared
from shared.errors import ConfigError, DataError, RunError, SilotuneError
from shared.files.atomic import write_json, write_text
from shared.files.json_files import canonical_json, parse_object
from shared.job.job import Job
from shared.job.values import PERSON_UNITS
from shared.privacy.central import CentralPlan
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.privacy.sizes import default_delta
from shared.runtime.runtime import load_runtime
from shared.tasks import Record, task_of
from simulations.data.partitions import partition
from simulations.data.small_gpt2 import prepare_backbone
from simulations.running.baselines import arm_changes, merged
from simulations.running.grid import InProcessGrid, with_dropouts
from simulations.running.ray_backend import run_on_ray
from simulations.running.resumption import arm_as_started, as_started
from simulations.running.sites import answer_together, forget_simulated_sites, simulated_site, site_homes
from simulations.scenario import Fold, Scenario, changed_job, persons_of

log = logging.getLogger("silotune.simulation")

FEDERATED = "federated"


@dataclass
class Arm:
    """One run of the scenario: the federated one or a baseline.

    Attributes:
        name: "federated" or the baseline's name.
        job: what it executes.
        folder: its run folder.
        sites: records by site name.
    """

    name: str
    job: Job
    folder: Path
    sites: dict[str, list[Record]] = field(default_factory=dict)


MakeObserver = Callable[[Arm], Observer]


@dataclass(frozen=True, kw_only=True)
class _Running:
    """What all arms of one run have in common; see `run_scenario`."""

    scenario: Scenario
    test: Sequence[Record]
    fold: Fold | None
    observer: MakeObserver
    resume: bool
    injected_seed: str | None


def run_scenario(
    scenario: Scenario,
    folder: Path,
    *,
    observer: MakeObserver,
    resume: bool = False,
    stop_after: int | None = None,
    injected_seed: str | None = None,
    fold: Fold | None = None,
    report: bool = True,
) -> Checkpoint:
    """Run `scenario` into `folder` and return the federated arm's last checkpoint.

    Args:
        observer: makes the observer of each arm.
        resume: continue what is there.
        stop_after: stop the federated arm after this round; baselines and report wait for the resume.
        injected_seed: for tests only, see `simulations.running.sites.simulated_site`.
        fold: the records, one part of a cross-validation; None loads and splits them as the scenario says.
        report: write the report at the end; False if the caller does, once it has more to show.

    Raises:
        SilotuneError: bad data or configuration is found before anything is written.
    """
    if scenario.simulation.threads is not None:
        torch.set_num_threads(scenario.simulation.threads)
    prepare_backbone(scenario.job.model.backbone)
    if resume:
        scenario = as_started(scenario, folder)
    train, test = (fold.train, fold.test) if fold else scenario.load_data()
    arms = plan_arms(scenario, folder, train)
    if resume:
        for arm in arms[1:]:
            arm.job = arm_as_started(scenario, arm.name, arm.job, arm.folder)
    for arm in arms:
        check_arm(scenario, arm, test)
        check_run_folder(arm.folder, arm.job, resume=resume)
    running = _Running(
        scenario=scenario, test=test, fold=fold, observer=observer, resume=resume, injected_seed=injected_seed
    )
    baselines = [arm for arm in arms[1:] if not (resume and _is_complete(arm))]
    # Baselines take long, so there is something to read before them.
    finished = _run_arm(running, arms[0], stop_after=stop_after, report=report or bool(baselines))
    if not is_over(finished, arms[0].job):
        return finished
    for arm in baselines:
        _run_baseline(running, arm)
    if report and (baselines or stop_after is not None):  # else it is written already
        write_report_if_possible(folder)
    return finished


def plan_arms(scenario: Scenario, folder: Path, train: Sequence[Record]) -> list[Arm]:
    """Return the federated arm and the baselines, with every site's records."""
    has_labels = "label" in task_of(scenario.job).roles
    if scenario.partition.kind == "dirichlet" and not has_labels:
        raise ConfigError(
            f"partition.kind is 'dirichlet', a skew of labels, but task {scenario.job.task.kind!r} has none for each record; use "
            "'iid', 'quantity' or 'column'."
        )
    persons = persons_of(train, scenario.job.privacy.unit)
    parts = partition(train, scenario.partition, seed=scenario.seed, persons=persons)
    sites = {name: [train[index] for index in indices] for name, indices in parts.items()}
    arms = [Arm(FEDERATED, scenario.job, folder, sites)]
    for name in scenario.baselines.arms:
        changes = arm_changes(
            name,
            scenario.job,
            num_records=len(train) if persons is None else persons.count,
            num_sites=len(sites),
            evaluate_every=scenario.simulation.evaluate_every,
        )
        job = changed_job(
            scenario.job,
            merged(changes, scenario.baselines.changes(name)),
            source=f"baselines.{name.replace('-', '_')}",
        )
        units = {job.privacy.unit, scenario.job.privacy.unit}
        if len(units) > 1 and units & {*PERSON_UNITS}:
            # Whose records are held out, and which site has whose, was settled by the scenario's own unit.
            raise ConfigError(
                f"baseline {name} has another privacy.unit than the scenario; run it as a scenario of its own."
            )
        records = sites if name == "federated-non-private" else {"central": list(train)}
        arms.append(Arm(name, job, arm_folder(folder, name), records))
    return arms


def arm_folder(folder: Path, name: str) -> Path:
    """Return the run folder of an arm within that of its scenario."""
    return folder if name == FEDERATED else folder / "baselines" / name


def check_arm(scenario: Scenario, arm: Arm, test: Sequence[Record]) -> None:
    """Find what would stop the coordinator or a site before anything is written.

    Raises:
        DataError, PrivacyError, ConfigError, ModelError: naming the site where one is at fault.
    """
    task = task_of(arm.job)
    plan = PrivacyPlan.from_job(arm.job)
    require_public_records(arm.job, len(test))
    check_early_stopping(scenario, arm.job)
    if arm.job.privacy.central:
        _check_central(arm)
    if arm.job.privacy.shares_noise:
        _check_one_process(scenario)
    check_min_sites(arm)
    for name, records in arm.sites.items():
        missing = [role for role in task.roles if records and role not in records[0]]
        if missing:
            raise DataError(
                f"task {arm.job.task.kind!r} needs the column role {missing[0]!r}; declare it in data.train.columns."
            )
        labels = {str(record["label"]) for record in records} if "label" in task.roles else set()
        if not labels <= {*arm.job.task.labels}:
            # A label may be a note by mistake: it is not shown.
            unknown = sum(str(record["label"]) not in arm.job.task.labels for record in records)
            raise DataError(
                f"{name}: {unknown:,} of {len(records):,} records have a label that is not among task.labels "
                f"({', '.join(arm.job.task.labels)}). Mend the data, name the right column, or add the label."
            )
        if labels and len(labels) < 2:
            _judge_single_label(scenario, name, summed=arm.job.privacy.shares_noise)
        persons = persons_of(records, arm.job.privacy.unit)
        size = len(records) if persons is None else persons.count
        try:
            plan.check_size(size)
        except SilotuneError as error:
            raise type(error)(f"{name}: {error} (for this data set: {default_delta(size):.1e})") from None
    _warn_of_overlap(arm, test)
    runtime = load_runtime(arm.job, scenario.compute)
    for name, part in {**arm.sites, "the evaluation data": list(test)}.items():
        try:
            examples = runtime.encode(part)
            if name in arm.sites and scenario.partition.kind != "dirichlet":  # whose skew was asked for
                task.check_site(examples)
        except SilotuneError as error:
            raise type(error)(f"{name}: {error}") from None


def _judge_single_label(scenario: Scenario, name: str, *, summed: bool) -> None:
    """Warn of a site all of whose records have one label where such a skew was asked for; else it is a mistake.

    Args:
        summed: whether gradients are summed before a step is taken: such a skew then does no harm, and nobody is warned.

    Raises:
        DataError: it was not asked for.
    """
    if scenario.partition.kind == "dirichlet":
        if not summed:
            log.warning(
                "all records of %s have one and the same label (partition.alpha %g).", name, scenario.partition.alpha
            )
        return
    raise DataError(
        f"all records of {name} have one and the same label; check the column of labels, raise partition.min_records, or use "
        "fewer sites."
    )


def _warn_of_overlap(arm: Arm, test: Sequence[Record]) -> None:
    """Tell whoever simulates that evaluation records are trained on as well; a real site asks `site check --public`."""
    training = [record for records in arm.sites.values() for record in records]
    if shared := num_shared(test, training):
        log.warning(
            "%s: %s of %s evaluation records stand in the sites' training data as well, so metrics on them are too good.",
            arm.name,
            f"{shared:,}",
            f"{len(test):,}",
        )


def check_min_sites(arm: Arm) -> None:
    """Raise DataError if `arm` has too few sites for a round: a real coordinator would wait for more."""
    if len(arm.sites) < arm.job.federation.min_sites:
        raise DataError(
            f"the partition has {len(arm.sites)} sites, federation.min_sites is {arm.job.federation.min_sites}; "
            "lower it or add sites."
        )


def check_early_stopping(scenario: Scenario, job: Job) -> None:
    """Raise unless the records that decide when `job` stops are public, or at least nobody's.

    Raises:
        ConfigError: saying what to declare.
    """
    protected = job.privacy.mechanism != "none"  # else there is no budget that could pay
    if protected and job.training.early_stopping is not None and scenario.data.evaluation_kind == "private":
        key = "data.kind" if scenario.data.test is None else "data.test_kind"
        raise ConfigError(
            "training.early_stopping decides by the evaluation records, and these count as private (a file does unless it is "
            f'declared otherwise): no budget would pay for the decision. Declare {key} = "public" or "synthetic" if they are, '
            "give public ones as data.test, or remove the section."
        )


def _check_one_process(scenario: Scenario) -> None:
    """Raise unless each site's two answers of a round come from one process: what it drew is nowhere else."""
    simulation = scenario.simulation
    if simulation.backend == "ray" and simulation.num_actors > 1:
        raise ConfigError(
            f"simulation.num_actors is {simulation.num_actors}; with privacy.mechanism 'distributed' it must be 1. What a site "
            "drew for a round stays in the memory of the process that drew it, and Ray may ask another one for it. Set it to 1, "
            "or simulation.backend to 'in-process', which trains many sites side by side."
        )


def _check_central(arm: Arm) -> None:
    """Raise unless the coordinator's noise can be accounted for, and the partition has the sites that the job declares."""
    CentralPlan.from_job(arm.job)
    central = arm.job.privacy.central
    if central is not None and len(arm.sites) != central.num_sites:
        raise DataError(
            f"the partition has {len(arm.sites)} sites, but privacy.central.num_sites declares {central.num_sites}; make "
            "them equal."
        )


def write_site_homes(scenario: Scenario, arm: Arm) -> None:
    """Write the home of every simulated site: the same files that a real site has.

    Homes that are there, with their ledgers, are kept.

    Raises:
        RunError: if they were made for other data or other sites; nothing is written then.
    """
    sites = arm.folder / "sites"
    found = {home.parent.name for home in site_homes(sites)}
    if strangers := sorted(found - arm.sites.keys()):
        raise RunError(
            f"{sites} holds the site {strangers[0]!r}, which the scenario does not have; resume with the scenario that the run "
            "was started with, or choose another folder."
        )
    for name in sorted(found):
        _check_site_home(scenario, arm, name)
    for name in sorted(arm.sites.keys() - found):
        home = sites / name / "home"
        write_jsonl(home / "data.jsonl", _columns(arm, name))
        # Last, for it makes the home count as there.
        write_text(home / "site.toml", tomli_w.dumps(site_config(scenario, arm, name)))


def _check_site_home(scenario: Scenario, arm: Arm, name: str) -> None:
    home = arm.folder / "sites" / name / "home"
    try:
        kept = tomllib.loads((home / "site.toml").read_text(encoding="utf-8"))
        with (home / "data.jsonl").open(encoding="utf-8") as lines:
            records = [parse_object(line) for line in lines]
        same_data = dataset_fingerprint(records) == dataset_fingerprint(_columns(arm, name))
        found = canonical_json(kept)
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{home} cannot be read ({type(error).__name__}); restore it or start a new run.") from None
    # Settings that change speed may change on the way.
    wanted = {**site_config(scenario, arm, name), "compute": kept.get("compute")}
    if found != canonical_json(wanted) or not same_data:
        raise RunError(
            f"{home} was made from other data or settings than the scenario has now; resume with the scenario that the run "
            "was started with, or choose another folder."
        )


def _columns(arm: Arm, name: str) -> list[Record]:
    roles = _roles(arm.job)
    return [{role: record[role] for role in roles} for record in arm.sites[name]]


def _roles(job: Job) -> tuple[str, ...]:
    """Return the columns that a simulated site has: the task's, and the id column where persons are the unit."""
    return (*task_of(job).roles, *([PERSON_ROLE] if job.privacy.unit in PERSON_UNITS else []))


def _planned_epsilons(job: Job) -> dict[str, float]:
    """Return the caps of a simulated site: a noise multiplier that was given, not calibrated, spends what it spends."""
    privacy = job.privacy
    if not privacy.sites_add_noise:
        return {"epsilon": privacy.epsilon}
    plan = PrivacyPlan.from_job(job)
    if plan.honest is None:
        return {"epsilon": max(privacy.epsilon, plan.epsilon())}
    together = max(privacy.epsilon, plan.of_sum.epsilon())
    return {"epsilon": together, "epsilon_alone": max(privacy.epsilon_alone or 0.0, plan.epsilon(), together)}


def site_config(scenario: Scenario, arm: Arm, name: str) -> dict[str, Any]:
    """Return the `site.toml` of one simulated site."""
    budget: dict[str, Any] = _planned_epsilons(arm.job) | {"delta": arm.job.privacy.delta}
    # What is not asked for is not written, so that homes of older versions can be resumed.
    further: dict[str, Any] = {}
    if arm.job.privacy.unit in PERSON_UNITS:
        budget["unit"] = arm.job.privacy.unit
    if scenario.data.evaluation_share:
        further["evaluation_share"] = scenario.data.evaluation_share
    if arm.job.privacy.mechanism == "central":
        further["allow_trusted_coordinator"] = True
    return {
        "name": name,
        "dataset": f"{scenario.name}-{name}",
        **further,
        "allow_non_private": arm.job.privacy.mechanism == "none",
        "data": {"path": "data.jsonl", "columns": {role: role for role in _roles(arm.job)}},
        "budget": budget,
        "compute": scenario.compute.model_dump(mode="json", exclude_none=True),
    }


def _run_arm(running: _Running, arm: Arm, *, stop_after: int | None = None, report: bool = True) -> Checkpoint:
    scenario, injected_seed = running.scenario, running.injected_seed
    run = Run(
        job=arm.job,
        folder=arm.folder,
        public_records=running.test,
        compute=scenario.compute,
        details=_details(running, arm),
        resume=running.resume,
        evaluate_every=scenario.simulation.evaluate_every,
        stop_after=stop_after,
        report=False,
        observer=running.observer(arm),
        may_fit=arm.job.privacy.mechanism == "none" or scenario.data.evaluation_kind != "private",
        new_randomness=_coordinator_randomness(injected_seed),
        prepare=functools.partial(write_site_homes, scenario, arm),
    )
    forget_simulated_sites()  # of an earlier run in this process, whose folder may have had the same name
    open_site = functools.partial(simulated_site, sites=arm.folder / "sites", injected_seed=injected_seed)
    client_app = make_client_app(open_site)
    server_app = make_server_app(
        run, wrap_grid=functools.partial(with_dropouts, scenario=scenario, job=arm.job, folder=arm.folder)
    )
    if scenario.simulation.backend == "ray":
        run_on_ray(server_app, client_app, len(arm.sites), scenario.simulation)
    else:
        # All clients at once: their few records one client after the other would be mostly padding.
        runtime = load_runtime(arm.job, scenario.compute)
        runtime.warm_cache(
            [example for part in arm.sites.values() for example in runtime.encode(part)], run.observer.preparing
        )
        # The test records as well, as far as there is room: they come up in every evaluation of every arm.
        runtime.warm_cache(runtime.encode(running.test), run.observer.preparing)
        grid = InProcessGrid(
            client_app,
            len(arm.sites),
            together=functools.partial(answer_together, open_site=open_site),
            at_once=scenario.simulation.clients_at_once,
        )
        server_app(grid, grid.server_context)
    if run.finished is None:
        raise RunError(f"the {scenario.simulation.backend} backend ended without a result; its log says why.")
    if report and stop_after is None:
        write_report_if_possible(arm.folder)
    return run.finished


def _run_baseline(running: _Running, arm: Arm) -> None:
    """Run a baseline; if one without noise diverges so far that nothing can be aggregated, note that and let the run go on."""
    try:
        _run_arm(running, arm)
    except TooFewSites as error:
        if arm.job.privacy.mechanism != "none" or DIVERGED not in str(error):
            raise
        reason = "no update could be aggregated, for its values grew too large"
        write_json(arm.folder / DIVERGED_FILE, Diverged(reason=reason))
        log.warning("baseline %s diverged: %s", arm.name, error)


def _coordinator_randomness(injected_seed: str | None) -> Callable[[], SiteRandomness]:
    if injected_seed is None:
        return SiteRandomness.from_os
    return lambda: SiteRandomness.injected(f"{injected_seed}/coordinator")


def _details(running: _Running, arm: Arm) -> Mapping[str, Any]:
    scenario, fold = running.scenario, running.fold
    # Also of the baselines beside a private run: they train on the same records.
    protected = scenario.job.privacy.mechanism != "none"
    return {
        "mode": f"simulation ({scenario.simulation.backend})",
        "arm": arm.name,
        "dataset": {
            "name": scenario.data.builtin or (scenario.data.train.path if scenario.data.train else scenario.name),
            # The number of private records is a release; what sites declare is public and stands beside each of them.
            **({} if protected else {"train_records": sum(len(records) for records in arm.sites.values())}),
            "test_records": len(running.test),
            "test_kind": scenario.data.evaluation_kind,
            **({"test_name": scenario.data.test.path} if scenario.data.test else {}),
            "partition": scenario.partition.model_dump(mode="json"),
            **({"site_names": names} if (names := _real_names(scenario, arm)) else {}),
            **({"fold": fold.number, "folds": fold.of} if fold else {}),
        },
    }


def _real_names(scenario: Scenario, arm: Arm) -> dict[str, str]:
    """Return what the data calls each site whose folder and certificate have another name."""
    column = scenario.partition.column if scenario.partition.kind == "column" else None
    if column is None or arm.name not in (FEDERATED, "federated-non-private"):
        return {}
    if scenario.job.privacy.central:
        return {}  # who takes part is what is protected
    real = {name: str(records[0][column]) for name, records in arm.sites.items() if records}
    return {name: value for name, value in real.items() if value != name}


def _is_complete(arm: Arm) -> bool:
    return (arm.folder / "evaluation.json").exists() or (arm.folder / DIVERGED_FILE).exists()
