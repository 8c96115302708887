"""What the pages of a coordinator's console are made from: its folder, and the key that signs its audit log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.console.promises import Planner
from server.console.reports import Reports
from server.console.runs import Runs
from server.console.said import Said
from server.console.sites import Sites
from server.store.home import CoordinatorHome
from shared.trust.audit_log import AuditLog
from shared.web.asked import Asked
from shared.web.live import Streams
from shared.web.opening import note


@dataclass(frozen=True, kw_only=True)
class CoordinatorContent:
    """A coordinator's folder, opened for its console.

    Attributes:
        home: the folder.
        log: its audit log, to which every action of the console is added.
        said: what the running coordinator says of itself.
        runs: every submitted job.
        planner: what jobs promise.
        reports: makes them.
        sites: who may connect.
        streams: the browsers that follow what happens.
    """

    home: CoordinatorHome
    log: AuditLog
    said: Said
    runs: Runs
    planner: Planner
    reports: Reports
    sites: Sites
    streams: Streams

    def record(self, account: str, action: str, details: Mapping[str, Any]) -> None:
        """Note what an account does, see `shared.web.opening.note`."""
        note(self.log, account, action, details)


def content_of(asked: Asked) -> CoordinatorContent:
    """Return what the console that was asked shows."""
    content: CoordinatorContent = asked.console.content
    return content
