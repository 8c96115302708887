"""One TLS handshake with a coordinator, without gRPC: it tells more clearly than gRPC what is wrong with a certificate."""

from __future__ import annotations

import base64
import socket
import ssl
import time
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from client.link.failures import Unreachable
from shared.errors import RunError, TrustError

_MOST_HEAD_BYTES = 65536


@dataclass(frozen=True, kw_only=True)
class TlsFacts:
    """What a TLS handshake with the coordinator showed."""

    tls_version: str
    alpn: str | None
    cipher: str


def tls_facts(address: str, ca_certificate: bytes, *, proxy: str | None = None, timeout: float = 10.0) -> TlsFacts:
    """Make one TLS handshake with the coordinator, as gRPC does but with no certificate of our own, and return what was agreed.

    Args:
        address: host:port.
        ca_certificate: PEM.
        proxy: see `LinkClient`.

    Raises:
        TrustError: the certificate does not hold: another CA, expired, another host.
        Unreachable: no connection, or no TLS on the other side.
        RunError: the address is none.
    """
    host, port = split_address(address)
    context = ssl.create_default_context(cadata=ca_certificate.decode("ascii"))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    try:
        with (
            _connected(host, port, proxy, timeout) as plain,
            context.wrap_socket(plain, server_hostname=host) as wrapped,
        ):
            cipher = wrapped.cipher()
            return TlsFacts(
                tls_version=wrapped.version() or "none",
                alpn=wrapped.selected_alpn_protocol(),
                cipher=cipher[0] if cipher else "none",
            )
    except ssl.SSLCertVerificationError as error:
        raise TrustError(
            f"the certificate of {address} does not hold: {error.verify_message}. Check that ca.crt is the consortium's, that "
            "the address is one the certificate was made for, and this machine's clock."
        ) from None
    except ssl.SSLError as error:
        raise Unreachable(f"{address} does not speak TLS as expected ({error.reason}).") from None
    except OSError as error:
        through = "" if proxy is None else f" through the proxy {urlsplit(proxy).hostname}"
        raise Unreachable(
            f"the coordinator at {address} cannot be reached{through} ({error.strerror or error}); check the address, that the "
            "coordinator runs, and that the firewall lets this machine open connections to it."
        ) from None


def _connected(host: str, port: int, proxy: str | None, timeout: float) -> socket.socket:
    """Return a connection, through an HTTP proxy by CONNECT (RFC 9110, section 9.3.6) if one was named."""
    if proxy is None:
        return socket.create_connection((host, port), timeout=timeout)
    named = urlsplit(proxy)
    made = socket.create_connection((named.hostname or "", named.port or 0), timeout=timeout)
    try:
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        if named.username is not None:
            who = f"{unquote(named.username)}:{unquote(named.password or '')}"
            lines.append(f"Proxy-Authorization: Basic {base64.b64encode(who.encode()).decode()}")
        made.sendall("\r\n".join([*lines, "", ""]).encode())
        head, until = b"", time.monotonic() + timeout
        # Byte by byte: what follows the head belongs to TLS.
        while not head.endswith(b"\r\n\r\n") and len(head) < _MOST_HEAD_BYTES and (byte := made.recv(1)):
            head += byte
            made.settimeout(max(until - time.monotonic(), 1e-3))  # for the whole head, however slowly it comes
        made.settimeout(timeout)
        status = head.split(b"\r\n", 1)[0].decode("latin-1")
        if " 200" not in status:
            raise OSError(f"it answered {status[:80]!r}" if status else "it closed the connection")
    except BaseException:
        made.close()
        raise
    return made


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of "host:port" or "[v6]:port".

    Raises:
        RunError: if it is neither, or there is no such port.
    """
    host, _, port = address.rpartition(":")
    name = host.removeprefix("[").removesuffix("]")
    bare_v6 = ":" in name and host != f"[{name}]"
    if not (name and name.isprintable() and port.isascii() and port.isdecimal()) or bare_v6 or set(name) & set(" /@[]"):
        raise RunError(f"the address {address!r} is not of the form host:port, for example fl.example.org:9092.")
    if len(port) > 5 or not 0 < int(port) < 2**16:
        raise RunError(f"the address {address!r} is not of the form host:port with a port from 1 to 65,535.")
    return name, int(port)
