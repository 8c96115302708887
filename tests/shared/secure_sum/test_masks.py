"""Masks are what their standards say they are, of all bits of a secret that only two know."""

from __future__ import annotations

import functools
import hashlib
import hmac
import struct
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import TrustError
from shared.secure_sum import masks
from shared.secure_sum.masks import WORD, add_masks, agree, check_canonical, check_order, mask_key

PRIME = 2**255 - 19
# Of order 1, 2, 4, 8 and 8 on the curve or its twist (Wycheproof, x25519_test.json, flag LowOrderPublic).
LOW_ORDER = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]
# A public key in another writing, a private key and what they share (the same file, flag NonCanonicalPublic, tests 87 to 98).
NON_CANONICAL = [
    (
        "efffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "0016b62af5cabde8c40938ebf2108e05d27fa0533ed85d70015ad4ad39762d54",
        "b4d10e832714972f96bd3382e4d082a21a8333a16315b3ffb536061d2482360d",
    ),
    (
        "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "98c2b08cbac14e15953154e3b558d42bb1268a365b0ef2f22725129d8ac5cb7f",
        "9c034fcd8d3bf69964958c0105161fcb5d1ea5b8f8abb371491e42a7684c2322",
    ),
    (
        "0400000000000000000000000000000000000000000000000000000000000080",
        "20620d82487707bedf9ee3549e95cb9390d2618f50cf6acba47ffaa103224a6f",
        "03a633df01480d0d5048d92f51b20dc1d11f73e9515c699429b90a4f6903122a",
    ),
    (
        "ebffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
        "b8d499041a6713c0f6f876db7406587fdb44582f9542356ae89cfa958a34d266",
        "63483b5d69236c63cddbed33d8e22baecc2b0ccf886598e863c844d2bf256704",
    ),
]


def private(text: str) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(bytes.fromhex(text))


def number(value: int) -> bytes:
    return value.to_bytes(32, "little")


# --- an independent reading of the RFCs ---


