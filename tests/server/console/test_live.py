"""Pages that follow what happens: what a stream says, when it ends, and what it may not do."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from server.store.home import CoordinatorHome
from shared.web import live
from shared.web.accounts.sessions import IDLE_SECONDS
from shared.web.roles import Role
from tests.client.console.conftest import Browser, Serving, text_of
from tests.server.console.homes import go_on, job_of, make_home, say, submit

RUN = "/runs/0001-triage"
STREAM = {"accept": "text/event-stream"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorHome:
    home = make_home(tmp_path_factory.mktemp("federation"))
    go_on(submit(home, job_of(), 1, state="running"), 1)
    return home


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, home: CoordinatorHome) -> None:
    for name, seconds in (("LOOK_SECONDS", 0.1), ("JUDGE_SECONDS", 0.2), ("BEAT_SECONDS", 0.5)):
        monkeypatch.setattr(live, name, seconds)
    say(home, job="0001-triage", round={"round": 2, "sites": {"north": "training"}, "codes": {}})


def address(browser: Browser, path: str = RUN) -> str:
    """Return where the page's stream is, with the mark of the page."""
    found = re.search(r'data-events="([^"]+)"', browser.get(path).text)
    assert found
    return found[1]


@contextmanager
def following(browser: Browser, path: str) -> Iterator[Iterator[str]]:
    with browser.http.stream("GET", path, headers=STREAM, timeout=20) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-store", "no")
        yield answer.iter_lines()


def until(lines: Iterator[str], begin: str) -> str:
    return next(line for line in lines if line.startswith(begin))


def test_a_change_is_told_and_nothing_else(serving: Serving, home: CoordinatorHome) -> None:
    browser = serving.signed_in("viewer")
    with following(browser, address(browser)) as lines:
        assert until(lines, ":") == ": still here", "first the heart beats: nothing changed since the page was made"
        say(
            home,
            job="0001-triage",
            online=("charite",),
            round={"round": 2, "sites": {"north": "training"}, "codes": {}},
        )
        assert until(lines, "event") == "event: changed"
        assert re.fullmatch(r"data: [0-9a-f]{16}", until(lines, "data"))
    part = browser.get(f"{RUN}/live", headers={"hx-request": "true", "x-live": "1"}).text
    assert "<html" not in part
    assert "north lost" in text_of(part)


def test_a_round_moves_the_list(serving: Serving, home: CoordinatorHome) -> None:
    browser = serving.signed_in("viewer")
    with following(browser, address(browser, "/runs")) as lines:
        until(lines, ":")
        go_on(serving.console.content.runs.all()[0].submission, 3)
        until(lines, "event")
    listed = browser.get("/runs/listed", headers={"hx-request": "true"}).text
    assert "3 / 8" in text_of(listed)


def test_a_stream_ends_with_its_session(serving: Serving) -> None:
    browser = serving.signed_in("viewer")
    with following(browser, address(browser)) as lines:
        threading.Timer(0.3, lambda: browser.post("/sign-out")).start()
        began = time.monotonic()
        assert list(lines) is not None
    assert time.monotonic() - began < 5
    assert browser.get(f"{RUN}/events", headers=STREAM).status_code == 303


def test_a_role_counts_for_streams_too(serving: Serving) -> None:
    accounts = serving.console.accounts
    administrator, viewer = (
        next(one for one in accounts.all() if one.role is role) for role in (Role.ADMINISTRATOR, Role.VIEWER)
    )
    browser = serving.signed_in("viewer")
    with following(browser, address(browser)) as lines:
        accounts.change(viewer.id, by=administrator, disabled=True)
        assert list(lines) is not None
    accounts.change(viewer.id, by=administrator, disabled=False)


def test_streams_are_bounded(serving: Serving) -> None:
    browser, path = serving.signed_in("viewer"), f"{RUN}/events"
    cookies = dict(browser.http.cookies)
    opened = [
        httpx.Client(base_url=serving.address, cookies=cookies, timeout=20) for _ in range(live.MOST_OF_A_SESSION)
    ]
    streams = [client.stream("GET", path, headers=STREAM) for client in opened]
    for stream in streams:
        assert stream.__enter__().status_code == 200
    assert browser.get(path, headers=STREAM).status_code == 429
    other = serving.signed_in("engineer")
    with following(other, path):
        assert serving.console.content.streams.num_open == live.MOST_OF_A_SESSION + 1
    for stream in streams:
        stream.__exit__(None, None, None)
    for client in opened:
        client.close()
    deadline = time.monotonic() + 10
    while serving.console.content.streams.num_open and time.monotonic() < deadline:
        time.sleep(0.05)
    assert serving.console.content.streams.num_open == 0, "what is over is given back"


def test_an_account_gets_no_more_by_more_sessions(serving: Serving) -> None:
    path = f"{RUN}/events"
    sessions = [dict(serving.signed_in("viewer").http.cookies) for _ in range(3)]
    with ExitStack() as opened:

        def status(cookies: dict[str, str]) -> int:
            client = opened.enter_context(httpx.Client(base_url=serving.address, cookies=cookies, timeout=20))
            return opened.enter_context(client.stream("GET", path, headers=STREAM)).status_code

        for number in range(live.MOST_OF_AN_ACCOUNT):
            assert status(sessions[number % 2]) == 200
        assert status(sessions[2]) == 429
        with following(serving.signed_in("engineer"), path):
            pass


def test_a_stream_keeps_no_session_alive(serving: Serving) -> None:
    browser = serving.signed_in("viewer")
    path = address(browser)
    serving.clock.seconds += IDLE_SECONDS - 60
    with following(browser, path) as lines:
        until(lines, ":")
        assert browser.get(f"{RUN}/live", headers={"hx-request": "true", "x-live": "1"}).status_code == 200
        serving.clock.seconds += 120
        assert list(lines) is not None
    assert browser.get("/runs").status_code == 303


def test_a_site_that_is_killed_shows_within_seconds(serving: Serving, home: CoordinatorHome) -> None:
    """What the coordinator says twice a second is on the page a second later; that it says so, tests/integration tells."""
    browser = serving.signed_in("viewer")
    assert "charite waiting" in text_of(browser.get(RUN).text)
    began = time.monotonic()
    say(home, job="0001-triage", online=("north",), round={"round": 2, "sites": {"north": "training"}, "codes": {}})
    assert "charite lost" in text_of(browser.get(RUN).text)
    assert time.monotonic() - began < 2


def test_what_cannot_be_read_ends_no_stream(serve: Callable[..., Serving], tmp_path: Path) -> None:
    home = make_home(tmp_path, ())
    submission = submit(home, job_of(), 1, state="running")
    say(home, sites=())
    browser = serve(home).signed_in("viewer")
    with following(browser, f"{RUN}/events") as lines:
        until(lines, "event")
        (submission.path / "state.json").write_text("{")
        until(lines, "event")
        (submission.path / "state.json").unlink()
        assert until(lines, "id: gone")
