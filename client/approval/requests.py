"""Jobs that wait for people of this site: asked, approved, refused, withdrawn, expired.

An approval is for one job, as one key signed it for one coordinator, and for nothing else. It stands for all rounds once the
first one has begun, until somebody withdraws it (docs/decisions/0030).

Formal guarantees (tests: tests/client/approval/test_requests.py)
    * `admit` lets a job pass only if as many different accounts as the policy wants approved this job, of this signer and this
      coordinator, and nobody refused it since (test_an_approval_is_for_one_job_of_one_signer_and_one_coordinator,
      test_four_eyes_are_two_accounts, test_a_refusal_holds_until_somebody_approves).
    * An approval whose job has not begun, and a request that nobody decided, are void after the policy's days
      (test_what_waits_too_long_is_asked_anew, test_an_approval_that_is_not_used_expires).
    * However many jobs are asked for, and however often, the file stays below its bound, and no request that waits or was
      approved gives way to another (test_no_coordinator_fills_the_disk).
    * A decision that names what its person saw holds for that alone: whatever was said meanwhile, it does nothing
      (tests/client/approval/test_seen.py).
    * What `admit` raises says that a job waits, or was refused, and nothing else (test_what_is_told_is_one_of_two_texts).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.approval.request import STATES, Approval, Refused, Request, RequestState, Rules, request_id, same_account
from client.approval.store import SealedStore
from shared.errors import AwaitingApproval, PolicyError, RunError, excerpt
from shared.names import is_plain
from shared.trust.audit_chain import Held
from shared.trust.audit_log import AuditLog, Event
from shared.trust.keystore import Seal
from shared.trust.signed_job import SignedJob

log = logging.getLogger("silotune.site")

MOST_REQUESTS = 256
MOST_JOB_BYTES = 512 << 10
MOST_BYTES = 4 << 20  # of all jobs together
MOST_ACCOUNT, MOST_REASON = 100, 500  # characters
LEAST_PREFIX = 6
_PATIENCE = 0.1
"""Seconds for which somebody who only reads waits for whoever writes."""


class Changed(RunError):
    """A request is not any more as the person saw it who decides."""


class Approvals:
    """The requests of one site.

    Args:
        path: where they are kept.
        site: its name, for texts.
        seal, log: of the site.
        clock: tells the time, with time zone.
    """

    def __init__(
        self,
        path: Path,
        *,
        site: str,
        seal: Seal,
        log: AuditLog,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = SealedStore(path, seal=seal, log=log)
        self._site, self._clock = site, clock

    @property
    def exist(self) -> bool:
        """Whether there is a file: whether this site ever kept a request."""
        return self._store.path.exists()

    def admit(self, signed: SignedJob, rules: Rules) -> None:
        """Let a job pass that was approved; keep any other as a request, once.

        Args:
            signed: a job that no rule refuses, its signature verified.

        Raises:
            AwaitingApproval: it waits.
            PolicyError: people refused it, or it is too large to be kept for them.
            TrustError, RunError: the requests cannot be read or written.
        """
        with self._store.alone():
            requests = self._settled(rules)
            found = requests.get(_id(signed))
            now = self._clock()
            state = found.state(rules, now) if found is not None else "expired"
            if state == "refused":
                raise self._refused(signed)
            if state == "waiting":
                raise AwaitingApproval
            if found is None or state == "expired":
                self._ask(requests, signed, rules)
                raise AwaitingApproval

    def begin(self, signed: SignedJob, rules: Rules) -> None:
        """Note that a round of a job that was let pass has been charged: from now on its approval does not expire.

        Raises:
            TrustError, RunError: the requests cannot be read or written.
        """
        with self._store.alone():
            requests, now = self._read(), self._clock()
            found = requests.get(_id(signed))
            if found is not None and found.state(rules, now) == "approved":
                self._put(requests, found.model_copy(update={"begun": now}), Event.APPROVAL_BEGUN)

    def check_refused(self, signed: SignedJob, rules: Rules) -> None:
        """Refuse a job that people refused, where the policy requires no approval any more.

        Raises:
            PolicyError: they did.
            TrustError: the requests cannot be read.
        """
        with self._store.alone():
            found = self._read().get(_id(signed))
            if found is not None and found.state(rules, self._clock()) == "refused":
                raise self._refused(signed)

    def listed(self, rules: Rules) -> list[tuple[Request, RequestState]]:
        """Return all requests and where they stand: those that wait first, of each kind the latest first.

        Raises:
            TrustError, RunError: the requests cannot be read or written.
        """
        requests, now = self._seen(rules), self._clock()
        found = [(request, request.state(rules, now)) for request in requests.values()]
        found.sort(key=lambda one: one[0].arrived, reverse=True)
        return sorted(found, key=lambda one: STATES.index(one[1]))

    def find(self, named: str, rules: Rules, *, by_id: bool = False) -> tuple[Request, RequestState]:
        """Return the one request that is meant.

        Args:
            named: the job's name, or at least six characters of the beginning of its SHA-256 or of the request's id.
            by_id: it is the whole id and nothing else; a job may be called as another request's id.

        Raises:
            RunError: there is none, or more than one.
            TrustError: the requests cannot be read.
        """
        request = _the_one(self._seen(rules), named, by_id=by_id)
        return request, request.state(rules, self._clock())

    def last_approved(self, request: Request, rules: Rules) -> Request | None:
        """Return what the same signer asked for that was approved last, other than `request`; None if there is nothing."""
        approved = [
            other
            for other, state in self.listed(rules)
            if state in ("approved", "begun") and other.signer == request.signer and other.id != request.id
        ]
        return max(approved, key=lambda other: max(approval.at for approval in other.approvals), default=None)

    def approve(
        self,
        named: str,
        rules: Rules,
        *,
        by: str,
        reason: str = "",
        seen: str | None = None,
        moved: Mapping[str, Any] | None = None,
    ) -> tuple[Request, RequestState]:
        """Note, durably, that an account approves a request; return it, and whether it still waits for another account.

        A request that was refused, or withdrawn, is taken up again: it then needs all approvals anew.

        Args:
            named: see `find`.
            seen: its `Request.mark` when the person saw it; `named` is its whole id then. None: as it is now.
            moved: what of the budget moved since then, for the log; see `client.approval.grounds.Grounds.moved`.

        Raises:
            Changed: it is not as it was seen.
            RunError: there is no such request, its time is over, it needs no further approval, or this account gave its own.
            TrustError: the requests cannot be read.
        """
        by, reason = checked_account(by), checked_reason(reason)
        with self._store.alone():
            requests, now = self._settled(rules), self._clock()
            request = _the_one(requests, named, by_id=seen is not None)
            _check_seen(request, seen, rules, now)
            state = request.state(rules, now)
            if state == "expired":
                raise RunError(
                    f"the time of the request {_named(request)} is over; once the coordinator asks again, within a minute if it "
                    "still wants the job, it is a new one, which can be approved."
                )
            if state in ("approved", "begun"):
                givers = ", ".join(approval.by for approval in request.approvals)
                raise RunError(f"{_named(request)} was approved already, by {givers}; nothing more is needed.")
            if state == "refused":
                taken_up = {"refused": None, "begun": None, "approvals": (), "since": now, "expired": False}
                request = request.model_copy(update=taken_up)
            counted = request.counted(rules, now)
            if any(same_account(approval.by, by) for approval in counted):
                raise RunError(
                    f"{by} approved {_named(request)} already; the policy wants {rules.needed} different accounts, so the next "
                    "one is somebody else's (--by)."
                )
            approvals = (*counted, Approval(by=by, at=now, reason=reason))
            request = request.model_copy(update={"approvals": approvals})
            self._put(
                requests,
                request,
                Event.APPROVAL_GIVEN,
                by=by,
                reason=reason,
                given=len(approvals),
                needed=rules.needed,
                **({"budget": dict(moved)} if moved else {}),
            )
            return request, request.state(rules, now)

    def refuse(self, named: str, rules: Rules, *, by: str, reason: str, seen: str | None = None) -> Request:
        """Note, durably, that an account refuses a request, or withdraws what was approved; one account is enough.

        Args:
            named: see `find`.
            reason: for this site alone; not empty.
            seen: see `approve`.

        Raises:
            Changed: it is not as it was seen.
            RunError: there is no such request, or it was refused already.
            TrustError: the requests cannot be read.
        """
        by, reason = checked_account(by), checked_reason(reason)
        if not reason:
            raise RunError(
                "a refusal needs a reason (--reason): this site's own people will ask; nobody else reads it."
            )
        with self._store.alone():
            requests, now = self._settled(rules), self._clock()
            request = _the_one(requests, named, by_id=seen is not None)
            _check_seen(request, seen, rules, now)
            state = request.state(rules, now)
            if state == "refused":
                assert request.refused is not None  # noqa: S101 (so says the state)
                raise RunError(f"{_named(request)} was refused already, by {request.refused.by}.")
            withdrawn = state in ("approved", "begun")
            refused = Refused(by=by, at=now, reason=reason, withdrawn=withdrawn)
            request = request.model_copy(update={"refused": refused})
            event = Event.APPROVAL_WITHDRAWN if withdrawn else Event.APPROVAL_REFUSED
            self._put(requests, request, event, by=by, reason=reason)
            return request

    def _read(self) -> dict[str, Request]:
        return {request.id: request for request in self._store.read()}

    def _seen(self, rules: Rules) -> dict[str, Request]:
        """Return the requests by their ids for whoever only reads: settled, or if others write, as they then will be.

        Raises:
            Held: a change of them does not come to its end.
            TrustError, RunError: the requests cannot be read or written.
        """
        try:
            with self._store.alone(patience=_PATIENCE):
                return self._settled(rules)
        except Held:
            requests = {request.id: request for request in self._store.glance()}
            return requests | self._over(requests, rules)

    def _settled(self, rules: Rules) -> dict[str, Request]:
        """Return the requests by their ids, after noting which ones ended by themselves."""
        requests = self._read()
        for over in self._over(requests, rules).values():
            self._put(requests, over, Event.APPROVAL_EXPIRED, approvals=len(requests[over.id].approvals))
        return requests

    def _over(self, requests: Mapping[str, Request], rules: Rules) -> dict[str, Request]:
        """Return those that ended by themselves and were not noted, as they are from then on."""
        now = self._clock()
        return {
            request.id: request.model_copy(update={"expired": True, "approvals": ()})
            for request in requests.values()
            if not request.expired and request.state(rules, now) == "expired"
        }

    def _ask(self, requests: dict[str, Request], signed: SignedJob, rules: Rules) -> None:
        """Keep a job as a new request, if there is room."""
        now = self._clock()
        request = Request.of(signed, now=now)
        size = len(request.signed_job.encode())
        if size > MOST_JOB_BYTES:
            raise PolicyError(
                f"the signed job {request.name} has {size:,} bytes; site {self._site} keeps at most {MOST_JOB_BYTES:,} for "
                "its people to look at."
            )
        requests.pop(request.id, None)
        old = [other for other in requests.values() if _gives_way(other, rules, now) is not None]
        old.sort(key=lambda other: (_gives_way(other, rules, now), other.arrived))
        while len(requests) >= MOST_REQUESTS or size + _size(requests) > MOST_BYTES:
            if not old:
                log.error(
                    "job %s (%s) waits for approval, and cannot be shown: %d requests are kept already. Decide some of them, or "
                    "refuse those whose jobs are over.",
                    request.name,
                    request.job[:12],
                    len(requests),
                )
                return
            del requests[old.pop(0).id]
        log.warning("job %s waits for approval: silotune site request HOME %s", request.name, request.job[:12])
        self._put(requests, request, Event.APPROVAL_ASKED, bytes=size)

    def _put(self, requests: dict[str, Request], request: Request, event: Event, **details: object) -> None:
        requests[request.id] = request
        self._store.write(
            list(requests.values()),
            event,
            job=request.job,
            name=request.name,
            signer=request.signer,
            coordinator=request.coordinator,
            **details,
        )

    def _refused(self, signed: SignedJob) -> PolicyError:
        return PolicyError(f"site {self._site} refuses the job {signed.job.name}: its people said no.")


def _id(signed: SignedJob) -> str:
    return request_id(job=signed.job.sha256, signer=signed.signer.text, coordinator=signed.coordinator.text)


def _size(requests: Mapping[str, Request]) -> int:
    return sum(len(request.signed_job.encode()) for request in requests.values())


def _gives_way(request: Request, rules: Rules, now: datetime) -> int | None:
    """Return how soon a request makes room for another, 0 the soonest; None if it does not.

    What waits or was approved stays, or whoever may sign jobs could push another's out. What was refused is asked for anew.
    """
    state = request.state(rules, now)
    if state == "begun":
        return 1 if now >= request.not_after else None
    return {"expired": 0, "refused": 2}.get(state)


def _named(request: Request) -> str:
    return f"{request.name} ({request.job[:12]})"


def _check_seen(request: Request, seen: str | None, rules: Rules, now: datetime) -> None:
    if seen is not None and seen != request.mark(rules, now):
        raise Changed(f"something was said to {_named(request)} meanwhile, or its time is over; look at it once more.")


def _the_one(requests: Mapping[str, Request], named: str, *, by_id: bool = False) -> Request:
    if by_id and named in requests:
        return requests[named]
    by_hash = len(named) >= LEAST_PREFIX
    found = [
        request
        for request in requests.values()
        if not by_id
        and (request.name == named or (by_hash and (request.job.startswith(named) or request.id.startswith(named))))
    ]
    if not found:
        raise RunError(
            f"no request is called {excerpt(named)}, nor does one's SHA-256 begin like that (at least {LEAST_PREFIX} "
            "characters); `silotune site requests HOME` lists them."
        )
    if len(found) > 1:
        told = ", ".join(f"{_named(one)} with the id {one.id[:12]}" for one in found[:5])
        raise RunError(
            f"{excerpt(named)} could be {len(found)} requests: {told}. Name one by more of its SHA-256 or id."
        )
    return found[0]


def checked_account(by: str) -> str:
    """Return the name of an account, blanks made one; `RunError` if it cannot stand in a log, or could pass for another."""
    name = _checked(" ".join(by.split()), "the name of the account (--by)", MOST_ACCOUNT, least=1)
    if not is_plain(name):
        raise RunError(
            f"the name of the account (--by) is {name!a}; expected letters of one alphabet, and nothing that cannot be seen."
        )
    return name


def checked_reason(reason: str) -> str:
    """Return a reason likewise; it may be empty."""
    return _checked(" ".join(reason.split()), "the reason (--reason)", MOST_REASON)


def _checked(text: str, what: str, most: int, *, least: int = 0) -> str:
    if not least <= len(text) <= most or not text.isprintable():
        raise RunError(
            f"{what} is {excerpt(text)}; expected {f'{least} to {most}' if least else f'at most {most}'} printable characters."
        )
    return text
