"""Pages of a process for whoever watches the machine: plain HTTP, on loopback unless somebody chose otherwise.

Guarantees (tests: tests/shared/service/test_page.py)
    * GET alone; a request of more than 8 KB, or that takes longer than five seconds, is dropped.
    * On loopback only requests that call this machine localhost or by a loopback address are answered, so that no web page can
      read the answers through a browser here (DNS rebinding).
    * A few threads answer, whoever asks and however often; nothing here ends or holds up the process.
"""

from __future__ import annotations

import contextlib
import functools
import io
import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException, parse_headers
from typing import Annotated

from pydantic import AfterValidator

log = logging.getLogger("silotune.metrics")

OFF = "off"
_WORKERS = 2
_WAITING = 16
_HEAD_BYTES = 8192
_REQUEST_SECONDS = 5.0
_KEPT_SECONDS = 1.0
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    421: "Misdirected Request",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


@dataclass(frozen=True)
class Page:
    """An answer.

    Attributes:
        status: of HTTP.
        content_type: of `body`.
    """

    status: int
    content_type: str
    body: bytes


def _parsed(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    if not (port.isascii() and port.isdecimal() and int(port) < 2**16) or (address.version == 6) != host.startswith(
        "["
    ):
        raise ValueError
    return str(address), int(port)


def _checked(listen: str) -> str:
    if listen != OFF:
        try:
            _parsed(listen)
        except ValueError:
            raise ValueError(f'expected ADDRESS:PORT, such as "127.0.0.1:9492" or "[::1]:9492", or "{OFF}"') from None
    return listen


Listen = Annotated[str, AfterValidator(_checked)]
"""Where pages are served: an address with its port (0: any that is free), or "off"."""


class Pages:
    """Serves pages until `close`.

    Args:
        listen: see `Listen`.
        routes: what makes each page, by its path; called from several threads, at most once a second each.

    Attributes:
        told: where they are served, or why they are not; None if nobody wants them.
    """

    def __init__(self, listen: str, routes: Mapping[str, Callable[[], Page]]) -> None:
        self._routes = {path: _Kept(make) for path, make in routes.items()}
        self._listener: socket.socket | None = None
        self._closed = False
        self._noted = -1e9
        self._loopback = True
        self.told: str | None = None
        if listen != OFF:
            self._open(*_parsed(listen))

    def close(self) -> None:
        """Stop listening."""
        self._closed = True
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes those who wait in `accept`
            self._listener.close()

    def _open(self, host: str, port: int) -> None:
        self._loopback = ipaddress.ip_address(host).is_loopback
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=_WAITING)
        except OSError as error:
            # Of several nodes on one machine, whoever comes second; it is no reason to do no work.
            self.told = f"not served: {host} port {port} cannot be listened on ({error.strerror}); set metrics_listen"
            log.warning("metrics are %s", self.told)
            return
        shown = f"[{host}]" if ":" in host else host
        self.told = f"http://{shown}:{self._listener.getsockname()[1]}/metrics"
        log.log(logging.INFO if self._loopback else logging.WARNING, "metrics: %s", self.told)
        if not self._loopback:
            log.warning(
                "metrics_listen is no loopback address: whoever reaches that port reads them, without a password"
            )
        for number in range(_WORKERS):
            threading.Thread(target=self._work, args=(self._listener,), name=f"metrics-{number}", daemon=True).start()

    def _work(self, listener: socket.socket) -> None:
        while not self._closed:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed, or no descriptor is left
                time.sleep(0.0 if self._closed else 1.0)
                continue
            with connection:
                try:
                    self._answer(connection)
                except OSError:  # gone, or too slow
                    pass
                except Exception:
                    if time.monotonic() - self._noted > 60:
                        self._noted = time.monotonic()
                        log.exception("a page could not be made")

    def _answer(self, connection: socket.socket) -> None:
        deadline = time.monotonic() + _REQUEST_SECONDS
        head = _read_head(connection, deadline)
        if head is None:
            return
        page = None
        try:
            page = self._page(head)
        finally:
            page = page or _plain(500, "see the log")
            lines = [
                f"HTTP/1.1 {page.status} {_REASONS[page.status]}",
                f"Content-Type: {page.content_type}",
                f"Content-Length: {len(page.body)}",
                "Cache-Control: no-store",
                "X-Content-Type-Options: nosniff",
                *(["Allow: GET"] if page.status == 405 else []),
                "Connection: close",
            ]
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            connection.sendall("\r\n".join([*lines, "", ""]).encode() + page.body)

    def _page(self, head: bytes) -> Page:
        line, _, rest = head.partition(b"\r\n")
        words = line.decode("latin-1").split(" ")
        try:
            hosts = parse_headers(io.BytesIO(rest)).get_all("Host", [])
        except HTTPException:
            hosts = []
        if len(words) != 3 or not words[2].startswith("HTTP/1.") or len(hosts) != 1:
            return _plain(400, "this is no request of HTTP/1.1")
        if self._loopback and not _is_here(hosts[0]):
            return _plain(421, "ask for localhost, or for a loopback address")
        if words[0] != "GET":
            return _plain(405, "GET alone is answered")
        route = self._routes.get(words[1].partition("?")[0])
        return _plain(404, f"there are {', '.join(self._routes)}") if route is None else route()


class _Kept:
    """A page that is made at most once a second, and by one thread at a time."""

    def __init__(self, make: Callable[[], Page]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._page: Page | None = None
        self._until = -1e9

    def __call__(self) -> Page:
        with self._lock:
            if self._page is None or time.monotonic() >= self._until:
                self._page, self._until = self._make(), time.monotonic() + _KEPT_SECONDS
            return self._page


def _read_head(connection: socket.socket, deadline: float) -> bytes | None:
    """Return a request up to its empty line; None if it does not come, in time and within bounds."""
    head = b""
    while b"\r\n\r\n" not in head:
        left = deadline - time.monotonic()
        if left <= 0 or len(head) > _HEAD_BYTES:
            return None
        connection.settimeout(left)
        part = connection.recv(_HEAD_BYTES)
        if not part:
            return None
        head += part
    return head


@functools.lru_cache(maxsize=64)
def _is_here(host: str) -> bool:
    """Return whether a Host header names this machine, by a name that no stranger's DNS can give to it."""
    name = host.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _plain(status: int, text: str) -> Page:
    return Page(status, "text/plain; charset=utf-8", f"{text}\n".encode())
