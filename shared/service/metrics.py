"""The pages `/metrics` (text format of Prometheus) and `/healthz` of a process, from the facts that its `status` shows.

Only numbers that somebody chose stand there: no CPU time and no memory of the process, as Prometheus' own collectors would give,
for at a site they follow from its records (decision 0024).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from shared.service.machine import Certificate, Trouble
from shared.service.page import Page
from shared.version import silotune_version

Samples = Iterable[tuple[Mapping[str, str], float | bool | None]]


def gauge(name: str, text: str, samples: Samples) -> Metric:
    """Return a number of each set of labels; those that are None are left out."""
    return _filled(GaugeMetricFamily, name, text, samples)


def counter(name: str, text: str, value: float) -> Metric:
    """Return a number that only grows; its name gets the end `_total`."""
    return _filled(CounterMetricFamily, name, text, [({}, value)])


def _filled(family: Any, name: str, text: str, samples: Samples) -> Metric:
    kept = [(labels, value) for labels, value in samples if value is not None]
    keys = list(kept[0][0]) if kept else []
    made: Metric = family(f"silotune_{name}", text, labels=keys)
    for labels, value in kept:
        made.add_metric([labels[key] for key in keys], float(value))  # type: ignore[attr-defined]
    return made


def moment(text: str | None) -> float | None:
    """Return the seconds since 1970 of a time in a status."""
    return None if text is None else datetime.fromisoformat(text).timestamp()


def common(
    said: Mapping[str, Any], found: Sequence[Trouble], kinds: Iterable[str], certificates: Iterable[Certificate]
) -> Iterator[Metric]:
    """Yield what both sides tell.

    Args:
        said: what the process says of itself.
        found: what is wrong.
        kinds: of all troubles that there may be.
        certificates: and their ends.
    """
    wrong = {trouble.kind for trouble in found}
    yield gauge("build_info", "The version that runs.", [({"version": silotune_version()}, 1)])
    yield gauge("start_time_seconds", "When the process began.", [({}, moment(said.get("started")))])
    yield gauge("status_time_seconds", "When it last came round.", [({}, moment(said.get("updated")))])
    yield gauge("healthy", "1: nothing is wrong.", [({}, not found)])
    yield gauge("trouble", "1: this is wrong; /healthz says what to do.", [({"kind": k}, k in wrong) for k in kinds])
    ends = [({"kind": one.kind, "name": one.name}, one.until.timestamp()) for one in certificates]
    yield gauge("certificate_end_time_seconds", "When a certificate or the revocation list ends.", ends)
    clock = said.get("clock") or {}
    known = clock.get("synchronized")
    yield gauge(
        "clock_synchronized", "1: a time server keeps the clock; absent: the kernel does not say.", [({}, known)]
    )
    yield gauge("clock_set_seconds", "By how much the clock was set last while it ran.", [({}, clock.get("set_by"))])
    yield gauge("descriptors_limit", "File descriptors that it may have.", [({}, _limit(said))])


def _limit(said: Mapping[str, Any]) -> float | None:
    return (said.get("descriptors") or {}).get("limit")


def routes(
    metrics: Callable[[], Iterable[Metric]], troubles: Callable[[], Sequence[Trouble]]
) -> dict[str, Callable[[], Page]]:
    """Return the pages for `Pages`.

    Args:
        metrics: all that `/metrics` tells.
        troubles: what is wrong; 503 if anything is.
    """

    class All(Collector):
        def collect(self) -> Iterable[Metric]:  # see `Collector`
            return metrics()

    registry = CollectorRegistry(auto_describe=False)
    registry.register(All())

    def healthz() -> Page:
        found = troubles()
        told = {"healthy": not found, "troubles": [trouble._asdict() for trouble in found]}
        return Page(503 if found else 200, "application/json", (json.dumps(told) + "\n").encode())

    return {
        "/metrics": lambda: Page(200, CONTENT_TYPE_PLAIN_0_0_4, generate_latest(registry)),
        "/healthz": healthz,
    }
