"""Pages of a process for whoever watches the machine: plain HTTP, on loopback unless somebody chose otherwise.

Guarantees (tests: tests/shared/service/test_page.py)
    * GET alone; a request of more than 8 KB, or that takes longer than five seconds, is dropped.
    * On loopback only requests that call this machine localhost or by a loopback address are answered, so that no web page can
      read the answers through a browser here (DNS rebinding).
    * A few threads answer, whoever asks and however often; nothing here ends or holds up the process.
    * Requests are read side by side: who connects and says nothing holds nobody up. Of more connections than are kept the one
      that has waited longest gives way.
"""

from __future__ import annotations

import contextlib
import functools
import io
import ipaddress
import logging
import queue
import selectors
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
_WAITING = 64
_HEAD_BYTES = 8192
_REQUEST_SECONDS = 5.0
_KEPT_SECONDS = 1.0
_LOOK_SECONDS = 0.5
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
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits for it
            self._listener.close()

    def _open(self, host: str, port: int) -> None:
        self._loopback = ipaddress.ip_address(host).is_loopback
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=_WAITING)
            reading = _Reading(self._listener)
        except OSError as error:
            self.close()
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
        asked: queue.Queue[_Request] = queue.Queue(_WAITING)
        threading.Thread(target=self._receive, args=(reading, asked), name="metrics", daemon=True).start()
        for number in range(_WORKERS):
            threading.Thread(target=self._work, args=(asked,), name=f"metrics-{number}", daemon=True).start()

    def _receive(self, reading: _Reading, asked: queue.Queue[_Request]) -> None:
        """Read requests, and hand on those that are whole."""
        with reading:
            while not self._closed:
                for request in reading.whole():
                    try:
                        asked.put_nowait(request)
                    except queue.Full:
                        request.connection.close()

    def _work(self, asked: queue.Queue[_Request]) -> None:
        while not self._closed:
            try:
                request = asked.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                continue
            with request.connection:
                try:
                    self._answer(request)
                except OSError:  # gone, or too slow
                    pass
                except Exception:
                    if time.monotonic() - self._noted > 60:
                        self._noted = time.monotonic()
                        log.exception("a page could not be made")

    def _answer(self, request: _Request) -> None:
        page = None
        try:
            page = self._page(request.head)
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
            request.connection.settimeout(max(0.01, request.deadline - time.monotonic()))
            request.connection.sendall("\r\n".join([*lines, "", ""]).encode() + page.body)

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


class _Request:
    """A request on its way.

    Attributes:
        connection: on which it comes.
        deadline: until then it must have come, and its answer left.
        head: what came.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.head = connection, b""
        self.deadline = time.monotonic() + _REQUEST_SECONDS


class _Reading:
    """Reads requests up to their empty lines, side by side; drops those that do not come, in time and within bounds."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener, self._selector = listener, selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._requests: dict[_Request, None] = {}  # the oldest first

    def __enter__(self) -> _Reading:
        return self

    def __exit__(self, *_: object) -> None:
        for request in list(self._requests):
            self._drop(request)
        self._selector.close()

    def whole(self) -> list[_Request]:
        """Wait a moment, and return the requests that have come."""
        found = []
        for key, _ in self._selector.select(_LOOK_SECONDS):
            request: _Request | None = key.data
            if request is None:
                self._accept()
            elif request in self._requests and self._read(request):
                self._let_go(request)
                found.append(request)
        now = time.monotonic()
        for request in [request for request in self._requests if request.deadline <= now]:
            self._drop(request)
        return found

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # closed, or no descriptor is left
            if self._requests:
                self._drop(next(iter(self._requests)))
            else:
                time.sleep(_LOOK_SECONDS)
            return
        if len(self._requests) >= _WAITING:
            self._drop(next(iter(self._requests)))
        connection.setblocking(False)
        request = _Request(connection)
        self._requests[request] = None
        self._selector.register(connection, selectors.EVENT_READ, request)

    def _read(self, request: _Request) -> bool:
        """Read what is there, and return whether the request is whole."""
        try:
            part = request.connection.recv(_HEAD_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            part = b""
        request.head += part
        if b"\r\n\r\n" in request.head:
            return True
        if not part or len(request.head) > _HEAD_BYTES:
            self._drop(request)
        return False

    def _let_go(self, request: _Request) -> None:
        del self._requests[request]
        self._selector.unregister(request.connection)

    def _drop(self, request: _Request) -> None:
        self._let_go(request)
        request.connection.close()


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
