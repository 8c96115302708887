"""Every submitted job as the console shows it, read again where its files changed.

Formal guarantees (tests: tests/server/console/test_secrets.py, test_runs.py)
    * Of what sites wrote, nothing is kept but names as certificates have them, and codes of refusals that this version knows:
      no reason, no metric of a site, no name of a label (test_nothing_of_a_site_reaches_a_page).
    * When a round under central DP ended is not told, but to an hour (test_rounds_under_central_dp_are_looked_up_seldom).
    * A run is found by the name of its folder among those that are there, never by a path (test_no_path_leads_elsewhere).
    * A thousand runs take well under 0.3 s, the first time as well (test_a_thousand_runs).
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from server.console.said import is_name
from server.coordinator.progress import code_of
from server.records.rounds import RoundRecord, read_rounds
from server.store.submission import OPEN, Submission, submissions
from shared.errors import RunError, SilotuneError
from shared.files.json_files import parse_record, read_if_there
from shared.job.kinds import primary_metric

_METRIC = re.compile(r"[a-z0-9_]{1,40}(@[0-9]{1,4})?")
"""A metric of all records; those of one label have its name after a space."""
_MOST_CURVES, _MOST_POINTS = 16, 1000
SECRET_SECONDS = 3600.0
"""Under central DP how long a round took tells how many sites were drawn, so how far a run is is looked up no more often."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job says of itself; its signature is checked where it is run, and on its page.

    Attributes:
        rounds, min_sites: as planned.
        kind: of task.
        mechanism, unit, epsilon, epsilon_alone, noise_multiplier, delta: of privacy; None of what the job does not say.
    """

    rounds: int | None = None
    min_sites: int | None = None
    kind: str = ""
    mechanism: str = ""
    unit: str = ""
    epsilon: float | None = None
    epsilon_alone: float | None = None
    noise_multiplier: float | None = None
    delta: float | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One submitted job at one moment.

    Attributes:
        submission: its folder.
        plan: what it asks for.
        state: of the submission; "damaged" if its files cannot be read.
        is_stopping: somebody asked to stop it, and it has not ended yet.
        is_waiting: it cannot go on now, and will by itself.
        has_problem: the coordinator noted one; its text may quote a site, so it is not here.
        num_done: rounds that are durable.
        stopped_early: round after which the job's own rule ended it.
        metric, value: how it does on public records, by its task's metric; "" and None before the first evaluation.
        spent: largest epsilon spent by a site so far.
        since, started: when the state was taken up, and when it was begun last; UTC, ISO 8601.
        last: when the last round became durable, seconds since 1970. Under central DP it would tell how many sites were drawn, as
            would the end of the run: both are None.
        sites: who takes part.
        awaiting: sites at which the job waits for approval.
        refused: site -> code of its refusal.
        job, signer: hash of the job, key that signed it.
        mark: stands for all of this.
    """

    submission: Submission
    plan: Plan = Plan()
    state: str = "damaged"
    is_stopping: bool = False
    is_waiting: bool = False
    has_problem: bool = False
    num_done: int = 0
    stopped_early: int | None = None
    metric: str = ""
    value: float | None = None
    spent: float | None = None
    since: str | None = None
    started: str | None = None
    last: float | None = None
    sites: tuple[str, ...] = ()
    awaiting: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    job: str = ""
    signer: str = ""
    mark: str = ""

    @property
    def id(self) -> str:
        """Names it in addresses: its folder's name."""
        return self.submission.name

    @property
    def seen(self) -> str:
        """Names the state that a page showed: one of before, though called the same, is another."""
        return f"{self.state} {self.since or ''}".strip()

    @property
    def steered(self) -> str:
        """Names what can be asked of it now: likewise, and whether it is stopping."""
        return f"{self.seen}{' stopping' if self.is_stopping else ''}"

    @property
    def is_open(self) -> bool:
        """Whether the coordinator still has to work on it."""
        return self.state in OPEN


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What a run's rounds say, thinned out.

    Attributes:
        rounds: their numbers.
        metrics: name -> value after each, on public records.
        epsilon: largest epsilon spent by a site after each.
        counted: site -> updates that counted; empty under central DP, where it is secret who was drawn.
    """

    rounds: list[int]
    metrics: dict[str, list[float | None]]
    epsilon: list[float | None]
    counted: Mapping[str, int]


class Runs:
    """The jobs of a coordinator; safe to use from several threads.

    Args:
        jobs: their folder.
        now: seconds of any clock that only goes on.
    """

    def __init__(self, jobs: Path, *, now: Callable[[], float] = time.monotonic) -> None:
        self._jobs, self._now = jobs, now
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[object, Run]] = {}
        self._looked: dict[str, float] = {}
        self._plans: dict[str, tuple[object, Plan]] = {}
        self._curves: OrderedDict[str, tuple[object, Curves]] = OrderedDict()
        self.all()  # so that the first page need not read every file

    def all(self) -> list[Run]:
        """Return all of them, the newest first."""
        with self._lock:
            found = [self._run(submission) for submission in reversed(submissions(self._jobs))]
            if len(self._kept) > 2 * len(found) + 100:
                here = {run.id for run in found}
                self._kept = {name: kept for name, kept in self._kept.items() if name in here}
                self._plans = {name: kept for name, kept in self._plans.items() if name in here}
        return found

    def find(self, name: str) -> Run | None:
        """Return the run of a folder's whole name."""
        if not re.fullmatch(r"[0-9]+-[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            return None
        submission = Submission(self._jobs / name)
        if not (submission.path / "state.json").is_file():
            return None
        with self._lock:
            return self._run(submission)

    def curves(self, run: Run) -> Curves:
        """Return what its rounds say.

        Raises:
            RunError: they cannot be read.
        """
        path = run.submission.run_folder / "metrics.jsonl"
        stamp = run.mark if _is_secret(run) else _stamp(path)
        with self._lock:
            if (kept := self._curves.get(run.id)) is not None and kept[0] == stamp:
                self._curves.move_to_end(run.id)
                return kept[1]
        found = _curves(read_rounds(path, complete=False)[: run.num_done + 1], central=run.plan.mechanism == "central")
        with self._lock:
            self._curves[run.id] = (stamp, found)
            while len(self._curves) > _MOST_CURVES:
                self._curves.popitem(last=False)
        return found

    # --- with the lock ---

    def _run(self, submission: Submission) -> Run:
        rounds = _stamp(submission.run_folder / "metrics.jsonl")
        stamp = (_stamp(submission.path / "state.json"), rounds, submission.stop_requested)
        kept = self._kept.get(submission.name)
        if kept is not None and _is_secret(kept[1]) and not self._is_time(kept[1]):
            return replace(kept[1], is_stopping=submission.stop_requested)
        if kept is None or kept[0] != stamp:
            mark = f"{abs(hash(stamp)):x}"
            try:
                run = _read(submission, self._plan(submission), mark)
            except (SilotuneError, OSError):
                run = Run(submission=submission, mark=mark)
            self._kept[submission.name] = kept = (stamp, run)
        return kept[1]

    def _is_time(self, run: Run) -> bool:
        """Return whether the rounds of a run under central DP may be looked at again: seldom, or in another state."""
        try:
            if run.submission.state()["state"] != run.state:
                return True
        except SilotuneError:
            return True
        now = self._now()
        if now < self._looked.setdefault(run.id, now) + SECRET_SECONDS:
            return False
        self._looked[run.id] = now
        return True

    def _plan(self, submission: Submission) -> Plan:
        path = submission.path / "signed_job.json"
        stamp = _stamp(path)
        kept = self._plans.get(submission.name)
        if kept is None or kept[0] != stamp:
            self._plans[submission.name] = kept = (stamp, _plan(path))
        return kept[1]


def _is_secret(run: Run) -> bool:
    """Whether it tells something when a round of a run ends."""
    return run.is_open and run.plan.mechanism == "central"


def mark_of(runs: Sequence[Run]) -> str:
    """Return what stands for a list: which runs there are, their states, and how far those are that are not over."""
    return str(hash(tuple((run.id, run.state, run.mark if run.is_open else "") for run in runs)))


def matching(runs: Sequence[Run], search: str, state: str) -> list[Run]:
    """Return those in whose name a text stands and whose state is one; "" is every one."""
    wanted = search.casefold()
    return [run for run in runs if wanted in run.id.casefold() and state in ("", run.state)]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


def _plan(path: Path) -> Plan:
    """Return what the job in a file says; a `Plan` that says nothing if it cannot be read."""
    try:
        job = json.loads(json.loads(path.read_bytes())["job"])
        privacy, training, federation = job["privacy"], job["training"], job["federation"]
        central = privacy.get("central") is not None
        return Plan(
            rounds=int(training["rounds"]),
            min_sites=int(federation["min_sites"]),
            kind=str(job["task"]["kind"]),
            mechanism="central" if central else str(privacy["mechanism"]),
            unit=str(privacy["unit"]),
            epsilon=_number(privacy.get("epsilon")),
            epsilon_alone=_number(privacy.get("epsilon_alone")),
            noise_multiplier=_number(privacy.get("noise_multiplier")),
            delta=_number(privacy.get("delta")),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Plan()


def _read(submission: Submission, plan: Plan, mark: str) -> Run:
    state = submission.state()
    num_done, last = _last_round(submission.run_folder / "metrics.jsonl")
    metric = primary_metric(plan.kind)
    metrics = state.get("metrics") or (last.metrics if last else {})
    is_open = state["state"] in OPEN
    central = plan.mechanism == "central"
    written = _stamp(submission.run_folder / "metrics.jsonl")
    return Run(
        submission=submission,
        plan=plan,
        state=state["state"],
        is_stopping=is_open and submission.stop_requested,
        is_waiting=is_open and bool(state.get("waiting")),
        has_problem=bool(state.get("problem")),
        num_done=num_done,
        stopped_early=state.get("stopped_early"),
        metric=metric if metric in metrics else "",
        value=metrics.get(metric),
        spent=_spent(submission.run_folder, last, is_open=is_open),
        since=None if central and not is_open else state.get("since"),
        started=state.get("started"),
        last=None if central or written is None else written[0] / 1e9,
        sites=tuple(name for name in state.get("sites") or () if is_name(name)),
        awaiting=tuple(name for name in state.get("awaiting") or () if is_name(name)),
        refused={
            name: code_of(reason) for name, reason in sorted((state.get("refused") or {}).items()) if is_name(name)
        },
        job=state["job_sha256"],
        signer=str(state.get("signer") or ""),
        mark=mark,
    )


@dataclass(frozen=True)
class _AtSites:
    sites: int
    epsilon: float


@dataclass(frozen=True)
class _Stated:
    """What is read of `statement.json`; its own type computes epsilons, which takes seconds to load."""

    up_to_m_sites: tuple[_AtSites, ...] = ()


def _spent(run: Path, last: RoundRecord | None, *, is_open: bool) -> float | None:
    """Return the largest epsilon of a site so far; once nobody goes on, as it is stated: with what was given up."""
    known = [] if last is None or last.epsilon_max is None else [last.epsilon_max]
    if not is_open:
        with suppress(SilotuneError):
            stated = read_if_there(run / "statement.json", _Stated)
            known += [row.epsilon for row in stated.up_to_m_sites if row.sites == 1] if stated else []
    return max(known, default=None)


def _last_round(path: Path) -> tuple[int, RoundRecord | None]:
    """Return how many rounds are durable, and the last of them; the first line is the state before training."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return 0, None
    if not lines:
        return 0, None
    try:
        return len(lines) - 1, parse_record(lines[-1].decode(errors="replace"), RoundRecord, path)
    except RunError:
        return len(lines) - 1, None


def _curves(rounds: tuple[RoundRecord, ...], *, central: bool) -> Curves:
    counted: Counter[str] = Counter()
    if not central:
        for record in rounds:
            counted.update(name for name in record.sites if is_name(name))
    evaluated = [record for record in rounds if record.metrics]
    names = sorted({name for record in evaluated for name in record.metrics if _METRIC.fullmatch(name)})
    shown = [record for record in rounds if record.metrics or record is rounds[-1]]
    step = -(-len(shown) // _MOST_POINTS) or 1
    shown = [record for i, record in enumerate(shown) if i % step == 0 or record is shown[-1]]
    return Curves(
        rounds=[record.round for record in shown],
        metrics={name: [record.metrics.get(name) for record in shown] for name in names},
        epsilon=[record.epsilon_max for record in shown],
        counted=counted,
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
