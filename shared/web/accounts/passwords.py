"""Passwords: their rule, and argon2id.

Formal guarantees (tests: tests/shared/web/test_accounts.py)
    * Only argon2id hashes are kept (test_a_password_is_kept_as_argon2id).
    * Checking takes as long whether an account has a password, or is there at all (test_unknown_names_take_as_long).
    * At most two are computed at once, in two threads of their own: allocators keep what a thread needed for that thread, so
      that many who try would fill the memory for good (tests/client/console/test_process.py).
"""

from __future__ import annotations

import unicodedata
from concurrent.futures import ThreadPoolExecutor

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from shared.errors import SilotuneError

LEAST_CHARACTERS, MOST_CHARACTERS = 12, 256

# RFC 9106 leaves memory to the machine; a site's console shares one with training. OWASP's least: 19 MiB, two passes.
_HASHER = PasswordHasher(time_cost=2, memory_cost=19 << 10, parallelism=1)
_WORKERS = ThreadPoolExecutor(2, thread_name_prefix="password")
_NOBODYS = _HASHER.hash("nobody has this password")


class Unsuitable(SilotuneError):
    """A password or a name that cannot be taken.

    Attributes:
        key: of the message in `texts/`.
    """

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def hashed(password: str, *, name: str) -> str:
    """Return the hash to keep.

    Raises:
        Unsuitable: it is too short, too long, or the account's name.
    """
    if len(password) < LEAST_CHARACTERS:
        raise Unsuitable("password_short")
    if len(password) > MOST_CHARACTERS:
        raise Unsuitable("password_long")
    if len(set(password)) < 5 or name.casefold() in password.casefold():
        raise Unsuitable("password_plain")
    return _WORKERS.submit(_HASHER.hash, _bytes(password)).result()


def fits(password: str, kept: str | None) -> bool:
    """Return whether a password is the one that was kept; without one it takes as long, and is not."""
    try:
        _WORKERS.submit(_HASHER.verify, kept or _NOBODYS, _bytes(password[: MOST_CHARACTERS + 1])).result()
    except (VerificationError, InvalidHashError):
        return False
    return kept is not None


def _bytes(password: str) -> bytes:
    """Return what is hashed: one and the same, on whatever keyboard accents are typed."""
    return unicodedata.normalize("NFC", password).encode(errors="surrogatepass")
