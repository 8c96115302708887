"""Whether the service on this machine can answer, for health checks of containers: `python -m server.serving.probe URL`.

It needs the standard library alone, so it ends within a tenth of a second, and shows no token. The certificate is not
checked: the one who asks and the one who answers share a loopback address, and no secret is sent.
"""

from __future__ import annotations

import http.client
import ssl
import sys
from urllib.parse import urlsplit

_SECONDS = 5.0


def healthy(url: str) -> bool:
    """Return whether 200 is answered there within seconds; it must be on loopback."""
    place = urlsplit(url)
    if place.hostname not in ("127.0.0.1", "::1", "localhost"):
        raise SystemExit(f"error: {place.hostname} is not this machine; expected https://127.0.0.1:PORT/healthz.")
    connection: http.client.HTTPConnection
    if place.scheme == "https":
        unchecked = ssl._create_unverified_context()  # noqa: S323 (see the module)
        connection = http.client.HTTPSConnection(place.hostname, place.port, timeout=_SECONDS, context=unchecked)
    else:
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=_SECONDS)
    try:
        connection.request("GET", place.path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(0 if healthy(sys.argv[1]) else 1)
