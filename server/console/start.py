"""`silotune coordinator console`: a coordinator's folder becomes a console, which is served until it is told to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from server.console.connections import spark
from server.console.content import CoordinatorContent
from server.console.navigation import NAVIGATION
from server.console.promises import Planner
from server.console.reports import Reports
from server.console.routes import compare_pages, job_pages, report_pages, run_pages, site_pages, steer_pages
from server.console.runs import Runs
from server.console.said import Said
from server.console.sites import Sites
from server.store.home import CoordinatorHome
from shared.files.backup import refuse_unpacked
from shared.http.serving import Place, place_at
from shared.web.console import Console
from shared.web.filters import FILTERS
from shared.web.live import Streams
from shared.web.opening import open_people, seconds_now
from shared.web.running import run

FOLDER = "console"
ROUTES = (
    compare_pages.ROUTES,
    run_pages.ROUTES,
    steer_pages.ROUTES,
    report_pages.ROUTES,
    site_pages.ROUTES,
    job_pages.ROUTES,
)
"""Of its own pages; the first that fits counts."""


def open_console(
    home: CoordinatorHome,
    *,
    place: Place,
    port: int,
    passphrase: str | None,
    database: str | None = None,
    now: Callable[[], int] = seconds_now,
) -> Console:
    """Return the console of a coordinator's folder.

    Args:
        place, port: where it will be served.
        passphrase: of the coordinator's keys.
        database: URL of PostgreSQL; None: a file in the folder.

    Raises:
        ConfigError, RunError, TrustError: as their texts say.
    """
    refuse_unpacked(home.path, "silotune coordinator restore BACKUP HOME")
    config = home.load_config()
    said = Said(home)
    content = CoordinatorContent(
        home=home,
        log=home.open_log(home.load_round_key(passphrase)),
        said=said,
        runs=Runs(home.jobs),
        planner=Planner(),
        reports=Reports(home),
        sites=Sites(home, said),
        streams=Streams(),
    )
    folder = home.path / FOLDER
    people = open_people(folder, url=database, passphrase=passphrase, record=content.record, now=now)
    return Console(
        kind="coordinator",
        owner=config.name,
        accounts=people.accounts,
        sessions=people.sessions,
        navigation=NAVIGATION,
        folders=(Path(__file__).parent,),
        now=now,
        names=place.names,
        loopback=place.loopback,
        secure=place.secure,
        port=port,
        filters={**FILTERS, "spark": spark},
        provider=people.provider,
        shows_errors=False,  # they may quote what a site sent
        content=content,
    )


def run_console(
    home: CoordinatorHome,
    *,
    host: str,
    port: int,
    certificate: Path | None,
    key: Path | None,
    database: str | None,
    passphrase: str | None,
    say: Callable[[str], None],
) -> None:
    """Serve a coordinator's console until Ctrl-C or SIGTERM; `say` prints a line for whoever started it."""

    def opened(place: Place, bound: int) -> Console:
        return open_console(home, place=place, port=bound, passphrase=passphrase, database=database)

    run(
        opened,
        ROUTES,
        place_at(host, port, certificate, key),
        last="; the coordinator does not depend on it.",
        again=f"silotune coordinator console {home.path}",
        say=say,
    )
