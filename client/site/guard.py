"""What a real site puts between the coordinator and its data: signatures, policy, audit log, encryption at rest.

A real site cannot be opened without a `Guard` (`client.site.home.open_site`), and refuses whatever is
not signed (tests/client/site/test_guard.py). A simulated one, whose
folder has no keys, has a `NoGuard`, which does nothing.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from client.approval.policy_changes import PolicyChanges
from client.approval.request import Rules
from client.approval.requests import Approvals
from client.approval.store import STORE_FILE
from client.ledger.account import Promise
from client.ledger.audit_mirror import AuditMirror
from client.ledger.ledger import Ledger
from client.policy.limits import check_adapter_size
from client.policy.peers import check_peers
from client.policy.policy import (
    Policy,
    check_backbone,
    check_clock,
    check_hours,
    check_job,
    check_metrics,
    check_spend,
    load_policy,
)
from client.site.charged_records import RECORDS_FILE, ChargedRecords
from client.site.declared import durable_size
from client.site.secure.peers import peer_keys
from shared.errors import BudgetExceeded, PolicyError, SilotuneError, TrustError
from shared.job.job import Job
from shared.job.model import ModelConfig
from shared.models.backbones import backbone_folder, backbone_sha256
from shared.models.images import image_network_sha256
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.plan import PrivacyPlan
from shared.privacy.sizes import declared_size
from shared.secure_sum.keys import shown_key
from shared.secure_sum.site import KeyOf
from shared.trust.audit_log import AuditLog, Event
from shared.trust.certificates import load_certificate, spki
from shared.trust.keystore import Seal
from shared.trust.receipts import sign_release
from shared.trust.signed_job import SignedJob, round_fields
from shared.trust.signing import Purpose
from shared.wire.messages import MetricsReply, RequestKind, TrainReply, TrainRequest, released

service_log = logging.getLogger("silotune.site")


class Guard:
    """A site's policy, log and storage key.

    Attributes:
        seal: encrypts what the site keeps.
        log: the site's audit log.
        approvals: what people of this site said to jobs.

    Args:
        key: returns the key of the site's certificate, as it is now; it signs releases.
    """

    def __init__(
        self,
        *,
        site: str,
        policy_file: Path,
        seal: Seal,
        log: AuditLog,
        key: Callable[[], ec.EllipticCurvePrivateKey],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.seal, self.log, self._key = seal, log, key
        self._site, self._clock, self._policy_file = site, clock, policy_file
        self._home = policy_file.parent
        self.approvals = Approvals(self._home / STORE_FILE, site=site, seal=seal, log=log, clock=clock)
        self._changes = PolicyChanges(policy_file, log=log)
        self._policy = (_version(policy_file), load_policy(policy_file))

    @property
    def policy(self) -> Policy:
        """The site's policy as it stands in the file now: a signer that was struck out signs nothing any more."""
        if _version(self._policy_file) != self._policy[0]:
            self.keep_policy()  # first, for it may finish a change that somebody began
            try:
                self._policy = (_version(self._policy_file), load_policy(self._policy_file))
            except SilotuneError as error:
                # What is wrong with it is the site's own business.
                self.log.append(Event.POLICY_UNREADABLE, reason=str(error))
                raise PolicyError(f"site {self._site} accepts no job now: its policy cannot be read.") from None
        return self._policy[1]

    def keep_policy(self) -> None:
        """Keep the policy in force as a version, if it was written by hand; training does not depend on it."""
        try:
            self._changes.settle()
        except (SilotuneError, OSError) as error:
            service_log.warning("a version of the policy could not be kept: %s", error)

    def admit_job(self, signed: SignedJob | None) -> None:
        """Raise `PolicyError` unless the policy accepts this job, signed, on the backbone that it names."""
        if signed is None:
            raise PolicyError(f"site {self._site} accepts signed jobs only; submit the job through a coordinator.")
        check_job(self.policy, signed, now=self._clock(), site=self._site)
        check_backbone(self.policy, signed.job, _model_sha256(signed.job.model))

    def admit_decided(self, signed: SignedJob) -> None:
        """Raise unless people approved a job that no rule refuses, where the policy requires that; asked last of all.

        Raises:
            AwaitingApproval, PolicyError, TrustError, RunError: see `client.approval.requests.Approvals.admit`.
        """
        policy = self.policy
        rules = Rules.of(policy)
        if policy.approval == "required":
            self.approvals.admit(signed, rules)
        elif self.approvals.exist:  # a "no" holds whatever the policy says since
            self.approvals.check_refused(signed, rules)

    def note_begun(self, signed: SignedJob) -> None:
        """Note that a round of a job was charged, which keeps an approval from expiring.

        Raises:
            TrustError, RunError: the requests cannot be read or written.
        """
        if self.policy.approval == "required":
            self.approvals.begin(signed, Rules.of(self.policy))

    def mirror(self) -> AuditMirror:
        """Return what repeats the ledger in the log."""
        return AuditMirror(self.log)

    def charged_records(self, home: Path, *, dataset: str, records: Sequence[Mapping[str, Any]]) -> ChargedRecords:
        """Return what is kept of the records that were charged; see `client.site.charged_records`."""
        return ChargedRecords(home / RECORDS_FILE, seal=self.seal, dataset=dataset, records=records)

    def declared_size(self, home: Path, *, dataset: str, unit: str, num_units: int) -> int:
        """Return the size that the site declared first; see `client.site.declared`."""
        return durable_size(home, dataset=dataset, unit=unit, num_units=num_units)

    def admit_round(self, request: TrainRequest, kind: RequestKind = "train", *, begun: bool = False) -> None:
        """Note a request; raise `PolicyError` unless the job's coordinator sent it, as this kind of request, now.

        Args:
            begun: it belongs to what was admitted within the policy's hours, which may be over by now.
        """
        order = request.order
        self.log.append(
            Event.REQUEST_RECEIVED,
            job=request.job.sha256,
            name=request.job.name,
            round=request.round_number,
            signer=order.signed_job.signer.text if order else None,
            adapter_sha256=hashlib.sha256(request.adapter).hexdigest(),
            bytes=len(request.adapter),
            sent_at=order.sent_at if order else None,
            waited_seconds=round(request.waited_seconds, 3),
        )
        self.admit_job(order.signed_job if order else None)
        check_adapter_size(self.policy.limits, len(request.adapter))
        assert order is not None  # noqa: S101 (admit_job refused otherwise)
        try:
            fields = round_fields(
                job_sha256=request.job.sha256,
                round_number=request.round_number,
                adapter=request.adapter,
                sent_at=order.sent_at,
                attempt=request.attempt,
                kind=kind,
            )
            order.signed_job.coordinator.verify(Purpose.ROUND, fields, order.signature)
            sent_at = _parse_time(order.sent_at)
            if request.job != order.signed_job.job:
                raise ValueError("the job is not the signed one")
        except (TrustError, ValueError):
            raise PolicyError(
                f"round {request.round_number} is not signed by the coordinator that the job names; the job, the round number, "
                "the adapter or the kind of request was changed on the way, or somebody else sent it."
            ) from None
        self._key()  # a key that cannot sign the release is found before anything is charged
        now = self._clock()
        check_clock(self.policy, sent_at, now - timedelta(seconds=request.waited_seconds))
        if not begun:
            check_hours(self.policy, now.astimezone())

    def admit_spend(
        self, ledger: Ledger, job: Job, mechanism: GaussianSteps, together: GaussianSteps | None = None
    ) -> None:
        """Raise `PolicyError` if this job, what it repeated included, would spend more than the policy allows a job.

        Args:
            mechanism: the steps about to be charged, with the noise in what leaves the site.
            together: the same with the noise of the sum that it goes into, if it goes into one.
        """
        alone = PrivacyPlan.from_job(job)
        spend = functools.partial(_job_epsilon, ledger, job)
        check_spend(
            self.policy,
            spend("together", together or mechanism, alone.of_sum),
            spend("alone", mechanism, alone),
        )

    def admit_attempt(self, ledger: Ledger, job: Job, round_number: int, attempt: int) -> None:
        """Raise `PolicyError` unless a job's rounds go forward, and the attempts at each, within its plan and the policy.

        Every attempt in which a masked input left was charged, whether its sum was opened or not; who asks for the same one again
        gets the stored bytes or nothing, so here each comes once.
        """
        charges = ledger.charges(job.sha256)
        last_round = max((charged.round for charged in charges), default=0)
        if not last_round <= round_number <= job.training.rounds:
            raise PolicyError(
                f"round {round_number} was asked for, but the job has {job.training.rounds} rounds, and this site has taken part "
                f"in round {last_round}; rounds go forward only. If the coordinator's folder was put back to an older state, "
                "submit the job anew."
            )
        attempts = [charged.attempt or 0 for charged in charges if charged.round == round_number]
        if attempts and attempt <= max(attempts):
            raise PolicyError(
                f"attempt {attempt} at round {round_number} was asked for, but this site has taken part in attempt "
                f"{max(attempts)}; each needs a number above all before it. If the coordinator's folder was put back to an older "
                "state, or its attempts.json was lost, submit the job anew."
            )
        if len(attempts) >= (most := self.policy.max_attempts_per_round):
            raise PolicyError(
                f"this site has taken part in {len(attempts)} attempts at round {round_number}; its policy allows {most} a "
                "round. Find out which site drops out, and submit a job without it."
            )
        if len(charges) >= job.charged_steps:
            raise PolicyError(
                f"this site has taken part in {len(charges)} attempts, and the job plans {job.training.rounds} rounds and "
                f"{job.spare_attempts} spare attempts. Submit a job with more privacy.spare_attempts; they are part of its "
                "epsilon."
            )

    def admit_progress(self, ledger: Ledger, request: TrainRequest, request_sha256: str) -> None:
        """Raise `PolicyError` unless a job's rounds go forward, each from one adapter.

        A coordinator that shows a site two adapters in one round, or goes back, gets two releases where the job plans one. What
        was charged and not stored, because the process died, may be asked for again: by the same request.
        """
        for charged in ledger.charges(request.job.sha256):
            same = charged.round == request.round_number
            # Of what another ledger charged nobody knows from which adapter.
            if charged.round > request.round_number or (same and charged.request_sha256 != request_sha256):
                raise PolicyError(
                    f"round {request.round_number} was asked for, but this site has answered round {charged.round} of the job"
                    f"{' from another adapter' if same else ''}; rounds go forward only, each from one adapter. If the "
                    "coordinator's folder was put back to an older state, submit the job anew."
                )

    def most_attempts(self, job: Job) -> int:
        """Return how many attempts at one round are computed, whether they are charged in the end or not."""
        return min(job.spare_attempts + 1, self.policy.max_attempts_per_round)

    def admit_peers(self, job: Job, names: Collection[str]) -> None:
        """Raise `PolicyError` unless enough of the sites in a sum, this one included, are known to the policy."""
        check_peers(self.policy.peers, job, names, site=self._site)

    def admit_metrics(self, job: Job) -> None:
        """Raise `PolicyError` unless the policy lets every one of the job's site metrics out."""
        check_metrics(self.policy, job)

    def receipt(self, request: TrainRequest, release: TrainReply | MetricsReply) -> bytes:
        """Return the signature, by the key of the site's certificate, of a release that answers this request."""
        assert request.order is not None  # noqa: S101 (admitted)
        return sign_release(self._key(), released(request, request.order.sent_at, release))

    def certified_key(self) -> tuple[ec.EllipticCurvePrivateKey, bytes]:
        """Return the key that signs for this site, and its certificate (DER)."""
        certificate = load_certificate(self._home / "site.crt")
        return self._key(), certificate.public_bytes(Encoding.DER)

    def peer_keys(self) -> KeyOf:
        """Return what gives the keys of the other sites of a roster; see `client.site.secure.peers`."""
        return peer_keys(self._home, pinned=self.policy.peers, now=self._clock())

    def is_past(self, time: datetime) -> bool:
        """Return whether a time is over by this site's clock."""
        return self._clock() >= time

    def told(self, error: SilotuneError) -> str:
        """Return what may be told; what a real site spent on other jobs is its own business."""
        if isinstance(error, BudgetExceeded):
            return f"the round does not fit into the site's budget; {error.steps_affordable} such steps still fit."
        return str(error)

    def refused(self, job: Job | None, round_number: int | None, error: Exception, *, sent: bool) -> None:
        """Note a refusal; `sent` tells whether its text left the site or only the error's name."""
        # The text of a defect may quote data, so only its type goes into the log.
        reason = str(error) if isinstance(error, SilotuneError) else "a defect; see the node's own log"
        self.log.append(
            Event.REQUEST_REFUSED,
            job=job.sha256 if job else None,
            round=round_number,
            code=type(error).__name__,
            reason=reason,
            reason_sent=sent,
        )

    def prepared(self, signed: SignedJob) -> None:
        """Note that a job was accepted and its model loaded."""
        job = signed.job
        backbone = job.model.backbone
        self.log.append(Event.JOB_PREPARED, job=job.sha256, name=job.name, signer=signed.signer.text, backbone=backbone)

    def left_out(self, job: Job, what: str) -> None:
        """Note which records a job cannot use; by row and reason, for the site's own people."""
        self.log.append(Event.RECORDS_LEFT_OUT, job=job.sha256, name=job.name, reason=what)

    def stored(self, request: TrainRequest, release: bytes, ledger: Ledger | None, *, seconds: float) -> None:
        """Note a release that is about to leave: an update, or after the last round the metrics."""
        self.log.append(
            Event.RELEASE_STORED,
            job=request.job.sha256,
            round=request.round_number,
            sha256=hashlib.sha256(release).hexdigest(),
            bytes=len(release),
            epsilon_spent=ledger.spent_epsilon() if ledger else None,
            seconds_training=round(seconds, 3),
        )

    def repeated(self, request: TrainRequest, release: bytes) -> None:
        """Note a release that was made before and leaves again; its process may have died before `stored`."""
        sha256 = hashlib.sha256(release).hexdigest()
        self.log.append(Event.RELEASE_REPEATED, job=request.job.sha256, round=request.round_number, sha256=sha256)


