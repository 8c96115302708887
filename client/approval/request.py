"""A job that a site was asked for, and what its people said to it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Literal

from shared.files.json_files import canonical_json
from shared.job.parsing import Section
from shared.names import name_key
from shared.trust.signed_job import SignedJob

if TYPE_CHECKING:
    from client.policy.policy import Policy

RequestState = Literal["waiting", "approved", "begun", "refused", "expired"]
STATES: tuple[RequestState, ...] = ("waiting", "approved", "begun", "refused", "expired")
"""In the order in which people should look at them."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the policy says of approvals.

    Attributes:
        needed: number of different accounts that must approve.
        valid: how long a request waits, and an approval stands before the first round.
    """

    needed: int
    valid: timedelta

    @classmethod
    def of(cls, policy: Policy) -> Rules:
        """Return those of a policy, whether or not it requires approval."""
        return cls(needed=policy.approvals_needed, valid=timedelta(days=policy.approval_days))


class Approval(Section):
    """Somebody said yes."""

    by: str
    at: datetime
    reason: str = ""


class Refused(Section):
    """Somebody said no, or took an approval back."""

    by: str
    at: datetime
    reason: str
    withdrawn: bool


class Request(Section):
    """One job, by one signer, from one coordinator.

    `signed_job` is the document as it came; `since` the time from which on it waits: when it came, or was taken up again after a
    refusal. `begun` is when its first round began; until it is withdrawn an approval does not end from then on. `expired` says
    that its time is over.
    """

    job: str
    name: str
    signer: str
    coordinator: str
    signed_job: str
    not_after: datetime
    arrived: datetime
    since: datetime
    approvals: tuple[Approval, ...] = ()
    refused: Refused | None = None
    begun: datetime | None = None
    expired: bool = False

    @classmethod
    def of(cls, signed: SignedJob, *, now: datetime) -> Request:
        """Return the request that a signed job is, nothing said to it yet."""
        return cls(
            job=signed.job.sha256,
            name=signed.job.name,
            signer=signed.signer.text,
            coordinator=signed.coordinator.text,
            signed_job=signed.to_json(),
            not_after=signed.not_after,
            arrived=now,
            since=now,
        )

    @property
    def id(self) -> str:
        """What tells it apart: SHA-256 over the job's hash, its signer and the coordinator that it names."""
        return request_id(job=self.job, signer=self.signer, coordinator=self.coordinator)

    def signed(self) -> SignedJob:
        """Return the signed job, read and verified anew.

        Raises:
            TrustError, ConfigError: this version reads it differently; it waits for nothing that could be executed then.
        """
        return SignedJob.from_json(self.signed_job, source=f"the request {self.job[:12]}")

    def counted(self, rules: Rules, now: datetime) -> Sequence[Approval]:
        """Return the approvals that are not too old."""
        return [approval for approval in self.approvals if now < approval.at + rules.valid]

    def ends(self, rules: Rules, now: datetime) -> datetime:
        """Return until when it waits, or its approvals stand before its first round."""
        counted = self.counted(rules, now)
        since = min(approval.at for approval in counted) if len(counted) >= rules.needed else self.since
        return min(since + rules.valid, self.not_after)

    def state(self, rules: Rules, now: datetime) -> RequestState:
        """Return where it stands at `now`."""
        if self.refused is not None:
            return "refused"
        if self.begun is not None:
            return "begun"
        if self.expired or now >= self.ends(rules, now):
            return "expired"
        return "approved" if len(self.counted(rules, now)) >= rules.needed else "waiting"

    def mark(self, rules: Rules, now: datetime) -> str:
        """Return what is another text once somebody said something to it, or its state is another."""
        said = self.model_dump(mode="json", exclude={"signed_job"})
        seen = [self.id, self.state(rules, now), rules.needed, len(self.counted(rules, now)), said]
        return hashlib.sha256(canonical_json(seen).encode()).hexdigest()


def request_id(*, job: str, signer: str, coordinator: str) -> str:
    """Return what tells a request apart, see `Request.id`."""
    return hashlib.sha256("\n".join((job, signer, coordinator)).encode()).hexdigest()


def same_account(one: str, other: str) -> bool:
    """Return whether two names are one account: case, blanks and what nobody sees make no second pair of eyes."""
    return name_key(one) == name_key(other)
