"""What the entries of a ledger mean for one account: its two caps, the rule that measures them, and what was charged.

An account keeps two promises at once (`Promise`). A release with all its noise counts the same in both; a masked input to a
sum over sites (`shared.privacy.shared_noise`) counts with the noise of the sum in the one, and of the site's share in the other.

Pure: it reads entries, wherever they stand (`client.ledger.ledger` in the ledger's file, `client.ledger.audit_mirror` in the
audit log), so that both arrive at the same number.

| kind | says |
|---|---|
| open | the account was begun |
| budget | its caps from here on, their composition, and the orders of each one's filter |
| reserve | a round was charged; its sequence number is the reservation's id |
| commit | how many of the reserved steps ran |
| import | the account was taken over from another ledger; `imported` entries follow, one for each charge |
| imported | a charge that was made there; it counts in full and stays as it is |
| migrate | the file was taken over from an older version |

Formal guarantees (tests in tests/client/ledger/test_ledger.py)
    * The orders of the filter are fixed before the first charge and never change with what comes after
      (test_orders_stay_when_the_cap_changes_after_a_charge; tests/client/ledger/test_ledger_import.py:
      test_an_import_brings_its_orders). An account of a version that recorded none has those that follow from its first cap.
      Likewise of the second cap, which is the first one, orders included, until it is set
      (tests/client/ledger/test_two_promises.py::test_orders_of_each_cap_are_fixed_before_the_first_charge).
    * Every charge counts against both caps, against the first with at least as much noise
      (tests/client/ledger/test_two_promises.py::test_both_caps_hold_whatever_is_charged).
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
from typing import Any, Literal

from client.ledger.file import Entry
from shared.errors import LedgerError
from shared.privacy.accounting import GaussianSteps, check_delta
from shared.privacy.filter import Composition, SpendingRule, filter_orders

Promise = Literal["together", "alone"]
"""`together`: what `budget.epsilon` caps, which holds while secure aggregation does. `alone`: what `budget.epsilon_alone` caps,
which holds if it fails completely and all other sites collude. Both count everything that the account released."""
PROMISES: tuple[Promise, ...] = ("together", "alone")
CHARGING_KINDS = ("reserve", "imported")
MAX_NAME = 500  # characters of a data set, unit or job: longer ones would be cut in the audit log


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The caps of one account, as the site's settings have them.

    Attributes:
        epsilon: largest epsilon that all releases together may reach, finite and > 0.
        delta: the delta at which epsilon is computed, in (0, 1).
        composition: "fixed" if the plans of all runs are fixed before the first starts, else "adaptive";
            see `shared.privacy.filter.SpendingRule`.
        epsilon_alone: the same where each masked input counts by itself, at least `epsilon`; None is as much as `epsilon`.
    """

    epsilon: float
    delta: float
    composition: Composition = "fixed"
    epsilon_alone: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise LedgerError(f"the budget's epsilon is {self.epsilon}; expected a finite number above 0.")
        if not (math.isfinite(self.cap("alone")) and self.cap("alone") >= self.epsilon):
            raise LedgerError(
                f"the budget's epsilon_alone is {self.epsilon_alone}; expected a finite number from epsilon {self.epsilon} up."
            )
        check_delta(self.delta)
        if self.composition not in ("adaptive", "fixed"):
            raise LedgerError(f"the budget's composition is {self.composition!r}; expected 'adaptive' or 'fixed'.")

    def cap(self, promise: Promise) -> float:
        """Return the largest epsilon of a promise."""
        return self.epsilon if promise == "together" or self.epsilon_alone is None else self.epsilon_alone


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What a site is about to release: one round of one job.

    Attributes:
        job_id: the job, not empty.
        round: number of the round within the job, >= 0.
        request_sha256: SHA-256 of the request for the round, 64 lower-case hexadecimal digits.
        mechanism: the declared noisy steps, at least one, with the noise that is in what leaves the site.
        records: keyed fingerprint of the records, see `client.site.charged_records`; None in a simulation.
        planned_steps: all steps of the job, if it may take fewer: when it stops, or how often a round is repeated, may depend on
            what it releases. None if it does not.
        together: the same steps with the noise of the sum that a masked input goes into; None if it goes into none.
        attempt: number of the attempt at the round, >= 0, each of which is charged; None if a round has only one.
    """

    job_id: str
    round: int
    request_sha256: str
    mechanism: GaussianSteps
    records: str | None = None
    planned_steps: int | None = None
    together: GaussianSteps | None = None
    attempt: int | None = None

    def __post_init__(self) -> None:
        check_name("job_id", self.job_id)
        check_sha256("request_sha256", self.request_sha256)
        if operator.index(self.round) < 0:
            raise LedgerError(f"round is {self.round}; expected 0 or more.")
        if operator.index(self.mechanism.steps) < 1:
            raise LedgerError(f"the charge is {self.mechanism.steps} steps; expected at least one.")
        if self.planned_steps is not None and operator.index(self.planned_steps) < 1:
            raise LedgerError(f"the job plans {self.planned_steps} steps; expected at least one.")
        if self.attempt is not None and operator.index(self.attempt) < 0:
            raise LedgerError(f"attempt is {self.attempt}; expected 0 or more.")
        if self.together is not None:
            check_together(self.mechanism, self.together)


@dataclass(frozen=True, kw_only=True, slots=True)  # there may be a hundred thousand
class Charged:
    """One charge of an account.

    Attributes:
        job_id, round: whose round it was.
        mechanism, together: see `Charge`; the reserved steps until committed, the executed ones from then on.
        committed: whether the round is known to be over.
        time: when it was charged, UTC, ISO 8601.
        imported: whether it was made in another ledger.
        planned_steps, attempt: see `Charge`.
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
    together: GaussianSteps | None = None
    attempt: int | None = None

    def executed(self, steps: int) -> Charged:
        """Return the charge once it is known how many of its steps ran."""
        together = None if self.together is None else replace(self.together, steps=steps)
        return replace(self, mechanism=replace(self.mechanism, steps=steps), together=together, committed=True)


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
            together = payload.get("together")
            self.charges[sequence] = Charged(
                job_id=payload["job_id"],
                round=payload["round"],
                mechanism=GaussianSteps(**payload["mechanism"]),
                committed=payload["committed"] if imported else False,
                time=payload["charged_at"] if imported else time,
                imported=imported,
                planned_steps=payload.get("planned_steps"),
                request_sha256=payload.get("request_sha256"),
                together=None if together is None else GaussianSteps(**together),
                attempt=payload.get("attempt"),
            )
        elif kind == "commit":
            reserved = self.charges[payload["reservation"]]
            self.charges[payload["reservation"]] = reserved.executed(payload["executed_steps"])
        elif kind not in ("open", "import", "migrate"):
            raise LedgerError(
                f"ledger entry {sequence} is of the unknown kind {kind!r}; what it charges cannot be told. Install the release "
                "of Silotune that wrote it, or a newer one."
            )

    def events(self, job_id: str | None = None, *, promise: Promise = "together") -> list[GaussianSteps]:
        """Return the charges, or those of one job, oldest first."""
        return [counting(charged, promise) for charged in self.charges.values() if job_id in (None, charged.job_id)]

    def counted(
        self, composition: Composition, further: Charge | None = None, *, promise: Promise = "together"
    ) -> list[GaussianSteps]:
        """Return what a cap has to hold: everything charged, `further`, and what is held back of plans that may take fewer steps.

        Under "fixed" the cap holds for plans that were fixed in advance, and where such a job stops depends on what it
        released: had the steps that it leaves been given to a later job, that job's plan would depend on it too. So its whole
        plan counts from its first round on. The filter of "adaptive" is valid under such choices, so there nothing is held.
        """
        charges: list[Charge | Charged] = list(self.charges.values())
        if further is not None:
            charges.append(further)
        charges += _held_back(charges, composition).values()
        return [counting(charged, promise) for charged in charges]

    def held_back(self, composition: Composition) -> dict[str, Charged]:
        """Return by job the steps that `counted` holds back, as a charge of round 0."""
        return _held_back(self.charges.values(), composition)

    def orders_for(self, budget: Budget, promise: Promise = "together") -> tuple[int, ...]:
        """Return the orders of a cap's filter once `budget` is set: those fixed before the first charge, if there is one."""
        if not self.charges:
            return filter_orders(epsilon=budget.cap(promise), delta=budget.delta)
        return self.orders_of(promise)

    def orders_of(self, promise: Promise) -> tuple[int, ...]:
        """Return the orders of the filter that a cap goes by."""
        recorded = [cap["orders_alone"] for cap in self.caps if "orders_alone" in cap] if promise == "alone" else []
        # Until it was set for the first time, the second cap was the first one.
        recorded = recorded or [cap["orders"] for cap in self.caps if "orders" in cap]
        if recorded:
            return tuple(recorded[-1])
        first = self.caps[0]  # an older version recorded none: those that it would have fixed then
        return filter_orders(epsilon=first["epsilon"], delta=first["delta"])

    def entry_of(self, budget: Budget, *, orders: tuple[int, ...], orders_alone: tuple[int, ...]) -> dict[str, Any]:
        """Return the content of the `budget` entry that sets `budget` with these orders."""
        entry: dict[str, Any] = {
            "epsilon": float(budget.epsilon),
            "delta": float(budget.delta),
            "composition": budget.composition,
            "orders": list(orders),
        }
        if budget.epsilon_alone is not None:
            entry["epsilon_alone"] = float(budget.epsilon_alone)
        # Once they were recorded they always are, so that the latest ones hold; else those of the first cap do.
        recorded = any("orders_alone" in cap for cap in self.caps)
        if budget.epsilon_alone is not None or orders_alone != orders or recorded:
            entry["orders_alone"] = list(orders_alone)
        return entry

    def rule(
        self, *, delta: float, composition: Composition | None = None, promise: Promise = "together"
    ) -> SpendingRule:
        """Return how spending is measured; by default by the composition that was recorded last."""
        recorded: Composition = self.caps[-1].get("composition", "fixed")
        return SpendingRule(composition=composition or recorded, delta=delta, orders=self.orders_of(promise))


