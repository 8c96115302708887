"""Browsers that accounts signed in with before, each by a sealed cookie; they open nothing and only count by themselves.

Without them whoever reaches the page could keep an officer out by wrong tries under the name (OWASP calls them device cookies).

Formal guarantees (tests: tests/shared/web/test_attempts.py)
    * Once known browsers of an account were ended, none is known until somebody signs in there again
      (tests/shared/web/test_accounts.py, test_known_browsers_end).
    * A cookie that this console did not seal, of another account, or older than half a year knows nobody
      (test_a_cookie_of_another_knows_nobody).
"""

from __future__ import annotations

import json
import secrets

from shared.errors import TrustError
from shared.trust.keystore import Seal

SECONDS = 180 * 86_400
_MOST_ACCOUNTS = 5
_CONTEXT = "known device"


def device_of(seal: Seal, cookie: str, account: str, *, now: int) -> str | None:
    """Return what names the browser of an account (see `known_as`); None if it is not known."""
    device, accounts = _opened(seal, cookie)
    return f"{device}/{account}" if accounts.get(account, 0) > now else None


def known_as(account: str, ended: int) -> str:
    """Return what an account is called in cookies, after its known browsers were ended so many times."""
    return f"{account}.{ended}" if ended else account


def cookie_of(seal: Seal, cookie: str, account: str, *, now: int) -> str:
    """Return the cookie of a browser with which an account has just signed in, beside those that did before."""
    device, accounts = _opened(seal, cookie)
    same = account.partition(".")[0]
    kept = [(one, until) for one, until in accounts.items() if until > now and one.partition(".")[0] != same]
    known = dict([*kept, (account, now + SECONDS)][-_MOST_ACCOUNTS:])
    return seal.seal(json.dumps([device, known]).encode(), context=_CONTEXT).hex()


def _opened(seal: Seal, cookie: str) -> tuple[str, dict[str, int]]:
    try:
        device, accounts = json.loads(seal.open(bytes.fromhex(cookie), context=_CONTEXT))
    except (TrustError, ValueError):
        return secrets.token_hex(16), {}
    return device, accounts
