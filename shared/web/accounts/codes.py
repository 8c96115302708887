"""Codes of authenticators (TOTP, RFC 6238: SHA-1, six digits, 30 seconds), and codes that invite.

Guarantee (tests: tests/shared/web/test_accounts.py, `test_a_code_counts_once`): a code that was used, and every older one, is
refused from then on; whoever keeps the steps does that (`shared.web.accounts.accounts`).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from io import BytesIO

import pyotp
import segno

STEP_SECONDS = 30
_STEPS_BESIDE = 1  # clocks differ
_ALPHABET = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"  # without what looks alike


def new_secret() -> str:
    """Return a secret for an authenticator, 160 bits in base 32."""
    return pyotp.random_base32(32)


def step_of(secret: str, code: str, now: int) -> int | None:
    """Return the step of time that a code belongs to; None if it is none of now or of the moments beside it."""
    typed = "".join(code.split())
    found = None
    for step in range(now // STEP_SECONDS - _STEPS_BESIDE, now // STEP_SECONDS + _STEPS_BESIDE + 1):
        if hmac.compare_digest(pyotp.HOTP(secret).at(step).encode(), typed.encode(errors="replace")):
            found = step
    return found


def enrolment(secret: str, *, name: str, issuer: str) -> tuple[str, str]:
    """Return the address that an authenticator reads, and its picture (SVG)."""
    address = pyotp.TOTP(secret).provisioning_uri(name=name, issuer_name=issuer)
    picture = BytesIO()
    segno.make(address, error="m").save(
        picture, kind="svg", xmldecl=False, svgns=True, border=4, scale=4, dark="#000", light="#fff", nl=False
    )
    return address, picture.getvalue().decode()


def new_invitation() -> str:
    """Return a code for one who is invited, 80 bits in groups of four."""
    letters = "".join(secrets.choice(_ALPHABET) for _ in range(16))
    return "-".join(letters[i : i + 4] for i in range(0, 16, 4))


def invitation_hash(code: str) -> str:
    """Return under what an invitation is kept, however its code is typed."""
    return hashlib.sha256("".join(c for c in code.upper() if c.isalnum()).encode()).hexdigest()
