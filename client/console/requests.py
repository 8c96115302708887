"""Jobs that wait for people of a site, as its console shows them; what is decided is decided by `client.site.approving`.

Guarantees (tests: tests/client/console/test_requests.py)
    * A decision holds for the request as its page showed it, or does nothing (test_a_decision_on_a_page_of_before_does_nothing).
    * An approval names the facts that its page showed: of another job, or of another state of budget, policy and settings, or
      of a page that showed none, it is not told as read (tests/client/console/test_deciding.py,
      test_nobody_approves_what_was_not_computed).
    * What is shown follows from policy, settings and ledger as they are: facts are computed anew when one of them changed, and
      after ten minutes (test_facts_are_computed_once_and_anew_after_a_change).
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from client.approval.facts import BudgetLine, Facts, planned_charges
from client.approval.request import Approval, Request, RequestState, Rules, same_account
from client.console.budget import Budgets
from client.policy.policy import Policy
from client.site.approving import ApprovalDesk
from shared.errors import ConfigError, SilotuneError, TrustError
from shared.job.job import Job
from shared.trust.signing import VerifyKey
from shared.web.turns import Turn

log = logging.getLogger("silotune.console")

_KEPT_SECONDS, _MOST_KEPT = 600, 32
_COUNTED_SECONDS = 15
WITHOUT_POLICY = Rules(needed=2, valid=timedelta(days=7))
"""What requests are shown by while nobody can tell; nothing is decided by it."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One request as it stands now.

    Attributes:
        request: as it is kept.
        state: where it stands.
        needed: number of accounts that must approve.
        ends: until when it waits, or an approval stands before the first round.
        approvals: those that count.
        signer_name: the policy's; None if it has none.
        mark: what a decision names, see `Request.mark`.
    """

    request: Request
    state: RequestState
    needed: int
    ends: datetime
    approvals: Sequence[Approval]
    signer_name: str | None
    mark: str

    @property
    def is_open(self) -> bool:
        """Whether `ends` means something."""
        return self.state in ("waiting", "approved")

    @property
    def may_be_approved(self) -> bool:
        """Whether a yes would do something."""
        return self.state in ("waiting", "refused")

    @property
    def may_be_refused(self) -> bool:
        """Whether a no would do something."""
        return self.state in ("waiting", "approved", "begun")

    def approved_by(self, account: str) -> bool:
        """Whether an account's yes counts already; after a refusal all of them are needed anew."""
        return self.state != "refused" and any(same_account(one.by, account) for one in self.approvals)


@dataclass(frozen=True, kw_only=True)
class Known:
    """Facts that were computed.

    Attributes:
        facts: of one request.
        mark: what an approval names; only pages that show these facts hold it.
    """

    facts: Facts
    mark: str


class Requests:
    """The requests of a site; safe to use from several threads.

    Args:
        desk: decides and tells.
        budgets: what is spent.
        now: this site's clock, with time zone.
    """

    def __init__(
        self, desk: ApprovalDesk, budgets: Budgets, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self.desk, self._budgets, self._now = desk, budgets, now
        self._lock, self._accounting = threading.Lock(), Turn()
        self._facts: dict[tuple[object, ...], tuple[float, Known]] = {}
        self._secret = secrets.token_bytes(32)
        self._counted: tuple[float, int] | None = None

    def all(self) -> list[Shown]:
        """Return all of them, those that wait first; while the policy cannot be read, as `WITHOUT_POLICY` has it.

        Raises:
            ConfigError, TrustError, RunError: see `ApprovalDesk`.
        """
        now, policy = self._now(), None
        with suppress(ConfigError):
            policy = self.desk.policy()
        rules = WITHOUT_POLICY if policy is None else Rules.of(policy)
        found = [_shown(request, state, policy, rules, now) for request, state in self.desk.requests(rules)]
        with self._lock:
            self._counted = (time.monotonic(), sum(one.state == "waiting" for one in found))
        return found

    def find(self, request: str) -> Shown | None:
        """Return the one of a whole id."""
        return next((one for one in self.all() if one.request.id == request), None)

    @property
    def num_waiting(self) -> int:
        """How many wait, as far as it can be told: pages about something else do not fail for it."""
        with self._lock:
            counted = self._counted
        if counted is None or time.monotonic() > counted[0] + _COUNTED_SECONDS:
            try:
                self.all()
            except SilotuneError as error:
                log.warning("how many requests wait cannot be told: %s", error)
                with self._lock:
                    self._counted = (time.monotonic(), 0)
            with self._lock:
                counted = self._counted
        return counted[1] if counted else 0

    def forget_count(self) -> None:
        """Count anew how many wait."""
        with self._lock:
            self._counted = None

    def known_facts(self, shown: Shown) -> Known | None:
        """Return the facts of a request if they need not be computed."""
        return self._kept(self.desk.basis(shown.request))

    def are_read(self, shown: Shown, mark: str) -> bool:
        """Return whether a page showed the facts of this request as they are now; raises as `ApprovalDesk.basis`."""
        return hmac.compare_digest(self._mark(self.desk.basis(shown.request)).encode(), mark.encode())

    def facts(self, shown: Shown) -> Known:
        """Return the facts of a request; they take seconds of accounting, one at a time, unless they are known.

        Raises:
            ConfigError, TrustError, LedgerError, RunError: see `ApprovalDesk.facts`.
            Busy: others wait for theirs.
        """
        if (known := self.known_facts(shown)) is not None:
            return known
        with self._accounting:
            basis = self.desk.basis(shown.request)
            if (kept := self._kept(basis)) is not None:
                return kept
            facts = self.desk.facts(shown.request.id, by_id=True, lines=self._lines)
            found = Known(facts=facts, mark=self._mark(basis))
            with self._lock:
                while len(self._facts) >= _MOST_KEPT:
                    del self._facts[next(iter(self._facts))]
                self._facts[basis] = (time.monotonic(), found)
            return found

    def _lines(self, job: Job, policy: Policy) -> tuple[BudgetLine, ...]:
        """Return what the desk would say of the budget, without a whole ledger in memory."""
        return self._budgets.current().lines(job.sha256, planned_charges(job, policy))

    def _mark(self, basis: tuple[object, ...]) -> str:
        return hmac.new(self._secret, repr(basis).encode(), hashlib.sha256).hexdigest()

    def _kept(self, basis: tuple[object, ...]) -> Known | None:
        with self._lock:
            since, found = self._facts.get(basis, (0.0, None))
            return found if found is not None and time.monotonic() < since + _KEPT_SECONDS else None


def _shown(request: Request, state: RequestState, policy: Policy | None, rules: Rules, now: datetime) -> Shown:
    signer_name = None
    with suppress(TrustError):
        signer_name = None if policy is None else policy.signer_name(VerifyKey.parse(request.signer))
    return Shown(
        request=request,
        state=state,
        needed=rules.needed,
        ends=request.ends(rules, now),
        approvals=request.approvals if state in ("begun", "refused") else request.counted(rules, now),
        signer_name=signer_name,
        mark=request.mark(rules, now),
    )
