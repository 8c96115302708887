"""A link that signs in: 256 random bits that the terminal prints to whoever started the console. No password, no account to make.

Formal guarantees (tests: tests/simulations/console/test_link.py)
    * A link counts once; from then on only the next one does, which the terminal prints in its place
      (test_a_link_counts_once).
    * It is used by a form that a page of this console sent, so no preview and no foreign page uses it up
      (test_looking_at_a_link_does_not_use_it, test_another_origin_cannot_use_it).
    * Nothing limits attempts: to guess one of 2^256 is hopeless, and a limit would let others on the machine lock the owner out.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from collections.abc import Callable


class OneTimeLink:
    """The link that counts now; none before `begin`.

    Args:
        say: is told the path of every new link.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._lock = say, threading.Lock()
        self._kept: bytes | None = None

    def begin(self) -> None:
        """Make a link and say it; one that counted before does so no more."""
        code = secrets.token_urlsafe(32)
        self._kept = _hash(code)
        self._say(f"link/{code}")

    def use(self, code: str) -> bool:
        """Use up a code; return whether it is the one that counts."""
        with self._lock:
            right = self._kept is not None and hmac.compare_digest(_hash(code), self._kept)
            if right:
                self.begin()
            return right


def _hash(code: str) -> bytes:
    return hashlib.sha256(code.encode(errors="replace")).digest()
