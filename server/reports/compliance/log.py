"""What the coordinator's audit log says about one job."""

from __future__ import annotations

from dataclasses import dataclass, replace

from server.store.home import CoordinatorHome
from shared.trust import audit_log
from shared.trust.audit_log import Event
from shared.trust.signing import load_verify_key


@dataclass(frozen=True, kw_only=True)
class JudgedUpdate:
    """What the coordinator wrote down when a site's update arrived, or its refusal.

    Attributes:
        sha256, num_bytes: of the update as it arrived; None if the site sent none.
        reason: why it was refused; empty if it was accepted.
    """

    round: int
    site: str
    sha256: str | None
    num_bytes: int | None
    accepted: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class LogFacts:
    """The log of a coordinator, checked from its first entry to its last.

    Attributes:
        sha256: of the last entry: it names the whole log.
        signature_checked: whether the signature of its end was checked with the coordinator's public key.
        job_entries: number of entries that speak of this job; None if it is not to be told. Nor is that of all entries ever: of
            another job, it could tell how many sites were drawn in secret.
        updates: every judged update of this job.
        asked: (round, site) of every request for one; of site metrics the round after the last.
    """

    sha256: str
    signature_checked: bool
    job_entries: int | None
    updates: tuple[JudgedUpdate, ...]
    asked: frozenset[tuple[int, str]] = frozenset()

    def before(self, at_hand: int | None) -> LogFacts:
        """Return what it says of the rounds before the one at hand; all of it if there is none."""
        if at_hand is None:
            return self
        updates = tuple(one for one in self.updates if one.round < at_hand)
        return replace(self, updates=updates, asked=frozenset(one for one in self.asked if one[0] < at_hand))

    def without_participants(self) -> LogFacts:
        """Return what may be told where sites are drawn in secret: an entry for each update is also a count of them."""
        return replace(self, job_entries=None, updates=(), asked=frozenset())


def read_log(home: CoordinatorHome, job_sha256: str) -> LogFacts | None:
    """Verify and read the log of `home`; None if there is none.

    Raises:
        TrustError: if the chain is broken.
    """
    if not home.audit.is_dir():
        return None
    public = home.path / "round.pub"
    key = load_verify_key(public) if public.exists() else None
    checked = audit_log.verify(home.audit, verify_head=key)
    own = [entry for entry in audit_log.read(home.audit) if entry.details.get("job") == job_sha256]
    return LogFacts(
        sha256=checked.sha256,
        signature_checked=checked.signature_checked,
        job_entries=len(own),
        updates=tuple(
            JudgedUpdate(
                round=int(entry.details["round"]),
                site=str(entry.details["site"]),
                sha256=entry.details.get("sha256"),
                num_bytes=entry.details.get("bytes"),
                accepted=entry.event == Event.UPDATE_ACCEPTED,
                reason=str(entry.details.get("reason", "")),
            )
            for entry in own
            if entry.event in (Event.UPDATE_ACCEPTED, Event.UPDATE_REFUSED)
        ),
        asked=frozenset(
            (int(entry.details["round"]), str(name))
            for entry in own
            if entry.event == Event.ROUND_ASKED
            for name in entry.details["sites"]
        ),
    )
