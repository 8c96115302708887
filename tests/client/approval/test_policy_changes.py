"""Changes of the policy: who stands behind them, what they were made from, what is left after a kill."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from client.approval import policy_changes
from client.approval.policy_changes import FOLDER, MOST_OPEN, PolicyChanges, Stale
from client.policy.policy import load_policy
from shared.errors import ConfigError, RunError, TrustError
from shared.trust import audit_log
from shared.trust.audit_log import AuditLog, Event
from tests.client.approval.conftest import LOG_KEY, NOON, SIGNER
from tests.client.approval.test_store import Killed, dying

BEFORE = f"""\
tasks = ["sequence_classification"]
max_epsilon_per_job = 8.0
max_steps = 200

[signers]
"lead" = "{SIGNER.verify_key.text}"

[backbones]
"embedded:x" = "{"ab" * 32}"
"""
AFTER = BEFORE.replace("max_steps = 200", "max_steps = 100  # <script>alert(1)</script>")
FOUR_EYES = f"policy_approvals_needed = 2\n{BEFORE}"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def opened(folder: Path) -> PolicyChanges:
    log = AuditLog(folder / "audit", seal_head=LOG_KEY, clock=lambda: NOON)
    return PolicyChanges(folder / "policy.toml", log=log)


def begun(folder: Path, text: str = BEFORE) -> PolicyChanges:
    folder.mkdir(exist_ok=True)
    (folder / "policy.toml").write_text(text)
    changes = opened(folder)
    changes.settle()
    return changes


@pytest.fixture
def changes(tmp_path: Path) -> PolicyChanges:
    return begun(tmp_path / "north")


def events(changes: PolicyChanges) -> list[str]:
    return [entry.event for entry in audit_log.read(changes.policy.parent / "audit")]


def test_a_change_is_proposed_accepted_and_kept(changes: PolicyChanges) -> None:
    changes.policy.chmod(0o640)
    proposal = changes.propose(AFTER.replace("\n", "\r\n"), base=sha256(BEFORE), by="eve", reason="shorter  jobs")
    assert changes.policy.read_text() == BEFORE, "nothing holds yet"
    assert (proposal.number, proposal.state, proposal.reason) == (1, "open", "shorter jobs")
    version = changes.accept(1, by="olga", reason="fine")
    assert changes.policy.read_text() == AFTER
    assert changes.policy.stat().st_mode & 0o777 == 0o640
    assert (version.number, version.sha256, version.proposal and version.proposal.by) == (2, sha256(AFTER), "eve")
    assert [changes.text_of(one.sha256) for one in changes.versions()] == [AFTER, BEFORE]
    assert events(changes) == ["policy.changed", "policy.proposed", "policy.accepted", "policy.changed"]
    entries = [one.details for one in audit_log.read(changes.policy.parent / "audit")]
    assert entries[2] == {"number": 1, "sha256": sha256(AFTER), "base": sha256(BEFORE), "by": "olga", "reason": "fine"}
    assert entries[3] == {"number": 1, "sha256": sha256(AFTER), "before": sha256(BEFORE)}
    again = opened(changes.policy.parent)
    assert again.versions() == changes.versions()
    assert again.find(1) == changes.find(1)


def test_an_old_version_can_be_proposed_again(changes: PolicyChanges) -> None:
    changes.propose(AFTER, base=sha256(BEFORE), by="eve")
    changes.accept(1, by="olga")
    changes.propose(changes.text_of(sha256(BEFORE)), base=sha256(AFTER), by="eve")
    assert changes.accept(2, by="olga").number == 3
    assert changes.policy.read_text() == BEFORE


@pytest.mark.parametrize("wrong", ["", "max_steps = 1", "[[", BEFORE + "min_site = 2\n", BEFORE.replace("200", "-1")])
def test_what_is_no_policy_is_not_proposed(changes: PolicyChanges, wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"^policy\.toml"):
        changes.propose(wrong, base=sha256(BEFORE), by="eve")
    assert events(changes) == ["policy.changed"]


def test_what_is_too_long_or_changes_nothing_is_not_proposed(changes: PolicyChanges) -> None:
    for text, says in (
        (f"{BEFORE}# {'x' * 40_000}", "at most 32 KiB"),
        (BEFORE + "\n" * 2500 + "# x", "lines"),
        (BEFORE + "\n\n", "nothing would change"),
    ):
        with pytest.raises(RunError, match=says):
            changes.propose(text, base=sha256(BEFORE), by="eve")


def test_four_eyes_are_two_accounts(tmp_path: Path) -> None:
    changes = begun(tmp_path, FOUR_EYES)
    changes.propose(BEFORE, base=sha256(FOUR_EYES), by="Olga Meier")
    for same in ("Olga Meier", "olga  meier", "ＯLGA MEIER"):
        with pytest.raises(RunError, match="somebody else"):
            changes.accept(1, by=same)
    assert changes.policy.read_text() == FOUR_EYES
    assert changes.accept(1, by="jan").number == 2


def test_the_policy_in_force_says_how_many(tmp_path: Path) -> None:
    """Who wants one pair of eyes where two are asked for needs two; who wants two where one is enough needs one."""
    changes = begun(tmp_path, FOUR_EYES)
    assert changes.needed == 2
    changes.propose(BEFORE, base=sha256(FOUR_EYES), by="olga")
    with pytest.raises(RunError, match="somebody else"):
        changes.accept(1, by="olga")
    changes.accept(1, by="jan")
    assert changes.needed == 1
    changes.propose(FOUR_EYES, base=sha256(BEFORE), by="olga")
    changes.accept(2, by="olga")
    assert changes.needed == 2
    changes.policy.write_text("[[")
    assert changes.needed == 2, "what cannot be read asks for two"


def test_a_proposal_on_another_file_is_stale(changes: PolicyChanges) -> None:
    changes.propose(AFTER, base=sha256(BEFORE), by="eve")
    by_hand = BEFORE.replace("8.0", "4.0")
    changes.policy.write_text(by_hand)
    assert [one.state for one in changes.proposals()] == ["stale"]
    with pytest.raises(Stale):
        changes.accept(1, by="olga")
    with pytest.raises(Stale):
        changes.propose(AFTER, base=sha256(BEFORE), by="eve")
    assert changes.policy.read_text() == by_hand
    latest = changes.versions()[0]
    assert (latest.proposal, changes.text_of(latest.sha256)) == (None, by_hand)
    changes.decline(1, by="eve")
    with pytest.raises(Stale):
        changes.accept(1, by="olga")


def test_what_was_overtaken_stays_so(changes: PolicyChanges) -> None:
    """What was decided on since may be why it was not accepted; the same bytes do not take that back."""
    changes.propose(AFTER, base=sha256(BEFORE), by="eve")
    changes.policy.write_text(BEFORE.replace("8.0", "4.0"))
    changes.settle()
    changes.policy.write_text(BEFORE)
    for one in (changes, opened(changes.policy.parent)):
        assert [(one.state, one.version) for one in one.proposals()] == [("stale", 1)]
        with pytest.raises(Stale):
            one.accept(1, by="olga")
    assert changes.policy.read_text() == BEFORE
    changes.propose(AFTER, base=sha256(BEFORE), by="eve")
    assert changes.accept(2, by="olga").number == 4


@pytest.mark.parametrize(
    ("what", "to"),
    [
        ("approvals_needed = 2", "approvals_needed = 1"),
        ('approval = "required"\napprovals_needed = 2', 'approval = "none"'),
        ("approval_days = 7.0", "approval_days = 8.0"),
    ],
)
def test_nobody_lowers_four_eyes_alone(tmp_path: Path, what: str, to: str) -> None:
    eyes = f'approval = "required"\napprovals_needed = 2\napproval_days = 7.0\n{BEFORE}'
    changes = begun(tmp_path, eyes)
    changes.propose(eyes.replace(what, to), base=sha256(eyes), by="otto", officer=True)
    with pytest.raises(RunError, match="somebody else"):
        changes.accept(1, by="otto")
    assert changes.policy.read_text() == eyes
    assert changes.accept(1, by="olga").number == 2


def test_four_eyes_of_officers_are_lowered_by_officers(tmp_path: Path) -> None:
    """Whoever decides on no job is no second pair of eyes where jobs take two; not in a later process either."""
    eyes = f'approval = "required"\napprovals_needed = 2\npolicy_approvals_needed = 2\n{BEFORE}'
    changes, one = begun(tmp_path, eyes), eyes.replace("approvals_needed = 2\n", "approvals_needed = 1\n", 1)
    changes.propose(one, base=sha256(eyes), by="eve, an engineer")
    changes.propose(one, base=sha256(eyes), by="otto", officer=True)
    again = opened(tmp_path)
    assert [again.lacks_officer(found) for found in again.proposals()] == [False, True]
    with pytest.raises(RunError, match="as many officers as decide on one"):
        again.accept(1, by="olga")
    assert again.policy.read_text() == eyes
    assert again.accept(2, by="olga").number == 2
    changes.propose(eyes, base=sha256(one), by="eve, an engineer")
    assert changes.accept(3, by="olga").number == 3, "stricter again: who proposes it, and an officer"


def test_stricter_decisions_and_other_rules_take_what_the_policy_says(tmp_path: Path) -> None:
    eyes = f'approval = "required"\napprovals_needed = 2\n{BEFORE}'
    changes, stricter = begun(tmp_path, eyes), f"approval_days = 3.0\n{eyes}"
    changes.propose(stricter, base=sha256(eyes), by="otto")
    assert changes.accept(1, by="otto").number == 2
    changes.propose(stricter.replace("200", "300"), base=sha256(stricter), by="otto")
    assert changes.accept(2, by="otto").number == 3


def test_a_proposal_is_decided_once(changes: PolicyChanges) -> None:
    changes.propose(AFTER, base=sha256(BEFORE), by="eve")
    other = opened(changes.policy.parent)
    changes.decline(1, by="olga", reason="no")
    for act in (other.accept, other.decline):
        with pytest.raises(Stale):
            act(1, by="jan")
    with pytest.raises(Stale):
        other.accept(7, by="jan")
    found = changes.find(1)
    assert found is not None
    assert found.said is not None
    assert (found.state, found.said.by, found.said.reason) == ("declined", "olga", "no")
    assert changes.policy.read_text() == BEFORE


def test_nobody_floods_it(changes: PolicyChanges) -> None:
    for number in range(MOST_OPEN):
        changes.propose(f"{BEFORE}# {number}", base=sha256(BEFORE), by="eve")
    with pytest.raises(RunError, match="accept or decline some first"):
        changes.propose(AFTER, base=sha256(BEFORE), by="eve")


def test_what_was_never_in_force_is_not_kept_for_ever(changes: PolicyChanges, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_changes, "MOST_KEPT", 2)
    changes.propose(AFTER, base=sha256(BEFORE), by="eve")
    changes.accept(1, by="olga")
    changes.propose(waiting := f"{AFTER}# waits\n", base=sha256(AFTER), by="eve")
    for number in range(3, 8):
        changes.propose(f"{AFTER}# {number}\n", base=sha256(AFTER), by="eve")
        changes.decline(number, by="eve")
    changes.propose(last := f"{AFTER}# last\n", base=sha256(AFTER), by="eve")
    kept = {path.read_text() for path in (changes.policy.parent / FOLDER).iterdir()}
    assert kept == {BEFORE, AFTER, waiting, last, f"{AFTER}# 6\n", f"{AFTER}# 7\n"}
    assert [changes.has_text(sha256(f"{AFTER}# {number}\n")) for number in (3, 7)] == [False, True]
    assert changes.accept(2, by="olga").sha256 == sha256(waiting)


def test_a_key_of_thousands_of_parts_is_not_read(changes: PolicyChanges, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_changes, "policy_of", lambda _: pytest.fail("it would take seconds"))
    for line in (f"x{'.a' * 9000} = 1", f"[x{' .a' * 9000}]", f"x = {{ a{'.a' * 9000} = 1 }}"):
        with pytest.raises(RunError, match="at most 100 dots in one line"):
            changes.propose(f"{BEFORE}{line}\n", base=sha256(BEFORE), by="eve")


def test_a_kept_text_that_was_changed_is_not_shown(changes: PolicyChanges) -> None:
    changes.propose(AFTER, base=sha256(BEFORE), by="eve")
    kept = changes.policy.parent / FOLDER / f"{sha256(AFTER)}.toml"
    kept.write_text(AFTER.replace("100", "9999"))
    with pytest.raises(TrustError, match="was changed after it was kept"):
        changes.accept(1, by="olga")
    assert changes.policy.read_text() == BEFORE
    assert Event.POLICY_ACCEPTED not in events(changes)


def test_a_link_is_not_replaced(changes: PolicyChanges) -> None:
    changes.propose(AFTER, base=sha256(BEFORE), by="eve")
    real = changes.policy.rename(changes.policy.with_name("elsewhere.toml"))
    changes.policy.symlink_to(real)
    with pytest.raises(RunError, match="no plain file"):
        changes.accept(1, by="olga")
    assert (real.read_text(), Event.POLICY_ACCEPTED in events(changes)) == (BEFORE, False)


def test_what_was_written_while_a_change_was_begun_is_kept(changes: PolicyChanges) -> None:
    changes.propose(AFTER, base=sha256(BEFORE), by="eve")
    with changes._log.locked():  # and there its process dies
        changes._note(Event.POLICY_ACCEPTED, number=1, sha256=sha256(AFTER), base=sha256(BEFORE), by="olga")
    by_hand = BEFORE.replace("8.0", "4.0")
    changes.policy.write_text(by_hand)
    again = opened(changes.policy.parent)
    assert again.versions()[0].sha256 == sha256(by_hand)
    assert (changes.policy.read_text(), again.versions()[0].proposal) == (by_hand, None)
    again.settle()
    assert events(changes).count(Event.POLICY_CHANGED) == 2


ACTIONS: dict[str, tuple[Callable[[PolicyChanges], Any], str]] = {
    "propose": (lambda changes: changes.propose(AFTER, base=sha256(BEFORE), by="eve"), ""),
    "accept": (lambda changes: changes.accept(1, by="olga"), "proposed"),
    "decline": (lambda changes: changes.decline(1, by="olga"), "proposed"),
    "by hand": (lambda changes: changes.settle(), "written"),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_kill_at_any_write_leaves_a_change_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, after: bool
) -> None:
    act, prepared = ACTIONS[action]
    nth, ended, left = 0, False, set()
    while not ended:
        nth += 1
        folder = tmp_path / f"{nth}"
        changes = begun(folder)
        if prepared == "proposed":
            changes.propose(AFTER, base=sha256(BEFORE), by="eve")
        elif prepared:
            changes.policy.write_text(AFTER)
        with dying(monkeypatch, nth, after=after) as calls:
            with suppress(Killed):
                act(changes)
            ended = calls[0] < nth
        # 1. The node reads one policy or the other, never a part.
        load_policy(folder / "policy.toml")
        # 2. Whoever looks next finds file and log agreeing, and each step noted once.
        again = opened(folder)
        versions, proposals = again.versions(), again.proposals()
        told = events(again)
        assert versions[0].sha256 == sha256(changes.policy.read_text()), f"killed at {nth}"
        assert all(told.count(one) <= 1 for one in ("policy.proposed", "policy.accepted", "policy.declined"))
        assert told.count("policy.changed") == len(versions)
        assert ("policy.accepted" in told) == (action == "accept" and changes.policy.read_text() == AFTER)
        audit_log.verify(folder / "audit", verify_head=LOG_KEY.verify_key)
        left.add((len(versions), proposals[0].state if proposals else ""))
        # 3. It can be gone on with.
        if proposals and proposals[0].state == "open":
            assert again.accept(1, by="jan").sha256 == sha256(AFTER)
    assert nth > 6, "hardly anything was written: the test saw nothing"
    assert (
        left
        == {
            "propose": {(1, ""), (1, "open")},
            "accept": {(1, "open"), (2, "accepted")},
            "decline": {(1, "open"), (1, "declined")},
            "by hand": {(2, "")},
        }[action]
    )
