"""What an application of ours is to a server (ASGI), and by which names a browser may call it."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def is_named(host: str, names: Collection[str], *, loopback: bool) -> bool:
    """Return whether a Host header names this service; a port does not matter, as the port was reached.

    Args:
        loopback: the machine's own names count as well.
    """
    name = host.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    if name in names or f"*.{name.partition('.')[2]}" in names:
        return True
    if not loopback:
        return False
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