def reference_hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869, 2.2 and 2.3, for 32 bytes."""
    extracted = hmac.new(salt, secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\1", hashlib.sha256).digest()


def _times(a: int, b: int) -> int:
    """Multiply in GF(2^8), FIPS 197, 4.2."""
    product = 0
    while b:
        product ^= a if b & 1 else 0
        a = a << 1 ^ (0x11B if a & 0x80 else 0)
        b >>= 1
    return product


def _substitute(byte: int) -> int:
    """FIPS 197, 5.1.1: the inverse, then an affine map."""
    inverse = next((other for other in range(256) if _times(byte, other) == 1), 0)
    return functools.reduce(lambda found, turn: found ^ (inverse << turn | inverse >> (8 - turn)) & 255, range(5), 0x63)


S_BOX = bytes(map(_substitute, range(256)))
TWICE, THRICE = (bytes(_times(byte, factor) for byte in range(256)) for factor in (2, 3))


def reference_block(key: bytes, block: bytes) -> bytes:
    """AES-256 of one block, FIPS 197, 5.1 and 5.2."""
    words, constant = [key[i : i + 4] for i in range(0, 32, 4)], 1
    for index in range(8, 60):
        last = words[-1]
        if index % 4 == 0:
            last = bytes(S_BOX[byte] for byte in (last[1:] + last[:1] if index % 8 == 0 else last))
        if index % 8 == 0:
            last, constant = bytes([last[0] ^ constant]) + last[1:], _times(constant, 2)
        words.append(bytes(a ^ b for a, b in zip(words[-8], last, strict=True)))
    keys = [b"".join(words[i : i + 4]) for i in range(0, 60, 4)]
    state = bytes(a ^ b for a, b in zip(block, keys[0], strict=True))
    for number, round_key in enumerate(keys[1:], 1):
        state = bytes(S_BOX[state[(5 * place) % 16]] for place in range(16))  # bytes substituted, rows shifted
        if number < 14:
            columns = [state[i : i + 4] for i in range(0, 16, 4)]
            state = bytes(
                TWICE[c[i]] ^ THRICE[c[(i + 1) % 4]] ^ c[(i + 2) % 4] ^ c[(i + 3) % 4]
                for c in columns
                for i in range(4)
            )
        state = bytes(a ^ b for a, b in zip(state, round_key, strict=True))
    return state


def reference_stream(key: bytes, count: int, counter: int = 0) -> bytes:
    """SP 800-38A, 6.5, of plaintext zero; the counter is the whole block (appendix B.1)."""
    blocks = (count + 15) // 16
    return b"".join(reference_block(key, (counter + i).to_bytes(16, "big")) for i in range(blocks))[:count]


def reference_mask_key(secret: bytes, context: bytes, first: tuple[str, bytes], second: tuple[str, bytes]) -> bytes:
    info = b"silotune/mask-key/2"
    for name, key in sorted((first, second)):
        info += struct.pack(">I", len(name)) + name.encode() + key
    return reference_hkdf(secret, context, info)


# --- vectors ---


def test_rfc_7748() -> None:
    for scalar, point, expected in (  # section 5.2; bit 255 of the second point is set there, and counts as zero
        (
            "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
            "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
        ),
        (
            "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
            "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a413",
            "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
        ),
    ):
        assert agree(private(scalar), bytes.fromhex(point), "b").hex() == expected
    # Section 6.1.
    alice = private("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = private("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    for own, other in ((alice, bob), (bob, alice)):
        assert agree(own, other.public_key().public_bytes_raw(), "other").hex() == shared
    # Section 5.2, a thousand times.
    scalar = point = number(9)
    for _ in range(1000):
        scalar, point = (
            X25519PrivateKey.from_private_bytes(scalar).exchange(X25519PublicKey.from_public_bytes(point)),
            scalar,
        )
    assert scalar.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


def test_rfc_5869() -> None:
    """Appendix A.1 to A.3, of the library; what is used of it is compared with a reading of its own below."""
    for secret, salt, info, length, expected in (
        (
            b"\x0b" * 22,
            bytes(range(13)),
            bytes(range(0xF0, 0xFA)),
            42,
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            bytes(range(80)),
            bytes(range(0x60, 0xB0)),
            bytes(range(0xB0, 0x100)),
            82,
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
            "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
        ),
        (
            b"\x0b" * 22,
            b"",
            b"",
            42,
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ):
        assert HKDF(hashes.SHA256(), length=length, salt=salt, info=info).derive(secret).hex() == expected
        assert reference_hkdf(secret, salt, info).hex() == expected[:64]


def test_fips_197_and_sp_800_38a() -> None:
    plain, cipher = bytes.fromhex("00112233445566778899aabbccddeeff"), "8ea2b7ca516745bfeafc49904b496089"
    assert reference_block(bytes(range(32)), plain).hex() == cipher  # FIPS 197, appendix C.3
    # SP 800-38A, F.5.5.
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = (
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    assert Cipher(AES256(key), CTR(counter)).encryptor().update(plain).hex() == cipher
    stream = reference_stream(key, 64, int.from_bytes(counter, "big"))
    assert bytes(a ^ b for a, b in zip(plain, stream, strict=True)).hex() == cipher
    # Of the key zero, the mask's first block: AES-256 of the block zero (AESAVS, all zero).
    words = np.zeros(2, WORD)
    add_masks(words, plus=[bytes(32)], minus=[])
    assert words.tobytes().hex() == "dc95c078a2408989ad48a21492842087"


# --- keys ---


@pytest.mark.parametrize("text", LOW_ORDER)
def test_a_key_of_small_order_is_refused(text: str) -> None:
    raw = bytes.fromhex(text)
    check_canonical(raw, "b")
    for _ in range(3):
        with pytest.raises(TrustError, match="key of b gives a secret that everybody knows"):
            agree(X25519PrivateKey.generate(), raw, "b")
    with pytest.raises(TrustError, match="key of b gives a secret that everybody knows"):
        check_order(raw, "b")


def test_a_key_of_large_order_passes() -> None:
    for own in (X25519PrivateKey.generate() for _ in range(20)):
        check_canonical(own.public_key().public_bytes_raw(), "b")
        check_order(own.public_key().public_bytes_raw(), "b")


@pytest.mark.parametrize(("alias", "own", "shared"), NON_CANONICAL)
def test_another_writing_of_a_key_gives_the_same_secret_and_is_refused(alias: str, own: str, shared: str) -> None:
    raw = bytes.fromhex(alias)
    assert agree(private(own), raw, "b").hex() == shared
    canonical = number(int.from_bytes(raw, "little") % 2**255 % PRIME)
    assert canonical != raw
    assert agree(private(own), canonical, "b").hex() == shared
    check_canonical(canonical, "b")
    with pytest.raises(TrustError, match="key of b is not 32 bytes in canonical form"):
        check_canonical(raw, "b")


@pytest.mark.parametrize(
    "key",
    [
        number(PRIME),
        number(PRIME + 1),
        number(2**255 - 1),
        number(2**255),
        number(2**255 + 9),
        number(2**256 - 1),
        b"",
        number(9)[:31],
        number(9) + b"\0",
        "9" * 32,
        bytearray(number(9)),
        None,
    ],
)
def test_what_is_no_canonical_key_is_refused(key: object) -> None:
    check_canonical(number(PRIME - 1), "b")
    with pytest.raises(TrustError, match="canonical"):
        check_canonical(key, "b")


# --- mask keys ---

NAMES = st.text("abYZ09._-", max_size=63).map("a".__add__)
PARTY = st.tuples(NAMES, st.binary(min_size=32, max_size=32))
SECRET = st.binary(min_size=32, max_size=32)
MaskKey = Callable[[bytes, bytes, tuple[str, bytes], tuple[str, bytes]], bytes]


def check_every_bit_counts(derive: MaskKey) -> None:
    """Assert that a mask key changes with every bit of the secret, the context, both names and both public keys."""
    secret, context, first, second = bytes(range(32)), bytes(32), ("a", bytes(range(32, 64))), ("b", bytes(32))
    seen = {derive(secret, context, first, second)}
    assert len(next(iter(seen))) == 32
    flips = [(1 << bit).to_bytes(32, "little") for bit in range(256)]

    def changed(raw: bytes) -> Iterator[bytes]:
        return (bytes(a ^ b for a, b in zip(raw, flip, strict=True)) for flip in flips)

    seen |= {derive(other, context, first, second) for other in changed(secret)}
    seen |= {derive(secret, other, first, second) for other in changed(context)}
    seen |= {derive(secret, context, (first[0], other), second) for other in changed(first[1])}
    seen |= {derive(secret, context, first, (second[0], other)) for other in changed(second[1])}
    seen |= {derive(secret, context, (name, first[1]), second) for name in ("c", "aa", "a.")}
    assert len(seen) == 1 + 4 * 256 + 3


def check_no_birthday(derive: MaskKey, count: int = 200_000) -> None:
    """Assert that `count` mask keys are distinct: of 2^32 possible ones, some five pairs would be equal."""
    found = {
        derive(struct.pack("<4Q", index, 0, 0, index), bytes(32), ("a", b""), ("b", b"")) for index in range(count)
    }
    assert len(found) == count


def test_a_mask_key_is_of_all_bits() -> None:
    check_every_bit_counts(mask_key)
    check_no_birthday(mask_key)


def of_four_bytes(secret: bytes, context: bytes, first: tuple[str, bytes], second: tuple[str, bytes]) -> bytes:
    return mask_key(secret[:4] + bytes(28), context, first, second)


def cut_to_four_bytes(secret: bytes, context: bytes, first: tuple[str, bytes], second: tuple[str, bytes]) -> bytes:
    return hashlib.sha256(mask_key(secret, context, first, second)[:4]).digest()


@pytest.mark.parametrize("derive", [of_four_bytes, lambda secret, *_: secret])
def test_a_mask_key_of_some_bits_is_found(derive: MaskKey) -> None:
    with pytest.raises(AssertionError):
        check_every_bit_counts(derive)


def test_seeds_of_32_bits_are_found() -> None:
    # Flower's SecAgg+ draws at most 2^28 different seeds; here the derivation is cut, though every bit goes into it.
    check_every_bit_counts(cut_to_four_bytes)
    with pytest.raises(AssertionError):
        check_no_birthday(cut_to_four_bytes)


@settings(deadline=None)
@given(SECRET, SECRET, PARTY, PARTY)
def test_a_mask_key_is_hkdf_of_the_secret_for_one_context_and_pair(
    secret: bytes, context: bytes, first: tuple[str, bytes], second: tuple[str, bytes]
) -> None:
    found = mask_key(secret, context, first, second)
    assert found == mask_key(secret, context, second, first)
    assert found == reference_mask_key(secret, context, first, second)


# --- streams ---


@settings(max_examples=25, deadline=None)
@given(st.lists(SECRET, max_size=3), st.lists(SECRET, max_size=3), st.integers(1, 40))
def test_masks_are_streams_added_and_subtracted(plus: list[bytes], minus: list[bytes], count: int) -> None:
    start = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    found = start.astype(WORD)
    add_masks(found, plus=plus, minus=minus)
    for place in range(count):
        expected = int(start[place])
        for sign, keys in ((1, plus), (-1, minus)):
            for key in keys:
                stream = reference_stream(key, 8 * count)
                expected += sign * int.from_bytes(stream[8 * place : 8 * place + 8], "little")
        assert int(found[place]) == expected % 2**64


@pytest.mark.parametrize("count", [masks._BLOCK_WORDS + change for change in (-1, 0, 1)] + [3 * masks._BLOCK_WORDS + 5])
def test_a_stream_goes_on_from_block_to_block(count: int) -> None:
    key = bytes(range(32))
    words = np.zeros(count, WORD)
    add_masks(words, plus=[key], minus=[])
    whole = Cipher(AES256(key), CTR(bytes(16))).encryptor().update(bytes(8 * count))
    assert words.tobytes() == whole
    add_masks(words, plus=[], minus=[key])
    assert not words.any()
