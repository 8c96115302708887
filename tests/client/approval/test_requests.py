"""What a site's people say to a job, and what it is worth: for which job, for how long, by how many."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from client.approval import requests as requests_module
from client.approval.request import Rules, same_account
from client.approval.requests import MOST_JOB_BYTES, MOST_REQUESTS
from client.approval.store import MOST_FILE_BYTES
from shared.errors import AwaitingApproval, PolicyError, RunError
from shared.trust.audit_log import Event
from shared.trust.signed_job import SignedJob
from shared.trust.signing import SigningKey
from tests.client.approval.conftest import NOON, OTHER_SIGNER, Desk
from tests.shared.test_names import LOOK_ALIKE, UNSEEN

DAY = timedelta(days=1)


def approve(desk: Desk, named: str = "triage", *, by: str = "ada", **options: Any) -> str:
    return desk.opened().approve(named, desk.rules, by=by, **options)[1]


def refuse(desk: Desk, named: str = "triage", *, by: str = "ada", reason: str = "not ours") -> None:
    desk.opened().refuse(named, desk.rules, by=by, reason=reason)


def admitted(desk: Desk, signed: SignedJob, *, begins: bool = False) -> bool:
    """Return whether a job passes; False if it waits."""
    try:
        desk.opened().admit(signed, desk.rules)
        if begins:
            desk.opened().begin(signed, desk.rules)
    except AwaitingApproval:
        return False
    return True


def refused(desk: Desk, signed: SignedJob) -> str:
    with pytest.raises(PolicyError) as caught:
        desk.opened().admit(signed, desk.rules)
    assert type(caught.value) is PolicyError
    return str(caught.value)


# --- the way of a request ---


def test_a_job_waits_is_approved_and_runs(desk: Desk) -> None:
    signed = desk.signed()
    assert not admitted(desk, signed)
    assert desk.states() == {"triage": "waiting"}
    assert approve(desk, reason="as agreed on 3 May") == "approved"
    assert admitted(desk, signed)
    assert admitted(desk, signed, begins=True)
    assert desk.states() == {"triage": "begun"}
    assert desk.events() == [Event.APPROVAL_ASKED, Event.APPROVAL_GIVEN, Event.APPROVAL_BEGUN]
    given = desk.entries()[1].details
    assert (given["by"], given["reason"], given["given"], given["needed"]) == ("ada", "as agreed on 3 May", 1, 1)
    assert (given["job"], given["name"], given["signer"]) == (signed.job.sha256, "triage", signed.signer.text)


def test_asking_again_makes_no_second_request_and_writes_nothing(desk: Desk) -> None:
    signed = desk.signed()
    desk.asked(signed)
    content, events = desk.file.read_bytes(), desk.events()
    for _ in range(5):
        desk.now += timedelta(minutes=1)
        desk.asked(signed)
    assert (desk.file.read_bytes(), desk.events()) == (content, events)
    approve(desk)
    assert admitted(desk, signed, begins=True)
    content = desk.file.read_bytes()
    assert admitted(desk, signed, begins=True)
    assert desk.file.read_bytes() == content


def test_the_job_that_was_signed_is_what_is_kept(desk: Desk) -> None:
    signed = desk.signed()
    desk.asked(signed)
    request, _ = desk.only()
    assert request.signed() == signed
    assert (request.job, request.arrived) == (signed.job.sha256, NOON)


# --- what an approval is for ---


def test_an_approval_is_for_one_job_of_one_signer_and_one_coordinator(desk: Desk) -> None:
    signed = desk.signed()
    desk.asked(signed)
    approve(desk)
    others = {
        "job": desk.signed("other"),
        "one setting": desk.signed(training={"rounds": 11}),
        "signer": desk.signed(signer=OTHER_SIGNER),
        "coordinator": desk.signed(coordinator=SigningKey.generate()),
    }
    assert admitted(desk, signed)
    for what, other in others.items():
        assert not admitted(desk, other), what
        assert not admitted(desk, other, begins=True), what
    # Nor once it has begun.
    assert admitted(desk, signed, begins=True)
    assert not any(admitted(desk, other) for other in others.values())
    assert len(desk.opened().listed(desk.rules)) == 5


def test_a_job_that_was_signed_anew_is_the_same_request(desk: Desk) -> None:
    desk.asked(desk.signed(days=30))
    approve(desk)
    desk.now += DAY
    assert admitted(desk, desk.signed(days=5))
    assert len(desk.opened().listed(desk.rules)) == 1


def test_a_refusal_is_for_one_signer_too(desk: Desk) -> None:
    desk.asked(desk.signed())
    refuse(desk)
    assert "its people said no" in refused(desk, desk.signed())
    desk.asked(desk.signed(signer=OTHER_SIGNER))


# --- refusals ---


def test_a_refusal_holds_until_somebody_approves(desk: Desk) -> None:
    signed = desk.signed()
    desk.asked(signed)
    refuse(desk)
    desk.now += 20 * DAY
    refused(desk, signed)
    assert approve(desk, by="eve") == "approved"
    assert admitted(desk, signed)
    assert desk.events()[-2:] == [Event.APPROVAL_REFUSED, Event.APPROVAL_GIVEN]


def test_what_is_told_is_one_of_two_texts(desk: Desk) -> None:
    signed = desk.signed()
    with pytest.raises(AwaitingApproval) as first:
        desk.opened().admit(signed, desk.rules)
    refuse(desk, by="marker-account", reason="marker-reason")
    assert str(first.value) == "waiting for approval"
    assert refused(desk, signed) == "site north refuses the job triage: its people said no."
    approve(desk)
    refuse(desk, by="marker-account", reason="marker-reason")
    assert refused(desk, signed) == "site north refuses the job triage: its people said no."


def test_an_approval_is_withdrawn_in_the_middle_of_a_job(desk: Desk) -> None:
    signed = desk.signed()
    desk.asked(signed)
    approve(desk)
    assert admitted(desk, signed, begins=True)
    refuse(desk, by="bob", reason="the ethics board has doubts")
    refused(desk, signed)
    entry = desk.entries()[-1]
    assert (entry.event, entry.details["by"]) == (Event.APPROVAL_WITHDRAWN, "bob")
    assert entry.details["reason"] == "the ethics board has doubts"
    # Taken up again, it needs its approvals anew, and expires like a new one.
    assert approve(desk, by="bob") == "approved"
    desk.now += 8 * DAY
    assert not admitted(desk, signed)


def test_a_refusal_holds_where_no_approval_is_required_any_more(desk: Desk) -> None:
    signed, other = desk.signed(), desk.signed("other")
    desk.asked(signed)
    desk.asked(other)
    refuse(desk)
    with pytest.raises(PolicyError, match="its people said no"):
        desk.opened().check_refused(signed, desk.rules)
    desk.opened().check_refused(other, desk.rules)  # it only waited
    desk.opened().check_refused(desk.signed("never asked"[:5]), desk.rules)


def test_a_refusal_needs_a_reason_and_comes_once(desk: Desk) -> None:
    desk.asked(desk.signed())
    with pytest.raises(RunError, match="a refusal needs a reason"):
        refuse(desk, reason="  ")
    refuse(desk)
    with pytest.raises(RunError, match="was refused already, by ada"):
        refuse(desk, by="bob")


# --- four eyes ---


def test_four_eyes_are_two_accounts(four_eyes: Desk) -> None:
    desk, signed = four_eyes, four_eyes.signed()
    desk.asked(signed)
    assert approve(desk, by="Ada Lovelace") == "waiting"
    assert not admitted(desk, signed)
    for same in ("Ada Lovelace", "ada lovelace", " Ada  Lovelace ", "ADA LOVELACE"):
        with pytest.raises(RunError, match="the next one is somebody else's"):
            approve(desk, by=same)
    assert not admitted(desk, signed)
    assert approve(desk, by="bob") == "approved"
    assert admitted(desk, signed)
    with pytest.raises(RunError, match="was approved already, by Ada Lovelace, bob"):
        approve(desk, by="eve")


@pytest.mark.parametrize("other", ["ada\u200b", "\uff41\uff44\uff41", "A\u0064a"])
def test_what_nobody_sees_makes_no_second_account(other: str) -> None:
    assert same_account("ada", other)
    assert not same_account("ada", "adam")


@pytest.mark.parametrize("name", LOOK_ALIKE)
def test_a_name_that_could_pass_for_another_says_nothing(four_eyes: Desk, name: str) -> None:
    four_eyes.asked(four_eyes.signed())
    with pytest.raises(RunError, match=r"\(--by\) is "):
        approve(four_eyes, by=name)
    assert name not in UNSEEN or same_account("officer", name), "of an approval from before"


def test_one_of_two_can_refuse_and_both_must_then_approve(four_eyes: Desk) -> None:
    desk, signed = four_eyes, four_eyes.signed()
    desk.asked(signed)
    approve(desk, by="ada")
    refuse(desk, by="bob")
    refused(desk, signed)
    assert approve(desk, by="bob") == "waiting"
    assert not admitted(desk, signed)
    assert approve(desk, by="ada") == "approved"


def test_a_stricter_policy_holds_for_what_has_not_begun(desk: Desk) -> None:
    signed, running = desk.signed(), desk.signed("running")
    for one in (signed, running):
        desk.asked(one)
        approve(desk, one.job.name)
    assert admitted(desk, running, begins=True)
    desk.rules = Rules(needed=2, valid=desk.rules.valid)
    assert not admitted(desk, signed)
    assert admitted(desk, running)
    assert approve(desk, by="bob") == "approved"
    assert admitted(desk, signed)


def test_those_who_decide_at_once_are_counted_one_after_the_other(four_eyes: Desk) -> None:
    desk = four_eyes
    desk.asked(desk.signed())

    def say_yes(number: int) -> bool:
        try:
            desk.opened().approve("triage", desk.rules, by=f"account-{number}")
        except RunError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(say_yes, range(8))) == 2
    request, state = desk.only()
    assert (state, len(request.approvals)) == ("approved", 2)
    assert desk.events().count(Event.APPROVAL_GIVEN) == 2


# --- time ---


def test_what_waits_too_long_is_asked_anew(desk: Desk) -> None:
    signed = desk.signed()
    desk.asked(signed)
    desk.now += 7 * DAY - timedelta(seconds=1)
    assert desk.states() == {"triage": "waiting"}
    desk.now += timedelta(seconds=1)
    assert desk.states() == {"triage": "expired"}
    with pytest.raises(RunError, match=r"the time of the request triage .* is over"):
        approve(desk)
    desk.asked(signed)
    request, state = desk.only()
    assert (state, request.arrived) == ("waiting", desk.now)
    assert desk.events() == [Event.APPROVAL_ASKED, Event.APPROVAL_EXPIRED, Event.APPROVAL_ASKED]


def test_an_approval_that_is_not_used_expires(desk: Desk) -> None:
    signed = desk.signed()
    desk.asked(signed)
    desk.now += 6 * DAY
    approve(desk)
    desk.now += 7 * DAY - timedelta(seconds=1)
    assert admitted(desk, signed)
    desk.now += timedelta(seconds=1)
    assert not admitted(desk, signed)
    assert not admitted(desk, signed, begins=True)
    assert desk.states() == {"triage": "waiting"}
    assert approve(desk) == "approved"
    assert admitted(desk, signed)


def test_one_of_two_approvals_does_not_outlive_the_request(four_eyes: Desk) -> None:
    desk, signed = four_eyes, four_eyes.signed()
    desk.asked(signed)
    desk.now += 6 * DAY
    approve(desk, by="ada")
    desk.now += DAY
    desk.asked(signed)  # anew
    assert approve(desk, by="bob") == "waiting"
    assert not admitted(desk, signed)


def test_the_earlier_of_two_approvals_is_what_ends_both(four_eyes: Desk) -> None:
    desk, signed = four_eyes, four_eyes.signed()
    desk.asked(signed)
    approve(desk, by="ada")
    desk.now += 6 * DAY
    assert approve(desk, by="bob") == "approved"
    desk.now += DAY
    assert not admitted(desk, signed)


def test_a_job_that_has_begun_stays_approved(desk: Desk) -> None:
    signed = desk.signed(days=300)
    desk.asked(signed)
    approve(desk)
    assert admitted(desk, signed, begins=True)
    desk.now += 200 * DAY
    assert admitted(desk, signed, begins=True)
    assert desk.states() == {"triage": "begun"}


def test_no_approval_outlives_the_signed_job(desk: Desk) -> None:
    desk.asked(desk.signed(days=1))
    approve(desk)
    desk.now += DAY
    assert desk.states() == {"triage": "expired"}


# --- names ---


def test_a_request_is_named_by_name_hash_or_id(desk: Desk) -> None:
    signed = desk.signed()
    desk.asked(signed)
    request, _ = desk.only()
    for named in ("triage", signed.job.sha256, signed.job.sha256[:6], request.id[:12], request.id):
        assert desk.opened().find(named, desk.rules)[0].id == request.id
    for named in ("triag", signed.job.sha256[:5], "0" * 12, "", "\x1b[2J"):
        with pytest.raises(RunError, match="no request is called") as caught:
            desk.opened().find(named, desk.rules)
        assert str(caught.value).isprintable()


def test_a_name_that_means_two_requests_means_none(desk: Desk) -> None:
    desk.asked(desk.signed())
    desk.asked(desk.signed(signer=OTHER_SIGNER))
    for named in ("triage", desk.signed().job.sha256):
        with pytest.raises(RunError, match="could be 2 requests"):
            approve(desk, named)
    for request, _ in desk.opened().listed(desk.rules):
        assert approve(desk, request.id[:16]) == "approved"


def test_a_job_that_is_called_like_anothers_id_is_not_taken_for_it(desk: Desk) -> None:
    """A signer could name one job like another's hash or id, so that people approve what they did not mean."""
    desk.asked(desk.signed())
    request, _ = desk.only()
    for name in (request.id[:16], request.job[:12]):
        desk.asked(desk.signed(name))
        with pytest.raises(RunError, match="could be 2 requests"):
            approve(desk, name)


