"""The ledgers of simulated sites, for a compliance report: they lie in the run folder, where a real site's never does."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import closing
from pathlib import Path

from client.ledger.ledger import Ledger
from client.site.config import SiteConfig
from client.site.opened import caps
from server.records.privacy import read_site
from server.reports.compliance import Account
from server.runs.folder import load_job
from shared.job.parsing import load_toml, parse


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
        file, record = place / "ledger.db", place.parent / "privacy.json"
        if place.parent.name in without or not file.exists() or not record.exists():
            continue
        config = parse(SiteConfig, load_toml(place / "site.toml"), source=str(place / "site.toml"))
        declared = read_site(record).declared_records
        with closing(Ledger(file, dataset=config.dataset, unit=unit, budget=caps(config.budget))) as ledger:
            export = ledger.export(site=config.name, declared_records=declared)
        accounts.append(Account(file=file, export=export, from_ledger=True))
    return accounts
