"""What the pages of a site's console are made from: the site's folder, with the keys that open it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from client.approval.policy_changes import PolicyChanges
from client.console.audit.chains import Chains
from client.console.audit.releases import Releases
from client.console.budget import Budgets
from client.console.forecast import Forecasts
from client.console.machine import Gpus
from client.console.requests import Requests
from client.site.home import SiteHome
from shared.errors import SilotuneError
from shared.trust.audit_log import AuditLog, Event
from shared.web.asked import Asked

log = logging.getLogger("silotune.console")


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

    def record(self, account: str, action: str, details: Mapping[str, Any]) -> None:
        """Note in the site's signed audit log what an account does; what cannot be noted is not done.

        Raises:
            TrustError: the log cannot be written.
        """
        self.log.append(Event.CONSOLE_ACTION, account=account, action=action, **details)

    def read_ahead(self) -> None:
        """Read what pages will show, so that the first of them need not: logs and ledgers of years take seconds once.

        What is in force as policy is kept with it, before anybody changes it here. What cannot be read, its page tells.
        """
        for read in (self.policies.settle, self.budgets.all, self.releases.latest_round, self.requests.all):
            try:
                read()
            except SilotuneError as error:
                log.warning("%s", error)


def content_of(asked: Asked) -> SiteContent:
    """Return what the console that was asked shows."""
    content: SiteContent = asked.console.content
    return content
