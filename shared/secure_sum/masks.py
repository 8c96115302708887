"""Masks between two sites: a key agreed by X25519, from it one stream of AES-256, which one adds and the other subtracts.

    shared secret = X25519(own key, the other's key)                                       RFC 7748
    mask key      = HKDF-SHA256(shared secret, salt: context, info: both names and keys)   RFC 5869
    mask          = AES-256(mask key, 0), AES-256(mask key, 1), ... as little-endian words of 64 bits   FIPS 197, SP 800-38A 6.5

A mask key is for one stream, because the context is of one roster and both public keys of one attempt. Arithmetic is modulo
2^64, so a masked input is as uniform as the stream, and masks of a pair cancel exactly.

Guarantee (tests: tests/shared/secure_sum/test_masks.py, against the vectors of the standards): the mask is this, for all bits of
the secret; a shared secret that is zero, and a public key in another than its one writing, are a `TrustError`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from shared.errors import TrustError

WORD = np.dtype("<u8")
_PRIME = 2**255 - 19
_MASK_KEY = b"silotune/mask-key/2"
_SHA256 = hashes.SHA256()
_BLOCK_WORDS = 1 << 14  # 128 KiB: stream, zeros and sum of a block stay in the processor's cache
_ZEROS = bytes(8 * _BLOCK_WORDS)
# Any key shows whether another has a small order: all private ones are multiples of eight.
_PROBE = X25519PrivateKey.from_private_bytes(bytes(32))


def check_canonical(public_key: object, site: str) -> None:
    """Check that a public key is written in its one way: below 2^255 - 19, little-endian, bit 255 zero.

    X25519 itself takes the others as well (RFC 7748, section 5), so one key would have several writings, and keys that differ
    in bytes would not be distinct.

    Raises:
        TrustError: if not.
    """
    if (
        not isinstance(public_key, bytes)
        or len(public_key) != 32
        or int.from_bytes(public_key, "little") >= _PRIME  # also where bit 255 is set
    ):
        raise TrustError(
            f"the X25519 key of {site} is not 32 bytes in canonical form; it was made to pass for another."
        )


def check_order(public_key: bytes, site: str) -> None:
    """Check that an agreement with this key depends on both sides.

    Raises:
        TrustError: if it would be zero with every key.
    """
    agree(_PROBE, public_key, site)


def agree(own: X25519PrivateKey, public_key: bytes, site: str) -> bytes:
    """Return the secret shared with the owner of `public_key`, 32 bytes; `site` names them in the error.

    Raises:
        TrustError: if it is zero, as it is for keys of small order, whatever the own key.
    """
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(public_key))
    except ValueError:
        raise TrustError(
            f"the X25519 key of {site} gives a secret that everybody knows; it is no honest key."
        ) from None


def mask_key(secret: bytes, context: bytes, first: tuple[str, bytes], second: tuple[str, bytes]) -> bytes:
    """Return the key of the stream that two sites share under one context, 32 bytes.

    Args:
        secret: that they share, 32 bytes.
        context: of the roster, 32 bytes.
        first, second: name and public key of each, in either order.
    """
    info = _MASK_KEY
    for name, public_key in sorted((first, second)):
        info += len(name).to_bytes(4, "big") + name.encode() + public_key
    return HKDF(_SHA256, length=32, salt=context, info=info).derive(secret)


def add_masks(words: NDArray[np.uint64], *, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
    """Add the streams of some mask keys to `words` and subtract those of others, in place, modulo 2^64.

    Args:
        words: [d], contiguous, of `WORD`.
        plus, minus: mask keys, 32 bytes each.
    """
    # A key is for one stream only, so all begin to count at zero (why AES: docs/decisions/0029).
    streams = [
        (operation, Cipher(AES256(key), CTR(bytes(16))).encryptor())
        for operation, keys in ((np.add, plus), (np.subtract, minus))
        for key in keys
    ]
    buffer = np.empty(_BLOCK_WORDS, WORD)
    for start in range(0, len(words), _BLOCK_WORDS):
        block = words[start : start + _BLOCK_WORDS]
        mask = buffer[: len(block)]
        data, zeros = mask.data.cast("B"), _ZEROS[: mask.nbytes]
        for operation, stream in streams:
            stream.update_into(zeros, data)
            operation(block, mask, out=block)
