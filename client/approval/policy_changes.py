"""Changes of a site's policy that its people make together: proposed, compared, accepted, kept.

All of it stands in the site's signed audit log; of every text a file named by its SHA-256 lies in `policies/`. Whoever may write
the folder can write `policy.toml` as well, so neither is sealed: what is found in the file is noted as a change by hand.

Formal guarantees (tests: tests/client/approval/test_policy_changes.py)
    * Nothing is put into force that this program would not read as a policy (test_what_is_no_policy_is_not_proposed).
    * A proposal holds once as many accounts stand behind it as the policy in force asks for, not the one that is proposed
      (test_the_policy_in_force_says_how_many, test_four_eyes_are_two_accounts); a file that is no policy asks for two. By
      which people decide less strictly, that takes as many as decide on a job (test_nobody_lowers_four_eyes_alone), each of
      whom may decide on one (test_four_eyes_of_officers_are_lowered_by_officers).
    * A proposal is for the file as its proposer saw it: once that has changed, it cannot be accepted
      (test_a_proposal_on_another_file_is_stale), nor when it is put back (test_what_was_overtaken_stays_so).
    * Who accepted what is in the log before the file is replaced; killed anywhere, the next one to look finds the change done
      or not begun, file and log agreeing (test_a_kill_at_any_write_leaves_a_change_or_none).
    * A text that was kept is shown as it was, or not at all (test_a_kept_text_that_was_changed_is_not_shown).
    * However much is proposed, the folder stays below a bound (test_what_was_never_in_force_is_not_kept_for_ever), and no text
      takes long to be judged (test_a_key_of_thousands_of_parts_is_not_read).

Not guaranteed: an editor that writes the file in the moment between comparing and replacing loses what it wrote; the log tells.
"""

from __future__ import annotations

import hashlib
import math
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from client.approval.request import same_account
from client.approval.requests import checked_account, checked_reason
from client.policy.diff import officers_needed, people_needed
from client.policy.policy import load_policy, policy_of
from shared.errors import ConfigError, RunError, SilotuneError, TrustError
from shared.files.atomic import require_file_or_nothing, write_bytes
from shared.files.bounded import read_bounded
from shared.trust.audit_chain import BEGINNING, Entry, Held
from shared.trust.audit_log import AuditLog, Event

FOLDER = "policies"
MOST_BYTES, MOST_LINES = 32 << 10, 2000
"""Of a text that is proposed."""
MOST_DOTS = 100
"""In one line of it: a key of n parts takes the reader n * n steps."""
MOST_OPEN = 16
MOST_KEPT = 256
"""Of texts that were proposed and never in force; the oldest go first."""
_COUNTED_SECONDS = 15
_PATIENCE = 0.1
"""Seconds for which somebody who only reads waits for whoever writes."""
_MOST_FILE_BYTES = 1 << 20
ProposalState = Literal["open", "stale", "accepted", "declined"]
_STATES: dict[str, ProposalState] = {Event.POLICY_ACCEPTED: "accepted", Event.POLICY_DECLINED: "declined"}


class Stale(RunError):
    """The policy is not any more as the person saw it who changes it."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """Who ended a proposal, when (UTC, ISO 8601), and why."""

    by: str
    at: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A change that somebody wants.

    Attributes:
        number: 1, 2, ... in this site.
        sha256, base: of the text that is proposed, and of the file that it was made from.
        by, at, reason: who proposed it, when, why.
        officer: whether that account decided on jobs then; of versions that did not note it, not.
        version: number of the policy that was in force then.
        state: as the log has it; whether an open one is stale depends on the file, and on what was in force since.
        said: who accepted or declined it; None while it is open.
    """

    number: int
    sha256: str
    base: str
    by: str
    at: str
    reason: str
    version: int
    officer: bool = False
    state: ProposalState = "open"
    said: Said | None = None


@dataclass(frozen=True, kw_only=True)
class Version:
    """A policy that is or was in force.

    Attributes:
        number: 1, 2, ...
        sha256: of its text.
        since: when it was put into force, or found, UTC, ISO 8601.
        proposal: by which it came; None: it was found in the file.
    """

    number: int
    sha256: str
    since: str
    proposal: Proposal | None


