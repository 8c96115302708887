"""Services that answer over real HTTP in a thread of this process, and how they are asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from server.serving.application import Application, Service
from server.serving.limits import Limits
from server.serving.models import Plan
from server.serving.monitoring.drift import DriftPlan
from server.serving.serving import ROUTES, Start, close, open_service, quiet
from shared.http.serving import listen, make_server, place_at

_CLIENT = httpx.Client(timeout=30)  # making one takes longer than asking


@dataclass
class Live:
    """A service, and where it is."""

    service: Service
    address: str

    @property
    def port(self) -> int:
        """Of it."""
        return int(self.address.rpartition(":")[2])

    def client(self, token: str | None = None, **options: Any) -> httpx.Client:
        """Return a client that shows a token."""
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        return httpx.Client(base_url=self.address, headers=headers, timeout=30, **options)

    def post(self, path: str, body: Any, token: str | None = None) -> httpx.Response:
        """Ask once."""
        return self.ask("POST", path, token, json=body)

    def ask(self, method: str, path: str, token: str | None = None, **options: Any) -> httpx.Response:
        """Ask once, over a connection that is kept."""
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        return _CLIENT.request(method, self.address + path, headers=headers, **options)


@contextmanager
def live(
    reference: str,
    registry: Path,
    *,
    tokens: Path | None = None,
    plan: Plan = Plan("torch"),  # noqa: B008 (frozen)
    drift: DriftPlan | None = None,
    **limits: Any,
) -> Iterator[Live]:
    """Serve a model while the block lasts."""
    place, bounds = place_at("127.0.0.1", 0, None, None), Limits(**limits)
    start = Start(
        reference=reference,
        registry=registry,
        policy=None,
        place=place,
        plan=plan,
        limits=bounds,
        tokens=tokens,
        drift=drift,
    )
    service = open_service(start)
    with listen(place) as listener:
        server = make_server(quiet(Application(service, ROUTES)), place, connections=bounds.of_connections)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
        thread.start()
        try:
            yield Live(service, f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join(20)
            close(service)


def events(response: httpx.Response) -> list[Any]:
    """Return what a stream of events held; the last is "[DONE]"."""
    found = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    return [one if one == "[DONE]" else json.loads(one) for one in found]
