"""What the pages of a site's console are made from: the site's folder, with the keys that open it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import Response

from client.approval.policy_changes import PolicyChanges
from client.budget.accounts import Budgets
from client.console.audit.chains import Chains
from client.console.audit.releases import Releases
from client.console.forecast import Forecasts
from client.console.known_accuracy import KnownAccuracy
from client.console.machine import Gpus
from client.console.requests import Requests
from client.site.home import SiteHome
from shared.errors import SilotuneError
from shared.trust.audit_log import AuditLog
from shared.web.asked import Asked
from shared.web.opening import note
from shared.web.turns import MOST_SECONDS, Places

log = logging.getLogger("silotune.console")

_SHORTLY = 0.3  # seconds in which most sites are read
_WAITING = Places(4)


def _set() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


@dataclass(frozen=True, kw_only=True)
class SiteContent:
    """A site's folder, opened for its console.

    Attributes:
        home: the folder.
        log: its audit log, to which every action of the console is added.
        budgets: the accounts of its ledger.
        releases: what left it, by its audit log.
        requests: jobs that wait for its people, or were decided by them.
        policies: changes of its policy.
        forecasts: what the budget will be.
        gpus: of the machine.
        chains: whether log and ledger are unbroken.
        accuracy: what a sweep elsewhere found; None where none was given.
        is_read: set unless `read_ahead` is at work.
    """

    home: SiteHome
    log: AuditLog
    budgets: Budgets
    releases: Releases
    requests: Requests
    policies: PolicyChanges
    forecasts: Forecasts
    gpus: Gpus
    chains: Chains
    accuracy: KnownAccuracy | None = None
    is_read: threading.Event = field(default_factory=_set)

    def record(self, account: str, action: str, details: Mapping[str, Any]) -> None:
        """Note what an account does, see `shared.web.opening.note`."""
        note(self.log, account, action, details)

    def read_ahead(self) -> None:
        """Read what pages will show, so that the first of them need not: logs and ledgers of years take seconds once.

        What is in force as policy is kept with it, before anybody changes it here. What cannot be read, its page tells.
        """
        self.is_read.clear()
        try:
            for read in (self._read_budgets, self.policies.versions, self.releases.latest_round, self.requests.all):
                try:
                    read()
                except SilotuneError as error:
                    log.warning("%s", error)
        finally:
            self.is_read.set()

    def _read_budgets(self) -> None:
        for one in self.budgets.all():
            _ = one.spent


def being_read(asked: Asked) -> Response | None:
    """Return what stands in for a page while what it shows is read for the first time; None: it can be shown.

    A browser with scripts asks again by itself and loads the page once that is done; without, one follows the link, and waits.
    """
    reading, query = content_of(asked).is_read, asked.request.query_params
    if "waits" in query:
        with _WAITING:
            reading.wait(MOST_SECONDS)
        return None
    is_read = reading.wait(0 if asked.is_fragment else _SHORTLY)
    if asked.is_fragment and "asks-again" in query:
        return Response(status_code=204, headers={"HX-Refresh": "true"} if is_read else {})
    return None if is_read or asked.is_fragment else asked.page("being-read.html")


def content_of(asked: Asked) -> SiteContent:
    """Return what the console that was asked shows."""
    content: SiteContent = asked.console.content
    return content
