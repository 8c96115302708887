"""Requests in a browser: what is shown is what the engine says; what is decided is decided by the account, as it was seen."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest

from client.approval.request import Request
from client.approval.words import told
from client.site.approving import ApprovalDesk
from shared.epsilons import rounded_up
from shared.errors import AwaitingApproval, LedgerError, PolicyError
from shared.trust.audit_log import Event, read
from shared.web.roles import Role
from tests.client.console.conftest import PASSWORD, Browser, Serving, files_of, take, text_of
from tests.client.console.homes import approvals_of, ask, charge, facts_by_ledger, make_home, say, want_people

MARKS = "\"><script>alert(1)</script><img src=x onerror=alert(1)>'; DROP TABLE accounts; --"
Serve = Callable[..., Serving]


@pytest.fixture(scope="module")
def asked(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Serving:
    """The console of a site with a past, which wants two people to approve; two officers have an account."""
    home = make_home(tmp_path_factory.mktemp("asked"))
    charge(home, rounds=3)
    say(home)
    want_people(home, 2)
    serving = serve(home)
    administrator = next(one for one in serving.console.accounts.all() if one.role is Role.ADMINISTRATOR)
    code = serving.console.accounts.invite("Jan Maurer", Role.OFFICER, by=administrator)
    take(serving, code, "Jan Maurer")
    return serving


@pytest.fixture
def request_of(asked: Serving, request: pytest.FixtureRequest) -> Request:
    """A new request, named as the test."""
    return ask(asked.home, re.sub("[^a-z_]", "", request.node.name)[:60])


def seen_on(page: str) -> str:
    found = set(re.findall(r'name="seen" value="([0-9a-f]{64})"', page))
    assert len(found) == 1
    return found.pop()


def read_on(page: str) -> str:
    """Return the mark of the facts that a page shows; "" where it offers no approval beside them."""
    return "".join(set(re.findall(r'name="read" value="([^"]{64,})"', page)))


def decide(browser: Browser, request: Request, what: str, *, seen: str | None = None, **data: str) -> Any:
    path = f"/requests/{request.id}"
    page = browser.get(f"{path}/facts").text
    if seen is None:
        seen = seen_on(browser.get(path).text + page)
    return browser.post(f"{path}/{what}", page=path, seen=seen, read=read_on(page), **data)


def state_of(serving: Serving, request: Request) -> str:
    approvals, rules = approvals_of(serving.home)
    return approvals.find(request.id, rules, by_id=True)[1]


def said_of(serving: Serving, request: Request) -> list[tuple[str, Any, Any]]:
    return [
        (entry.event, entry.details.get("by"), entry.details.get("reason"))
        for entry in read(serving.home.audit)
        if entry.details.get("job") == request.job and entry.event.startswith("approval.")
    ]


# --- what is shown ---


def test_what_waits_comes_first(asked: Serving, request_of: Request) -> None:
    older = ask(asked.home, "decided-already")
    approvals, rules = approvals_of(asked.home)
    approvals.refuse(older.id, rules, by="Ruth", reason="no board yet")
    page = asked.signed_in("engineer").get("/requests").text
    assert page.index(request_of.name) < page.index("decided-already")
    words = text_of(page)
    assert "0 of 2" in words
    assert "refused by Ruth" in words
    assert "no board yet" not in words, "a reason stands on the request's own page"
    assert "consortium" in words


def test_a_page_shows_the_facts_of_the_engine(asked: Serving, request_of: Request) -> None:
    browser = asked.signed_in("engineer")
    frame = browser.get(f"/requests/{request_of.id}").text
    assert f'hx-get="/requests/{request_of.id}/facts"' in frame, "what takes long comes later"
    part = browser.get(f"/requests/{request_of.id}/facts", headers={"hx-request": "true"}).text
    assert "<html" not in part
    facts = facts_by_ledger(asked.home, request_of)
    words = text_of(part)
    assert facts.promised is not None
    assert repr(facts.promised.epsilon) in part
    for line in facts.budget:
        assert repr(line.spent) in part
        assert repr(line.after) in part
        assert rounded_up(line.after, 4) in words
    for text in (facts.signer, facts.coordinator, facts.job, facts.backbone, facts.here.dataset, "4 rounds of 2"):
        assert text in words
    for verdict in facts.rules:
        assert verdict.rule in words
    kept = sum(verdict.kept for verdict in facts.rules)
    assert f"{kept} of {len(facts.rules)} kept" in words
    assert any("kept" in line for line in told(facts))
    # Known by now, they stand in the page at once.
    assert repr(facts.promised.epsilon) in browser.get(f"/requests/{request_of.id}").text
    assert "<html" in browser.get(f"/requests/{request_of.id}/facts").text


def test_what_changed_since_the_last_approved_job_is_shown(asked: Serving, request_of: Request) -> None:
    approvals, rules = approvals_of(asked.home)
    for name in ("ada", "ben"):
        approvals.approve(request_of.id, rules, by=name)
    newer = ask(asked.home, "the-next-one", training={"rounds": 5, "local_steps": 2})
    words = text_of(asked.signed_in("officer").get(f"/requests/{newer.id}/facts").text)
    assert f"Settings that differ from {request_of.name}" in words
    assert re.search(r"training\.rounds 4 5", words)


def test_a_broken_rule_and_an_empty_budget_are_told(asked: Serving) -> None:
    large = ask(
        asked.home, "much-too-large", training={"rounds": 90, "local_steps": 2}, privacy={"noise_multiplier": 0.6}
    )
    words = text_of(asked.signed_in("officer").get(f"/requests/{large.id}/facts").text)
    assert "This site would refuse the job as things are" in words
    assert "The whole job does not fit." in words
    assert "broken" in words


def test_facts_are_computed_once_and_anew_after_a_change(
    asked: Serving, request_of: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []
    plain = ApprovalDesk.facts

    def counted(desk: ApprovalDesk, named: str, **options: Any) -> Any:
        computed.append(named)
        return plain(desk, named, **options)

    monkeypatch.setattr(ApprovalDesk, "facts", counted)
    browser, path = asked.signed_in("engineer"), f"/requests/{request_of.id}/facts"
    for _ in range(3):
        assert browser.get(path).status_code == 200
    assert computed == [request_of.id]
    approvals, rules = approvals_of(asked.home)
    approvals.approve(request_of.id, rules, by="ada")
    browser.get(path)
    assert len(computed) == 1, "who approved is no part of them"
    text = asked.home.policy.read_text()
    try:
        asked.home.policy.write_text(text.replace("max_steps = 200", "max_steps = 4"))
        assert "at most 4" in browser.get(path).text
        charge(asked.home, jobs=["one more"], rounds=1)
        browser.get(path)
        assert len(computed) == 2, "a charge changes what the budget says, and no verdict"
        known = asked.console.content.requests.known_facts(asked.console.content.requests.find(request_of.id))
        assert known.facts.budget == facts_by_ledger(asked.home, request_of).budget
    finally:
        asked.home.policy.write_text(text)


def test_facts_that_cannot_be_told_are_no_reason_to_hide_the_request(
    asked: Serving, request_of: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LedgerError("the ledger is <b>broken</b>")

    monkeypatch.setattr(ApprovalDesk, "facts", fail)
    browser, path = asked.signed_in("officer"), f"/requests/{request_of.id}"
    part = browser.get(f"{path}/facts", headers={"hx-request": "true"})
    assert (part.status_code, "the ledger is &lt;b&gt;broken" in part.text) == (200, True)
    assert browser.get(path).status_code == 200


def test_how_many_wait_is_told_to_those_who_may_see_them(asked: Serving, request_of: Request) -> None:
    approvals, rules = approvals_of(asked.home)
    number = sum(state == "waiting" for _, state in approvals.listed(rules))
    asked.console.content.requests.forget_count()
    for path in ("/budget", "/health"):
        page = asked.signed_in("officer").get(path).text
        assert f'<span class="count">{number}<' in page
        assert re.search(rf"{number} requests? waits?", text_of(page))
    for role in ("viewer", "researcher", "administrator"):
        page = asked.signed_in(role).get("/budget").text
        assert 'class="count"' not in page
        assert "/requests" not in page


def test_looking_changes_nothing(asked: Serving, request_of: Request) -> None:
    browser = asked.signed_in("officer")
    before = files_of(asked.home.path)
    for path in ("/requests", f"/requests/{request_of.id}", f"/requests/{request_of.id}/facts"):
        assert browser.get(path).status_code == 200
    assert files_of(asked.home.path) == before


# --- deciding ---


def test_four_eyes_are_two_accounts(asked: Serving, request_of: Request) -> None:
    olga, jan = asked.signed_in("officer"), asked.signed_in("Jan Maurer")
    assert decide(olga, request_of, "approve", reason="read it").status_code == 303
    page = olga.get(f"/requests/{request_of.id}").text
    assert "You approved it" in page
    assert f"/requests/{request_of.id}/approve" not in page
    again = decide(olga, request_of, "approve")
    assert (again.status_code, "the policy wants two different accounts" in again.text) == (409, True)
    assert state_of(asked, request_of) == "waiting"
    shown = text_of(jan.get(f"/requests/{request_of.id}").text)
    assert "1 of 2" in shown
    assert "approved by officer" in shown
    assert "read it" in shown
    assert decide(jan, request_of, "approve").status_code == 303
    assert state_of(asked, request_of) == "approved"
    assert said_of(asked, request_of)[1:] == [
        ("approval.given", "officer", "read it"),
        ("approval.given", "Jan Maurer", ""),
    ]


def test_a_refusal_needs_a_reason_and_can_be_taken_back(asked: Serving, request_of: Request) -> None:
    olga, jan = asked.signed_in("officer"), asked.signed_in("Jan Maurer")
    for reason in ("", "  \t "):
        answer = decide(olga, request_of, "refuse", reason=reason)
        assert (answer.status_code, "needs a reason" in answer.text) == (422, True)
    for reason in ("x" * 501, "a\x00b", "a\u202eb"):
        answer = decide(olga, request_of, "refuse", reason=reason)
        assert (answer.status_code, "at most 500 characters" in answer.text) == (422, True), reason
    assert state_of(asked, request_of) == "waiting"
    assert decide(olga, request_of, "refuse", reason="no consent").status_code == 303
    assert "no consent" in text_of(jan.get(f"/requests/{request_of.id}").text)
    assert decide(jan, request_of, "approve", reason="there is one").status_code == 303
    assert state_of(asked, request_of) == "waiting", "all approvals anew"
    assert decide(olga, request_of, "approve").status_code == 303
    assert decide(olga, request_of, "refuse", reason="it was withdrawn").status_code == 303
    assert state_of(asked, request_of) == "refused"
    assert [event for event, _, _ in said_of(asked, request_of)] == [
        "approval.asked",
        "approval.refused",
        "approval.given",
        "approval.given",
        "approval.withdrawn",
    ]


def test_a_decision_on_a_page_of_before_does_nothing(asked: Serving, request_of: Request) -> None:
    olga, jan = asked.signed_in("officer"), asked.signed_in("Jan Maurer")
    seen = seen_on(olga.get(f"/requests/{request_of.id}").text)
    assert decide(jan, request_of, "refuse", reason="not this one").status_code == 303
    before = said_of(asked, request_of)
    for what, mark in (("approve", seen), ("refuse", seen), ("approve", ""), ("approve", "0" * 64)):
        answer = decide(olga, request_of, what, seen=mark, reason="as I saw it")
        assert (answer.status_code, "Somebody decided meanwhile" in answer.text) == (409, True)
        assert "not this one" in answer.text, "this is how it stands now"
    assert said_of(asked, request_of) == before


def test_of_two_decisions_at_one_moment_one_counts(asked: Serving, request_of: Request) -> None:
    browsers = [asked.signed_in("officer"), asked.signed_in("Jan Maurer")]
    seen = seen_on(browsers[0].get(f"/requests/{request_of.id}").text)
    tokens, answers = [browser.token("/account") for browser in browsers], []

    def send(number: int) -> None:
        path = f"/requests/{request_of.id}/refuse"
        answer = browsers[number].post(path, csrf_token=tokens[number], seen=seen, reason="no")
        answers.append(answer.status_code)

    threads = [threading.Thread(target=send, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(answers) == [303, 409]
    assert len(said_of(asked, request_of)) == 2


def test_nobody_approves_for_another(asked: Serving, request_of: Request) -> None:
    olga = asked.signed_in("officer")
    answer = decide(olga, request_of, "approve", by="Jan Maurer", account="Jan Maurer", named="something else")
    assert answer.status_code == 303
    assert said_of(asked, request_of)[-1] == ("approval.given", "officer", "")


def test_only_officers_decide(asked: Serving, request_of: Request) -> None:
    seen = seen_on(asked.signed_in("officer").get(f"/requests/{request_of.id}").text)
    for role in Role:
        if role is Role.OFFICER:
            continue
        browser = asked.signed_in(role.value)
        for what in ("approve", "refuse"):
            path = f"/requests/{request_of.id}/{what}"
            assert browser.post(path, seen=seen, reason="because").status_code == 403
    engineer = asked.signed_in("engineer").get(f"/requests/{request_of.id}").text
    assert "/approve" not in engineer
    assert 'name="seen"' not in engineer
    assert len(said_of(asked, request_of)) == 1


def test_what_expired_is_not_decided(asked: Serving, request_of: Request) -> None:
    olga, text = asked.signed_in("officer"), asked.home.policy.read_text()
    seen = seen_on(olga.get(f"/requests/{request_of.id}").text)
    try:
        asked.home.policy.write_text(re.sub("(?m)^approval_days = .*$", "approval_days = 1e-9", text))
        answer = decide(olga, request_of, "approve", seen=seen)
        assert (answer.status_code, "its time is over" in answer.text) == (409, True)
    finally:
        asked.home.policy.write_text(text)
    page = olga.get(f"/requests/{request_of.id}").text
    assert "Its time is over" in page
    assert 'name="seen"' not in page


def test_nothing_of_it_is_told_to_the_coordinator(asked: Serving, request_of: Request) -> None:
    approvals, rules = approvals_of(asked.home)
    with pytest.raises(AwaitingApproval) as waits:
        approvals.admit(request_of.signed(), rules)
    assert str(waits.value) == "waiting for approval"
    decide(asked.signed_in("officer"), request_of, "refuse", reason="marker-reason")
    with pytest.raises(PolicyError) as refused:
        approvals.admit(request_of.signed(), rules)
    assert "officer" not in str(refused.value)
    assert "marker" not in str(refused.value)


def test_a_decision_is_logged_once(asked: Serving, request_of: Request) -> None:
    olga = asked.signed_in("officer")
    before = len(list(read(asked.home.audit)))
    decide(olga, request_of, "refuse", reason="once")
    (entry,) = list(read(asked.home.audit))[before:]
    assert (entry.event, entry.details["by"]) == (Event.APPROVAL_REFUSED, "officer")


# --- what strangers write, and ids ---


def test_marks_in_jobs_reasons_and_names_do_nothing(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = make_home(tmp_path_factory.mktemp("planted"))
    want_people(home)
    before = ask(home, "before", task={"kind": "sequence_classification", "labels": ["a", "b"]})
    approvals, rules = approvals_of(home)
    approvals.approve(before.id, rules, by=MARKS, reason=MARKS)
    planted = ask(
        home,
        "planted",
        model={"backbone": MARKS},
        task={"kind": "sequence_classification", "labels": [MARKS, "\u202egpj.exe"]},
    )
    store = approvals._store
    with store.alone():  # names are checked when a job is read; a page must not rely on it
        found = [
            one.model_copy(update={"name": MARKS, "signer": MARKS if one.id == before.id else one.signer})
            for one in store.read()
        ]
        store.write(found, Event.APPROVAL_ASKED)
    serving = serve(home)
    browser, shown = serving.signed_in("officer"), ""
    paths = ["/requests", *(f"/requests/{planted.id}{end}" for end in ("", "/facts")), "/releases/log", "/budget"]
    paths += [f"/requests/{one.id}" for one, _ in approvals.listed(rules)]
    for path in paths:
        page = browser.get(path)
        assert page.status_code == 200, (path, page.text)
        assert "<script>alert" not in page.text
        assert "<img" not in page.text
        assert "\u202e" not in page.text
        assert not re.search(r"<style|\sstyle=|<script(?![^>]*\ssrc=\"/static/)|javascript:", page.text)
        shown += page.text
    assert shown.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 10
    path = f"/requests/{planted.id}"
    answer = browser.post(f"{path}/refuse", page=path, seen="0" * 64, reason=MARKS)
    assert answer.status_code == 409
    assert "<script>alert" not in answer.text


def test_ids_of_nothing_all_look_alike(asked: Serving, request_of: Request) -> None:
    olga, viewer = asked.signed_in("officer"), asked.signed_in("viewer")
    seen = seen_on(olga.get(f"/requests/{request_of.id}").text)
    ids = ["0" * 64, request_of.id[:12], request_of.id[:63], request_of.id.upper(), request_of.job, request_of.name]
    for end in ("", "/facts"):
        told = {
            re.sub(r"[0-9a-f]{64}|value=\"/[^\"]*\"", "", olga.get(f"/requests/{one}{end}").text)
            for one in ids
            if one != request_of.id
        }
        assert len(told) == 1
        assert {olga.get(f"/requests/{one}{end}").status_code for one in ids} == {404}
    for what in ("approve", "refuse"):
        told = {olga.post(f"/requests/{one}/{what}", seen=seen, reason="no").status_code for one in ids}
        assert told == {404}
    for one in (request_of.id, "0" * 64):
        assert viewer.get(f"/requests/{one}").status_code == 403
    assert len(said_of(asked, request_of)) == 1


def test_a_job_that_is_called_as_another_request_hides_neither(asked: Serving, request_of: Request) -> None:
    ask(asked.home, request_of.id)
    olga = asked.signed_in("officer")
    assert olga.get(f"/requests/{request_of.id}/facts").status_code == 200
    assert decide(olga, request_of, "refuse", reason="this one").status_code == 303
    assert state_of(asked, request_of) == "refused"
    other = [
        one
        for one, state in approvals_of(asked.home)[0].listed(approvals_of(asked.home)[1])
        if one.name == request_of.id
    ]
    assert [state_of(asked, one) for one in other] == ["waiting"]


# --- where it cannot be trusted ---


def test_a_broken_list_is_told_and_breaks_no_other_page(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = make_home(tmp_path_factory.mktemp("broken"))
    want_people(home)
    request = ask(home)
    home.approvals.write_bytes(home.approvals.read_bytes()[:-1])
    serving = serve(home)
    olga = serving.signed_in("officer")
    for path in ("/requests", f"/requests/{request.id}"):
        answer = olga.get(path)
        assert (answer.status_code, "Nothing counts as approved" in answer.text) == (503, True)
    for path in ("/budget", "/policy", "/releases"):
        assert olga.get(path).status_code == 200


def test_a_policy_that_is_none_is_told(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = make_home(tmp_path_factory.mktemp("policies"))
    say(home)
    text = home.policy.read_text()
    serving = serve(home)
    browser = serving.signed_in("officer")
    assert "The policy is valid" in browser.get("/policy").text
    for wrong, says in (
        (text.replace("max_steps = 200", 'max_steps = "<script>"'), "max_steps"),
        (text.replace("min_sites = 2", "min_site = 2"), "min_sites"),
        (text + "\n[[", "The file is no valid TOML"),
    ):
        home.policy.write_text(wrong)
        answer = browser.get("/policy")
        assert answer.status_code == 200
        words = text_of(answer.text)
        assert "no job is accepted" in words
        assert says in words.partition("What this site accepts")[0]
        assert "The policy is valid" not in words
        assert "<script>" not in re.sub(r"<script [^>]*src=[^>]*>", "", answer.text)
        assert browser.get("/requests").status_code == 200
        assert browser.get("/budget").status_code == 200
    assert json.loads(home.status.read_text())["state"] == "connected"


def test_a_site_that_asks_nobody_says_so(serving: Serving) -> None:
    words = text_of(serving.signed_in("officer").get("/requests").text)
    assert "its rules alone decide" in words
    assert PASSWORD not in words