def _held_back(charges: Iterable[Charge | Charged], composition: Composition) -> dict[str, Charged]:
    """Return by job, for those that may take fewer steps, the planned ones of rounds that were not charged.

    A round that was charged twice is beyond the plan: were its second charge taken from what is held back, then how much of the
    cap is left for others would depend on where the job stops after all. Attempts at a round are part of the plan.
    """
    if composition != "fixed":
        return {}
    first: dict[str, Charge | Charged] = {}
    taken: dict[str, dict[tuple[int, int | None], int]] = {}
    for charged in charges:
        if charged.planned_steps is not None:
            first.setdefault(charged.job_id, charged)
            of_job = taken.setdefault(charged.job_id, {})
            place = charged.round, charged.attempt
            of_job[place] = max(of_job.get(place, 0), charged.mechanism.steps)
    left = {job: (charged.planned_steps or 0) - sum(taken[job].values()) for job, charged in first.items()}
    return {job: _not_taken(charged, left[job]) for job, charged in first.items() if left[job] > 0}


def _not_taken(charge: Charge | Charged, steps: int) -> Charged:
    """Return so many steps like those of a charge, as its round 0."""
    return Charged(
        job_id=charge.job_id,
        round=0,
        mechanism=replace(charge.mechanism, steps=steps),
        together=None if charge.together is None else replace(charge.together, steps=steps),
        committed=False,
        time="",
        imported=False,
    )


def counting(charge: Charge | Charged, promise: Promise) -> GaussianSteps:
    """Return what a charge counts as for a promise."""
    return charge.together if promise == "together" and charge.together is not None else charge.mechanism


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


def check_together(mechanism: GaussianSteps, together: GaussianSteps) -> None:
    """Raise `LedgerError` unless `together` is `mechanism` with at least its noise."""
    if together.noise_multiplier < mechanism.noise_multiplier or mechanism != replace(
        together, noise_multiplier=mechanism.noise_multiplier
    ):
        raise LedgerError(
            f"the sum is charged as {together}, one input to it as {mechanism}; expected the same steps with at least as much "
            "noise."
        )


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
