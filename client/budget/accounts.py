"""A site's budget as its people are shown it: every account of the ledger, its spend by its own rule, and how it came about.

Formal guarantees (tests: tests/client/console/test_budget.py)
    * What is called spent is what the ledger itself computes, to the last bit (test_the_spend_is_the_ledgers), and what would be
      spent after further jobs is what it would then compute (test_what_would_be_spent_is_the_ledgers).
    * Nothing is written to the ledger, and none is begun (test_reading_changes_nothing).
    * Entries are checked when they are read, all of them by `check` (test_a_changed_ledger_is_told).
    * A ledger that lacks what the audit log repeats of it, as an older copy does, is told and not shown
      (test_fault_an_older_ledger_is_not_shown).
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from pathlib import Path

from client.approval.facts import BudgetLine, planned_charges
from client.budget.reading import Counts, Reading
from client.ledger.account import PROMISES, Account, Charged, Promise, counting, dataset_key
from client.ledger.audit_mirror import Witness
from client.ledger.file import LedgerFile, checked_hash, head_of
from client.policy.policy import Policy
from client.site.home import SiteHome
from shared.errors import LedgerError, PrivacyError
from shared.job.job import Job as TrainingJob
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.filter import Composition, SpendingRule
from shared.trust.keystore import Seal

Plan = Mapping[Promise, Sequence[GaussianSteps]]
"""Everything that a job would charge if it ran to its end, as each promise counts it."""

LEDGER_FILE = "ledger.db"
_MOST_POINTS = {"adaptive": 300, "fixed": 24}
"""Of a chart, evenly, and as many again where jobs end: under "fixed" each is a composition of its own, which takes a while."""
MOST_JOBS = 200
"""The latest ones are listed: each is a composition of its own."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one job has charged.

    Attributes:
        job: its hash.
        charges, steps: how many.
        epsilon, epsilon_alone: of the job by itself, for both promises.
        first, last: times of its charges, UTC, ISO 8601.
    """

    job: str
    charges: int
    steps: int
    epsilon: float
    epsilon_alone: float
    first: str
    last: str


@dataclass(frozen=True, kw_only=True)
class Point:
    """One place on the line of charges: seconds since 1970, and what was spent up to then."""

    time: float
    spent: float


@dataclass(frozen=True)
class AccountBudget:
    """One account, at one state of the ledger.

    Attributes:
        account: as its entries leave it.
        caps: the largest epsilon of each promise, as the settings have it; of a data set that is not the site's now, as the
            ledger recorded it last.
        delta, composition: likewise.
        is_current: it is that of the data set which `site.toml` names.
        counts: how often each mechanism was charged, where somebody counted already.
        head: number and SHA-256 of the ledger's last entry.
    """

    account: Account
    caps: dict[Promise, float]
    delta: float
    composition: Composition
    is_current: bool
    counts: Counts | None = None
    head: tuple[int, str] = (0, "")

    @property
    def mark(self) -> tuple[object, ...]:
        """What is another value once anything of it may be another."""
        return self.id, self.head, *self.caps.values(), self.delta, self.composition

    @property
    def id(self) -> str:
        """Names it in addresses."""
        name = f"{dataset_key(self.account.dataset)}/{self.account.unit}"
        return hashlib.sha256(name.encode()).hexdigest()[:16]

    @cached_property
    def spent(self) -> dict[Promise, float]:
        """What counts against each cap, as `Ledger.spent_epsilon` has it."""
        counts = self.counts or {promise: Counter(self.account.events(promise=promise)) for promise in PROMISES}
        return {
            promise: self._rule(promise).epsilon(
                counts[promise] + Counter(counting(held, promise) for held in self._held_back.values())
            )
            for promise in PROMISES
        }

    def after(self, plans: Mapping[str, Plan]) -> dict[Promise, float]:
        """Return what will be spent once these jobs have run to their ends; what they charged already is part of their plans."""
        others = [*self.account.charges.values(), *self._held_back.values()]
        if plans.keys() & self._jobs_charged:
            others = [charged for charged in others if charged.job_id not in plans]
        found: dict[Promise, float] = {}
        for promise in PROMISES:
            counts = Counter(counting(charged, promise) for charged in others)
            for plan in plans.values():
                counts.update(plan[promise])
            found[promise] = max(self.spent[promise], self._rule(promise).epsilon(counts))
        return found

    def lines(self, job: str, plan: Plan) -> tuple[BudgetLine, ...]:
        """Return what a job would do to each cap; none where it charges nothing, or what it costs cannot be told."""
        try:
            after = self.after({job: plan}) if plan else None
        except PrivacyError:
            after = None
        if after is None:
            return ()
        return tuple(
            BudgetLine(promise=promise, spent=self.spent[promise], after=after[promise], cap=self.caps[promise])
            for promise in PROMISES
        )

    @property
    def tells_both(self) -> bool:
        """Whether the second promise says anything that the first does not."""
        return self.caps["alone"] != self.caps["together"] or self.spent["alone"] != self.spent["together"]

    @property
    def charges(self) -> list[Charged]:
        """All charges, the oldest first."""
        return sorted(self.account.charges.values(), key=lambda charged: charged.time)

    @property
    def steps(self) -> int:
        """How many steps were charged."""
        return sum(charged.mechanism.steps for charged in self.account.charges.values())

    @property
    def num_open(self) -> int:
        """How many rounds were charged and are not known to be over; they count in full."""
        return sum(not charged.committed for charged in self.account.charges.values())

    @property
    def held_back(self) -> int:
        """How many steps count although nobody took them, under "fixed"."""
        return sum(charged.mechanism.steps for charged in self._held_back.values())

    @cached_property
    def _held_back(self) -> dict[str, Charged]:
        return self.account.held_back(self.composition)

    def steps_of(self, job: str) -> int:
        """Return how many steps a job has charged."""
        return self._jobs_charged[job]

    @cached_property
    def _jobs_charged(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for charged in self.account.charges.values():
            found[charged.job_id] += charged.mechanism.steps
        return found

    def line(self, promise: Promise) -> list[Point]:
        """Return what was spent after each charge, with the steps that are known to have run by now; many are thinned out."""
        if promise not in self._lines:
            self._lines[promise] = self._line(promise)
        return self._lines[promise]

    @cached_property
    def _lines(self) -> dict[Promise, list[Point]]:
        return {}

    def _line(self, promise: Promise) -> list[Point]:
        charges = self.charges
        told, rule = _told(charges, _MOST_POINTS[self.composition]), self._rule(promise)
        found: list[Point] = []
        so_far: Counter[tuple[float, float]] = Counter()
        for number, charged in enumerate(charges):
            step = counting(charged, promise)
            so_far[step.noise_multiplier, step.sample_rate] += step.steps
            if number in told:
                steps = (GaussianSteps(noise_multiplier=s, sample_rate=q, steps=n) for (s, q), n in so_far.items())
                found.append(Point(time=_seconds(charged.time), spent=_spent(rule, tuple(steps))))
        return found

    @cached_property
    def jobs(self) -> list[Job]:
        """What each of the latest jobs has charged, the latest first; each is one plan, so PLD holds for it alone."""
        by_job: dict[str, list[Charged]] = {}
        for charged in self.charges:
            by_job.setdefault(charged.job_id, []).append(charged)
        latest = sorted(by_job.items(), key=lambda one: one[1][-1].time, reverse=True)[:MOST_JOBS]
        found = []
        for job, charges in latest:
            both = {
                promise: compose_epsilon([counting(charged, promise) for charged in charges], self.delta)
                for promise in PROMISES
            }
            found.append(
                Job(
                    job=job,
                    charges=len(charges),
                    steps=sum(charged.mechanism.steps for charged in charges),
                    epsilon=both["together"],
                    epsilon_alone=both["alone"],
                    first=charges[0].time,
                    last=charges[-1].time,
                )
            )
        return found

    def _rule(self, promise: Promise) -> SpendingRule:
        return self.account.rule(delta=self.delta, composition=self.composition, promise=promise)


class Budgets:
    """The accounts of a site's ledger, read anew when it has changed; safe to use from several threads.

    Args:
        home: the site's folder.
        seal: with the key that sealed the ledger.
    """

    def __init__(self, home: SiteHome, seal: Seal) -> None:
        self._home, self._seal = home, seal
        self._lock = threading.Lock()
        self._kept: tuple[object, list[AccountBudget]] | None = None
        self._witness = Witness(home.audit)
        self._reading: Reading | None = None

    @property
    def is_begun(self) -> bool:
        """Whether there is a ledger."""
        return (self._home.path / LEDGER_FILE).exists()

    def all(self) -> list[AccountBudget]:
        """Return every account, that of `site.toml` first; none before the first job.

        Raises:
            ConfigError: `site.toml` is not valid.
            LedgerError: the ledger cannot be read, the chain of its entries is broken, or it is not the one that the log repeats.
            TrustError: the log's head cannot be read.
        """
        path = self._home.path / LEDGER_FILE
        with self._lock:
            self._witness.check(path)
            if not self.is_begun:
                return []
            state = (head_of(path), path.stat().st_ino, self._home.config.stat().st_mtime_ns)
            if self._kept is None or self._kept[0] != state:
                self._reading = self._read(path)
                self._kept = (state, self._accounts(self._reading))
            return self._kept[1]

    def check(self) -> None:
        """Check every entry, those that were read before as well.

        Raises:
            ConfigError, LedgerError: see `all`.
        """
        if self.is_begun:
            known = self._reading
            found = checked_hash(self._home.path / LEDGER_FILE, 0 if known is None else known.number)
            with self._lock:
                if known is not None and found != known.sha256 and self._reading is known:
                    self._kept = self._reading = None
        self.all()

    def current(self) -> AccountBudget:
        """Return the account of `site.toml`: before its first charge as it will be begun. Raises as `all`."""
        for one in self.all():
            if one.is_current:
                return one
        config = self._home.load_config()
        caps, account = config.budget.caps(), Account(dataset=config.dataset, unit=config.budget.unit)
        orders, orders_alone = (account.orders_for(caps, promise) for promise in PROMISES)
        account.caps.append(account.entry_of(caps, orders=orders, orders_alone=orders_alone))
        cap: dict[Promise, float] = {promise: caps.cap(promise) for promise in PROMISES}
        return AccountBudget(account, cap, caps.delta, caps.composition, True)

    def lines(self, job: TrainingJob, policy: Policy) -> tuple[BudgetLine, ...]:
        """Return what a job would do to each cap, by the ledger as it is; raises as `all`."""
        return self.current().lines(job.sha256, planned_charges(job, policy))

    @property
    def head(self) -> tuple[int, str] | None:
        """Number and SHA-256 of the ledger's last entry, as its head says; None before the first; quick."""
        return head_of(self._home.path / LEDGER_FILE) if self.is_begun else None

    def find(self, account: str) -> AccountBudget | None:
        """Return the account of an id."""
        return next((one for one in [*self.all(), self.current()] if one.id == account), None)

    def _read(self, path: Path) -> Reading:
        """Return the ledger, read on from where it was left if that is still there."""
        status, known = path.stat(), self._reading
        self._reading = None  # what breaks off half-way is not gone on with
        file = LedgerFile(path, cipher=self._seal, clock=lambda: datetime.now(UTC))
        try:
            with file.transaction("DEFERRED"):
                if known is not None and known.file == (status.st_dev, status.st_ino):
                    with contextlib.suppress(LedgerError):
                        known.take(file.read_on(known.number, known.sha256))
                        return known
                reading = Reading((status.st_dev, status.st_ino))
                reading.take(file.read_on(reading.number, reading.sha256))
                return reading
        finally:
            file.close()

    def _accounts(self, reading: Reading) -> list[AccountBudget]:
        config = self._home.load_config()
        own = (dataset_key(config.dataset), config.budget.unit)
        head = (reading.number, reading.sha256)
        found: list[AccountBudget] = []
        for key, tally in reading.tallies.items():
            account, counts = tally.copy()
            if not account.caps:
                continue
            if key == own:
                caps = config.budget.caps()
                cap: dict[Promise, float] = {promise: caps.cap(promise) for promise in PROMISES}
                found.insert(0, AccountBudget(account, cap, caps.delta, caps.composition, True, counts, head))
            else:
                latest = account.caps[-1]
                cap = {"together": latest["epsilon"], "alone": latest.get("epsilon_alone", latest["epsilon"])}
                composition: Composition = latest.get("composition", "fixed")
                found.append(AccountBudget(account, cap, latest["delta"], composition, False, counts, head))
        return found


def _told(charges: Sequence[Charged], most: int) -> set[int]:
    """Return the numbers of the charges that a chart shows: some, evenly, and where jobs end."""
    ends = sorted({charged.job_id: number for number, charged in enumerate(charges)}.values())
    return _spread(len(charges), most) | {ends[place] for place in _spread(len(ends), most)}


def _spread(count: int, most: int) -> set[int]:
    """Return at most so many of `count` numbers, evenly, with the first and the last; of one more, hardly any is another one."""
    stride = 1
    while stride * (most - 1) < count - 1:
        stride *= 2
    return {*range(0, count, stride), *([count - 1] if count else [])}


@lru_cache(maxsize=4096)
def _spent(rule: SpendingRule, steps: tuple[GaussianSteps, ...]) -> float:
    """Return a point of a chart, most of which are the same after the next charge."""
    return rule.epsilon(steps)


def _seconds(time: str) -> float:
    moment = datetime.fromisoformat(time)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
