"""Jobs that wait for people of a site, as its console shows them; what is decided is decided by `client.site.approving`.

Guarantees (tests: tests/client/console/test_requests.py)
    * A decision holds for the request as its page showed it, or does nothing (test_a_decision_on_a_page_of_before_does_nothing).
    * An approval names the facts that its page showed its account: of another job, of another policy or settings, of a budget
      that would now be overrun, or of a page that showed none, it does not hold (tests/client/console/test_deciding.py,
      test_nobody_approves_what_was_not_computed, test_a_verdict_that_turned_is_told_with_the_figures).
    * A round that another job charges meanwhile stands against none (test_another_job_that_charges_keeps_nobody_from_approving).
    * What is shown follows from policy, settings and ledger as they are: facts are computed anew when one of them changed, and
      after ten minutes; after a charge, what the budget says (test_facts_are_computed_once_and_anew_after_a_change).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from client.approval.facts import BudgetLine, Facts
from client.approval.grounds import Difference, Grounds, Part
from client.approval.request import Approval, Request, RequestState, Rules, same_account
from client.budget.accounts import Budgets
from client.policy.policy import Policy
from client.site.approving import ApprovalDesk
from shared.errors import ConfigError, SilotuneError, TrustError
from shared.trust.signing import VerifyKey
from shared.web.accounting import accounted
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
        parts, head: of what they were computed: see `ApprovalDesk.parts`, and the ledger's last entry.
        since: when the rules were judged, of `time.monotonic`.
    """

    facts: Facts
    parts: Mapping[Part, str]
    head: tuple[int, str] | None
    since: float

    @property
    def grounds(self) -> Grounds:
        """What an approval of whoever reads them rests on."""
        return Grounds(parts=self.parts, budget=self.facts.budget)


@dataclass(frozen=True, kw_only=True)
class Since:
    """What is not any more as a page showed it.

    Attributes:
        was_shown: it was shown at all, on a page of this console, to the account that asks.
        against: why its approval does not hold.
        moved: figures that do not stand against it, for the audit log.
    """

    was_shown: bool = True
    against: tuple[Difference, ...] = ()
    moved: Mapping[str, Any] = field(default_factory=dict)


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
        self._facts: dict[str, Known] = {}
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
        known = self._known(shown, self.desk.parts(shown.request))
        return known if known is not None and known.head == self._budgets.head else None

    def facts(self, shown: Shown) -> Known:
        """Return the facts of a request; they take seconds of accounting, one at a time, unless they are known.

        Raises:
            ConfigError, TrustError, LedgerError, RunError: see `ApprovalDesk.facts`.
            Busy: others wait for theirs.
        """
        if (known := self.known_facts(shown)) is not None:
            return known
        with self._accounting:
            parts, head = self.desk.parts(shown.request), self._budgets.head
            known = self._known(shown, parts)
            if known is None:
                request = shown.request.id
                facts = accounted(lambda: self.desk.facts(request, by_id=True, lines=self._budgets.lines))
                known = Known(facts=facts, parts=parts, head=head, since=time.monotonic())
            elif known.head != head:  # a round was charged: nothing but the budget is another
                known = replace(known, facts=replace(known.facts, budget=self._lines(shown)), head=head)
            with self._lock:
                self._facts.pop(shown.request.id, None)
                while len(self._facts) >= _MOST_KEPT:
                    del self._facts[next(iter(self._facts))]
                self._facts[shown.request.id] = known
            return known

    def shown_to(self, known: Known, by: str) -> str:
        """Return what a page on which an account reads these facts names when it approves."""
        grounds = known.grounds
        lines = [[line.promise, line.spent, line.after, line.cap] for line in grounds.budget]
        content = json.dumps([grounds.parts, lines]).encode()
        return f"{base64.urlsafe_b64encode(content).decode()}.{self._sealed(content, by)}"

    def since(self, shown: Shown, read: str, *, by: str) -> Since:
        """Return what is not any more as a page showed it to an account; takes a moment of accounting where a round was charged.

        Args:
            read: see `shown_to`.

        Raises:
            ConfigError, TrustError, LedgerError, RunError: see `ApprovalDesk.facts`.
            Busy: others wait for theirs.
        """
        grounds = self._grounds(read, by)
        if grounds is None or grounds.parts.get("request") != shown.request.id:
            return Since(was_shown=False)
        if (known := self.known_facts(shown)) is not None:
            now = known.grounds
        else:
            with self._accounting:
                # Files after figures: what was computed by a policy that is no more is told as changed.
                lines = self._lines(shown)
                now = Grounds(parts=self.desk.parts(shown.request), budget=lines)
        return Since(against=tuple(grounds.against(now)), moved=grounds.moved(now))

    def _known(self, shown: Shown, parts: Mapping[Part, str]) -> Known | None:
        """Return facts that were computed not long ago from the same rules and settings, whatever the ledger had."""
        with self._lock:
            known = self._facts.get(shown.request.id)
        if known is None or known.parts != parts or time.monotonic() > known.since + _KEPT_SECONDS:
            return None
        return known

    def _lines(self, shown: Shown) -> tuple[BudgetLine, ...]:
        return accounted(lambda: self._budgets.lines(shown.request.signed().job, self.desk.policy()))

    def _grounds(self, read: str, by: str) -> Grounds | None:
        """Return what a page showed, if it was this console that showed it, to this account."""
        text, _, seal = read.partition(".")
        try:
            content = base64.urlsafe_b64decode(text.encode())
        except ValueError:
            return None
        if not hmac.compare_digest(self._sealed(content, by).encode(), seal.encode()):
            return None
        parts, lines = json.loads(content)
        budget = (BudgetLine(promise=p, spent=spent, after=after, cap=cap) for p, spent, after, cap in lines)
        return Grounds(parts=parts, budget=tuple(budget))

    def _sealed(self, content: bytes, by: str) -> str:
        return hmac.new(self._secret, content + b"\n" + by.encode(), hashlib.sha256).hexdigest()


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
