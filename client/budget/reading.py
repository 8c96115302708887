"""A site's ledger as a console keeps it between two pages: what it read once, and only what came since.

Formal guarantees (tests: tests/client/console/test_budget_reading.py)
    * Of a ledger that grew, the new entries are read and checked, and no other (test_only_what_is_new_is_read).
    * Whatever is not as it was left, another file, fewer entries, another entry where the last one was, has all of it read anew
      (test_whatever_is_unexpected_has_all_of_it_read_anew).
    * An account that was read on is the one that a ledger reads as a whole (test_reading_on_is_reading_all).

Entries that were read are looked at again by `Budgets.check` alone, and by the node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from client.ledger.account import CHARGING_KINDS, PROMISES, Account, Charged, Promise, counting, dataset_key
from client.ledger.file import NO_ENTRY, Entry
from shared.privacy.accounting import GaussianSteps

Counts = dict[Promise, Counter[GaussianSteps]]
"""How often each mechanism was charged, as a promise counts it."""


@dataclass
class Tally:
    """An account, and how often it was charged what; of many charges what they have in common is kept once."""

    account: Account
    counts: Counts = field(default_factory=lambda: {promise: Counter() for promise in PROMISES})
    _handed_out: bool = False
    _mechanisms: dict[GaussianSteps, GaussianSteps] = field(default_factory=dict)
    _jobs: dict[str, str] = field(default_factory=dict)

    def take(self, entry: Entry) -> None:
        """Take in the next entry; raises as `Account.take`."""
        if self._handed_out:
            self.account.charges, self._handed_out = dict(self.account.charges), False
        charges = self.account.charges
        committed = entry.kind == "commit"
        number = entry.payload["reservation"] if committed else entry.sequence
        before = charges.get(number)
        self.account.take(entry.sequence, entry.kind, entry.time, entry.payload)
        if not committed and entry.kind not in CHARGING_KINDS:
            return
        charges[number] = now = self._slim(charges[number])
        for promise, counts in self.counts.items():
            if before is not None:
                was = counting(before, promise)
                counts[was] -= 1
                if not counts[was]:
                    del counts[was]
            counts[counting(now, promise)] += 1

    def copy(self) -> tuple[Account, Counts]:
        """Return account and counts as they are now, whatever is taken in later."""
        account, self._handed_out = self.account, True
        kept = Account(dataset=account.dataset, unit=account.unit, caps=list(account.caps), charges=account.charges)
        return kept, {promise: Counter(counts) for promise, counts in self.counts.items()}

    def _slim(self, charged: Charged) -> Charged:
        together = charged.together
        return replace(
            charged,
            job_id=self._jobs.setdefault(charged.job_id, charged.job_id),
            mechanism=self._mechanisms.setdefault(charged.mechanism, charged.mechanism),
            together=None if together is None else self._mechanisms.setdefault(together, together),
            request_sha256=None,
        )


@dataclass
class Reading:
    """A ledger's file, as far as it was read.

    Attributes:
        file: which one (device and inode).
        number, sha256: of the last entry that was taken in.
        tallies: by data set and unit.
    """

    file: tuple[int, int]
    number: int = 0
    sha256: str = NO_ENTRY
    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)

    def take(self, entries: Iterable[Entry]) -> None:
        """Take in what follows."""
        for entry in entries:
            dataset, unit = entry.payload["dataset"], entry.payload["unit"]
            key = (dataset_key(dataset), unit)
            if key not in self.tallies:
                self.tallies[key] = Tally(Account(dataset=dataset, unit=unit))
            tally = self.tallies[key]
            tally.account.dataset = dataset  # as it is spelled now
            tally.take(entry)
            self.number, self.sha256 = entry.sequence, entry.entry_sha256
