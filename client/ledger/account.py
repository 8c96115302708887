"""What the entries of a ledger mean for one account: its cap, the rule that measures it, and what was charged.

Pure: it reads entries, wherever they stand (`client.ledger.ledger` in the ledger's file, `client.ledger.audit_mirror` in the
audit log), so that both arrive at the same number.

| kind | says |
|---|---|
| open | the account was begun |
| budget | its cap from here on, its composition, and the orders of its filter |
| reserve | a round was charged; its sequence number is the reservation's id |
| commit | how many of the reserved steps ran |
| import | the account was taken over from another ledger; `imported` entries follow, one for each charge |
| imported | a charge that was made there; it counts in full and stays as it is |
| migrate | the file was taken over from an older version |

Formal guarantees (tests in tests/client/ledger/test_ledger.py)
    * The orders of the filter are fixed before the first charge and never change with what comes after
      (test_orders_stay_when_the_cap_changes_after_a_charge; tests/client/ledger/test_ledger_import.py:
      test_an_import_brings_its_orders). An account of a version that recorded none has those that follow from its first cap.
    * Names that differ by case, blanks or Unicode form are one data set and have one account; where an older version kept
      several, all their charges count (test_another_spelling_of_a_data_set_is_no_new_budget).
"""

from __future__ import annotations

import math
import operator
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from client.ledger.file import Entry
from shared.errors import LedgerError
from shared.privacy.accounting import GaussianSteps, check_delta
from shared.privacy.filter import Composition, SpendingRule, filter_orders

CHARGING_KINDS = ("reserve", "imported")
MAX_NAME = 500  # characters of a data set, unit or job: longer ones would be cut in the audit log


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The cap of one account, as the site's settings have it.

    Attributes:
        epsilon: largest epsilon that all releases together may reach, finite and > 0.
        delta: the delta at which epsilon is computed, in (0, 1).
        composition: "fixed" if the plans of all runs are fixed before the first starts, else "adaptive";
            see `shared.privacy.filter.SpendingRule`.
    """

    epsilon: float
    delta: float
    composition: Composition = "fixed"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise LedgerError(f"the budget's epsilon is {self.epsilon}; expected a finite number above 0.")
        check_delta(self.delta)
        if self.composition not in ("adaptive", "fixed"):
            raise LedgerError(f"the budget's composition is {self.composition!r}; expected 'adaptive' or 'fixed'.")


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What a site is about to release: one round of one job.

    Attributes:
        job_id: the job, not empty.
        round: number of the round within the job, >= 0.
        request_sha256: SHA-256 of the request for the round, 64 lower-case hexadecimal digits.
        mechanism: the declared noisy steps, at least one.
        records: keyed fingerprint of the records, see `client.site.charged_records`; None in a simulation.
        planned_steps: all steps of the job, if it may stop early: when depends on what it releases. None if it does not.
    """

    job_id: str
    round: int
    request_sha256: str
    mechanism: GaussianSteps
    records: str | None = None
    planned_steps: int | None = None

    def __post_init__(self) -> None:
        check_name("job_id", self.job_id)
        check_sha256("request_sha256", self.request_sha256)
        if operator.index(self.round) < 0:
            raise LedgerError(f"round is {self.round}; expected 0 or more.")
        if operator.index(self.mechanism.steps) < 1:
            raise LedgerError(f"the charge is {self.mechanism.steps} steps; expected at least one.")
        if self.planned_steps is not None and operator.index(self.planned_steps) < 1:
            raise LedgerError(f"the job plans {self.planned_steps} steps; expected at least one.")


@dataclass(frozen=True, kw_only=True)
class Charged:
    """One charge of an account.

    Attributes:
        job_id, round: whose round it was.
        mechanism: the reserved steps until committed, the executed ones from then on.
        committed: whether the round is known to be over.
        time: when it was charged, UTC, ISO 8601.
        imported: whether it was made in another ledger.
        planned_steps: see `Charge`.
        request_sha256: what was asked; None of a charge that was made in another ledger.
    """

    job_id: str
    round: int
    mechanism: GaussianSteps
    committed: bool
    time: str
    imported: bool
    planned_steps: int | None = None
    request_sha256: str | None = None


