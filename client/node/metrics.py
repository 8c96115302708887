"""The node's pages for monitoring: facts and troubles of `site status`, as numbers.

Nothing stands there that follows from a record (decision 0024): not whether the node trains, since when or how long, not what it
left out, not what is free on its disk to the byte, no CPU time and no memory.
Nor does the ledger: `silotune site ledger` shows that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from prometheus_client.core import Metric

from client.node.health import KINDS, certificates, down, is_connected, troubles
from client.site.home import SiteHome
from shared.service.machine import Trouble, is_alive
from shared.service.metrics import common, gauge, moment, routes
from shared.service.page import Page


def pages(home: SiteHome, name: str, said: Callable[[], dict[str, Any]]) -> dict[str, Callable[[], Page]]:
    """Return the pages of a node.

    Args:
        home: its folder.
        name: of the site.
        said: returns what it says of itself now.
    """

    def looked(told: dict[str, Any]) -> dict[str, Any]:
        # When it wrote last tells when a request came and when it was answered.
        return told | {"updated": told.get("looked") or told["started"]}

    def found(told: dict[str, Any]) -> list[Trouble]:
        return troubles(home, told) if is_alive(looked(told)) else [down(home)]

    def metrics() -> Iterator[Metric]:
        told = said()
        yield from common(looked(told), found(told), KINDS, certificates(home, name))
        connected = is_connected(told)
        yield gauge("node_connected", "1: connected to the coordinator.", [({"site": name}, connected)])
        last = moment(told.get("last_connected"))
        yield gauge("node_last_connected_time_seconds", "When it was connected last.", [({"site": name}, last)])
        since = moment(told.get("since"))
        waiting = 0.0 if connected or since is None else datetime.now(UTC).timestamp() - since
        yield gauge(
            "node_waiting_seconds", "How long it has been waiting for the coordinator.", [({"site": name}, waiting)]
        )

    return routes(metrics, lambda: found(said()))
