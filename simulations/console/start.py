"""`silotune console`: a folder of runs becomes a console, which is served until it is told to end."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from shared.errors import ConfigError, printable
from shared.files.atomic import write_text
from shared.http.serving import Place, address_of, place_at
from shared.trust.audit_log import AuditLog
from shared.trust.keystore import Seal, new_key
from shared.trust.signing import SigningKey, load_signing_key, save_signing_key
from shared.web.accounts.accounts import Accounts, Record
from shared.web.accounts.links import OneTimeLink
from shared.web.accounts.sessions import Sessions
from shared.web.console import Console
from shared.web.opening import People, note, open_people, seconds_now
from shared.web.running import invite, run
from shared.web.state.database import Database
from simulations.console import frontier_pages, pages
from simulations.console.content import Research
from simulations.console.index import Index
from simulations.console.pages import FILTERS, NAVIGATION
from simulations.console.reports import Reports

ROUTES = (pages.ROUTES, frontier_pages.ROUTES)
_LOG_KEY, _LOG_PUBLIC, _LOG = "log.key", "log.pub", "audit"
_TOLD_EVERY = 200


def check_places(runs: Path, place: Place, accounts: Path | None) -> None:
    """Find what speaks against a console of `runs`.

    Raises:
        ConfigError: it is no folder, others could reach it and it has no accounts, or these would lie among the runs.
    """
    if not runs.is_dir():
        raise ConfigError(
            f"{runs} is no folder; give one with runs in it, such as the one named in --out, or above it."
        )
    if accounts is None and not place.loopback:
        raise ConfigError(
            f"{place.host} can be reached from other machines, so people have to have accounts: give --accounts FOLDER, where "
            "they are kept. Without it the console is for whoever sits at this machine."
        )
    if accounts is not None and accounts.resolve().is_relative_to(runs.resolve()):
        raise ConfigError(
            f"--accounts {accounts} lies among the runs, in which nothing is written; give another folder."
        )


def open_console(
    runs: Path,
    *,
    place: Place,
    port: int,
    reports: Path,
    link: OneTimeLink | None = None,
    accounts: Path | None = None,
    passphrase: str | None = None,
    told: Callable[[int], None] = lambda number: None,
    now: Callable[[], int] = seconds_now,
) -> Console:
    """Return the console of a folder of runs, which was looked through once.

    Args:
        place, port: where it will be served.
        reports: a folder for reports that are made.
        link: sign-in from the terminal; accounts then are in memory only.
        accounts: the folder of lasting ones.
        passphrase: of the keys in that folder.
        told: see `Index`.

    Raises:
        ConfigError, RunError, TrustError: as their texts say.
    """
    content = Research(index=Index(runs, told=told), reports=Reports(reports))
    content.index.now()
    if accounts is None:
        database = Database(None)
        people = People(
            accounts=Accounts(database=database, seal=Seal(new_key()), now=now, record=_to_log),
            sessions=Sessions(database=database, now=now),
        )
    else:
        accounts.mkdir(parents=True, exist_ok=True, mode=0o700)
        people = open_people(accounts, url=None, passphrase=passphrase, record=_recorder(accounts, passphrase), now=now)
    return Console(
        kind="research",
        owner=printable(runs.resolve().name) or "/",
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
        link=link,
        content=content,
    )


def run_console(
    runs: Path,
    *,
    host: str,
    port: int,
    certificate: Path | None,
    key: Path | None,
    accounts: Path | None,
    passphrase: str | None,
    say: Callable[[str], None],
) -> None:
    """Serve the console of a folder of runs until Ctrl-C or SIGTERM; `say` prints a line for whoever started it."""
    place = place_at(host, port, certificate, key)
    check_places(runs, place, accounts)
    started = time.monotonic()

    def greet(console: Console, address: str) -> None:
        number = len(console.content.index.now().runs)
        say(f"{number:,} runs in {runs}, read in {time.monotonic() - started:.1f} s; nothing is written there")
        if console.link is not None:
            console.link.begin()
        else:
            invite(console, str(runs), address, say)

    with tempfile.TemporaryDirectory(prefix="silotune-console-") as reports:

        def opened(place: Place, bound: int) -> Console:
            address, link = address_of(place, bound), None
            if accounts is None:
                link = OneTimeLink(lambda path: say(f"open this link, which counts once:\n   {address}{path}"))
            return open_console(
                runs,
                place=place,
                port=bound,
                reports=Path(reports),
                link=link,
                accounts=accounts,
                passphrase=passphrase,
                told=lambda number: say(f"{number:,} runs read") if number % _TOLD_EVERY == 0 else None,
            )

        run(opened, ROUTES, place, last=".", again=f"silotune console {runs}", say=say, greet=greet)


def _to_log(account: str, action: str, details: Mapping[str, Any]) -> None:
    """Note what was done where accounts end with the process; nothing can be changed but these."""
    logging.getLogger("silotune.console").info("%s %s %s", account, action, dict(details))


def _recorder(folder: Path, passphrase: str | None) -> Record:
    """Return what notes every action in the signed audit log beside the accounts, made at the first time."""
    if not (folder / _LOG_KEY).exists():
        key = SigningKey.generate()
        save_signing_key(folder / _LOG_KEY, key, passphrase)
        write_text(folder / _LOG_PUBLIC, key.verify_key.text + "\n")
    return partial(note, AuditLog(folder / _LOG, seal_head=load_signing_key(folder / _LOG_KEY, passphrase)))
