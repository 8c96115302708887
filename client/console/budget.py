"""A site's budget as its console shows it: every account of the ledger, its spend by its own rule, and how it came about.

Formal guarantees (tests: tests/client/console/test_budget.py)
    * What is called spent is what the ledger itself computes, to the last bit (test_the_spend_is_the_ledgers).
    * Nothing is written to the ledger, and none is begun (test_reading_changes_nothing).
    * The chain of entries is checked whenever the ledger has changed (test_a_changed_ledger_is_told).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property

from client.ledger.account import PROMISES, Account, Charged, Promise, dataset_key
from client.ledger.file import Entry, LedgerFile, head_of
from client.site.home import SiteHome
from shared.privacy.accounting import GaussianSteps, compose_epsilon, merged
from shared.privacy.filter import Composition, SpendingRule
from shared.trust.keystore import Seal

LEDGER_FILE = "ledger.db"
_MOST_POINTS = {"adaptive": 300, "fixed": 24}
"""Of a chart: under "fixed" each one is a composition of its own, which takes a while."""


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
    """

    account: Account
    caps: dict[Promise, float]
    delta: float
    composition: Composition
    is_current: bool

    @property
    def id(self) -> str:
        """Names it in addresses."""
        name = f"{dataset_key(self.account.dataset)}/{self.account.unit}"
        return hashlib.sha256(name.encode()).hexdigest()[:16]

    @cached_property
    def spent(self) -> dict[Promise, float]:
        """What counts against each cap, as `Ledger.spent_epsilon` has it."""
        return {
            promise: self._rule(promise).epsilon(self.account.counted(self.composition, promise=promise))
            for promise in PROMISES
        }

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
        return sum(charged.mechanism.steps for charged in self.account.held_back(self.composition).values())

    def line(self, promise: Promise) -> list[Point]:
        """Return what was spent after each charge, with the steps that are known to have run by now; many are thinned out."""
        if promise not in self._lines:
            self._lines[promise] = self._line(promise)
        return self._lines[promise]

    @cached_property
    def _lines(self) -> dict[Promise, list[Point]]:
        return {}

    def _line(self, promise: Promise) -> list[Point]:
        charges, most = self.charges, _MOST_POINTS[self.composition]
        told = _spread(len(charges), most)
        found: list[Point] = []
        so_far: Sequence[GaussianSteps] = []
        for number, charged in enumerate(charges):
            so_far = merged([*so_far, _counting(charged, promise)])
            if number in told:
                found.append(Point(time=_seconds(charged.time), spent=self._rule(promise).epsilon(so_far)))
        return found

    @cached_property
    def jobs(self) -> list[Job]:
        """What each job has charged, the latest first; each is one plan, so PLD holds for it alone."""
        by_job: dict[str, list[Charged]] = {}
        for charged in self.charges:
            by_job.setdefault(charged.job_id, []).append(charged)
        found = []
        for job, charges in by_job.items():
            both = {
                promise: compose_epsilon([_counting(charged, promise) for charged in charges], self.delta)
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
        return sorted(found, key=lambda job: job.last, reverse=True)

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

    @property
    def is_begun(self) -> bool:
        """Whether there is a ledger."""
        return (self._home.path / LEDGER_FILE).exists()

    def all(self) -> list[AccountBudget]:
        """Return every account, that of `site.toml` first; none before the first job.

        Raises:
            ConfigError: `site.toml` is not valid.
            LedgerError: the ledger cannot be read, or its chain is broken.
        """
        if not self.is_begun:
            return []
        path = self._home.path / LEDGER_FILE
        with self._lock:
            state = (head_of(path), self._home.config.stat().st_mtime_ns)
            if self._kept is None or self._kept[0] != state:
                file = LedgerFile(path, cipher=self._seal, clock=lambda: datetime.now(UTC))
                try:
                    with file.transaction("DEFERRED"):
                        entries = file.read_chain()
                finally:
                    file.close()
                self._kept = (state, self._read(entries))
            return self._kept[1]

    def find(self, account: str) -> AccountBudget | None:
        """Return the account of an id."""
        return next((one for one in self.all() if one.id == account), None)

    def _read(self, entries: list[Entry]) -> list[AccountBudget]:
        config = self._home.load_config()
        own = (dataset_key(config.dataset), config.budget.unit)
        names = {
            (dataset_key(entry.payload["dataset"]), entry.payload["unit"]): entry.payload["dataset"]
            for entry in entries
        }
        found: list[AccountBudget] = []
        for key, dataset in names.items():
            account = Account.read(entries, dataset=dataset, unit=key[1])
            if not account.caps:
                continue
            if key == own:
                caps = config.budget.caps()
                cap: dict[Promise, float] = {promise: caps.cap(promise) for promise in PROMISES}
                found.insert(0, AccountBudget(account, cap, caps.delta, caps.composition, True))
            else:
                latest = account.caps[-1]
                cap = {"together": latest["epsilon"], "alone": latest.get("epsilon_alone", latest["epsilon"])}
                composition: Composition = latest.get("composition", "fixed")
                found.append(AccountBudget(account, cap, latest["delta"], composition, False))
        return found


def _counting(charged: Charged, promise: Promise) -> GaussianSteps:
    return charged.together if promise == "together" and charged.together is not None else charged.mechanism


def _spread(count: int, most: int) -> set[int]:
    """Return at most so many of `count` numbers, evenly, with the first and the last."""
    if count <= most:
        return set(range(count))
    return {round(i * (count - 1) / (most - 1)) for i in range(most)}


def _seconds(time: str) -> float:
    moment = datetime.fromisoformat(time)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