@dataclass(kw_only=True)
class Account:
    """The account (`dataset`, `unit`), as far as its entries were taken in.

    Attributes:
        caps: content of every `budget` entry, oldest first.
        charges: by the sequence number of the entry that made them.
    """

    dataset: str
    unit: str
    caps: list[dict[str, Any]] = field(default_factory=list)
    charges: dict[int, Charged] = field(default_factory=dict)

    @classmethod
    def read(cls, entries: Iterable[Entry], *, dataset: str, unit: str) -> Account:
        """Return the account as all `entries` of a file leave it."""
        account = cls(dataset=dataset, unit=unit)
        for entry in entries:
            account.take(entry.sequence, entry.kind, entry.time, entry.payload)
        return account

    def take(self, sequence: int, kind: str, time: str, payload: dict[str, Any]) -> None:
        """Take in the next entry; entries of other accounts change nothing.

        Raises:
            KeyError, TypeError, PrivacyError: it is not an entry that a ledger writes.
            LedgerError: it is of a kind that this version does not know, and might have to count.
        """
        if payload["unit"] != self.unit or dataset_key(payload["dataset"]) != dataset_key(self.dataset):
            return
        if kind == "budget":
            self.caps.append({name: value for name, value in payload.items() if name not in ("dataset", "unit")})
        elif kind in CHARGING_KINDS:
            imported = kind == "imported"
            self.charges[sequence] = Charged(
                job_id=payload["job_id"],
                round=payload["round"],
                mechanism=GaussianSteps(**payload["mechanism"]),
                committed=payload["committed"] if imported else False,
                time=payload["charged_at"] if imported else time,
                imported=imported,
                planned_steps=payload.get("planned_steps"),
                request_sha256=payload.get("request_sha256"),
            )
        elif kind == "commit":
            reserved = self.charges[payload["reservation"]]
            executed = replace(reserved.mechanism, steps=payload["executed_steps"])
            self.charges[payload["reservation"]] = replace(reserved, mechanism=executed, committed=True)
        elif kind not in ("open", "import", "migrate"):
            raise LedgerError(
                f"ledger entry {sequence} is of the unknown kind {kind!r}; what it charges cannot be told. Install the release "
                "of Silotune that wrote it, or a newer one."
            )

    def events(self, job_id: str | None = None) -> list[GaussianSteps]:
        """Return the charges, or those of one job, oldest first."""
        return [charged.mechanism for charged in self.charges.values() if job_id in (None, charged.job_id)]

    def counted(self, composition: Composition, further: Charge | None = None) -> list[GaussianSteps]:
        """Return what the cap has to hold: everything charged, `further`, and what is held back of plans that may stop early.

        Under "fixed" the cap holds for plans that were fixed in advance, and where such a job stops depends on what it
        released: had the steps that it leaves been given to a later job, that job's plan would depend on it too. So its whole
        plan counts from its first round on. The filter of "adaptive" is valid under such choices, so there nothing is held.
        """
        charges: list[Charge | Charged] = list(self.charges.values())
        if further is not None:
            charges.append(further)
        return [charged.mechanism for charged in charges] + list(_held_back(charges, composition).values())

    def held_back(self, composition: Composition) -> dict[str, GaussianSteps]:
        """Return by job the steps that `counted` holds back."""
        return _held_back(self.charges.values(), composition)

    def orders_for(self, budget: Budget) -> tuple[int, ...]:
        """Return the orders of the filter once `budget` is the cap: those fixed before the first charge, if there is one."""
        if not self.charges:
            return filter_orders(epsilon=budget.epsilon, delta=budget.delta)
        return self.orders

    @property
    def orders(self) -> tuple[int, ...]:
        """The orders of the filter that the account goes by."""
        recorded = [cap["orders"] for cap in self.caps if "orders" in cap]
        if recorded:
            return tuple(recorded[-1])
        first = self.caps[0]  # an older version recorded none: those that it would have fixed then
        return filter_orders(epsilon=first["epsilon"], delta=first["delta"])

    def rule(self, *, delta: float, composition: Composition | None = None) -> SpendingRule:
        """Return how spending is measured; by default by the composition that was recorded last."""
        recorded: Composition = self.caps[-1].get("composition", "fixed")
        return SpendingRule(composition=composition or recorded, delta=delta, orders=self.orders)


def _held_back(charges: Iterable[Charge | Charged], composition: Composition) -> dict[str, GaussianSteps]:
    """Return by job, for those that may stop early, the planned steps of rounds that were not charged.

    A round that was charged twice is beyond the plan: were its second charge taken from what is held back, then how much of the
    cap is left for others would depend on where the job stops after all.
    """
    if composition != "fixed":
        return {}
    plans: dict[str, GaussianSteps] = {}
    rounds: dict[str, dict[int, int]] = {}
    for charged in charges:
        if charged.planned_steps is not None:
            plans.setdefault(charged.job_id, replace(charged.mechanism, steps=charged.planned_steps))
            of_job = rounds.setdefault(charged.job_id, {})
            of_job[charged.round] = max(of_job.get(charged.round, 0), charged.mechanism.steps)
    left = {job: max(0, plan.steps - sum(rounds[job].values())) for job, plan in plans.items()}
    return {job: replace(plans[job], steps=steps) for job, steps in left.items() if steps}


@lru_cache(maxsize=1024)
def dataset_key(name: str) -> str:
    """Return what a data set is told apart by: its name without case, Unicode form, blanks too many, or what nobody sees.

    Two data sets that only such a trifle tells apart share a budget, which is safe; one under two spellings would have two.
    Letters of different scripts that look alike stay different: `client.site.charged_records` finds the same records there.
    """
    # Of the category "format": a zero-width space, a soft hyphen, a mark of direction.
    seen = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")
    folded = unicodedata.normalize("NFKC", seen).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def check_name(name: str, value: str) -> None:
    """Raise `LedgerError` unless `value` can name something in the ledger."""
    if not value.strip():
        raise LedgerError(f"{name} is empty; expected a name, because charges are kept under it.")
    if len(value) > MAX_NAME:
        raise LedgerError(f"{name} has {len(value)} characters; expected at most {MAX_NAME}.")


def check_sha256(name: str, value: str) -> None:
    """Raise `LedgerError` unless `value` is a SHA-256 in hexadecimal digits."""
    if not re.fullmatch("[0-9a-f]{64}", value):
        raise LedgerError(f"{name} is {value!r}; expected a SHA-256, 64 lower-case hexadecimal digits.")
