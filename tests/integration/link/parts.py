"""A consortium on disk, and both ends of the link on loopback."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from client.link.client import Credentials, Handler, LinkClient, NodeEvents
from server.link.events import LinkEvents
from server.link.server import LinkFiles, LinkServer
from shared.errors import SilotuneError
from shared.link.frames import Welcome
from shared.link.line import Parcel
from shared.trust import pki
from shared.trust.certificates import pem_bytes
from shared.trust.node_keys import save_server_key
from shared.trust.trust_store import TrustStore

HOST = "127.0.0.1"


def eventually(condition: Callable[[], Any], *, timeout: float = 30.0) -> Any:
    """Return the first true value of `condition`."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"it did not happen within {timeout:g} s"
        time.sleep(0.01)
    return found


class Consortium:
    """A CA, the coordinator's files, and sites that are admitted."""

    def __init__(self, folder: Path, sites: tuple[str, ...] = ("a", "b")) -> None:
        self.ca, self.trust = folder / "ca", folder / "trust"
        for path in (self.ca, self.trust / "sites"):
            path.mkdir(parents=True, mode=0o700)
        pki.create_ca(self.ca, name="consortium", passphrase=None)
        key, request = pki.make_request(name="coordinator", role="server", hosts=["localhost", HOST])
        certificate = pki.approve(self.ca, request, role="server", hosts=["localhost", HOST], passphrase=None)
        self.files = LinkFiles(certificate=folder / "server.pem", key=folder / "server.key", trust=self.trust)
        self.files.certificate.write_bytes(pem_bytes(certificate))
        save_server_key(self.files.key, key, None)
        (self.trust / "ca.crt").write_bytes((self.ca / "ca.crt").read_bytes())
        self.publish()
        self.credentials = {name: self.admit(name) for name in sites}

    def publish(self) -> None:
        """Copy the revocation list to the trust store, as `silotune pki publish` does."""
        temporary = self.trust / ".crl"
        temporary.write_bytes((self.ca / "crl.pem").read_bytes())
        temporary.replace(self.trust / "crl.pem")

    def certify(self, name: str, *, rotate: bool = False) -> tuple[ec.EllipticCurvePrivateKey, bytes]:
        """Return a key and its certificate."""
        key, request = pki.make_request(name=name, role="site")
        return key, pem_bytes(pki.approve(self.ca, request, role="site", passphrase=None, rotate=rotate))

    def crowd(self, number: int) -> list[Credentials]:
        """Return the credentials of many sites that are admitted."""
        found = []
        for n in range(number):
            found.append(self.admit(f"site-{n:04}"))
            for issued in (self.ca / "issued").iterdir():
                issued.unlink()  # else the CA compares each request with all before
        return found

    def admit(self, name: str, *, rotate: bool = False) -> Credentials:
        """Return the credentials of a site whose certificate lies in the trust store."""
        key, certificate = self.certify(name, rotate=rotate)
        TrustStore(self.trust).install(certificate)
        return self.shown(key, certificate)

    def shown(self, key: ec.EllipticCurvePrivateKey, certificate: bytes) -> Credentials:
        """Return credentials."""
        plain = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return Credentials(ca=(self.trust / "ca.crt").read_bytes(), certificate=certificate, key=plain)

    def revoke(self, name: str) -> None:
        """Revoke a site and publish it."""
        pki.revoke(self.ca, name, passphrase=None)
        self.publish()


@dataclass
class Heard(LinkEvents, NodeEvents):
    """What either end told, in words."""

    events: list[tuple[str, ...]] = field(default_factory=list)
    open: set[str] = field(default_factory=set)

    def connected(self, *facts: Any) -> None:  # type: ignore[override]
        if isinstance(facts[0], Welcome):
            self.events.append(("welcome", facts[0].site))
        else:
            self.open.add(facts[0])
            self.events.append(("connected", facts[0]))

    def disconnected(self, site: str, reason: str) -> None:
        self.open.discard(site)
        self.events.append(("disconnected", site, reason))

    def refused(self, name: str, peer: str, reason: str) -> None:
        self.events.append(("refused", name, reason))

    def twin(self, site: str, peer: str) -> None:
        self.events.append(("twin", site))

    def trouble(self, error: SilotuneError) -> None:
        self.events.append(("trouble", type(error).__name__, str(error)))

    def noticed(self, text: str) -> None:
        self.events.append(("noticed", text))

    def of(self, kind: str) -> list[tuple[str, ...]]:
        """Return the events of one kind."""
        return [event for event in self.events if event[0] == kind]


@contextlib.contextmanager
def serving(consortium: Consortium, *, port: int = 0, host: str = HOST) -> Iterator[tuple[LinkServer, Heard]]:
    """Run the coordinator's end."""
    heard = Heard()
    with LinkServer(f"{host}:{port}", consortium.files, events=heard) as server:
        yield server, heard


def echo(request: Parcel, welcome: Welcome) -> bytes:
    """Answer with what came, and the site's name."""
    return welcome.site.encode() + b":" + request.payload


@contextlib.contextmanager
def site(
    port: int, credentials: Credentials, handler: Handler = echo, **options: Any
) -> Iterator[tuple[LinkClient, Heard]]:
    """Run a site's end."""
    heard = Heard()
    client = LinkClient(f"localhost:{port}", lambda: credentials, handler, events=heard, **options)
    thread = threading.Thread(target=client.run, daemon=True)
    thread.start()
    try:
        yield client, heard
    finally:
        client.stop()
        thread.join(timeout=30)
        assert not thread.is_alive()
