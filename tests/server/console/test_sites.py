"""The roster: who may connect, since when, and how somebody is admitted or shut out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from server.console.connections import NUM_BINS, WEEK_SECONDS, Connections, spark, uptime_of
from server.store.home import CoordinatorHome
from shared.errors import TrustError
from shared.trust.audit_log import AuditLog, Event, read
from shared.trust.pki import revoke
from shared.trust.revocation import load_crl
from shared.trust.trust_store import TrustStore
from shared.web.roles import Role
from tests.client.console.conftest import Browser, Serving, text_of
from tests.server.console.homes import SITES, certificate, make_home, say

NOW = 1_800_000_000.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("federation")


@pytest.fixture(scope="module")
def home(folder: Path) -> CoordinatorHome:
    home = make_home(folder)
    log = home.open_log(home.load_round_key(None))
    log.append(Event.COORDINATOR_STARTED, pid=7)
    log.append(Event.SITE_CONNECTED, site="north", peer="MARKER", software="0.2.0")
    log.append(Event.SITE_CONNECTED, site="st-anna", peer="MARKER", software="<b>MARKER</b>")
    log.append(Event.SITE_DISCONNECTED, site="st-anna", reason="MARKER")
    log.append(Event.SITE_CONNECTED, site="MARKER not a name", peer="x", software="MARKER")
    say(home, online=("north",))
    return home


@pytest.fixture
def browser(serving: Serving) -> Browser:
    return serving.signed_in("engineer")


def actions(home: CoordinatorHome) -> list[dict[str, object]]:
    found = [entry.details for entry in read(home.audit) if entry.event == Event.CONSOLE_ACTION]
    return [one for one in found if one["action"] in ("admit site", "install revocation list")]


def test_the_roster_is_the_trust_stores(browser: Browser) -> None:
    page = browser.get("/sites").text
    text = text_of(page)
    assert "3 in all, 3 may connect, 1 connected" in text
    for name in SITES:
        assert name in text
    assert "north connected" in text
    assert "st-anna not connected" in text
    assert "0.2.0" in text
    assert "MARKER" not in page
    assert "days left" in text


def test_search(browser: Browser) -> None:
    text = text_of(browser.get("/sites", params={"q": "ANNA"}).text)
    assert ("st-anna" in text, "charite" in text) == (True, False)


def test_a_site_is_admitted_after_a_look_at_its_key(browser: Browser, folder: Path, home: CoordinatorHome) -> None:
    pem = certificate(folder, "new-site").decode()
    page = browser.post("/sites/check", page="/sites", certificate=pem)
    assert page.status_code == 200
    assert "Compare the fingerprint" in page.text
    assert "new-site" not in browser.get("/sites").text, "a look admits nobody"
    assert browser.post("/sites/admit", page="/sites", certificate=pem.replace("\n", "\r\n")).status_code == 303
    assert "new-site" in browser.get("/sites").text
    assert actions(home)[-1] | {"account": "engineer", "site": "new-site"} == actions(home)[-1]


def test_what_the_trust_store_refuses_is_not_admitted(browser: Browser, home: CoordinatorHome, tmp_path: Path) -> None:
    before, count = sorted((home.trust / "sites").iterdir()), len(actions(home))
    foreign = make_home(tmp_path, ())
    pem = certificate(tmp_path, "evil").decode()
    server = foreign.server_certificate.read_text()
    for text in (pem, server, "", "x", pem * 2, "<script>alert(1)</script>", pem[:-40]):
        for path in ("/sites/check", "/sites/admit"):
            answer = browser.post(path, page="/sites", certificate=text)
            assert answer.status_code == 422, path
            assert "<script>alert" not in answer.text
    assert (sorted((home.trust / "sites").iterdir()), len(actions(home))) == (before, count)


def test_it_is_noted_first(
    browser: Browser, folder: Path, home: CoordinatorHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem = certificate(folder, "later").decode()

    def full(*_: object, **__: object) -> None:
        raise TrustError("the audit log cannot be written")

    monkeypatch.setattr(AuditLog, "append", full)
    assert browser.post("/sites/admit", page="/sites", certificate=pem).status_code == 503
    assert not list((home.trust / "sites").glob("later*"))


def test_a_list_shuts_out_whom_the_ca_revoked(browser: Browser, folder: Path, home: CoordinatorHome) -> None:
    old = (home.trust / "crl.pem").read_text()
    revoke(folder / "ca", "charite", passphrase=None)
    newer = (folder / "ca" / "crl.pem").read_text()
    page = browser.post("/sites/revocations/check", page="/sites", revocations=newer)
    assert "end at once, also in a round: charite" in text_of(page.text)
    assert (home.trust / "crl.pem").read_text() == old, "a look changes nothing"
    assert browser.post("/sites/revocations", page="/sites", revocations=newer).status_code == 303
    assert load_crl(home.trust / "crl.pem", TrustStore(home.trust).judge(_now()).ca) is not None
    text = text_of(browser.get("/sites").text)
    assert "charite may not connect" in text
    (known, admitted) = re.findall(r"Known sites (\d+) in all, (\d+) may connect", text)[0]
    assert int(known) == int(admitted) + 1, "who was shut out is known, and no more than that"
    assert actions(home)[-1]["sites"] == ["charite"]
    answer = browser.post("/sites/revocations", page="/sites", revocations=old)
    assert (answer.status_code, "was seen before" in answer.text) == (422, True), "an older list is refused"
    for text in ("", "x", certificate(folder, "odd").decode()):
        assert browser.post("/sites/revocations", page="/sites", revocations=text).status_code == 422


def test_the_newer_of_two_lists_that_come_at_once_stays(folder: Path, home: CoordinatorHome) -> None:
    store = TrustStore(home.trust)
    older = store.check_list((folder / "ca" / "crl.pem").read_bytes())
    revoke(folder / "ca", "st-anna", passphrase=None)
    newer = (folder / "ca" / "crl.pem").read_bytes()
    store.install_list(store.check_list(newer))
    with pytest.raises(TrustError, match=r"newer|was seen"):
        store.install_list(older)
    assert (home.trust / "crl.pem").read_bytes() == newer


def test_a_broken_trust_store_is_told(serve: Callable[..., Serving], tmp_path: Path) -> None:
    home = make_home(tmp_path, ("north",))
    say(home, sites=("north",))
    (home.trust / "crl.pem").write_text("x")
    page = serve(home).signed_in("officer").get("/sites").text
    assert "nobody may connect" in page
    assert str(home.path) not in page


@pytest.mark.parametrize("role", Role)
def test_who_sees_and_who_admits(serving: Serving, role: Role) -> None:
    browser = serving.signed_in(role.value)
    sees, admits = role in (Role.ENGINEER, Role.OFFICER), role is Role.ENGINEER
    assert browser.get("/sites").status_code == (200 if sees else 403)
    assert browser.get("/sites/listed").status_code == (200 if sees else 403)
    for path in ("check", "admit", "revocations/check", "revocations"):
        assert browser.post(f"/sites/{path}", certificate="x").status_code == (422 if admits else 403)


# --- uptime ---


def test_a_week_is_told_as_it_was() -> None:
    day = 86_400.0
    changes = [(NOW - 10 * day, True), (NOW - 3.5 * day, False), (NOW - 1.75 * day, True)]
    found = uptime_of(changes, now=NOW, online=True)
    assert found.share == pytest.approx(0.75)
    assert len(found.bins) == NUM_BINS
    assert found.bins[0] == found.bins[27] == found.bins[-1] == 1.0
    assert found.bins[28] == found.bins[41] == 0.0


@pytest.mark.parametrize(
    ("changes", "online", "share"),
    [
        ([], True, None),
        ([(NOW - WEEK_SECONDS / 2, True)], True, 1.0),
        ([(NOW - WEEK_SECONDS / 2, False)], False, 0.5),
        ([(NOW - 2 * WEEK_SECONDS, False)], False, 0.0),
        ([(NOW - 2 * WEEK_SECONDS, False), (NOW - WEEK_SECONDS / 4, True)], True, 0.25),
    ],
)
def test_what_is_not_known_counts_as_nothing(
    changes: list[tuple[float, bool]], online: bool, share: float | None
) -> None:
    assert uptime_of(changes, now=NOW, online=online).share == (None if share is None else pytest.approx(share))


def test_a_sparkline_is_numbers_only() -> None:
    assert spark((None, 1.0, 0.0)) == "M1 10V0.00H2V10ZM2 10V9.50H3V10Z"


def test_a_coordinator_that_ends_ends_all_connections(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    found = Connections(tmp_path)
    assert (found.version("a"), found.last_seen("a")) == ("", None)
    log.append(Event.SITE_CONNECTED, site="a", software="1.2.3", peer="")
    assert found.version("a") == "1.2.3"
    log.append(Event.COORDINATOR_STOPPED, pid=1)
    assert found.last_seen("a") is not None
    now = (found.last_seen("a") or 0.0) + 100
    assert found.uptime("a", now=now, online=False).share == pytest.approx(0.0, abs=0.05)


def _now() -> object:
    from datetime import UTC, datetime

    return datetime.now(UTC)