@dataclass
class _State:
    """What the log says, and how far it was read."""

    proposals: dict[int, Proposal] = field(default_factory=dict)
    versions: list[Version] = field(default_factory=list)
    begun: int | None = None  # number of the proposal that was accepted and is not known to be in force


class PolicyChanges:
    """The changes of one site's policy; safe to use from several threads, and processes, each with an object of its own.

    Args:
        policy: the file, `policy.toml`.
        log: of the site.
    """

    def __init__(self, policy: Path, *, log: AuditLog) -> None:
        self.policy, self._folder, self._log = policy, policy.parent / FOLDER, log
        self._read_up_to, self._state, self._reading = BEGINNING, _State(), threading.RLock()
        self._counted = (-math.inf, 0)

    def settle(self) -> None:
        """Finish what a process that died had begun, and note a version that is in force and was not known.

        Raises:
            TrustError, RunError: the log or the files cannot be read or written.
        """
        with self._settled():
            pass

    def versions(self) -> list[Version]:
        """Return every version that was in force, the newest first; raises as `settle`."""
        with self._seen() as state:
            return state.versions[::-1]

    def proposals(self) -> list[Proposal]:
        """Return every proposal, the newest first; an open one that is stale says so. Raises as `settle`."""
        with self._seen() as state:
            return [self._told(state, one) for one in reversed(state.proposals.values())]

    @property
    def num_open(self) -> int:
        """How many proposals wait, counted every few seconds; 0 where that cannot be told."""
        since, count = self._counted
        if time.monotonic() > since + _COUNTED_SECONDS:
            count = 0
            with suppress(SilotuneError):
                count = sum(one.state == "open" for one in self.proposals())
            self._counted = (time.monotonic(), count)
        return count

    def find(self, number: int) -> Proposal | None:
        """Return the proposal of a number; raises as `settle`."""
        with self._seen() as state:
            found = state.proposals.get(number)
            return None if found is None else self._told(state, found)

    def text_of(self, sha256: str) -> str:
        """Return a text that was kept.

        Raises:
            TrustError: it is not there, or is not that text any more.
        """
        return self._kept(sha256).decode("utf-8-sig", errors="replace")

    def has_text(self, sha256: str) -> bool:
        """Return whether a text is kept: of what was never in force only the latest ones are."""
        return (self._folder / f"{sha256}.toml").exists()

    def _kept(self, sha256: str) -> bytes:
        path = self._folder / f"{sha256}.toml"
        content, _ = read_bounded(path, "kept policy", _MOST_FILE_BYTES)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise TrustError(f"{path} was changed after it was kept; find out by whom, and put it back from a backup.")
        return content

    @property
    def needed(self) -> int:
        """How many people must stand behind a change, by the policy in force; two where it cannot be read."""
        try:
            return load_policy(self.policy).policy_approvals_needed
        except ConfigError:
            return 2

    def needed_for(self, proposal: Proposal) -> int:
        """Return how many must stand behind this one, see `people_needed`; two where one of both cannot be read.

        Raises:
            TrustError: its text is not there, or is not that text any more.
        """
        try:
            return people_needed(load_policy(self.policy), policy_of(self.text_of(proposal.sha256)))
        except ConfigError:
            return 2

    def wants_officers(self, text: str) -> bool:
        """Return whether a change to this text takes two who decide on jobs (`officers_needed`).

        Of a file that cannot be read nobody can tell what it would lower, and two people mend it.
        """
        try:
            return officers_needed(load_policy(self.policy), policy_of(text)) > 1
        except ConfigError:
            return False

    def lacks_officer(self, proposal: Proposal) -> bool:
        """Return whether it takes two who decide on jobs, and its proposer is none; raises as `needed_for`."""
        return not proposal.officer and self.wants_officers(self.text_of(proposal.sha256))

    def propose(self, text: str, *, base: str, by: str, reason: str = "", officer: bool = False) -> Proposal:
        """Note, durably, that an account wants another policy.

        Args:
            base: SHA-256 of the file that it was made from.
            officer: whether the account may decide on jobs.

        Raises:
            ConfigError: the text is no policy.
            Stale: the file is another one by now.
            RunError: it is too long, changes nothing, or too many are open already.
            TrustError: log or files cannot be read or written.
        """
        by, reason = checked_account(by), checked_reason(reason)
        content = checked_text(text)
        sha256 = hashlib.sha256(content).hexdigest()
        with self._settled() as state:
            if base != self._sha256():
                raise Stale("the policy was changed meanwhile; compare what you wrote with how it stands now.")
            if sha256 == base:
                raise RunError("this is the policy as it stands; nothing would change.")
            if sum(self._told(state, one).state == "open" for one in state.proposals.values()) >= MOST_OPEN:
                raise RunError(f"{MOST_OPEN} proposals wait already; accept or decline some first.")
            self._keep(content)
            number = max(state.proposals, default=0) + 1
            self._note(
                Event.POLICY_PROPOSED, number=number, sha256=sha256, base=base, by=by, reason=reason, officer=officer
            )
            self._forget(state)
            return state.proposals[number]

    def accept(self, number: int, *, by: str, reason: str = "") -> Version:
        """Put a proposal into force, durably; whether an account may accept, and so decides on jobs, is for the caller to say.

        Raises:
            Stale: it is not open, or the file is another one by now.
            RunError: the policy in force wants another account than that of its proposer, or two who decide on jobs.
            ConfigError: this version of the program does not read it as a policy.
            TrustError: log or files cannot be read or written.
        """
        by, reason = checked_account(by), checked_reason(reason)
        with self._settled() as state:
            found = self._open(state, number)
            if self.needed_for(found) > 1 and same_account(found.by, by):
                raise RunError(f"{by} proposed it; the policy in force wants somebody else to accept it.")
            if self.lacks_officer(found):
                raise RunError(
                    "by it people decide on jobs less strictly, which takes as many officers as decide on one, and "
                    f"{found.by}, who proposed it, is none; an officer proposes it anew, and another one accepts it."
                )
            policy_of(self.text_of(found.sha256))
            require_file_or_nothing(self.policy)
            self._note(Event.POLICY_ACCEPTED, number=number, sha256=found.sha256, base=found.base, by=by, reason=reason)
            self._finish(state)
            return state.versions[-1]

    def decline(self, number: int, *, by: str, reason: str = "") -> None:
        """Note, durably, that a proposal shall not hold; raises as `accept`, but for stale ones, which can be declined."""
        by, reason = checked_account(by), checked_reason(reason)
        with self._settled() as state:
            found = state.proposals.get(number)
            if found is None or found.state != "open":
                raise Stale("somebody decided on it meanwhile.")
            self._note(Event.POLICY_DECLINED, number=number, sha256=found.sha256, by=by, reason=reason)

    # --- inside the log's lock ---

    @contextmanager
    def _seen(self) -> Iterator[_State]:
        """What the log says, for whoever only reads: settled, or if others write, as it stands."""
        with ExitStack() as stack:
            try:
                state = stack.enter_context(self._settled(patience=_PATIENCE))
            except Held:
                stack.enter_context(self._reading)
                self._read_log()
                state = self._state
            yield state

    @contextmanager
    def _settled(self, *, patience: float | None = None) -> Iterator[_State]:
        self._read_log()  # of a long log most of it, while others may still write
        with self._log.locked(patience=patience), self._reading:
            self._read_log()
            self._finish(self._state)
            yield self._state

    def _finish(self, state: _State) -> None:
        """Bring file and log together."""
        now = self._sha256()
        if state.begun is not None:
            begun = state.proposals[state.begun]
            if now == begun.base:
                mode = stat.S_IMODE(self.policy.stat().st_mode)
                write_bytes(self.policy, self._kept(begun.sha256), mode=mode)
                now = begun.sha256
            if now == begun.sha256:
                self._note(Event.POLICY_CHANGED, number=begun.number, sha256=now, before=begun.base)
                return
        known = state.versions[-1].sha256 if state.versions else ""
        if now and (now != known or state.begun is not None):
            self._keep(self._content())
            self._note(Event.POLICY_CHANGED, number=None, sha256=now, before=known)

    def _open(self, state: _State, number: int) -> Proposal:
        found = state.proposals.get(number)
        if found is None or found.state != "open":
            raise Stale("somebody decided on it meanwhile.")
        if self._told(state, found).state == "stale":
            raise Stale("the policy was changed since it was proposed; propose it anew on what stands now.")
        return found

    def _told(self, state: _State, one: Proposal) -> Proposal:
        overtaken = one.version != len(state.versions) or one.base != self._sha256()
        return replace(one, state="stale") if one.state == "open" and overtaken else one

    def _content(self) -> bytes:
        return read_bounded(self.policy, "policy", _MOST_FILE_BYTES)[0] if self.policy.exists() else b""

    def _sha256(self) -> str:
        """Return the SHA-256 of the file as it stands; "" if there is none."""
        return hashlib.sha256(self._content()).hexdigest() if self.policy.exists() else ""

    def _keep(self, content: bytes) -> None:
        path = self._folder / f"{hashlib.sha256(content).hexdigest()}.toml"
        if not path.exists() or path.read_bytes() != content:
            write_bytes(path, content)

    def _forget(self, state: _State) -> None:
        """Remove what was proposed longest ago of what was never in force and cannot be accepted any more."""
        told = [self._told(state, one) for one in reversed(state.proposals.values())]
        stay = {one.sha256 for one in state.versions} | {one.sha256 for one in told if one.state == "open"}
        over = [one for one in dict.fromkeys(one.sha256 for one in told) if one not in stay]
        for path in {self._folder / f"{one}.toml" for one in over[MOST_KEPT:]} & set(self._folder.iterdir()):
            path.unlink()

    def _note(self, event: Event, **details: Any) -> None:
        self._counted = (-math.inf, 0)
        self._log.append(event, **details)
        self._read_log()

    def _read_log(self) -> None:
        with self._reading:
            for entry, position in self._log.read_on(self._read_up_to):
                if entry.event.startswith("policy."):
                    _take(self._state, entry)
                self._read_up_to = position


