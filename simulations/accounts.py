"""The ledgers of simulated sites, for a compliance report: they lie in the run folder, where a real site's never does."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import closing
from pathlib import Path

from client.site import Site
from server.compliance import Account
from server.run_folder import load_job


def simulated_accounts(run: Path, *, without: Collection[str] = ()) -> list[Account]:
    """Return the account of every simulated site that charged one, its chain verified; nothing is charged.

    Args:
        run: the run folder.
        without: names of sites whose accounts are known already.

    Raises:
        LedgerError: if the chain of a ledger is broken.
    """
    unit = load_job(run).privacy.unit
    accounts = []
    for place in sorted(run.glob("sites/*/home")):
        file = place / "ledger.db"
        if place.parent.name in without or not file.exists():
            continue
        site = Site(place)
        with closing(site.ledger(unit)) as ledger:
            export = ledger.export(site=site.config.name, declared_records=site.declared_records)
        accounts.append(Account(file=file, export=export, from_ledger=True))
    return accounts
