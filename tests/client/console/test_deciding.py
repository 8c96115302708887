"""The page of a request: when it offers to approve, what it needs for that, and in whose words it tells."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import quote

import pytest

from client.approval.request import Request
from client.approval.words import told
from client.ledger.ledger import Ledger
from client.policy.verdicts import WORDS
from client.site.approving import ApprovalDesk
from shared.epsilons import rounded_up
from shared.web.accounts.sessions import PROVEN_SECONDS
from tests.client.console.conftest import PASSWORD, Serving, text_of
from tests.client.console.homes import ask, charge, make_home, say, want_people
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
    """A form that somebody made up, or of a page from before, names no facts of this job with the budget as it is."""
    browser, path = asked.signed_in("officer"), f"/requests/{request_of.id}"
    seen = seen_on(browser.get(path).text)  # before what it costs is known
    other = ask(asked.home, "another-one")
    strange = read_on(browser.get(f"/requests/{other.id}/facts").text)
    earlier = read_on(browser.get(f"{path}/facts").text)
    charge(asked.home, jobs=["meanwhile"], rounds=1)
    for read in ("", "0" * 64, "é", strange, earlier):
        answer = browser.post(f"{path}/approve", page=path, seen=seen, read=read, reason="as agreed")
        assert (answer.status_code, "Nothing was approved: read it here first" in answer.text) == (409, True), read
    assert state_of(asked, request_of) == "waiting"
    assert said_of(asked, request_of) == [("approval.asked", None, None)]
    now = read_on(browser.get(f"{path}/facts").text)
    assert now != earlier
    assert browser.post(f"{path}/approve", page=path, seen=seen, read=now).status_code == 303


def test_approving_needs_a_proof_and_refusing_none(asked: Serving, request_of: Request) -> None:
    browser, path = asked.signed_in("officer"), f"/requests/{request_of.id}"
    page = browser.get(f"{path}/facts").text
    marks = {"seen": seen_on(page), "read": read_on(page)}
    asked.clock.seconds += PROVEN_SECONDS
    page = browser.get(path).text
    assert f'href="/account/prove?next={quote(path, safe="")}"' in page
    answer = browser.post(f"{path}/approve", page=path, **marks)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/account/prove?next={quote(path, safe='')}")
    assert state_of(asked, request_of) == "waiting"
    assert said_of(asked, request_of) == [("approval.asked", None, None)]
    given = {"password": PASSWORD, "totp": asked.code("officer"), "next": path}
    assert browser.post("/account/prove", page="/account/prove", **given).headers["location"] == path
    assert browser.post(f"{path}/approve", page=path, **marks).status_code == 303
    asked.clock.seconds += PROVEN_SECONDS
    assert decide(browser, request_of, "refuse", reason="no").status_code == 303


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
    whole = ApprovalDesk(asked.home, passphrase=None).facts(request_of.id, by_id=True)
    monkeypatch.setattr(Ledger, "__init__", lambda *_, **__: pytest.fail("the whole ledger was opened"))
    requests = asked.console.content.requests
    requests._facts.clear()
    found = requests.facts(next(one for one in requests.all() if one.request.id == request_of.id)).facts
    assert (found.budget, found.rules) == (whole.budget, whole.rules)
