"""A study as its people see it: both consoles in Chromium, beside a coordinator, three nodes, an OpenID provider, PostgreSQL.

Roles sign in and see what is theirs; a job arrives, is refused, comes again and is approved by two; its run goes live, a site is
lost and comes back; the budget falls by what the ledger says; the compliance report is made, signed and verified.
With SILOTUNE_SCREENSHOTS set to a folder, every page on the way is left there in both themes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import tomli_w

from client.console.pages import NAVIGATION as OF_SITE
from client.node.status import read_status
from server.console.navigation import NAVIGATION as OF_COORDINATOR
from shared.job.job import Job
from shared.web.roles import Role, allowed
from simulations.federation.processes import HOST, Federation, change_toml, free_port
from tests.client.console.openid import CLIENT, SECRET, OpenId, provider
from tests.conftest import Outcome
from tests.integration.eventually import crowding, eventually
from tests.shared.web import postgresql
from tests.shared.web.accessibility import violations
from tests.shared.web.browsers import needs_chromium, running_chromium

POSTGRESQL = postgresql.programs()
pytestmark = [
    *needs_chromium,
    pytest.mark.skipif(POSTGRESQL is None, reason="PostgreSQL is not installed here (Debian: postgresql)"),
]

REASON = "marker-reason-of-the-board"
LOST_SECONDS = 10.0
SCREENSHOTS = os.environ.get("SILOTUNE_SCREENSHOTS")


class Desk:
    """A browser whose person signs in to the consoles by the provider, as whoever they are just then."""

    def __init__(self, browser: Any, openid: OpenId) -> None:
        self.browser, self.openid = browser, openid
        self.told: list[str] = []
        self.page: Any = None

    def sign_in(self, address: str, name: str, role: Role) -> Any:
        """Return the first page of a console as somebody new to this browser sees it."""
        if self.page is not None:
            self.page.context.close()
        self.openid.user = {"sub": name, "preferred_username": name, "groups": [role.value]}
        self.page = self.browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        self.page.set_default_timeout(30_000)
        for event in ("console", "pageerror"):
            self.page.on(event, lambda what: self.told.append(getattr(what, "text", str(what))))
        self.page.goto(f"{address}sign-in")
        self.page.get_by_role("link", name="Sign in with the hospital").click()
        self.page.locator("nav.side").wait_for()
        return self.page

    def look(self, name: str) -> None:
        """Judge the page that is open, and leave pictures of it if somebody wants them."""
        for theme in ("light", "dark"):
            self.page.emulate_media(color_scheme=theme)
            assert violations(self.page) == [], (name, theme)
            if SCREENSHOTS:
                self.page.screenshot(path=Path(SCREENSHOTS) / f"{name}-{theme}.png", full_page=True)
        self.page.emulate_media(color_scheme="light")


@pytest.fixture(scope="module")
def openid() -> Iterator[OpenId]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("AUTHLIB_INSECURE_TRANSPORT", "1")  # of the provider's side: it speaks plain HTTP on loopback
        with provider() as running:
            yield running


@pytest.fixture
def desk(openid: OpenId) -> Iterator[Desk]:
    with running_chromium() as browser:
        made = Desk(browser, openid)
        yield made
        if SCREENSHOTS and made.page is not None:
            made.page.screenshot(path=Path(SCREENSHOTS) / "last.png", full_page=True)


@pytest.fixture(scope="module")
def database() -> Iterator[Callable[[str], str]]:
    """Return what makes a database and tells its URL."""
    assert POSTGRESQL is not None
    with postgresql.running(POSTGRESQL) as url:

        def make(name: str) -> str:
            with psycopg.connect(f"{url}/postgres", autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {name}".encode())
            return f"{url}/{name}"

        yield make


@pytest.fixture(scope="module")
def federation(found_federation: Callable[..., Federation]) -> Federation:
    """Coordinator and three sites start; at a two people approve each job."""
    made = found_federation(["a", "b", "c"], epsilon=50.0, policy={"max_steps": 1900})
    change_toml(made.site("a").policy, approval="required", approvals_needed=2)
    made.start_coordinator()
    for name in "abc":
        made.start_site(name)
    return made


@pytest.fixture(scope="module")
def consoles(federation: Federation, openid: OpenId, database: Callable[[str], str]) -> dict[str, str]:
    """The addresses of the consoles of the coordinator and of a, processes of their own; by then the federation runs, too."""
    found = {}
    for name, home in (("coordinator", federation.coordinator), ("a", federation.site("a"))):
        folder, port = home.path / "console", free_port()
        folder.mkdir(mode=0o700)
        (folder / "client.secret").write_text(SECRET)
        (folder / "client.secret").chmod(0o600)
        oidc = {
            "issuer": openid.named,
            "client_id": CLIENT,
            "client_secret_file": "client.secret",
            "title": "the hospital",
            "roles": {role.value: role.value for role in Role},
        }
        (folder / "console.toml").write_text(tomli_w.dumps({"oidc": oidc}))
        address = f"http://{HOST}:{port}/"
        openid.client.redirect_uris.append(f"{address}sign-in/elsewhere/back")
        kind = "coordinator" if name == "coordinator" else "site"
        options = ["--port", str(port), "--database", database(f"console_{name}")]
        federation._spawn(f"console-{name}", [kind, "console", str(home.path), *options])
        found[name] = address
    for name, address in found.items():
        eventually(lambda name=name, address=address: address in federation.log_of(f"console-{name}"))
    for name in "abc":
        eventually(lambda name=name: read_status(federation.site(name))["healthy"])
    return found


def test_a_study_from_the_first_sign_in_to_the_signed_report(
    federation: Federation,
    consoles: dict[str, str],
    desk: Desk,
    federation_job: Callable[..., Job],
    evaluation_records: list[dict[str, Any]],
    silotune: Callable[..., Outcome],
    tmp_path: Path,
) -> None:
    at_site, at_coordinator = consoles["a"], consoles["coordinator"]

    # Every role sees the pages of its own, and no others.
    for address, navigation in ((at_site, OF_SITE), (at_coordinator, OF_COORDINATOR)):
        for role in Role:
            page = desk.sign_in(address, f"new {role.value}", role)
            links = page.locator("nav.side a")
            shown = [links.nth(number).get_attribute("href") for number in range(links.count())]
            assert shown == [entry.path for entry in navigation if allowed(role, entry.action)], (address, role)

    # A job arrives, is read and refused. The coordinator's people learn that it was, not why.
    first = federation.submit(federation_job(name="unwanted", federation={"min_sites": 3}), evaluation_records)
    eventually(lambda: first.state().get("awaiting") == ["a"])
    page = desk.sign_in(at_site, "Olga", Role.OFFICER)
    page.get_by_role("link", name="unwanted").click()
    page.get_by_role("rowheader", name="max_epsilon_per_job").wait_for()
    desk.look("site-request")
    page.get_by_role("button", name="Refuse the job").click()
    page.get_by_label("Reason", exact=True).fill(REASON)
    page.keyboard.press("Enter")
    page.get_by_text(REASON).wait_for()
    federation.kill("a")
    federation.start_site("a")  # it is asked at once
    eventually(lambda: "a" in first.state().get("refused", {}))
    page = desk.sign_in(at_coordinator, "Eva", Role.ENGINEER)
    page.goto(f"{at_coordinator}runs/{first.name}")
    row = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name="a", exact=True))
    row.get_by_text("refused").wait_for()
    assert REASON not in page.content()
    page.get_by_role("button", name="Stop this run").click()
    federation.wait(first, timeout=90)

    # It comes again, and two approve it.
    job = federation_job(
        name="study",
        training={"rounds": 40},
        privacy={"noise_multiplier": 2.0},
        federation={"min_sites": 3, "round_timeout_seconds": 20.0},
    )
    study = federation.submit(job, evaluation_records)
    eventually(lambda: study.state().get("awaiting") == ["a"])
    for name, told in (("Olga", "You approved it."), ("Pia", "approved, not begun")):
        page = desk.sign_in(at_site, name, Role.OFFICER)
        page.get_by_role("link", name="study").click()
        page.get_by_role("button", name="Approve the job").click()
        # Whom the provider just knows has proved nothing: it is asked for another sign-in, and leads back.
        desk.openid.more = {"auth_time": int(time.time())}
        page.get_by_role("link", name="Sign in again").click()
        page.get_by_role("button", name="Approve the job").click()
        page.get_by_text(told).first.wait_for()
    federation.kill("a")
    federation.start_site("a")

    # The run goes live: the page follows it without being loaded again.
    page = desk.sign_in(at_coordinator, "Rosa", Role.RESEARCHER)
    page.goto(f"{at_coordinator}runs/{study.name}")
    page.evaluate("window.loadedOnce = true")
    gauge = page.locator("#live svg.gauge")
    eventually(lambda: "0 of" not in str(gauge.get_attribute("aria-label")) and study.state().get("round", 0) >= 2)
    page.locator(".chart canvas").first.wait_for()
    drawn = page.locator(".chart canvas").first.evaluate("canvas => canvas.toDataURL()")
    moved = "drawn => document.querySelector('.chart canvas').toDataURL() !== drawn"
    page.wait_for_function(moved, arg=drawn)
    lost = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name="c", exact=True)).get_by_text("lost")
    federation.kill("c")
    killed = time.monotonic()
    lost.wait_for()
    assert time.monotonic() - killed < LOST_SECONDS * crowding()
    desk.look("coordinator-run")
    federation.start_site("c")
    lost.wait_for(state="detached", timeout=120_000)
    assert page.evaluate("window.loadedOnce"), "the page followed, and was not loaded anew"
    state = federation.wait(study, timeout=300)
    assert state["state"] == "completed", state

    # The budget fell by what the ledger says, to all digits.
    page = desk.sign_in(at_site, "Vera", Role.VIEWER)
    page.goto(f"{at_site}budget")
    ledger = json.loads(silotune("site", "ledger", federation.site("a").path, "--json").out)
    assert f"{ledger['epsilon_spent']!r}" in page.locator("main").inner_text()
    desk.look("site-budget")

    # The report is made, signed and verified by a person who trusts nobody here.
    page = desk.sign_in(at_coordinator, "Omar", Role.OFFICER)
    page.goto(f"{at_coordinator}runs/{study.name}")
    page.get_by_role("button", name="Compliance report, HTML, signed").click()
    names = ("compliance-report.html", "compliance-report.html.sig.json")
    page.get_by_role("link", name=names[1]).wait_for(timeout=120_000)
    desk.look("coordinator-reports")
    for name in names:
        with page.expect_download() as download:
            page.get_by_role("link", name=name, exact=True).click()
        download.value.save_as(tmp_path / name)
    verified = silotune("report", "verify", tmp_path / names[0], "--key", federation.coordinator.path / "round.pub")
    assert verified.status == 0, verified
    assert [line for line in desk.told if "Failed to load" not in line] == []
