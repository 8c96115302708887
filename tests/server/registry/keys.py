"""Keys of the people in these tests."""

from __future__ import annotations

from shared.trust.signing import SigningKey

SIGNER, OFFICER, STRANGER = (SigningKey.from_bytes(bytes([number]) * 32) for number in (1, 2, 3))
KEYS = {"sam": SIGNER, "olga": OFFICER, "stan": STRANGER}
