"""A coordinator's console that answers over real HTTP, and browsers without a screen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from argon2 import PasswordHasher

from server.console.start import ROUTES, open_console
from server.store.home import CoordinatorHome
from shared.http.serving import listen, make_server, place_at
from shared.web.accounts import passwords
from shared.web.application import make_application
from tests.client.console.conftest import Clock, Serving, make_accounts
from tests.server.console.homes import go_on, job_of, make_home, say, submit


@pytest.fixture(scope="module", autouse=True)
def _cheap_hashes() -> Iterator[None]:
    """What a hash costs is tested in tests/shared/web; here it would only take time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(passwords, "_HASHER", PasswordHasher(time_cost=1, memory_cost=64, parallelism=1))
        yield


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., Serving]]:
    """Return a function that serves the console of a home, with an account for each role."""
    ends: list[Callable[[], None]] = []

    def begin(home: CoordinatorHome) -> Serving:
        place = place_at("127.0.0.1", 0, None, None)
        listener = listen(place)
        port = listener.getsockname()[1]
        clock = Clock(1_800_000_000)
        console = open_console(home, place=place, port=port, passphrase=None, now=clock)
        guarded, app = make_application(console, ROUTES)
        server = make_server(guarded, place)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
        thread.start()

        def end() -> None:
            server.should_exit = True
            thread.join(20)
            console.accounts.database.close()

        ends.append(end)
        serving = Serving(home, console, app, f"http://127.0.0.1:{port}", clock)  # type: ignore[arg-type]
        make_accounts(serving)
        return serving

    yield begin
    for end in ends:
        end()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorHome:
    """The folder of a coordinator with a past, and a run at hand."""
    home = make_home(tmp_path_factory.mktemp("federation"))
    go_on(submit(home, job_of("pilot"), 1, state="completed"), 8)
    go_on(submit(home, job_of("wider", training={"rounds": 4, "local_steps": 4}), 2, state="stopped"), 3)
    shares = {"mechanism": "distributed", "epsilon": 4.0, "epsilon_alone": 16.0, "max_colluding": 1, "sample_rate": 0.2}
    secure = {"privacy": shares, "training": {"rounds": 6, "local_steps": 1}, "federation": {"min_sites": 3}}
    submit(home, job_of("secure", **secure), 3, state="failed", problem="RunError: it could not go on")
    go_on(submit(home, job_of("at-hand"), 4, state="running"), 5)
    say(home, job="0004-at-hand", round={"round": 6, "sites": {"north": "training", "st-anna": "sent"}, "codes": {}})
    return home


@pytest.fixture(scope="module")
def serving(serve: Callable[..., Serving], home: CoordinatorHome) -> Serving:
    """Its console."""
    return serve(home)
