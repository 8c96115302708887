"""The page of a request: when it offers to approve, what it needs for that, and in whose words it tells."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable
from dataclasses import replace
from urllib.parse import quote

import pytest

from client.approval.facts import planned_charges
from client.approval.request import Request
from client.approval.words import told
from client.ledger.ledger import Ledger
from client.policy.verdicts import WORDS
from shared.epsilons import rounded_up
from shared.trust.audit_log import read
from shared.web.accounts.sessions import IDLE_SECONDS, PROVEN_SECONDS
from tests.client.console.conftest import PASSWORD, Serving, text_of
from tests.client.console.homes import ask, charge, facts_by_ledger, make_home, say, want_people
from tests.client.console.test_requests import MARKS, decide, read_on, said_of, seen_on, state_of


@pytest.fixture(scope="module")
def asked(serve: Callable[..., Serving], tmp_path_factory: pytest.TempPathFactory) -> Serving:
    """The console of a site with a past, which wants people to approve."""
    home = make_home(tmp_path_factory.mktemp("deciding"))
    charge(home, jobs=["one"], rounds=2)
    say(home)
    want_people(home)
    return serve(home)


@pytest.fixture
def request_of(asked: Serving, request: pytest.FixtureRequest) -> Request:
    """A new request, named as the test."""
    return ask(asked.home, re.sub("[^a-z_]", "", request.node.name)[:60])


def test_a_broken_policy_hides_no_list(asked: Serving, request_of: Request) -> None:
    before = asked.home.policy.read_text()
    browser = asked.signed_in("officer")
    try:
        asked.home.policy.write_text("max_steps = [")
        page = browser.get("/requests")
        assert (page.status_code, request_of.name in page.text) == (200, True)
        words = text_of(page.text)
        assert "policy.toml cannot be read, so no job is let in" in words
        assert str(asked.home.path) not in words
        assert browser.get("/budget").status_code == 200
        assert browser.get(f"/budget/{asked.console.content.budgets.current().id}/what-if").status_code == 200
        assert browser.get(f"/requests/{request_of.id}").status_code == 200
        answer = decide(browser, request_of, "refuse", reason="no")
        assert answer.status_code == 503
    finally:
        asked.home.policy.write_text(before)
    assert state_of(asked, request_of) == "waiting"


def test_nobody_is_asked_to_approve_what_is_not_shown(asked: Serving, request_of: Request) -> None:
    browser, path = asked.signed_in("officer"), f"/requests/{request_of.id}"
    form = f'action="{path}/approve"'
    frame = browser.get(path).text
    assert form not in frame
    assert "You can approve it once" in frame
    assert f'action="{path}/refuse"' in frame
    engineer = asked.signed_in("engineer").get(f"{path}/facts", headers={"hx-request": "true"}).text
    assert "hx-swap-oob" not in engineer
    asked.console.content.requests._facts.clear()
    part = browser.get(f"{path}/facts", headers={"hx-request": "true"}).text
    assert part.index("What is promised") < part.index('<div id="approve" hx-swap-oob="true">') < part.index(form)
    whole = browser.get(f"{path}/facts").text  # without a script
    assert whole.index("What is promised") < whole.index(form)
    assert form in browser.get(path).text


def test_nobody_approves_what_was_not_computed(asked: Serving, request_of: Request) -> None:
    """A form that somebody made up, or of another job's page, or of another person's, names no facts that this account read."""
    browser, path = asked.signed_in("officer"), f"/requests/{request_of.id}"
    seen = seen_on(browser.get(path).text)  # before what it costs is known
    other = ask(asked.home, "another-one")
    strange = read_on(browser.get(f"/requests/{other.id}/facts").text)
    requests = asked.console.content.requests
    facts = requests.facts(requests.find(request_of.id))
    anothers = requests.shown_to(facts, "Jan Maurer")
    content, _, seal = requests.shown_to(facts, "officer").partition(".")
    forged = f"{base64.urlsafe_b64encode(base64.urlsafe_b64decode(content).replace(b'8.0', b'9.0')).decode()}.{seal}"
    assert not forged.startswith(content)
    for mark in ("", "0" * 64, "é", "a.b", strange, anothers, forged):
        answer = browser.post(f"{path}/approve", page=path, seen=seen, read=mark, reason="as agreed")
        assert (answer.status_code, "Nothing was approved: read it here first" in answer.text) == (409, True), mark
    assert state_of(asked, request_of) == "waiting"
    assert said_of(asked, request_of) == [("approval.asked", None, None)]
    assert (
        browser.post(f"{path}/approve", page=path, seen=seen, read=read_on(browser.get(path).text)).status_code == 303
    )


def test_another_job_that_charges_keeps_nobody_from_approving(asked: Serving, request_of: Request) -> None:
    """Rounds may be shorter than people read; what moved stands in the log beside what was shown."""
    browser, path = asked.signed_in("officer"), f"/requests/{request_of.id}"
    page = browser.get(f"{path}/facts").text
    shown = asked.console.content.requests.known_facts(asked.console.content.requests.find(request_of.id)).facts
    charge(asked.home, jobs=["meanwhile"], rounds=1)
    marks = {"seen": seen_on(page), "read": read_on(page)}
    assert browser.post(f"{path}/approve", page=path, **marks, reason="as agreed").status_code == 303
    assert state_of(asked, request_of) == "approved"
    given = [one for one in read(asked.home.audit) if one.event == "approval.given"][-1].details
    now = facts_by_ledger(asked.home, request_of)
    assert now.budget[0].spent > shown.budget[0].spent
    for before, after in zip(shown.budget, now.budget, strict=True):
        assert given["budget"][after.promise] == {
            "shown": {"spent": before.spent, "after": before.after},
            "now": {"spent": after.spent, "after": after.after},
        }


def test_a_verdict_that_turned_is_told_with_the_figures(asked: Serving, request_of: Request) -> None:
    browser, path, text = asked.signed_in("officer"), f"/requests/{request_of.id}", asked.home.policy.read_text()
    page = browser.get(f"{path}/facts").text
    marks = {"seen": seen_on(page), "read": read_on(page)}
    try:
        asked.home.policy.write_text(text.replace("max_steps = 200", "max_steps = 4"))
        answer = browser.post(f"{path}/approve", page=path, **marks, reason="as agreed")
        assert (answer.status_code, "The policy was changed." in answer.text) == (409, True)
        assert "at most 4" in text_of(answer.text), "and this is what it says now"
    finally:
        asked.home.policy.write_text(text)
    requests = asked.console.content.requests
    account = asked.console.content.budgets.current()
    tight = replace(account, caps=dict.fromkeys(account.caps, account.spent["together"] + 1e-6))
    with pytest.MonkeyPatch.context() as patched:  # as if a round had left less than this job costs
        lines = tight.lines(request_of.job, planned_charges(request_of.signed().job, requests.desk.policy()))
        lines = tuple(
            replace(line, cap=account.caps[line.promise], after=account.caps[line.promise] + 1) for line in lines
        )
        patched.setattr(requests._budgets, "lines", lambda *_: lines)
        requests._facts.clear()
        answer = browser.post(f"{path}/approve", page=path, **marks, reason="as agreed")
        requests._facts.clear()
    assert answer.status_code == 409
    assert "Once this job has run, the spend would be 9.0000, and not " in text_of(answer.text)
    assert 'name="reason" form="form-approve" maxlength="500" autocomplete="off" value="as agreed"' in answer.text
    assert state_of(asked, request_of) == "waiting"
    assert browser.post(f"{path}/approve", page=path, **marks).status_code == 303


def test_a_reason_stays_in_its_own_form(asked: Serving, request_of: Request) -> None:
    """A word too many must not lead to refusing, in the signed log, for the reason why somebody approves."""
    browser, path = asked.signed_in("officer"), f"/requests/{request_of.id}"
    seen = seen_on(browser.get(f"{path}/facts").text)
    for what, other in (("approve", "refuse"), ("refuse", "approve")):
        long = f"agreed by the board {'x' * 500}"
        for status, typed in ((409, {"seen": "0" * 64, "reason": "agreed"}), (422, {"seen": seen, "reason": long})):
            read = read_on(browser.get(f"{path}/facts").text)
            page = browser.post(f"{path}/{what}", page=path, read=read, **typed)
            assert page.status_code == status
            values = dict(re.findall(r'id="reason-(approve|refuse)"[^>]* value="([^"]*)"', page.text))
            assert values == {what: typed["reason"], other: ""}
    facts = browser.get(f"{path}/facts", headers={"hx-request": "true"}).text
    assert 'name="reason"' not in facts, "what comes later replaces nothing that was typed"
    assert state_of(asked, request_of) == "waiting"


def test_approving_needs_a_proof_and_refusing_none(asked: Serving, request_of: Request) -> None:
    browser, path = asked.signed_in("officer"), f"/requests/{request_of.id}"
    page = browser.get(f"{path}/facts").text
    marks = {"seen": seen_on(page), "read": read_on(page)}
    asked.clock.seconds += PROVEN_SECONDS
    page = browser.get(path).text
    assert f'href="/account/prove?next={quote(path, safe="")}"' in page
    answer = browser.post(f"{path}/approve", page=path, **marks, reason="as agreed")
    back = f"{path}?reason=as+agreed&not-done=yes#decide"
    assert (answer.status_code, answer.headers["location"]) == (303, f"/account/prove?next={quote(back, safe='')}")
    assert state_of(asked, request_of) == "waiting"
    assert said_of(asked, request_of) == [("approval.asked", None, None)]
    given = {"password": PASSWORD, "totp": asked.code("officer"), "next": back}
    assert browser.post("/account/prove", page="/account/prove", **given).headers["location"] == back
    page = browser.get(back).text
    assert 'maxlength="500" autocomplete="off" value="as agreed"' in page
    decide_part = page[page.index('id="do-approve"') : page.index("</form>", page.index('id="do-approve"'))]
    assert "Nothing was done so far" in decide_part, "it stands beside the button"
    assert browser.post(f"{path}/approve", page=path, **marks).status_code == 303
    asked.clock.seconds += PROVEN_SECONDS
    assert decide(browser, request_of, "refuse", reason="no").status_code == 303


def test_another_theme_or_language_loses_no_reason(asked: Serving, request_of: Request) -> None:
    browser, path = asked.signed_in("officer"), f"/requests/{request_of.id}"
    page = browser.post(f"{path}/approve", page=path, seen="0" * 64, reason="as agreed").text
    back = html.unescape(re.findall(r'name="next" value="([^"]*)"', page)[-1])
    assert back == f"{path}?reason=as+agreed"
    answer = browser.post("/preferences", theme="dark", next=back)
    assert answer.headers["location"] == back
    assert 'value="as agreed"' in browser.get(back).text
    asked.clock.seconds += PROVEN_SECONDS
    page = browser.post(f"{path}/refuse", page=path, seen="0" * 64, reason="no").text
    assert f'href="/account/prove?next={quote(path, safe="")}"' in page, "an address that can be asked for"


def test_what_was_written_in_a_session_that_is_over_is_given_back(asked: Serving, request_of: Request) -> None:
    browser, path = asked.signed_in("officer"), f"/requests/{request_of.id}"
    token = browser.token(path)
    asked.clock.seconds += IDLE_SECONDS
    typed = {"reason": f"agreed {MARKS}", "csrf_token": token}
    answer = browser.post(f"{path}/approve", **typed, seen="0" * 64, read="x")
    assert (answer.status_code, "Your session is over" in answer.text) == (403, True)
    assert html.unescape(re.search(r"(?s)<textarea[^>]*>\n(.*?)</textarea>", answer.text)[1]) == typed["reason"]
    assert "<script>alert" not in answer.text
    other = asked.browser()
    other.get("/sign-in")
    answer = other.post(f"{path}/approve", **typed)
    assert (answer.status_code, "The page is out of date" in answer.text, "agreed" in answer.text) == (403, True, False)
    answer = browser.post("/account/password", csrf_token=token, old=PASSWORD, password="something else")  # noqa: S106
    assert (answer.status_code, PASSWORD in answer.text, "something else" in answer.text) == (403, False, False)
    assert said_of(asked, request_of) == [("approval.asked", None, None)]


def test_labels_are_named_as_far_as_there_is_room(asked: Serving) -> None:
    labels = [f"label {number} {MARKS}"[:40] for number in range(30)]
    request = ask(asked.home, "many-labels", task={"kind": "sequence_classification", "labels": labels})
    page = asked.signed_in("officer").get(f"/requests/{request.id}/facts").text
    assert "30 labels: label 0 " in text_of(page)
    assert "and 10 more" in page
    assert "<script>alert" not in page


def test_rules_are_told_in_the_readers_language(asked: Serving, request_of: Request) -> None:
    browser = asked.signed_in("officer")
    words = text_of(browser.get(f"/requests/{request_of.id}/facts").text)
    assert "at most 200" in words
    browser.post("/preferences", page="/requests", language="zh")
    words = text_of(browser.get(f"/requests/{request_of.id}/facts").text)
    for text in ("最多 200", "至少 2", "按哈希列出的那些", "签名有效期为", "由 consortium"):
        assert text in words
    for text in ("at most", "at least", "signed by", "those listed"):
        assert text not in words
    for language in ("en", "zh"):
        texts = asked.app.state.texts[language].messages
        assert {key for key in texts if key.startswith("verdicts.")} == {f"verdicts.{key}" for key in WORDS}
    english = asked.app.state.texts["en"]
    assert {key: english.messages[f"verdicts.{key}"] for key in WORDS} == WORDS


def test_a_number_is_written_the_same_wherever_it_stands(asked: Serving, request_of: Request) -> None:
    facts = asked.console.content.requests.facts(asked.console.content.requests.find(request_of.id)).facts
    words = text_of(asked.signed_in("officer").get(f"/requests/{request_of.id}/facts").text)
    assert f"epsilon {rounded_up(facts.promised.epsilon, 4)} at delta" in words
    assert f"epsilon {rounded_up(facts.promised.epsilon, 4)} at delta" in "\n".join(told(facts))


def test_facts_open_no_ledger(asked: Serving, request_of: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger of years opened as the node has it takes half a gigabyte, and most of a minute."""
    whole = facts_by_ledger(asked.home, request_of)
    monkeypatch.setattr(Ledger, "__init__", lambda *_, **__: pytest.fail("the whole ledger was opened"))
    requests = asked.console.content.requests
    requests._facts.clear()
    found = requests.facts(next(one for one in requests.all() if one.request.id == request_of.id)).facts
    assert (found.budget, found.rules) == (whole.budget, whole.rules)
