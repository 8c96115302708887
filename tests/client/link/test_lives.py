"""Whether a node's client hangs: what its signs of life to the service manager follow."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from client.link.client import Credentials, LinkClient
from client.link.failures import Unreachable
from shared.link.frames import Welcome
from shared.link.line import Parcel
from tests.integration.eventually import eventually


class Site:
    """A client without a coordinator, whose steps a test holds up."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.asked = threading.Event()
        self.hung = False
        self.client = LinkClient("localhost:1", self._credentials, self._answer)
        self.thread = threading.Thread(target=self.client.run, daemon=True)

    def _credentials(self) -> Credentials:
        if self.hung:
            self.free.wait(30)
        raise Unreachable("nobody is there")

    def _answer(self, parcel: Parcel, welcome: Welcome) -> bytes | None:
        self.asked.set()
        self.free.wait(30)
        return None

    def ask(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let one request arrive."""
        self.client._welcome = Welcome(1, "a", "0.2.0")
        came = iter([Parcel(bytes(16), b"", b"")])
        monkeypatch.setattr(
            self.client._letterbox, "next_request", lambda seconds: next(came, None) or time.sleep(0.01)
        )
        monkeypatch.setattr(self.client._letterbox, "answer", lambda request, payload: None)


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.free.set()
    made.client.stop()
    made.thread.join(10)


def test_a_client_lives_that_waits_for_its_coordinator(site: Site) -> None:
    site.thread.start()
    assert site.client.lives(5.0)


def test_a_client_whose_connection_hangs_does_not(site: Site) -> None:
    site.hung = True
    site.thread.start()
    assert eventually(lambda: not site.client.lives(0.6))
    site.free.set()
    assert eventually(lambda: site.client.lives(0.6))


def test_a_client_that_answers_lives_however_long_it_takes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.ask(monkeypatch)
    site.hung = True
    site.thread.start()
    assert site.asked.wait(10)
    assert site.client.lives(0.0)
    site.free.set()
    assert eventually(lambda: not site.client._answering)