@pytest.mark.parametrize("by", ["", "  ", "a" * 101, "a\x1b[31mb", "a\u202eb", "\ud800"])
def test_an_account_is_a_printable_name(desk: Desk, by: str) -> None:
    desk.asked(desk.signed())
    with pytest.raises(RunError, match="the name of the account"):
        approve(desk, by=by)
    with pytest.raises(RunError, match="the name of the account"):
        refuse(desk, by=by)


@pytest.mark.parametrize("reason", ["a" * 501, "a\x00b", "\x1b]0;x\x07"])
def test_a_reason_is_printable_and_short(desk: Desk, reason: str) -> None:
    desk.asked(desk.signed())
    with pytest.raises(RunError, match="the reason"):
        refuse(desk, reason=reason)
    with pytest.raises(RunError, match="the reason"):
        approve(desk, reason=reason)


# --- bounds ---


def test_no_coordinator_fills_the_disk(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_module, "MOST_REQUESTS", 6)
    desk.asked(desk.signed("approved"))
    approve(desk, "approved")
    desk.asked(desk.signed("begun"))
    approve(desk, "begun")
    assert admitted(desk, desk.signed("begun"), begins=True)
    for number in range(10):
        assert not admitted(desk, desk.signed(f"job-{number}"))
    waiting = {f"job-{number}": "waiting" for number in range(4)}
    assert desk.states() == {"approved": "approved", "begun": "begun"} | waiting
    # Room is made by deciding, oldest first.
    refuse(desk, "job-0")
    refuse(desk, "job-1")
    desk.asked(desk.signed("job-7"))
    assert "job-0" not in desk.states()
    assert desk.states()["job-1"] == "refused"
    assert desk.states()["job-7"] == "waiting"
    # What was pushed out waits, and passes no more than before.
    assert not admitted(desk, desk.signed("job-0"))
    assert admitted(desk, desk.signed("approved"))


