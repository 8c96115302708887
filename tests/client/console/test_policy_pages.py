"""The policy in the console: who may change it, what is shown of it, and what a page of before is worth."""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from client.check import check_site
from client.console.content import SiteContent
from client.policy.diff import line_diff, setting_changes
from client.policy.policy import Policy, load_policy, policy_of
from client.site.home import SiteHome
from shared.trust.audit_log import Event, read
from shared.web.roles import Role
from tests.client.console.conftest import Browser, Serving, take, text_of
from tests.client.console.homes import make_home, want_people
from tests.conftest import Outcome

Serve = Callable[..., Serving]
MARKS = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def served(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Serving:
    serving = serve(make_home(tmp_path_factory.mktemp("policy")))
    administrator = next(one for one in serving.console.accounts.all() if one.role is Role.ADMINISTRATOR)
    take(serving, serving.console.accounts.invite("Jan", Role.OFFICER, by=administrator), "Jan")
    return serving


@pytest.fixture
def asked(served: Serving) -> Iterator[Serving]:
    """A console whose policy is as it was afterwards, with nothing that waits."""
    before = served.home.policy.read_bytes()
    yield served
    changes = content(served).policies
    for one in changes.proposals():
        if one.state in ("open", "stale"):
            changes.decline(one.number, by="the test")
    served.home.policy.write_bytes(before)


def content(serving: Serving) -> SiteContent:
    found: SiteContent = serving.console.content
    return found


def base_of(home: SiteHome) -> str:
    return hashlib.sha256(home.policy.read_bytes()).hexdigest()


def changed(home: SiteHome, what: str = "max_steps = 200", to: str = "max_steps = 100") -> str:
    return home.policy.read_text().replace(what, to)


def propose(browser: Browser, text: str, **more: str) -> httpx.Response:
    given = {"base": base_of(browser.serving.home), "do": "propose", "text": text} | more
    return browser.post("/policy/edit", **given)


def proposed(browser: Browser, text: str, **more: str) -> str:
    """Return the path of a new proposal."""
    answer = propose(browser, text, **more)
    assert answer.status_code == 303, text_of(answer.text)
    return answer.headers["location"]


def want(home: SiteHome, number: int) -> None:
    text = home.policy.read_text()
    home.policy.write_text(re.sub("policy_approvals_needed = .", f"policy_approvals_needed = {number}", text))


def test_an_engineer_proposes_and_an_officer_accepts(asked: Serving) -> None:
    home, eve = asked.home, asked.signed_in("engineer")
    page = eve.get("/policy/edit").text
    assert f'name="base" value="{base_of(home)}"' in page
    typed = html.unescape(re.search(r"(?s)<textarea[^>]*>\n(.*?)</textarea>", page)[1])  # type: ignore[index]
    assert typed == home.policy.read_text()
    compared = eve.post("/policy/edit", base=base_of(home), text=changed(home), do="compare")
    assert compared.status_code == 200
    words = text_of(compared.text)
    assert "removed: max_steps = 200" in words
    assert "added: max_steps = 100" in words
    assert "max_steps 200 100 less" in words
    before = home.policy.read_text()
    path = proposed(eve, changed(home).replace("\n", "\r\n"), reason="shorter jobs")
    assert home.policy.read_text() == before
    shown = eve.get(path).text
    assert "/accept" not in shown
    assert "Take it back" in shown
    olga = asked.signed_in("officer")
    words = text_of(olga.get(path).text)
    assert "proposed by engineer" in words
    assert "shorter jobs" in words
    assert olga.post(f"{path}/accept", reason="fine").status_code == 303
    assert load_policy(home.policy).max_steps == 100
    told = [entry for entry in read(home.audit) if entry.event.startswith("policy.")][-3:]
    assert [(one.event, one.details.get("by")) for one in told] == [
        (Event.POLICY_PROPOSED, "engineer"),
        (Event.POLICY_ACCEPTED, "officer"),
        (Event.POLICY_CHANGED, None),
    ]
    words = text_of(olga.get("/policy").text)
    assert "by engineer, accepted by officer" in words
    latest = content(asked).policies.versions()[0].number
    words = text_of(olga.get(f"/policy/versions/{latest}").text)
    assert "removed: max_steps = 200" in words
    old = eve.get(f"/policy/edit?version={latest - 1}").text
    assert "max_steps = 200" in old
    assert eve.get(f"/policy/versions/{latest - 1}?against={latest}").status_code == 200


def test_compare_says_what_it_found_where_one_looks(asked: Serving) -> None:
    eve, home = asked.signed_in("engineer"), asked.home
    assert 'action="/policy/edit#compared"' in eve.get("/policy/edit").text
    page = eve.post("/policy/edit", base=base_of(home), text=changed(home), do="compare").text
    part = page[page.index('<h2 id="compared" tabindex="-1">') :]
    assert "This is a valid policy. Nothing was proposed so far." in part
    broken = f"{home.policy.read_text()}\nmin_sites = = {MARKS}\n"
    for do, said in (("compare", "This is no valid policy:"), ("propose", "no valid policy, so nothing was proposed:")):
        page = eve.post("/policy/edit", base=base_of(home), text=broken, do=do).text
        part = page[page.index('<h2 id="compared" tabindex="-1">') :]
        assert said in part
        number = broken.splitlines().index(f"min_sites = = {MARKS}") + 1
        assert f"<code>{number}  min_sites = = &lt;script&gt;" in part
    assert "Something is wrong with it: see below." in text_of(page)


def test_an_engineer_is_told_at_once_what_only_officers_propose(asked: Serving) -> None:
    want_people(asked.home, 2)
    text = asked.home.policy.read_text()
    lower = re.sub("(?m)^approvals_needed = 2", "approvals_needed = 1", text)
    for name, told in (("engineer", True), ("officer", False)):
        page = asked.signed_in(name).post("/policy/edit", base=base_of(asked.home), text=lower, do="compare").text
        assert ("Only an officer can propose this" in page) is told


def test_what_is_proposed_is_counted_in_the_navigation(asked: Serving) -> None:
    olga = asked.signed_in("officer")
    assert 'class="count"' not in olga.get("/health").text
    path = proposed(asked.signed_in("engineer"), changed(asked.home))
    assert '>Policy <span class="count">1<' in olga.get("/health").text
    assert olga.post(f"{path}/decline").status_code == 303
    assert 'class="count"' not in olga.get("/health").text


def test_another_theme_or_language_keeps_what_was_written(asked: Serving) -> None:
    eve, text = asked.signed_in("engineer"), changed(asked.home)
    page = eve.get("/policy/edit").text
    assert '<button form="edit" formaction="/policy/edit" formnovalidate name="theme" value="dark"' in page
    for prefers, shown in (({"theme": "dark"}, 'data-theme="dark"'), ({"language": "zh"}, '<html lang="zh"')):
        page = eve.post("/policy/edit", base=base_of(asked.home), text=text, reason="why", **prefers).text
        assert shown in page
        assert shown in eve.get("/policy").text
        assert html.unescape(re.search(r"(?s)<textarea[^>]*>\n(.*?)</textarea>", page)[1]) == text
        assert 'value="why"' in page
    eve.post("/preferences", language="en", theme="auto")
    assert content(asked).policies.proposals() == [] or content(asked).policies.proposals()[0].state != "open"


def test_who_may_do_what(asked: Serving) -> None:
    path = proposed(asked.signed_in("engineer"), changed(asked.home))
    seen: dict[str, list[int]] = {}
    for role in Role:
        browser = asked.signed_in(role.value)
        seen[role.value] = [
            browser.get("/policy").status_code,
            browser.get(path).status_code,
            browser.get("/policy/versions/1").status_code,
            browser.get("/policy/edit").status_code,
            browser.post("/policy/edit", text="", do="compare").status_code,
            *([] if role is Role.OFFICER else [browser.post(f"{path}/accept").status_code]),
            *([] if role in (Role.OFFICER, Role.ENGINEER) else [browser.post(f"{path}/decline").status_code]),
        ]
    assert seen == {
        "viewer": [403] * 7,
        "researcher": [403] * 7,
        "engineer": [200, 200, 200, 200, 422, 403],
        "officer": [200, 200, 200, 200, 422],
        "administrator": [200, 200, 200, 403, 403, 403, 403],
    }
    assert content(asked).policies.proposals()[0].state == "open"
    olgas = proposed(asked.signed_in("officer"), changed(asked.home, to="max_steps = 90"))
    eve = asked.signed_in("engineer")
    assert eve.post(f"{olgas}/decline").status_code == 403, "an engineer takes back only one's own"
    assert eve.post(f"{path}/decline").status_code == 303


def test_four_eyes_are_two_accounts(asked: Serving) -> None:
    want(asked.home, 2)
    olga = asked.signed_in("officer")
    # A proposal that asks for one pair of eyes is judged by the policy that asks for two.
    path = proposed(olga, changed(asked.home, "policy_approvals_needed = 2", "policy_approvals_needed = 1"))
    page = olga.get(path).text
    assert "/accept" not in page
    assert "policy_approvals_needed 2 1 more" in text_of(page)
    answer = olga.post(f"{path}/accept")
    assert (answer.status_code, "wants somebody else" in answer.text) == (409, True)
    assert load_policy(asked.home.policy).policy_approvals_needed == 2
    jan = asked.signed_in("Jan")
    assert jan.post(f"{path}/accept").status_code == 303
    assert load_policy(asked.home.policy).policy_approvals_needed == 1
    path = proposed(olga, changed(asked.home))
    assert olga.post(f"{path}/accept").status_code == 303, "one officer is enough now"


def test_nobody_lowers_four_eyes_alone(asked: Serving) -> None:
    home, olga = asked.home, asked.signed_in("officer")
    want(home, 1)
    text = re.sub('approval = ".*"', 'approval = "required"', home.policy.read_text())
    home.policy.write_text(re.sub(r"(?m)^approvals_needed = .", "approvals_needed = 2", text))
    assert "Only a change by which people decide" in text_of(olga.get("/policy").text)
    path = proposed(olga, re.sub(r"(?m)^approvals_needed = 2", "approvals_needed = 1", home.policy.read_text()))
    assert "/accept" not in olga.get(path).text
    answer = olga.post(f"{path}/accept")
    assert (answer.status_code, "wants somebody else" in answer.text) == (409, True)
    assert load_policy(home.policy).approvals_needed == 2
    assert asked.signed_in("Jan").post(f"{path}/accept").status_code == 303
    assert "Only a change by which people decide" not in text_of(olga.get("/policy").text)


def test_an_engineer_and_an_officer_do_not_lower_four_eyes(asked: Serving) -> None:
    """Approvals of jobs are officers' alone (`shared.web.roles`), so an engineer stands for none of the two that a job takes."""
    home, olga, jan = asked.home, asked.signed_in("officer"), asked.signed_in("Jan")
    want(home, 2)
    text = re.sub('approval = ".*"', 'approval = "required"', home.policy.read_text())
    home.policy.write_text(re.sub(r"(?m)^approvals_needed = .", "approvals_needed = 2", text))
    lower = re.sub(r"(?m)^approvals_needed = 2", "approvals_needed = 1", home.policy.read_text())
    path = proposed(asked.signed_in("engineer"), lower)
    page = olga.get(path).text
    assert "so it takes two officers here" in text_of(page)
    assert f"{path}/accept" not in page
    answer = olga.post(f"{path}/accept")
    assert (answer.status_code, "so it takes two officers here" in answer.text) == (409, True)
    assert load_policy(home.policy).approvals_needed == 2
    number = path.rpartition("/")[2]
    assert f'href="/policy/edit?proposal={number}"' in page
    form = olga.get(f"/policy/edit?proposal={number}").text
    assert "approvals_needed = 1" in html.unescape(form)
    assert olga.get("/policy/edit?proposal=99999").status_code == 404
    own = proposed(olga, lower)
    assert f"{own}/accept" not in olga.get(own).text
    assert jan.post(f"{own}/accept").status_code == 303
    assert load_policy(home.policy).approvals_needed == 1


def test_the_command_line_warns_of_uneven_eyes(asked: Serving, silotune: Callable[..., Outcome]) -> None:
    home = asked.home

    def warned() -> list[bool]:
        policy = next(one for one in check_site(home, passphrase=None, connect=False) if one.name == "policy")
        told = silotune("site", "policy", home.path)
        says = "set policy_approvals_needed = 2"
        assert told.status == 0
        return [says in policy.text and policy.outcome == "warning", says in told.err]

    text = re.sub('approval = ".*"', 'approval = "required"', home.policy.read_text())
    for jobs, changes, expected in ((2, 1, True), (2, 2, False), (1, 1, False), (1, 2, False)):
        one = re.sub(r"(?m)^approvals_needed = .", f"approvals_needed = {jobs}", text)
        home.policy.write_text(re.sub("policy_approvals_needed = .", f"policy_approvals_needed = {changes}", one))
        assert warned() == [expected] * 2, (jobs, changes)


def test_a_page_of_before_proposes_nothing(asked: Serving) -> None:
    eve, before = asked.signed_in("engineer"), base_of(asked.home)
    path = proposed(eve, changed(asked.home))
    asked.home.policy.write_text(changed(asked.home, "min_sites = 2", "min_sites = 3"))
    answer = propose(eve, changed(asked.home, "min_sites = 3", "min_sites = 9"), base=before)
    assert (answer.status_code, "Nothing was proposed" in answer.text) == (409, True)
    assert "min_sites = 9" in answer.text, "what was typed is not lost"
    assert f'name="base" value="{base_of(asked.home)}"' in answer.text
    olga = asked.signed_in("officer")
    answer = olga.post(f"{path}/accept")
    assert (answer.status_code, "Nothing was changed by you" in answer.text) == (409, True)
    assert "overtaken" in answer.text
    assert load_policy(asked.home.policy).min_sites == 3
    assert "written by hand" in text_of(olga.get("/policy").text)


def test_what_the_node_would_not_read_is_told_at_the_page(asked: Serving) -> None:
    eve, text = asked.signed_in("engineer"), asked.home.policy.read_text()
    for wrong, says in (
        (text.replace("max_steps = 200", 'max_steps = "many"'), "max_steps"),
        (text.replace("min_sites = 2", "min_site = 2"), "did you mean 'min_sites'"),
        (text + "\n[[", "cannot be read as TOML"),
        ("", "signers"),
    ):
        with pytest.raises(Exception, match="policy"):
            policy_of(wrong)
        for do in ("compare", "propose"):
            answer = propose(eve, wrong, do=do)
            assert answer.status_code == 422
            assert says in html.unescape(text_of(answer.text))
            assert str(asked.home.path) not in answer.text
    assert propose(eve, text).status_code == 409
    assert propose(eve, "a" * 40_000).status_code == 409
    assert propose(eve, "ü" * 60_000).status_code == 413
    assert content(asked).policies.proposals() == [
        one for one in content(asked).policies.proposals() if one.state != "open"
    ]


def test_marks_in_a_policy_do_nothing(asked: Serving) -> None:
    eve, olga = asked.signed_in("engineer"), asked.signed_in("officer")
    text = f"# {MARKS} </textarea>\u202e\n" + changed(asked.home)
    text = text.replace("[signers]\n", f'[peers]\n"{MARKS}" = "{"ab" * 32}"\n[signers]\n').replace("[peers]\n#", "#")
    answer = propose(eve, text, reason=MARKS)
    if answer.status_code == 422:  # names are checked; then in a comment alone
        answer = propose(eve, f"# {MARKS} </textarea>\u202e\n" + changed(asked.home), reason=MARKS)
    path = answer.headers["location"]
    assert olga.post(f"{path}/accept", reason=MARKS).status_code == 303
    number = content(asked).policies.versions()[0].number
    shown = ""
    for place in ("/policy", path, "/policy/edit", f"/policy/edit?version={number}", f"/policy/versions/{number}"):
        page = olga.get(place).text
        assert "<script>alert" not in page
        assert "<img" not in page
        assert page.count("</textarea>") <= 1
        assert not re.search(r"<style|\sstyle=|javascript:", page)
        shown += page
    assert shown.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5


def test_nobody_speaks_for_another(asked: Serving) -> None:
    path = proposed(asked.signed_in("engineer"), changed(asked.home), by="officer", account="officer", number="7")
    assert content(asked).policies.proposals()[0].by == "engineer"
    assert asked.signed_in("officer").post(f"{path}/decline", by="engineer").status_code == 303
    said = content(asked).policies.proposals()[0].said
    assert said is not None
    assert said.by == "officer"


def test_numbers_of_nothing(asked: Serving) -> None:
    olga = asked.signed_in("officer")
    for path in ("/policy/proposals/999", "/policy/versions/999", "/policy/edit?version=999"):
        assert olga.get(path).status_code == 404
    assert olga.get("/policy/versions/1?against=999").status_code == 404
    for path in ("/policy/proposals/x", "/policy/versions/-1", "/policy/versions/1?against=x"):
        assert olga.get(path).status_code == 422
    for deed in ("accept", "decline"):
        assert olga.post(f"/policy/proposals/999/{deed}").status_code == 404


def test_a_broken_file_is_mended_here(asked: Serving) -> None:
    text = asked.home.policy.read_text()
    asked.home.policy.write_text("[[")
    olga, jan = asked.signed_in("officer"), asked.signed_in("Jan")
    path = proposed(olga, text)
    assert olga.post(f"{path}/accept").status_code == 409, "what cannot be read asks for two"
    assert jan.post(f"{path}/accept").status_code == 303
    assert asked.home.policy.read_text() == text


def test_every_setting_is_compared(tmp_path: Path) -> None:
    """A setting that is added to the policy has to be placed: does a larger value let more in, or less?"""
    text = make_home(tmp_path).policy.read_text()
    before = policy_of(text)
    key = next(iter(before.signers.values()))
    others = {
        "signers": ({"another": key}, "more"),
        "tasks": (("token_classification",), "less"),
        "backbones": ({"x": "ab" * 32}, "more"),
        "metrics": (("loss",), "more"),
        "approval": ("required", "less"),
        "hours": ("20:00-06:00", "other"),
        "peers": ({"north": "ab" * 32}, "other"),
        "limits": (before.limits.model_copy(update={"max_rank": 1}), "less"),
    }
    for name in Policy.model_fields:
        old = getattr(before, name) or 8.0
        value, effect = others.get(name) or (old + 1, "less" if "min_" in name or "needed" in name else "more")
        after = before.model_copy(update={name: value})
        found = {one.setting.partition(".")[0]: one.effect for one in setting_changes(before, after)}
        assert found.get(name) == effect, name


def test_lines_that_stay_are_left_out() -> None:
    old = [f"line {number}" for number in range(20)]
    new = [*old[:10], "another", *old[11:]]
    found = line_diff("\n".join(old), "\n".join(new))
    assert [(one.kind, one.old, one.new) for one in found] == [
        ("gap", 7, None),
        *(("same", n, n) for n in (8, 9, 10)),
        ("gone", 11, None),
        ("new", None, 11),
        *(("same", n, n) for n in (12, 13, 14)),
        ("gap", 6, None),
    ]
    assert line_diff("a\n", "a") == []


def test_a_comment_does_not_end_where_toml_goes_on() -> None:
    for sign in "\u2028\u2029\x85\x0b\x0c":
        text = f"# fine{sign}max_steps = 9"
        assert [one.text for one in line_diff("a = 1\r\n", f"a = 1\n{text}\n")] == ["a = 1", text]