def _take(state: _State, entry: Entry) -> None:
    """Take in what an entry says; one that no `PolicyChanges` wrote changes nothing."""
    details = entry.details
    number, sha256 = details.get("number"), details.get("sha256")
    if not isinstance(sha256, str):
        return
    by, reason = str(details.get("by", "")), str(details.get("reason", ""))
    found = state.proposals.get(number) if isinstance(number, int) else None
    if entry.event == Event.POLICY_PROPOSED and isinstance(number, int) and found is None:
        base = str(details.get("base", ""))
        state.proposals[number] = Proposal(
            number=number,
            sha256=sha256,
            base=base,
            by=by,
            at=entry.time,
            reason=reason,
            version=len(state.versions),
            officer=details.get("officer") is True,
        )
    elif entry.event in _STATES and found is not None and found.sha256 == sha256 and found.state == "open":
        said = Said(by=by, at=entry.time, reason=reason)
        state.proposals[found.number] = replace(found, state=_STATES[entry.event], said=said)
        if entry.event == Event.POLICY_ACCEPTED:
            state.begun = found.number
    elif entry.event == Event.POLICY_CHANGED:
        state.begun = None
        version = Version(number=len(state.versions) + 1, sha256=sha256, since=entry.time, proposal=found)
        state.versions.append(version)


def checked_text(text: str) -> bytes:
    """Return the file that a text makes.

    Raises:
        ConfigError: it is no policy.
        RunError: it is too long to be looked at, or to be read in little time.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")
    content = f"{lines}\n".encode(errors="replace")
    if len(content) > MOST_BYTES or lines.count("\n") >= MOST_LINES:
        raise RunError(
            f"a policy that is changed here may have at most {MOST_BYTES >> 10} KiB and {MOST_LINES:,} lines; edit the file "
            "itself."
        )
    if any(line.count(".") > MOST_DOTS for line in lines.split("\n")):
        raise RunError(
            f"a policy that is changed here may have at most {MOST_DOTS} dots in one line; edit the file itself."
        )
    policy_of(content.decode())
    return content
