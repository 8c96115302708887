"""The site's durable privacy budget: noisy steps are charged here before their output may leave the site.

One file (`client.ledger.file`) holds the entries of one or more accounts. An account (`client.ledger.account`) is a pair (data
set, unit of privacy), however the data set's name is spelled, so all runs, jobs and models on the same data share one cap.
A round is *reserved* before it starts and *committed* with the steps it executed; a reservation is never given back.

Formal guarantees (tests in tests/client/ledger/test_ledger.py, unless another file is named)
    * Charge before release: when `reserve` returns, the charge is on the disk; a process killed at any moment
      has not released more than was charged (test_kill_at_any_moment_never_loses_a_charge,
      test_every_write_is_synchronised_with_the_disk).
    * Hard stop: after every successful `reserve`, the spend of all charges of the account, by its own rule, is within
      both caps; a refused charge writes nothing (test_hard_stop_exactly_at_the_cap, test_hard_stop_of_the_filter,
      test_two_processes_race_for_the_last_affordable_charge, also with the filter; of the second cap, which is the first one
      where it is not set: tests/client/ledger/test_two_promises.py).
    * With composition "adaptive", what the account has released is (epsilon, delta)-DP at its cap also if each run was
      planned after seeing the results of earlier ones (shared/privacy/filter.py and its tests). With "fixed", only if the
      plans of all runs were fixed before the first started: PLD composition of all declared events. There a job that may stop
      early counts with its whole plan from its first round on (tests/client/ledger/test_unspent_steps.py).
    * A data set is charged by one unit only: once it was, its account by another unit cannot be opened or charged, so no cap
      overlooks a release (test_a_charged_data_set_keeps_its_unit; docs/decisions/0010).
    * An uncommitted reservation counts in full (test_uncommitted_reservation_counts_in_full).
    * A restart forgets nothing (test_reopening_keeps_every_charge).
    * An account that moves to another machine takes every charge along, in full (tests/client/ledger/test_ledger_import.py).
    * Nothing in the file was edited, deleted or moved, and a file of an older version is taken over with every charge
      (client/ledger/file.py).
    * With a mirror (client/ledger/audit_mirror.py), a file that was deleted or replaced by an older copy is refused at
      the next opening (tests/client/ledger/test_audit_mirror.py).

Not guaranteed
    * Without a mirror, deleting the file, or restoring a whole older copy of it, is not detected.
    * After an export was imported elsewhere, nothing stops the old machine from charging its own ledger on; the owner must.
    * Rounds that overlap are counted in the order in which they were reserved. This holds because a round is one answer to
      one request: what it may compute is fixed when it is reserved.
    * A commit gives back the steps that did not run. This holds because a site stops a round for reasons that are no
      secret (a fault, a shutdown), never by what the records contain.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.ledger.account import (
    CHARGING_KINDS,
    PROMISES,
    Account,
    Budget,
    Charge,
    Charged,
    Promise,
    check_name,
    check_sha256,
    dataset_key,
)
from client.ledger.file import SCHEMA_VERSION, Entry, LedgerFile
from shared.epsilons import as_set, delta_rounded_up, noise_rounded_down, rate_rounded_up, rounded_up
from shared.errors import BudgetExceeded, LedgerError
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.filter import SpendingRule
from shared.privacy.ledger_export import ChargedSteps, LedgerExport
from shared.trust.keystore import Seal


class Ledger:
    """The account (`dataset`, `unit`) in the ledger file at `path`; a new file is private to its owner.

    The caps are the site's own configuration: they may differ at each opening, and each change is recorded.
    Any number of processes may open one file; within a process, use one `Ledger` for each thread.
    Every method raises `LedgerError` if the file cannot be used or its chain of entries is broken.

    Args:
        cipher: stores every entry sealed. A ledger is sealed from its first entry on or never.
        mirror: repeats the entries elsewhere: called before the first write of an opening, after it, and after
            each charge and commit. What it raises is passed on; the charge stands, and the next call catches up.
    """

    def __init__(
        self,
        path: Path,
        *,
        dataset: str,
        unit: str,
        budget: Budget,
        cipher: Seal | None = None,
        mirror: Callable[[Ledger], None] | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        check_name("dataset", dataset)
        check_name("unit", unit)
        self.budget = budget
        self._names = {"dataset": dataset, "unit": unit}
        self._mirror = mirror
        self._file = LedgerFile(path, cipher=cipher, clock=clock)
        try:
            self._open_account()
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        """The ledger file."""
        return self._file.path

    @property
    def rule(self) -> SpendingRule:
        """How this account measures what it spends."""
        return self._rule(self._account())

    def reserve(self, charge: Charge) -> int:
        """Charge the declared steps of one round, durably, and return the id of the reservation.

        Raises:
            BudgetExceeded: if everything charged so far with this would cross a cap; nothing is written.
        """
        # 1. Compose before taking the lock, so that nobody waits for the accountant: step 2 then finds the
        #    sums in the accountant's cache, unless another process charged in between.
        self._spends(self._account(), charge)

        # 2. Check and charge under one lock. An epsilon that is not a number is refused too.
        reservation = None
        with self._file.transaction("IMMEDIATE"):
            entries = self._file.read_chain()
            spends = self._spends(self._account(entries), charge)
            if self._within_caps(spends):
                payload = {name: value for name, value in asdict(charge).items() if value is not None}
                reservation = self._append(entries, "reserve", payload).sequence
        if reservation is not None:
            self._call_mirror()
            return reservation

        # 3. Refuse. Finding out what would fit is slow, so the lock is free again.
        raise self._refusal(charge, spends)

    def check(self, charge: Charge) -> None:
        """Refuse a charge that `reserve` would refuse now; charges nothing.

        Raises:
            BudgetExceeded: see `reserve`.
        """
        spends = self._spends(self._account(), charge)
        if not self._within_caps(spends):
            raise self._refusal(charge, spends)

    def commit(self, reservation_id: int, *, executed_steps: int, release_sha256: str) -> None:
        """Record what a reserved round executed and releases; steps not executed are no longer charged.

        Args:
            reservation_id: the answer of `reserve`.
            executed_steps: noisy steps that ran, between 0 and the reserved number.
            release_sha256: SHA-256 of the bytes that leave the site.

        Raises:
            LedgerError: if this account has no such reservation, or it is committed already, or was smaller.
        """
        check_sha256("release_sha256", release_sha256)
        with self._file.transaction("IMMEDIATE"):
            entries = self._file.read_chain()
            found = self._account(entries).charges.get(reservation_id)
            if found is None or found.imported:
                raise LedgerError(
                    f"{self._name()} has no reservation {reservation_id}; use the id that `reserve` gave."
                )
            if found.committed:
                raise LedgerError(
                    f"reservation {reservation_id} of job {found.job_id} is committed already; a round that "
                    "runs again needs a reservation of its own."
                )
            if not 0 <= operator.index(executed_steps) <= found.mechanism.steps:
                raise LedgerError(
                    f"reservation {reservation_id} of job {found.job_id} covers {found.mechanism.steps} steps, "
                    f"but {executed_steps} are said to have run; do not release the result of this round."
                )
            payload = {
                "reservation": reservation_id,
                "executed_steps": executed_steps,
                "release_sha256": release_sha256,
            }
            self._append(entries, "commit", payload)
        self._call_mirror()

    def anticipate(self, mechanism: GaussianSteps, together: GaussianSteps | None = None) -> None:
        """Do now, while nobody waits, the accounting that the next charge like this will ask for; charges nothing."""
        account = self._account()
        more: dict[Promise, GaussianSteps] = {"together": together or mechanism, "alone": mechanism}
        for promise in PROMISES:
            counted = account.counted(self.budget.composition, promise=promise)
            self._rule(account, promise).epsilon([*counted, more[promise]])

    def events(self, job_id: str | None = None, *, promise: Promise = "together") -> list[GaussianSteps]:
        """Return the charges of the account, or of one job: executed steps; reserved until committed."""
        return self._account().events(job_id, promise=promise)

    def charges(self, job_id: str) -> list[Charged]:
        """Return the charges of one job, oldest first."""
        return [charged for charged in self._account().charges.values() if charged.job_id == job_id]

    def spent_epsilon(self, job_id: str | None = None, *, promise: Promise = "together") -> float:
        """Return the spend of the account by its own rule, or epsilon of one job by PLD, at `budget.delta`.

        A job is one plan that was fixed before it started, so PLD holds for it, alone.
        """
        account = self._account()
        if job_id is not None:
            return compose_epsilon(account.events(job_id, promise=promise), self.budget.delta)
        return self._spend(account, promise)

    def affordable_steps(
        self, *, noise_multiplier: float, sample_rate: float, noise_together: float | None = None
    ) -> int:
        """Return how many more steps of one mechanism fit under both caps; takes seconds of accounting.

        Args:
            noise_together: noise multiplier of the sum, if `noise_multiplier` is that of one site's share.
        """
        account = self._account()
        noise: dict[Promise, float] = {"together": noise_together or noise_multiplier, "alone": noise_multiplier}
        return min(
            self._rule(account, promise).affordable_steps(
                account.counted(self.budget.composition, promise=promise),
                noise_multiplier=noise[promise],
                sample_rate=sample_rate,
                cap=self.budget.cap(promise),
            )
            for promise in PROMISES
        )

    def export(self, *, site: str, declared_records: int) -> LedgerExport:
        """Return the account for others to read; charges nothing, and this ledger stays in use.

        Args:
            site: name of the site, for the reader.
            declared_records: the public size of the data set.
        """
        entries = self.entries()
        account = self._account(entries)
        held_back = account.held_back(self.budget.composition).values()
        orders_alone = account.orders_of("alone")
        return LedgerExport(
            site=site,
            dataset=self._names["dataset"],
            unit=self._names["unit"],
            declared_records=declared_records,
            epsilon=self.budget.epsilon,
            epsilon_alone=self.budget.epsilon_alone,
            delta=self.budget.delta,
            composition=self.budget.composition,
            orders=account.orders_of("together"),
            orders_alone=() if orders_alone == account.orders_of("together") else orders_alone,
            charges=tuple(_exported(charged) for charged in account.charges.values()),
            # It counts for whoever plans, and goes along to another machine.
            held_back=tuple(_exported(replace(held, time=self._file.now())) for held in held_back),
            num_entries=len(entries),
            head_sha256=entries[-1].entry_sha256,
            exported_at=self._file.now(),
        )

    def import_account(self, export: LedgerExport, *, from_dataset: str | None = None) -> None:
        """Take over every charge of another ledger's account, all or none; the cap stays that of this site's settings.

        Args:
            export: of the same data set and unit. The other machine must not charge any more.
            from_dataset: the export's data set, if it has another name here.

        Raises:
            LedgerError: if this account has charges, or the export is of another data set or unit.
        """
        self._check_import(export, from_dataset)
        # What a plan holds back follows from its charges, by the composition here; exports once did not tell the plan.
        told = {charged.job_id for charged in export.charges if charged.planned_steps is not None}
        charges = [*export.charges, *(held for held in export.held_back if held.job_id not in told)]
        with self._file.transaction("IMMEDIATE"):
            entries = self._file.read_chain()
            account = self._account(entries)
            if account.charges:
                raise LedgerError(
                    f"{self._name()} has {len(account.charges)} charges already. An export can only be taken into an "
                    "account without any, or what both hold would be counted twice or not at all. Nothing was changed."
                )
            source = {
                "site": export.site,
                "from_dataset": export.dataset,
                "num_charges": len(charges),
                "num_entries": export.num_entries,
                "head_sha256": export.head_sha256,
                "exported_at": export.exported_at,
            }
            entries.append(self._append(entries, "import", source))
            for charged in charges:
                payload = {
                    "job_id": charged.job_id,
                    "round": charged.round,
                    "mechanism": asdict(charged.mechanism),
                    "committed": charged.committed,
                    "charged_at": charged.time,
                }
                if charged.planned_steps is not None:
                    payload["planned_steps"] = charged.planned_steps
                if charged.together is not None:
                    payload["together"] = asdict(charged.together)
                if charged.attempt is not None:
                    payload["attempt"] = charged.attempt
                entries.append(self._append(entries, "imported", payload))
            # The filters' orders were fixed there, before the first of these charges.
            orders, orders_alone = export.rule.orders, export.rule_alone.orders
            self._append(entries, "budget", account.entry_of(self.budget, orders=orders, orders_alone=orders_alone))
        self._call_mirror()

    def entries(self) -> list[Entry]:
        """Return all entries of the file, of every account, oldest first; `LedgerError` names the first that does not hold."""
        with self._file.transaction("DEFERRED"):
            return self._file.read_chain()

    def close(self) -> None:
        """Close the file; the ledger cannot be used afterwards."""
        self._file.close()

    def _open_account(self) -> None:
        """Check the chain; take over an older file; record the account if it is new, and its cap if new or changed."""
        # An older copy must be refused before it is written to, so the mirror is asked first.
        self._call_mirror()
        with self._file.transaction("IMMEDIATE"):
            entries = self._file.read_chain()
            version = self._file.version()
            if version < SCHEMA_VERSION:
                entries.append(self._append(entries, "migrate", {"from": version, "to": SCHEMA_VERSION}))
                self._file.raise_version()
            account = self._account(entries)
            if not account.caps:
                entries.append(self._append(entries, "open", {"schema_version": SCHEMA_VERSION}))
            orders, orders_alone = (account.orders_for(self.budget, promise) for promise in PROMISES)
            cap = account.entry_of(self.budget, orders=orders, orders_alone=orders_alone)
            if not account.caps or account.caps[-1] != cap:
                self._append(entries, "budget", cap)
        self._call_mirror()

    def _check_import(self, export: LedgerExport, from_dataset: str | None) -> None:
        dataset, unit = self._names["dataset"], self._names["unit"]
        if export.unit != unit:
            raise LedgerError(
                f"the export counts by the unit {export.unit!r}, this account by {unit!r}. Charges of one unit say nothing "
                "about another; import it where the unit is the same."
            )
        if dataset_key(export.dataset) not in {dataset_key(name) for name in (dataset, from_dataset or dataset)}:
            raise LedgerError(
                f"the export is of the data set {export.dataset!r}, this account of {dataset!r}. If these are the same records "
                "under another name, say so by naming the export's (--from-dataset); else they keep separate budgets."
            )
        for charged in (*export.charges, *export.held_back):
            check_name("job_id of a charge in the export", charged.job_id)

    def _account(self, entries: list[Entry] | None = None) -> Account:
        entries = self.entries() if entries is None else entries
        self._check_unit(entries)
        return Account.read(entries, **self._names)

    def _check_unit(self, entries: list[Entry]) -> None:
        dataset, unit = self._names["dataset"], self._names["unit"]
        charged = {
            entry.payload["unit"]
            for entry in entries
            if entry.kind in CHARGING_KINDS and dataset_key(entry.payload["dataset"]) == dataset_key(dataset)
        }
        if other := sorted(charged - {unit}):
            raise LedgerError(
                f"data set {dataset!r} was charged by the unit {other[0]!r}, so it cannot be counted by {unit!r}: what was "
                f'released before would be missing in the sum. Set budget.unit = "{other[0]}" in site.toml again.'
            )

    def _rule(self, account: Account, promise: Promise = "together") -> SpendingRule:
        return account.rule(delta=self.budget.delta, composition=self.budget.composition, promise=promise)

    def _spend(self, account: Account, promise: Promise, further: Charge | None = None) -> float:
        counted = account.counted(self.budget.composition, further, promise=promise)
        return self._rule(account, promise).epsilon(counted)

    def _spends(self, account: Account, further: Charge) -> dict[Promise, float]:
        return {promise: self._spend(account, promise, further) for promise in PROMISES}

    def _within_caps(self, spends: Mapping[Promise, float]) -> bool:
        return all(spends[promise] <= self.budget.cap(promise) for promise in PROMISES)

    def _append(self, entries: list[Entry], kind: str, details: dict[str, Any]) -> Entry:
        return self._file.append(entries, kind, self._names | details)

    def _call_mirror(self) -> None:
        if self._mirror is not None:
            self._mirror(self)

    def _refusal(self, charge: Charge, spends: Mapping[Promise, float]) -> BudgetExceeded:
        sigma, q, summed = charge.mechanism.noise_multiplier, charge.mechanism.sample_rate, charge.together
        steps = self.affordable_steps(
            noise_multiplier=sigma, sample_rate=q, noise_together=None if summed is None else summed.noise_multiplier
        )
        share = "" if summed is None else f" (the sum's: {noise_rounded_down(summed.noise_multiplier)})"
        # A spend that is not a number exceeds every cap.
        crossed = next(promise for promise in PROMISES if not spends[promise] <= self.budget.cap(promise))
        alone, says = "", "the site's cap is"
        if crossed == "alone":
            unset = self.budget.epsilon_alone is None
            key = "budget.epsilon, as budget.epsilon_alone is not set" if unset else "budget.epsilon_alone"
            alone, says = ", each masked input counted by itself", f"the site's cap for that ({key}) is"
        return BudgetExceeded(
            f"round {charge.round} of job {charge.job_id} asks for {charge.mechanism.steps} steps at noise "
            f"multiplier {noise_rounded_down(sigma)}{share} and sample rate {rate_rounded_up(q)}. That would bring "
            f"{self._name()} from epsilon {rounded_up(self.spent_epsilon(promise=crossed), 6)} to "
            f"{rounded_up(spends[crossed], 6)} at delta {delta_rounded_up(self.budget.delta)} ({self.budget.composition} "
            f"composition{alone}); {says} {as_set(self.budget.cap(crossed))}. Nothing was charged. {steps} "
            "such steps still fit: ask for no more than that, for more noise or a smaller sample rate, or raise the site's cap "
            "in its settings.",
            steps_affordable=steps,
        )

    def _name(self) -> str:
        return f"data set {self._names['dataset']!r} (unit: {self._names['unit']})"


def _exported(charged: Charged) -> ChargedSteps:
    return ChargedSteps(
        job_id=charged.job_id,
        round=charged.round,
        **asdict(charged.mechanism),
        noise_together=None if charged.together is None else charged.together.noise_multiplier,
        committed=charged.committed,
        time=charged.time,
        planned_steps=charged.planned_steps,
        attempt=charged.attempt,
    )
