"""`silotune site console`: a site's folder becomes a console, which is served until it is told to end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from client.approval.policy_changes import PolicyChanges
from client.budget.accounts import Budgets
from client.console import budget_pages, pages, policy_pages, request_pages
from client.console.audit.chains import Chains
from client.console.audit.releases import Releases
from client.console.content import SiteContent
from client.console.forecast import Forecasts
from client.console.known_accuracy import known_accuracy
from client.console.machine import Gpus
from client.console.pages import NAVIGATION
from client.console.requests import Requests
from client.site.approving import ApprovalDesk
from client.site.home import SiteHome, open_log
from shared.files.backup import refuse_unpacked
from shared.http.serving import Place, place_at
from shared.trust.keystore import Seal, load_secret
from shared.web.console import Console
from shared.web.filters import FILTERS
from shared.web.opening import open_people, seconds_now
from shared.web.running import run

FOLDER = "console"
ROUTES = (pages.ROUTES, budget_pages.ROUTES, request_pages.ROUTES, policy_pages.ROUTES)
"""Of its own pages."""


def open_console(
    home: SiteHome,
    *,
    place: Place,
    port: int,
    passphrase: str | None,
    database: str | None = None,
    sweep: Path | None = None,
    now: Callable[[], int] = seconds_now,
) -> Console:
    """Return the console of a site's folder.

    Args:
        place, port: where it will be served.
        passphrase: of the site's keys.
        database: URL of PostgreSQL; None: a file in the folder.
        sweep: folder of a sweep elsewhere, whose accuracy is shown beside what a job would cost.

    Raises:
        ConfigError, RunError, TrustError: as their texts say.
    """
    refuse_unpacked(home.path, "silotune site restore BACKUP HOME")
    config = home.load_config()
    log = open_log(home, passphrase=passphrase)
    budgets = Budgets(home, Seal(load_secret(home.storage_key, passphrase=passphrase)))
    requests = Requests(ApprovalDesk(home, passphrase=passphrase), budgets)
    content = SiteContent(
        home=home,
        log=log,
        budgets=budgets,
        releases=Releases(home),
        requests=requests,
        policies=PolicyChanges(home.policy, log=log),
        forecasts=Forecasts(requests),
        gpus=Gpus(),
        chains=Chains(home, budgets, now=now),
        accuracy=None if sweep is None else known_accuracy(sweep),
    )
    folder = home.path / FOLDER
    people = open_people(folder, url=database, passphrase=passphrase, record=content.record, now=now)
    return Console(
        kind="site",
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
        filters=FILTERS,
        provider=people.provider,
        content=content,
    )


def run_console(
    home: SiteHome,
    *,
    host: str,
    port: int,
    certificate: Path | None,
    key: Path | None,
    database: str | None,
    sweep: Path | None,
    passphrase: str | None,
    say: Callable[[str], None],
) -> None:
    """Serve what `open_console` opens until Ctrl-C or SIGTERM; `say` prints a line for whoever started it."""

    def opened(place: Place, bound: int) -> Console:
        console = open_console(home, place=place, port=bound, passphrase=passphrase, database=database, sweep=sweep)
        console.content.is_read.clear()
        threading.Thread(target=console.content.read_ahead, name="read ahead", daemon=True).start()
        return console

    run(
        opened,
        ROUTES,
        place_at(host, port, certificate, key),
        last="; the node does not depend on it.",
        again=f"silotune site console {home.path}",
        say=say,
    )