def test_jobs_that_are_over_give_way(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_module, "MOST_REQUESTS", 2)
    for name in ("first", "second"):
        desk.asked(desk.signed(name))
        approve(desk, name)
        assert admitted(desk, desk.signed(name), begins=True)
    assert not admitted(desk, desk.signed("third"))
    assert "third" not in desk.states()
    desk.now += 31 * DAY
    desk.asked(desk.signed("third"))
    assert desk.states() == {"second": "begun", "third": "waiting"}


def test_the_file_stays_below_its_bound(desk: Desk) -> None:
    labels = [f"{number:03d}" + '"\\' * 40 for number in range(1000)]  # each doubled wherever it is written down
    task = {"kind": "sequence_classification", "labels": labels}
    largest = desk.signed("large", task=task)
    assert MOST_JOB_BYTES > len(largest.to_json()) > MOST_JOB_BYTES / 3
    asked = 0
    while True:
        before = len(desk.opened().listed(desk.rules))
        assert not admitted(desk, desk.signed(f"large-{asked}", task=task))
        asked += 1
        if len(desk.opened().listed(desk.rules)) == before:
            break
    assert 5 < asked < MOST_REQUESTS
    assert desk.file.stat().st_size < MOST_FILE_BYTES / 1.5


def test_a_job_that_is_too_large_to_be_kept_is_refused(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_module, "MOST_JOB_BYTES", 400)
    assert "site north keeps at most 400 for its people to look at" in refused(desk, desk.signed())
    assert not desk.file.exists()


# --- what people see ---


def test_those_that_wait_are_listed_first(desk: Desk) -> None:
    for name in ("a", "b", "c", "d"):
        desk.asked(desk.signed(name))
        desk.now += timedelta(minutes=1)
    refuse(desk, "a")
    approve(desk, "b")
    assert list(desk.states().items()) == [("d", "waiting"), ("c", "waiting"), ("b", "approved"), ("a", "refused")]


def test_the_last_approved_job_is_that_of_the_same_signer(desk: Desk) -> None:
    def last(named: str) -> str | None:
        request, _ = desk.opened().find(named, desk.rules)
        found = desk.opened().last_approved(request, desk.rules)
        return found and found.name

    desk.asked(desk.signed("first"))
    assert last("first") is None
    approve(desk, "first")
    desk.now += DAY
    desk.asked(desk.signed("second"))
    assert last("second") == "first"
    approve(desk, "second")
    desk.asked(desk.signed("stranger", signer=OTHER_SIGNER))
    approve(desk, "stranger")
    desk.asked(desk.signed("third"))
    assert last("third") == "second"
    assert last("stranger") is None
    refuse(desk, "second")
    assert last("third") == "first"
