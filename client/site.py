"""One site: its own configuration, data, ledger and outbox in one folder, and the way from a request to a release.

Guarantees (tests: tests/client/test_site.py)
    * The ledger is charged, durably, before the first noisy step; a crash keeps the charge.
    * A finished release is stored before it leaves. The same request again returns the same bytes and is not charged
      again; a request that differs in any byte is a new release, is charged, and takes the stored one's place.
    * Whether a request is answered, and how a refusal reads, follows from the request, from what the site declares and from
      its ledger, never from a record: a job trains without the records that it cannot use (client/usable.py), and whatever
      fails while records are read has one code and one text (tests/client/test_oracles.py; docs/decisions/0014).
    * The ids of persons are dropped when the data was read; only which records belong together stays in memory
      (tests/client/test_person_site.py).
    * A job is trained only if its unit of privacy is the one by which the site's budget counts (likewise).
    * With a guard, nothing is trained that is not signed and within the policy, and nothing that the site keeps can be read
      without its storage key (tests/client/test_guard.py).
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from client.adapter_bounds import check_bounds
from client.audit_mirror import AuditMirror
from client.charged_records import RECORDS_FILE, ChargedRecords
from client.config import SiteConfig
from client.declared import drift, durable_size
from client.guard import Guard
from client.held_out import held_out
from client.independence import check_adapter, keep_settled
from client.ledger import Budget, Charge, Ledger
from client.outbox import Outbox
from client.proof import prove_trainer
from client.terms import check_terms
from client.trainer import LocalRound, LocalWork, train_local_round
from client.usable import LeftOut, UsableRecords, usable_records
from shared import adapters
from shared.config import PERSON_UNITS, Job, load_toml, parse
from shared.datasets import PERSON_ROLE, read_records
from shared.errors import AdapterError, BudgetExceeded, DataError, PolicyError, SilotuneError, TrustError, place_of
from shared.messages import MetricsReply, Refusal, SiteDescription, TrainReply, TrainRequest
from shared.privacy.accounting import GaussianSteps
from shared.privacy.persons import Persons
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.privacy.sizes import declared_size
from shared.runtime import Runtime, load_runtime
from shared.signing import SignedJob
from shared.site_metrics import cast_votes, count_votes, noisy_counts
from shared.updates import encode_update
from shared.version import silotune_version

log = logging.getLogger("silotune.site")

# Texts of these errors speak of the job or of public quantities only; all others stay at the site, name and text.
_PUBLIC_ERRORS = (PolicyError, BudgetExceeded, AdapterError)

AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True, kw_only=True)
class BegunRound:
    """A round that is admitted, prepared and charged, and not yet trained.

    Attributes:
        request, request_sha256: what was asked.
        plan: what is to be executed.
        runtime, start: the model and the global adapter, checked.
        work: what the site brings.
        charge: ledger and reservation; None if nothing private is released.
    """

    request: TrainRequest
    request_sha256: str
    plan: PrivacyPlan
    runtime: Runtime
    start: dict[str, Tensor]
    work: LocalWork
    charge: tuple[Ledger, int] | None


class Site:
    """A site's folder, opened.

    Attributes:
        home: folder with `site.toml`, `ledger.db` and `rounds/`.
        config: the parsed `site.toml`.
        guard: of a real site; None in a simulation.
        left_out: what the job that was prepared last cannot use; for the site alone. None before.
    """

    def __init__(
        self,
        home: Path,
        *,
        new_randomness: Callable[[], SiteRandomness] = SiteRandomness.from_os,
        guard: Guard | None = None,
    ) -> None:
        self.home, self.guard = home, guard
        self.config = parse(SiteConfig, load_toml(home / "site.toml"), source=str(home / "site.toml"))
        self._new_randomness = new_randomness
        records = read_records(self.config.data, base=home)
        ids = [record.pop(PERSON_ROLE, None) for record in records]
        by_person = self.config.budget.unit in PERSON_UNITS
        out = held_out(
            records,
            self.config.evaluation_share,
            dataset=self.config.dataset,
            persons=Persons.keys(ids) if by_person else None,
        )
        self._records = [record for record, is_out in zip(records, out, strict=True) if not is_out]
        self._held_out = [record for record, is_out in zip(records, out, strict=True) if is_out]
        # Numbers of the records in the file, for the site's own log.
        self._rows = [row for row, is_out in enumerate(out, start=1) if not is_out]
        self._held_out_rows = [row for row, is_out in enumerate(out, start=1) if is_out]
        self._persons = self._held_out_persons = None
        if by_person:
            self._persons = Persons.from_ids([i for i, is_out in zip(ids, out, strict=True) if not is_out])
            self._held_out_persons = Persons.from_ids([i for i, is_out in zip(ids, out, strict=True) if is_out])
        self._outbox = Outbox(home / "rounds", seal=guard.seal if guard else None)
        self._declared: int | None = None
        self._charged_records: ChargedRecords | None = None
        if guard is not None:
            # All of them: a record that is held out is measured, and charged as well.
            self._charged_records = ChargedRecords(
                home / RECORDS_FILE, seal=guard.seal, dataset=self.config.dataset, records=records
            )
        self._prepared: tuple[Runtime, UsableRecords] | None = None
        self.left_out: LeftOut | None = None
        self._ledger: Ledger | None = None
        self._outbox_checked = False
        self._last: GaussianSteps | None = None  # mechanism of the latest charge

    @property
    def declared_records(self) -> int:
        """The public size of the data that is trained on, in the unit of the site's budget: records, or persons."""
        if self.config.declared_records is not None:
            return self.config.declared_records
        if self.guard is None:  # the data of a simulated site never changes
            return max(declared_size(self._num_units), 1)
        if self._declared is None:
            self._declared = durable_size(
                self.home, dataset=self.config.dataset, unit=self.config.budget.unit, num_units=self._num_units
            )
        return self._declared

    def warnings(self) -> list[str]:
        """Return what the site's own people should know of its data; begins the ledger, and never leaves the site."""
        found = self._charged_records.warnings(self.ledger().entries()) if self._charged_records else []
        return [*self.size_warnings(), *found]

    def size_warnings(self) -> list[str]:
        """Return what they should know of its declared size."""
        found = drift(self.declared_records, self._num_units, self.config.budget.unit)
        return [] if found is None else [found]

    @property
    def _num_units(self) -> int:
        return len(self._records) if self._persons is None else self._persons.count

    def ledger(self) -> Ledger:
        """Return the site's ledger, opened and verified; its account counts by the site's own unit."""
        if self._ledger is None:
            cap = self.config.budget
            budget = Budget(epsilon=cap.epsilon, delta=cap.delta, composition=cap.composition)
            self._ledger = Ledger(
                self.home / "ledger.db",
                dataset=self.config.dataset,
                unit=cap.unit,
                budget=budget,
                cipher=self.guard.seal if self.guard else None,
                mirror=AuditMirror(self.guard.log) if self.guard else None,
            )
        return self._ledger

    def checked_ledger(self) -> Ledger:
        """Return the ledger if it charged every release that the site keeps; the first time, all of them are looked up.

        Raises:
            LedgerError: if it did not, because an older copy was restored.
        """
        ledger = self.ledger()
        if not self._outbox_checked:
            self._outbox.check_charged(ledger.entries())
            self._outbox_checked = True
        return ledger

    def describe(self) -> SiteDescription:
        """Return the public description of this site."""
        return SiteDescription(
            site=self.config.name, declared_records=self.declared_records, version=silotune_version()
        )

    def accept(self, signed_job: SignedJob | None) -> SiteDescription | Refusal:
        """Describe this site; given a job, first check it and load its model, so that no round has to."""
        if signed_job is None:
            return self.describe()

        def prepare() -> SiteDescription:
            if self.guard:
                self.guard.admit_job(signed_job)
            check_terms(self.config, signed_job.job, declared_records=self.declared_records)
            self.prepare(signed_job.job)
            if self.guard:
                # Central DP is accounted by the coordinator; the site keeps no account of the unit "site".
                if signed_job.job.privacy.mechanism != "central":
                    self.checked_ledger()
                self.guard.prepared(signed_job)
            return self.describe()

        return self.guarded(prepare, job=signed_job.job, round_number=None)

    def answer(self, request: TrainRequest) -> TrainReply | Refusal:
        """Train one round, or refuse with a text that reveals nothing about the data."""
        return self.guarded(lambda: self.train(request), job=request.job, round_number=request.round_number)

    def answer_metrics(self, request: TrainRequest) -> MetricsReply | Refusal:
        """Release the job's site metrics, or refuse with a text that reveals nothing about the data."""
        return self.guarded(lambda: self.measure(request), job=request.job, round_number=request.round_number)

    def anticipate(self) -> None:
        """Prepare for another round like the last one; a tenth of a second that the round then does not pay."""
        if self._last is not None:
            self.ledger().anticipate(self._last)

    def refuse_unreadable(self, error: SilotuneError) -> Refusal:
        """Answer a request that could not be read, or whose job is not signed by whom it says."""
        log.error("refused an unreadable request: %s", error)
        # A signature that does not hold concerns only what the coordinator sent itself.
        public = isinstance(error, TrustError)
        if self.guard:
            self.guard.refused(None, None, error, sent=public)
        if not public:
            return Refusal.withheld(self.config.name)
        reason = f"the job's signature does not hold: {error}"
        return Refusal(site=self.config.name, code=type(error).__name__, reason=reason)

    def guarded(self, act: Callable[[], AnswerT], *, job: Job, round_number: int | None) -> AnswerT | Refusal:
        """Return what `act` returns, or a refusal whose text reveals nothing about the data."""
        what = f"job {job.name}" + (f", round {round_number}" if round_number is not None else "")
        try:
            return act()
        except SilotuneError as error:
            public = isinstance(error, _PUBLIC_ERRORS)
            log.log(logging.WARNING if public else logging.ERROR, "refused %s: %s", what, error)
            if self.guard:
                self.guard.refused(job, round_number, error, sent=public)
            if not public:
                return Refusal.withheld(self.config.name)
            reason = str(error)
            if self.guard and isinstance(error, BudgetExceeded):
                # What a real site spent on other jobs is its own business.
                reason = (
                    f"the round does not fit into the site's budget; {error.steps_affordable} such steps still fit."
                )
            return Refusal(site=self.config.name, code=type(error).__name__, reason=reason)
        except Exception as error:  # its text may quote data
            log.error("failed: %s: %s", what, place_of(error))
            if self.guard:
                self.guard.refused(job, round_number, error, sent=False)
            return Refusal.withheld(self.config.name)

    def train(self, request: TrainRequest) -> TrainReply:
        """Execute one round of a job.

        Raises:
            PolicyError: the site does not accept the job.
            BudgetExceeded: the round does not fit into the site's budget; nothing was charged.
            DataError, ModelError, AdapterError, PrivacyError, LedgerError: as their texts say.
        """
        begun = self.begin(request)
        return begun if isinstance(begun, TrainReply) else self.train_begun(begun)

    def begin(self, request: TrainRequest) -> TrainReply | BegunRound:
        """Do everything that comes before training, the charge last; or return the release that was made for this request.

        Raises:
            SilotuneError: see `train`.
        """
        job, round_number = request.job, request.round_number
        # 1. What the site accepts at all.
        self._admit(request)
        if not 1 <= round_number <= job.training.rounds:
            raise PolicyError(f"round {round_number} is outside the job's {job.training.rounds} rounds.")
        plan = PrivacyPlan.from_job(job)
        # 2. A release that was already made is sent again as it is.
        request_sha256 = _sha256(job.sha256.encode(), str(round_number).encode(), request.adapter)
        stored = self._outbox.stored_round(job.sha256, round_number, request_sha256=request_sha256)
        if stored is not None:
            if plan.private:
                self.checked_ledger()
            return stored
        # 3. Model and global adapter, all checked before a record is read and before anything is charged.
        runtime = self._load(job)
        start = self._adapter(runtime, plan, request)
        usable = self.usable(runtime, job)
        # 4. Charge first.
        charge = self._charge_round(request, request_sha256, plan) if plan.private else None
        return BegunRound(
            request=request,
            request_sha256=request_sha256,
            plan=plan,
            runtime=runtime,
            start=start,
            work=LocalWork(
                examples=usable.examples,
                declared_records=self.declared_records,
                randomness=self._new_randomness(),
                optimizer_state=self._outbox.optimizer_state(job.sha256, round_number),
                # Under central DP the whole site is the unit.
                persons=None if job.privacy.mechanism == "central" else usable.persons,
            ),
            charge=charge,
        )

    def train_begun(self, begun: BegunRound) -> TrainReply:
        """Train what was begun, by itself, and release it."""
        # 5. Train.
        started = time.monotonic()
        work, request = begun.work, begun.request
        with _on_records():
            result = train_local_round(
                begun.runtime,
                work.examples,
                begun.start,
                training=request.job.training,
                plan=begun.plan,
                declared_records=work.declared_records,
                randomness=work.randomness,
                round_number=request.round_number,
                optimizer_state=work.optimizer_state,
                persons=work.persons,
            )
        return self.finish(begun, result, seconds=time.monotonic() - started)

    def finish(self, begun: BegunRound, result: LocalRound, *, seconds: float) -> TrainReply:
        """Encode what was trained, store the release before it leaves, then close the charge."""
        # 6. Encode, with what the encoding lost in earlier rounds.
        request, randomness = begun.request, begun.work.randomness
        job, round_number = request.job, request.round_number
        encoded = encode_update(
            result.delta,
            job.federation.update_dtype,
            residual=self._outbox.residual(job.sha256, round_number),
            salt=randomness.stream("salt", round_number=round_number, step=0).uint64(2).tobytes().hex(),
        )
        reply = self._reply(job, begun.plan, round_number, result, randomness, encoded.data)
        self._outbox.store_round(
            reply,
            request_sha256=begun.request_sha256,
            optimizer_state=result.optimizer_state,
            residual=encoded.residual,
        )
        self._close(request, begun.charge, reply.update, executed_steps=result.executed_steps, seconds=seconds)
        return reply

    def measure(self, request: TrainRequest) -> MetricsReply:
        """Release the site metrics of a job: noisy counts over the held-out records, charged like a round.

        The request is that of a round after the last one, so an order for the one cannot be used for the other.

        Raises:
            PolicyError: the site does not release these metrics, or holds no records for them.
            BudgetExceeded: they do not fit into the site's budget; nothing was charged.
            DataError, ModelError, AdapterError, PrivacyError, LedgerError: as their texts say.
        """
        job, names = request.job, request.job.site_metrics.names
        # 1. What the site accepts at all.
        self._admit(request)
        if self.guard:
            self.guard.admit_metrics(job)
        plan = PrivacyPlan.from_job(job)
        if plan.metrics is None or request.round_number != job.training.rounds + 1:
            raise PolicyError("the job plans no site metrics, or they were asked for before its last round ended.")
        if not self.config.evaluation_share:
            raise PolicyError(
                f"site {self.config.name} holds no records out of training, so it has no metrics to release."
            )
        # 2. A release that was already made is sent again as it is.
        request_sha256 = _sha256(job.sha256.encode(), b"metrics", request.adapter)
        stored = self._outbox.stored_metrics(job.sha256, request_sha256=request_sha256)
        if stored is not None:
            self.checked_ledger()
            return stored
        # 3. Model and global adapter, all checked before a record is read and before anything is charged.
        runtime = self._load(job)
        adapter = self._adapter(runtime, plan, request)
        with _on_records():
            usable = usable_records(runtime, self._held_out, rows=self._held_out_rows, persons=self._held_out_persons)
        if usable.left_out.rows:
            log.warning("job %s, held-out records: %s. The coordinator is not told.", job.name, usable.left_out)
        # 4. Charge first.
        charge = self._charge(request, request_sha256, plan.metrics)
        # 5. Evaluate; one noise event for each metric.
        started = time.monotonic()
        randomness = self._new_randomness()
        runtime.load(adapter)
        owners = usable.persons.owners if usable.persons else None
        with _on_records():
            counts = {
                name: noisy_counts(
                    count_votes(cast, owners),
                    noise_multiplier=plan.metrics.noise_multiplier,
                    stream=randomness.stream("noise", round_number=request.round_number, step=step),
                )
                for step, (name, cast) in enumerate(cast_votes(runtime, usable.examples, job).items())
            }
        seconds = time.monotonic() - started
        # 6. Store the release before it leaves, then close the charge.
        reply = MetricsReply(
            site=self.config.name,
            job_sha256=job.sha256,
            adapter_sha256=hashlib.sha256(request.adapter).hexdigest(),
            counts=counts,
            noise_multiplier=plan.metrics.noise_multiplier,
            randomness=randomness.origin,
        )
        self._outbox.store_metrics(reply, request_sha256=request_sha256)
        self._close(request, charge, reply.canonical(), executed_steps=len(names), seconds=seconds)
        return reply

    def _admit(self, request: TrainRequest) -> None:
        """Raise `PolicyError` for whatever no job may ask of this site."""
        if self.guard:
            self.guard.received(request)
            self.guard.admit_round(request)
        check_terms(self.config, request.job, declared_records=self.declared_records)

    def _charge_round(self, request: TrainRequest, request_sha256: str, plan: PrivacyPlan) -> tuple[Ledger, int]:
        """Charge a round; of a job that may stop early, the ledger is told the whole plan."""
        training = request.job.training
        planned = None if training.early_stopping is None else plan.planned_steps
        return self._charge(request, request_sha256, plan.mechanism(training.local_steps), planned_steps=planned)

    def _charge(
        self,
        request: TrainRequest,
        request_sha256: str,
        mechanism: GaussianSteps,
        *,
        planned_steps: int | None = None,
    ) -> tuple[Ledger, int]:
        """Charge a release, durably, and return the ledger with the reservation."""
        job, ledger = request.job, self.checked_ledger()
        if self.guard:
            self.guard.admit_spend(ledger, job, mechanism)
        if self._charged_records is not None:
            self._charged_records.note()
        reservation = ledger.reserve(
            Charge(
                job_id=job.sha256,
                round=request.round_number,
                request_sha256=request_sha256,
                mechanism=mechanism,
                records=self._charged_records.fingerprint if self._charged_records else None,
                planned_steps=planned_steps,
            )
        )
        self._last = mechanism
        return ledger, reservation

    def _close(
        self,
        request: TrainRequest,
        charge: tuple[Ledger, int] | None,
        release: bytes,
        *,
        executed_steps: int,
        seconds: float,
    ) -> None:
        """Close the charge of a release that was stored, and note it."""
        ledger = None
        if charge is not None:
            ledger, reservation = charge
            ledger.commit(
                reservation, executed_steps=executed_steps, release_sha256=hashlib.sha256(release).hexdigest()
            )
        if self.guard:
            self.guard.stored(request, release, ledger, seconds=seconds)

    def prepare(self, job: Job) -> Runtime:
        """Load and prove the model, encode the data, warm the cache; idempotent, releases nothing."""
        runtime = self._load(job)
        self.usable(runtime, job)
        return runtime

    def _load(self, job: Job) -> Runtime:
        """Load and prove the model; reads no record."""
        runtime = load_runtime(job, self.config.compute)
        if not runtime.proven:
            prove_trainer(runtime)
            runtime.proven = True
        keep_settled(runtime)
        return runtime

    def _adapter(self, runtime: Runtime, plan: PrivacyPlan, request: TrainRequest) -> dict[str, Tensor]:
        """Return the global adapter of a request, checked: names, shapes, size, and what company makes of it here."""
        job = request.job
        adapter = adapters.decode(request.adapter, runtime.global_shapes(job.lora.train == "both"))
        check_bounds(job, plan, runtime.initial, adapter, rounds_before=request.round_number - 1)
        sha256 = hashlib.sha256(request.adapter).hexdigest()
        # Simulated sites share one runtime and get the same bytes.
        if plan.private and runtime.tried_adapter != sha256:
            check_adapter(runtime, adapter)
            runtime.tried_adapter = sha256
        return adapter

    def usable(self, runtime: Runtime, job: Job) -> UsableRecords:
        """Return the site's records as far as `runtime`'s job can use them, encoded; kept until another runtime asks."""
        if self._prepared is None or self._prepared[0] is not runtime:
            with _on_records():
                usable = usable_records(runtime, self._records, rows=self._rows, persons=self._persons)
                runtime.warm_cache(usable.examples)
            self._note_left_out(usable.left_out, job)
            self._prepared = (runtime, usable)
        return self._prepared[1]

    def examine(self, job: Job) -> LeftOut:
        """Return what `job` could not use of this site's records, for its engineer, before the job comes; notes nothing.

        Raises:
            PolicyError: the job does not fit what the site declares.
            ModelError, ConfigError: the job's model cannot be loaded here.
        """
        check_terms(self.config, job, declared_records=self.declared_records)
        runtime = load_runtime(job, self.config.compute)
        return usable_records(runtime, self._records, rows=self._rows, persons=self._persons).left_out

    def _note_left_out(self, left_out: LeftOut, job: Job) -> None:
        """Tell the site's own people what the job cannot use, or would make little of; nobody else."""
        self.left_out = left_out
        if left_out:
            log.warning("job %s: %s. The coordinator is not told.", job.name, left_out)
            if self.guard:
                self.guard.left_out(job, str(left_out))

    def _reply(
        self,
        job: Job,
        plan: PrivacyPlan,
        round_number: int,
        result: LocalRound,
        randomness: SiteRandomness,
        update: bytes,
    ) -> TrainReply:
        return TrainReply(
            site=self.config.name,
            round_number=round_number,
            job_sha256=job.sha256,
            update=update,
            declared_records=self.declared_records,
            noise_multiplier=plan.noise_multiplier,
            sample_rate=plan.sample_rate,
            max_grad_norm=plan.max_grad_norm,
            delta=plan.delta,
            steps=result.executed_steps,
            randomness=randomness.origin,
            epsilon_budget=self.config.budget.epsilon if plan.private else 0.0,
        )


@contextmanager
def _on_records() -> Iterator[None]:
    """Let no error that may be told leave what reads records: all that fails here is withheld, whatever its kind."""
    try:
        yield
    except _PUBLIC_ERRORS as error:
        raise DataError(f"while records were read: {type(error).__name__}: {error}") from error


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
