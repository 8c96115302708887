"""A site's folder, opened: settings, guard, records, account and outbox.

Guarantees (tests: tests/client/site/test_site.py)
    * A charge is durable when `charge` returns.
    * The ids of persons are dropped when the data was read; only which records belong together
      stays in memory (tests/client/site/test_person_site.py).
    * With a `Guard`, nothing that the site keeps can be read without its storage key
      (tests/client/site/test_guard.py).
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from client.ledger.account import Budget, Charge
from client.ledger.ledger import Ledger
from client.site.config import BudgetConfig, SiteConfig
from client.site.declared import drift
from client.site.guard import Guard, NoGuard
from client.site.held_out import split
from client.site.outbox import Outbox
from client.site.terms import check_terms
from client.site.usable import LeftOut, UsableRecords, on_records
from client.training.processes import Processes
from client.training.trainer import SiteRecords, Sums
from shared.data.datasets import read_records
from shared.errors import TrustError
from shared.job.job import Job
from shared.job.parsing import load_toml, parse
from shared.privacy.accounting import GaussianSteps
from shared.privacy.randomness import SiteRandomness
from shared.runtime.runtime import Runtime
from shared.tasks.views import views_of
from shared.trust.signed_job import SignedJob
from shared.wire.messages import RequestKind, TrainRequest

log = logging.getLogger("silotune.site")


class OpenedFolder:
    """A site's folder, opened.

    Attributes:
        home: folder with `site.toml`, `ledger.db` and `rounds/`.
        config: the parsed `site.toml`.
        guard: stands between the coordinator and the data.
        trained, held_out: the records, by what they are for.
        outbox: the stored releases.
        new_randomness: makes the source of one release's coins and noise.
        left_out: what the job that was prepared last cannot use; for the site alone. None before.
    """

    def __init__(
        self,
        home: Path,
        *,
        new_randomness: Callable[[], SiteRandomness] = SiteRandomness.from_os,
        guard: Guard | None = None,
    ) -> None:
        """Open a folder; without a guard, that of a simulated site.

        Raises:
            TrustError: a folder with keys is a real site's, and is opened with a guard or not at all.
            ConfigError, DataError: as their texts say.
        """
        if guard is None and (home / "keys").exists():
            raise TrustError(
                f"{home} is a real site's folder, for it holds keys; nothing here is opened without its policy. Start it "
                f"with: silotune site start {home}. A simulation makes folders of its own; choose another."
            )
        self.home, self.new_randomness = home, new_randomness
        self.guard: Guard | NoGuard = guard or NoGuard()
        self.config = parse(SiteConfig, load_toml(home / "site.toml"), source=str(home / "site.toml"))
        records = read_records(self.config.data, base=home)
        self.trained, self.held_out = split(records, self.config)
        self.outbox = Outbox(home / "rounds", seal=self.guard.seal)
        # All of them: a record that is held out is measured, and charged as well.
        self._charged = self.guard.charged_records(home, dataset=self.config.dataset, records=records)
        self.left_out: LeftOut | None = None
        self._outbox_checked = False
        self._prepared: tuple[Runtime, object, UsableRecords] | None = None
        compute = self.config.compute
        # From the start: everything that is tried out on this machine depends on the number of threads.
        self.processes = Processes(compute.processes, compute.of_each) if compute.processes > 1 else None
        self._last: tuple[GaussianSteps, GaussianSteps | None] | None = None  # what the latest charge counts as

    @functools.cached_property
    def declared_records(self) -> int:
        """The public size of the data that is trained on, in records or persons: the budget's unit."""
        config, num_units = self.config, self.trained.num_units
        if config.declared_records is not None:
            return config.declared_records
        return self.guard.declared_size(self.home, dataset=config.dataset, unit=config.budget.unit, num_units=num_units)

    def warnings(self) -> list[str]:
        """Return what the site's own people, and nobody else, should know; begins the ledger."""
        found = self._charged.warnings(self.ledger().entries()) if self._charged else []
        return [*self.size_warnings(), *found]

    def size_warnings(self) -> list[str]:
        """Return what they should know of its declared size."""
        found = drift(self.declared_records, self.trained.num_units, self.config.budget.unit)
        return [] if found is None else [found]

    def admit_job(self, signed: SignedJob) -> None:
        """Raise `PolicyError` unless policy, settings and people of this site accept a job; nothing is loaded for it before."""
        self.guard.admit_job(signed)
        check_terms(self.config, signed.job, declared_records=self.declared_records)
        self.guard.admit_decided(signed)

    def admit(self, request: TrainRequest, kind: RequestKind = "train", *, begun: bool = False) -> None:
        """Raise `PolicyError` unless they accept a request; every kind of request comes through here.

        Args:
            begun: see `Guard.admit_round`.
        """
        self.guard.admit_round(request, kind, begun=begun)
        check_terms(self.config, request.job, declared_records=self.declared_records)
        if request.order is not None:  # else it is a simulation
            self.guard.admit_decided(request.order.signed_job)

    def check_decided(self, request: TrainRequest) -> None:
        """Raise if people do not approve a job any more, if they approve jobs here: the last check before a charge."""
        if request.order is not None:
            self.guard.admit_decided(request.order.signed_job)

    def note_begun(self, request: TrainRequest) -> None:
        """Note, once a round is charged and not before, that the job has begun."""
        if request.order is not None:
            self.guard.note_begun(request.order.signed_job)

    def usable(self, runtime: Runtime, job: Job) -> UsableRecords:
        """Return the records that a job can use, encoded; kept until another runtime asks, or another way to add up."""
        asked = (job.privacy.shares_noise, job.training.augmentation)
        if self._prepared is None or self._prepared[0] is not runtime or self._prepared[1] != asked:
            with on_records():
                usable = self.trained.usable(runtime, summed=job.privacy.shares_noise)
                views = views_of(usable.examples, job, runtime.tokenizer)
                usable = replace(usable, views=views)
                if self.processes is None:
                    runtime.warm_cache([*usable.examples, *views])
                else:
                    self.processes.prepare(runtime, job, _records(usable))
            self.left_out = left_out = usable.left_out
            if left_out:
                # For the site's own people; nobody else is told.
                log.warning("job %s: %s. The coordinator is not told.", job.name, left_out)
                self.guard.left_out(job, str(left_out))
            self._prepared = (runtime, asked, usable)
        return self._prepared[2]

    def sums(self, runtime: Runtime, job: Job, usable: UsableRecords, start: dict[str, Tensor]) -> Sums | None:
        """Return what computes a round's sums with all processes of this site, each ready for its adapter; None if it is one.

        Raises:
            ComputeError: one of them ended or failed, or computes other numbers; nothing was computed of records.
        """
        if self.processes is None:
            return None
        self.processes.prepare(runtime, job, _records(usable))  # once more, if one has ended since
        self.processes.begin(runtime, start)
        return self.processes.sums

    def end_processes(self) -> None:
        """End the processes that compute beside this one."""
        if self.processes is not None:
            self.processes.close()

    def ledger(self) -> Ledger:
        """Return the site's ledger, opened and verified; it counts by the site's own unit."""
        return self._ledger

    @functools.cached_property
    def _ledger(self) -> Ledger:
        return Ledger(
            self.home / "ledger.db",
            dataset=self.config.dataset,
            unit=self.config.budget.unit,
            budget=caps(self.config.budget),
            cipher=self.guard.seal,
            mirror=self.guard.mirror(),
        )

    def checked_ledger(self) -> Ledger:
        """Return the ledger if it charged every release that the site keeps; looked up once.

        Raises:
            LedgerError: if it did not, because an older copy was restored.
        """
        ledger = self.ledger()
        if not self._outbox_checked:
            self.outbox.check_charged(ledger.entries())
            self._outbox_checked = True
        return ledger

    def anticipate(self) -> None:
        """Prepare for another round like the last one, which then is a tenth of a second shorter."""
        if self._last is not None:
            self.ledger().anticipate(*self._last)

    def charge(self, job: Job, charge: Charge) -> int:
        """Charge a release, durably, and return the reservation; the fingerprint of the records is added here.

        Raises:
            PolicyError, BudgetExceeded, LedgerError: as their texts say; nothing was charged.
        """
        ledger, fingerprint = self.checked_ledger(), None
        self.guard.admit_spend(ledger, job, charge.mechanism, charge.together)
        if self._charged is not None:
            self._charged.note()
            fingerprint = self._charged.fingerprint
        reservation = ledger.reserve(replace(charge, records=fingerprint))
        self._last = charge.mechanism, charge.together
        return reservation

    def check_charge(self, job: Job, charge: Charge) -> None:
        """Refuse what `charge` would refuse now, as it does; nothing is charged."""
        ledger = self.checked_ledger()
        self.guard.admit_spend(ledger, job, charge.mechanism, charge.together)
        ledger.check(charge)

    def close(
        self, request: TrainRequest, reservation: int | None, release: bytes, *, executed_steps: int, seconds: float
    ) -> None:
        """Close the charge of a release that was stored, if there is one, and note the release."""
        ledger = None
        if reservation is not None:
            ledger, sha256 = self.ledger(), hashlib.sha256(release).hexdigest()
            ledger.commit(reservation, executed_steps=executed_steps, release_sha256=sha256)
        self.guard.stored(request, release, ledger, seconds=seconds)


def _records(usable: UsableRecords) -> SiteRecords:
    return SiteRecords(examples=usable.examples, persons=usable.persons, views=usable.views)


def caps(budget: BudgetConfig) -> Budget:
    """Return the caps of a site's settings as its ledger takes them."""
    return Budget(
        epsilon=budget.epsilon,
        delta=budget.delta,
        composition=budget.composition,
        epsilon_alone=budget.epsilon_alone,
    )
