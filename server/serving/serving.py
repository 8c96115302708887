"""A service from its command to its end: it answers until it is told to end, and says where."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.serving.access.accounts import Accounts
from server.serving.application import Application, Route, Service, document, healthz, metrics, models, predict
from server.serving.asking import Desk
from server.serving.completing import Completing
from server.serving.completions import completions
from server.serving.engine import Batching
from server.serving.explaining import Explaining, explain
from server.serving.following import Following, registry_opener
from server.serving.limits import Limits
from server.serving.models import Plan
from server.serving.monitoring.drift import Drift, DriftPlan
from shared.errors import ConfigError, place_of
from shared.http.serving import Place, address_of, listen, make_server, place_at, serve
from shared.service.logs import sparing
from shared.service.manager import ServiceManager

log = logging.getLogger("silotune.serving")

_GRACE_SECONDS = 30
ROUTES = {
    "/v1/predict": Route("POST", predict, "predict"),
    "/v1/explain": Route("POST", explain, "explain"),
    "/v1/completions": Route("POST", completions, "completions"),
    "/v1/models": Route("GET", models),
    "/healthz": Route("GET", healthz, open=True),
    "/metrics": Route("GET", metrics, "metrics"),
    "/openapi.json": Route("GET", document, open=True),
}


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a service begins with; see the options of `silotune serve`."""

    reference: str
    registry: Path
    policy: Path | None
    place: Place
    plan: Plan
    limits: Limits
    tokens: Path | None
    drift: DriftPlan | None = None


def place_of_service(host: str, port: int, certificate: Path | None, key: Path | None, tokens: Path | None) -> Place:
    """Return where to serve; without tokens on loopback alone.

    Raises:
        ConfigError, TrustError: as `place_at`; also if anybody on the network could ask.
    """
    place = place_at(host, port, certificate, key)
    if tokens is None and not place.loopback:
        raise ConfigError(
            f"{place.host} can be reached from other machines, and without --tokens anybody there may ask. Make a token file "
            "(silotune tokens add NAME --tokens FILE) and name it, or leave --host out."
        )
    return place


def run(start: Start, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM; see `shared.http.serving.serve`."""
    listener = listen(start.place)
    sparing(log)
    with listener:
        service = open_service(start)
        manager = ServiceManager()
        try:
            server = make_server(
                quiet(Application(service, ROUTES)),
                start.place,
                connections=start.limits.of_connections,
                grace_seconds=_GRACE_SECONDS,
            )
            address = address_of(start.place, listener.getsockname()[1])

            def ready() -> None:
                for line in told(service, address):
                    say(line)
                manager.ready()

            serve(server, listener, ready=ready, again=f"silotune serve {start.reference}")
            manager.stopping()
        finally:
            close(service)


def open_service(start: Start) -> Service:
    """Return a service whose model is verified and loaded."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would take the engine's cores
    accounts = None if start.tokens is None else Accounts(start.tokens)
    following = Following(registry_opener(start.registry, start.policy), start.reference, start.plan)
    drift = None if start.drift is None else Drift(start.drift, following.model)
    continues = following.model.kind in ("causal_lm", "replies")
    engine = Completing(start.limits) if continues else Batching(start.limits, start.plan.at_once)
    return Service(
        following,
        engine,
        Desk(start.limits),
        start.limits,
        accounts,
        start.place.names,
        drift=drift,
        explaining=Explaining() if start.plan.explain else None,
        warning=lambda: start.place.trouble(datetime.now(UTC)) or _not_taken_over(following),
    )


def _not_taken_over(following: Following) -> str | None:
    # The reason may hold paths, and anybody may ask.
    return following.trouble and "the version to which the reference leads is not served; the log says why"


def close(service: Service) -> None:
    """End its threads; what is booked is written."""
    service.following.close()
    service.engine.close()
    service.desk.close()
    if service.explaining is not None:
        service.explaining.close()
    if service.drift is not None:
        service.drift.close()
    if service.accounts is not None:
        service.accounts.close()


def told(service: Service, address: str) -> list[str]:
    """Return what whoever started it is told."""
    following = service.following
    model = following.model
    signed = "verified" if model.manifest_sha256 else "not from a registry, so nobody signed it"
    path = "v1/completions" if isinstance(service.engine, Completing) else "v1/predict"
    lines = [
        f"{following.how} ({signed}), {model.kind}, {model.engine}, {model.precision}",
        f"serving {following.name} at {address}{path}",
    ]
    if service.accounts is None:
        lines.append("no token is asked for: every program on this machine may ask")
    return [*lines, "stop it with Ctrl-C"]


def quiet(application: Application) -> Any:
    """Return the application; what asyncio would log of a task that failed, texts of errors included, is its place alone."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        loop = asyncio.get_running_loop()
        if loop.get_exception_handler() is None:
            loop.set_exception_handler(_log_place)
        await application(scope, receive, send)

    return app


def _log_place(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    if isinstance(error, BaseException):
        log.error("a task failed: %s", place_of(error))