class NoGuard:
    """The guard of a simulated site: lets everything pass, notes nothing, seals nothing."""

    seal = None

    def __init__(self) -> None:
        self._own_key: ec.EllipticCurvePrivateKey | None = None

    def certified_key(self) -> tuple[ec.EllipticCurvePrivateKey, bytes]:
        """Return a key of this process, and in the place of a certificate its public part: others take it as shown."""
        if self._own_key is None:
            self._own_key = ec.generate_private_key(ec.SECP256R1())
        return self._own_key, spki(self._own_key.public_key())

    def peer_keys(self) -> KeyOf:
        """Return what gives the keys that the other simulated sites show."""
        return shown_key

    def most_attempts(self, job: Job) -> int:
        """Return what the job plans: there is no policy."""
        return job.spare_attempts + 1

    def is_past(self, time: datetime) -> bool:
        """Return False: in a simulation nothing ends by the clock."""
        return False

    def mirror(self) -> None:
        """Return None: no log repeats the ledger."""

    def charged_records(self, home: Path, *, dataset: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Return None: nobody renames the data of a simulation."""

    def declared_size(self, home: Path, *, dataset: str, unit: str, num_units: int) -> int:
        """Return the size that follows from the data, which never changes."""
        return max(declared_size(num_units), 1)

    def receipt(self, request: TrainRequest, release: TrainReply | MetricsReply) -> bytes:
        """Return nothing: a simulated site has no certificate."""
        return b""

    def told(self, error: SilotuneError) -> str:
        """Return the whole text: nobody's budget is a secret in a simulation."""
        return str(error)

    def keep_policy(self) -> None:
        """Do nothing: there is no policy."""

    def admit_job(self, signed: SignedJob | None) -> None: ...
    def admit_decided(self, signed: SignedJob) -> None: ...
    def note_begun(self, signed: SignedJob) -> None: ...
    def admit_round(self, request: TrainRequest, kind: RequestKind = "train", *, begun: bool = False) -> None: ...
    def admit_spend(
        self, ledger: Ledger, job: Job, mechanism: GaussianSteps, together: GaussianSteps | None = None
    ) -> None: ...
    def admit_attempt(self, ledger: Ledger, job: Job, round_number: int, attempt: int) -> None: ...
    def admit_peers(self, job: Job, names: Collection[str]) -> None: ...
    def admit_progress(self, ledger: Ledger, request: TrainRequest, request_sha256: str) -> None: ...
    def admit_metrics(self, job: Job) -> None: ...
    def refused(self, job: Job | None, round_number: int | None, error: Exception, *, sent: bool) -> None: ...
    def prepared(self, signed: SignedJob) -> None: ...
    def left_out(self, job: Job, what: str) -> None: ...
    def stored(self, request: TrainRequest, release: bytes, ledger: Ledger | None, *, seconds: float) -> None: ...
    def repeated(self, request: TrainRequest, release: bytes) -> None: ...


def _job_epsilon(ledger: Ledger, job: Job, promise: Promise, more: GaussianSteps, plan: PrivacyPlan) -> float:
    """Return epsilon of one job's charges and `more`; within `plan` that of the plan.

    Within it a job spends what `Guard.admit_job` checked, and the accountant remembers that sum.
    """
    events = [*ledger.events(job.sha256, promise=promise), more]
    within = _steps(events) <= _steps(plan.events)
    return compose_epsilon(plan.events if within else events, job.privacy.delta)


def _steps(events: Iterable[GaussianSteps]) -> Counter[GaussianSteps]:
    """Return the number of steps of each mechanism."""
    total: Counter[GaussianSteps] = Counter()
    for event in events:
        total[replace(event, steps=0)] += event.steps
    return total


def _version(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _parse_time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError("a time without a time zone")
    return time


def _model_sha256(model: ModelConfig) -> str:
    """Return what the policy must list: SHA-256 of the backbone's files, or of what a network for images computes."""
    return image_network_sha256(model) if model.is_image_network else _backbone_sha256(str(backbone_folder(model)))


@functools.lru_cache(maxsize=8)
def _backbone_sha256(folder: str) -> str:
    # Once per process: a node loads a backbone once, and hashing a large one takes seconds.
    return backbone_sha256(Path(folder))
