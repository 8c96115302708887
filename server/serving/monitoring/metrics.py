"""Numbers for monitoring: how much was asked, how fast it was answered, what waits; no text, no label, no token's name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from shared.service.metrics import counter, gauge
from shared.version import silotune_version

if TYPE_CHECKING:
    from server.serving.application import Service

_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Counts:
    """How many requests there were, by path and status, and how long their answers took."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self._buckets: dict[str, list[int]] = {}
        self._seconds: Counter[str] = Counter()

    def add(self, path: str, status: int, seconds: float) -> None:
        """Count one; of paths that there are not the caller gives one word."""
        self.requests[path, status] += 1
        buckets = self._buckets.setdefault(path, [0] * (len(_BOUNDS) + 1))
        buckets[next((i for i, bound in enumerate(_BOUNDS) if seconds <= bound), len(_BOUNDS))] += 1
        self._seconds[path] += seconds  # type: ignore[assignment]

    def families(self) -> Iterable[Metric]:
        """Yield both."""
        family = CounterMetricFamily("silotune_requests", "Requests, by path and status.", labels=["path", "status"])
        for (path, status), count in sorted(self.requests.items()):
            family.add_metric([path, str(status)], count)
        yield family
        histogram = HistogramMetricFamily("silotune_request_seconds", "Until a request was answered.", labels=["path"])
        for path, buckets in sorted(self._buckets.items()):
            sums = [sum(buckets[: i + 1]) for i in range(len(buckets))]
            ends = [*map(str, _BOUNDS), "+Inf"]
            histogram.add_metric(
                [path], [(end, float(n)) for end, n in zip(ends, sums, strict=True)], self._seconds[path]
            )
        yield histogram


def page(service: Service) -> tuple[str, bytes]:
    """Return content type and text of `/metrics`."""

    class All(Collector):
        def collect(self) -> Iterable[Metric]:  # see `Collector`
            return _all(service)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(All())
    return CONTENT_TYPE_PLAIN_0_0_4, generate_latest(registry)


def _all(service: Service) -> Iterable[Metric]:
    engine, following = service.engine, service.following
    model = {
        "version": following.model.version,
        "engine": following.model.engine,
        "precision": following.model.precision,
    }
    yield gauge("build_info", "The version that runs.", [({"version": silotune_version()}, 1)])
    yield gauge("start_time_seconds", "When the service began.", [({}, service.began)])
    yield gauge("healthy", "1: it can answer.", [({}, not service.troubles)])
    yield gauge("model_info", "The model that answers.", [(model, 1)])
    yield gauge(
        "model_refused", "1: the alias names a version that is not served.", [({}, following.trouble is not None)]
    )
    yield counter("model_changes", "How often another version took over.", following.changes)
    yield gauge("waiting_texts", "Texts that wait for the engine.", [({}, engine.waiting)])
    yield gauge("waiting_texts_limit", "How many may.", [({}, service.limits.queue)])
    told = engine.told
    yield counter("batches", "Batches or steps that were computed.", told.batches)
    yield counter("texts", "Texts that were answered.", told.texts)
    yield counter("tokens", "Tokens that were computed.", told.tokens)
    yield counter("padded_tokens", "The same, padding included.", told.padded)
    yield counter("compute_seconds", "Seconds in which the engine computed.", told.seconds)
    if service.drift is not None:
        yield from service.drift.families()
    yield from service.counts.families()
