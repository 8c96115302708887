"""Messages of the secure sum have one way of writing, one of being signed, and bounds; other bytes are one error."""

from __future__ import annotations

import hashlib
import re
from dataclasses import fields, replace
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import TrustError
from shared.files.json_files import canonical_json
from shared.limits import MAX_RECORDS, MAX_STEPS
from shared.secure_sum import messages
from shared.secure_sum.messages import (
    MOST_CERTIFICATE_BYTES,
    MOST_READY_BYTES,
    MOST_SITES,
    MOST_WORDS,
    Masked,
    Ready,
    context,
    pack_roster,
    unpack_roster,
)
from shared.trust.signing import Purpose, signed_bytes
from tests.shared.secure_sum.attempts import new_key

KEY = new_key()
WHAT: dict[str, Any] = {
    "site": "a",
    "job_sha256": "0" * 64,
    "round_number": 3,
    "attempt": 1,
    "adapter_sha256": "1" * 64,
    "declared_records": 64,
    "public_key": bytes(range(32)),
    "certificate": b"certificate",
}
READY = Ready(**WHAT).signed_by(KEY)
MASKED = Masked(site="a", context=bytes(range(32)), words=bytes(range(24))).signed_by(KEY, READY)
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256

NAMES = st.text("abYZ09._-", max_size=63).map("a".__add__)
DIGESTS = st.binary(min_size=32, max_size=32).map(bytes.hex)
PUBLIC_KEYS = st.integers(0, 2**255 - 20).map(lambda value: value.to_bytes(32, "little"))
READIES = st.builds(
    Ready,
    site=NAMES,
    job_sha256=DIGESTS,
    round_number=st.integers(0, MAX_STEPS),
    attempt=st.integers(0, MAX_STEPS),
    adapter_sha256=DIGESTS,
    declared_records=st.integers(1, MAX_RECORDS),
    public_key=PUBLIC_KEYS,
    certificate=st.binary(max_size=100),
    signature=st.binary(max_size=72),
)
MASKEDS = st.builds(
    Masked,
    site=NAMES,
    context=st.binary(min_size=32, max_size=32),
    words=st.integers(1, 9).flatmap(lambda count: st.binary(min_size=8 * count, max_size=8 * count)),
    signature=st.binary(max_size=72),
)


# --- bytes ---


@settings(deadline=None)
@given(st.lists(READIES, max_size=4).map(tuple), MASKEDS)
def test_what_was_written_is_read(roster: tuple[Ready, ...], masked: Masked) -> None:
    for ready in roster:
        assert Ready.from_bytes(ready.to_bytes()) == ready
    assert unpack_roster(pack_roster(roster)) == roster
    assert Masked.from_bytes(masked.to_bytes()) == masked


def test_the_largest_that_is_allowed_is_read() -> None:
    largest = Ready(
        site="a" * 64,
        job_sha256="f" * 64,
        round_number=MAX_STEPS,
        attempt=MAX_STEPS,
        adapter_sha256="f" * 64,
        declared_records=MAX_RECORDS,
        public_key=(2**255 - 20).to_bytes(32, "little"),
        certificate=bytes(MOST_CERTIFICATE_BYTES),
        signature=bytes(72),
    )
    assert Ready.from_bytes(largest.to_bytes()) == largest
    roster = (largest,) * MOST_SITES
    assert unpack_roster(pack_roster(roster)) == roster


def test_the_longest_input_that_is_allowed_is_read() -> None:
    longest = Masked(site="a" * 64, context=bytes(32), words=bytes(8 * MOST_WORDS), signature=bytes(72))
    assert MOST_WORDS == 2**24
    assert Masked.from_bytes(longest.to_bytes()) == longest
    with pytest.raises(TrustError, match="its words must be 8 to 134,217,728 bytes"):
        replace(longest, words=bytes(8 * MOST_WORDS + 8))


READERS = [(Ready.from_bytes, READY.to_bytes()), (Masked.from_bytes, MASKED.to_bytes()),
           (unpack_roster, pack_roster((READY, replace(READY, site="b"))))]  # fmt: skip
# Of the fields: what was read is kept as it was, and would always be the same.
WRITERS = [
    lambda found: replace(found).to_bytes(),
    lambda found: replace(found).to_bytes(),
    lambda found: pack_roster(tuple(map(replace, found))),
]


def check_only_way(which: int, data: bytes) -> None:
    """Assert that bytes are refused, or are what is written of what was read."""
    refused = ""
    try:
        found = READERS[which][0](data)
    except TrustError as error:
        refused = str(error)
    if refused:
        assert len(refused) < 300
        assert re.match("a message of the secure sum cannot be read: |the X25519 key of ", refused)
    else:
        assert WRITERS[which](found) == data


def test_what_is_made_of_a_message_that_was_read_is_written_anew() -> None:
    read = Ready.from_bytes(READY.to_bytes())
    assert read == READY
    assert hash(read) == hash(READY)
    assert read.to_bytes() == replace(read).to_bytes() == READY.to_bytes()
    other = replace(read, attempt=2)
    assert Ready.from_bytes(other.to_bytes()) == other != read
    assert context((other,)) == context((replace(READY, attempt=2),)) != context((read,)) == context((READY,))


@pytest.mark.parametrize(("which", "most"), [(0, "4,608"), (1, "134,218,240"), (2, "4,612,064")])
def test_bytes_are_counted_before_they_are_read(which: int, most: str) -> None:
    with pytest.raises(TrustError, match=f"it is longer than {most} bytes"):
        READERS[which][0](bytes(int(most.replace(",", "")) + 1))
    with pytest.raises(TrustError, match=r"it is no|too many parts"):
        READERS[which][0](bytes(int(most.replace(",", ""))))


@pytest.mark.parametrize("which", range(3))
def test_there_is_one_way_of_writing_a_message(which: int) -> None:
    """Every byte changed in several ways, left out or doubled; every beginning; something after the end."""
    whole = READERS[which][1]
    for place in range(len(whole)):
        for flip in (1, 0x80, 0xFF):
            check_only_way(which, whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
        check_only_way(which, whole[:place] + whole[place + 1 :])
        check_only_way(which, whole[: place + 1] + whole[place:])
        beginning = whole[:place]
        if which < 2 or place not in (21, 21 + 4 + len(READY.to_bytes())):  # a roster of none, and of one
            with pytest.raises(TrustError, match="cannot be read"):
                READERS[which][0](beginning)
    for rest in (b"\0", bytes(4), whole):
        with pytest.raises(TrustError, match="cannot be read"):
            READERS[which][0](whole + rest)


@pytest.mark.parametrize("which", range(2))
def test_every_part_has_one_length(which: int) -> None:
    """Parts longer or shorter, with their lengths said rightly: a number in nine bytes, half a digest, a name that is none."""
    kind, read = ((messages._READY, Ready.from_bytes), (messages._MASKED, Masked.from_bytes))[which]
    parts = messages._unpack(READERS[which][1], kind, count=(9, 4)[which], most=10_000)
    for place, part in enumerate(parts):
        for other in (part[1:], b"\0" + part, part + b"\0", part[:-1], b"", part * 2, b"\xff" + part[1:]):
            check_only_way(which, messages._pack(kind, *parts[:place], other, *parts[place + 1 :]))
    assert read(messages._pack(kind, *parts)) == (READY, MASKED)[which]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2), st.binary(max_size=300) | st.lists(st.binary(max_size=40), max_size=12).map(
    lambda parts: messages._pack(*parts)) | st.builds(
    lambda kind, parts: messages._pack(kind, *parts),
    st.sampled_from([messages._READY, messages._MASKED, messages._ROSTER]),
    st.lists(st.binary(max_size=40) | st.just(bytes(32)) | st.just(bytes(8)) | st.just(b"a"), max_size=12)))  # fmt: skip
def test_hostile_bytes_are_one_error(which: int, data: bytes) -> None:
    check_only_way(which, data)


def test_one_kind_is_not_read_as_another() -> None:
    for which, (_, data) in enumerate(READERS):
        for other, (read, _) in enumerate(READERS):
            if which != other:
                with pytest.raises(TrustError, match=r"it is no silotune/|it has too many parts"):
                    read(data)


def test_what_is_too_long_is_refused_before_it_is_read() -> None:
    with pytest.raises(TrustError, match="it is longer than 4,608 bytes"):
        Ready.from_bytes(bytes(MOST_READY_BYTES + 1))
    with pytest.raises(TrustError, match="it is longer than"):
        Masked.from_bytes(bytes(messages.MOST_MASKED_BYTES + 1))
    with pytest.raises(TrustError, match="it is longer than"):
        unpack_roster(bytes(messages.MOST_ROSTER_BYTES + 1))
    with pytest.raises(TrustError, match="it has too many parts"):
        unpack_roster(pack_roster((READY,) * (MOST_SITES + 1)))
    # Four bytes are enough for an empty part: they are counted, not collected.
    with pytest.raises(TrustError, match="it has too many parts"):
        unpack_roster(bytes(messages.MOST_ROSTER_BYTES))


# --- bounds ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("site", value) for value in ("", ".a", "a" * 65, "a b", "a\n", "ä", "a/b", "\ud800", 1, None)],
        *[("job_sha256", value) for value in ("", "0" * 63, "0" * 65, "A" * 64, "0" * 64 + "\n", b"0" * 64)],
        *[("adapter_sha256", value) for value in ("", "0" * 63, "0" * 65, "g" * 64, None)],
        *[(name, value) for name in ("round_number", "attempt") for value in (-1, MAX_STEPS + 1, True, 1.0, "1", 10**400)],
        *[("declared_records", value) for value in (0, -1, MAX_RECORDS + 1, True, 64.0)],
        *[("public_key", value) for value in (b"", bytes(31), bytes(33), b"\xff" * 32, "9" * 32)],
        *[("certificate", value) for value in (bytes(MOST_CERTIFICATE_BYTES + 1), "", None, bytearray(3))],
        *[("signature", value) for value in (bytes(73), None)],
    ],
)  # fmt: skip
def test_a_field_out_of_its_bounds_is_refused(name: str, value: object) -> None:
    expected = {"site": "its name is no name", "public_key": "the X25519 key of a is not"}.get(
        name, f"its {name} (is|must be) "
    )
    with pytest.raises(TrustError, match=expected) as caught:
        Ready(**{**WHAT, "signature": b"", name: value})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("site", "a b"),
        ("context", bytes(31)),
        ("context", bytes(33)),
        ("context", "0" * 32),
        ("words", b""),
        ("words", bytes(7)),
        ("words", bytes(9)),
        ("words", memoryview(bytes(8))),
        ("signature", bytes(73)),
    ],
)
def test_a_masked_input_out_of_bounds_is_refused(name: str, value: object) -> None:
    expected = {"site": "its name is no name"}.get(name, f"its {name} (must be|are) ")
    with pytest.raises(TrustError, match=expected):
        Masked(**{**{f.name: getattr(MASKED, f.name) for f in fields(Masked)}, name: value})


def test_a_key_in_another_writing_is_refused() -> None:
    own = int.from_bytes(READY.public_key, "little")
    for alias in (own + 2**255, own % 19 + 2**255 - 19):
        data = READY.to_bytes().replace(READY.public_key, alias.to_bytes(32, "little"))
        with pytest.raises(TrustError, match="X25519 key of a is not 32 bytes in canonical form"):
            Ready.from_bytes(data)


# --- context ---


def test_the_context_is_the_documented_one() -> None:
    roster = (READY, replace(READY, site="b"))
    parts = [b"silotune/roster/1"]
    for ready in roster:
        inner = [
            b"silotune/ready/2",
            ready.site.encode(),
            bytes(32),
            (3).to_bytes(8, "big"),
            (1).to_bytes(8, "big"),
            b"\x11" * 32,
            (64).to_bytes(8, "big"),
            ready.public_key,
            ready.certificate,
            ready.signature,
        ]
        parts.append(b"".join(len(part).to_bytes(4, "big") + part for part in inner))
    whole = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    assert context(roster) == hashlib.sha256(b"silotune/secure-sum/1\0" + whole).digest()


@settings(deadline=None)
@given(st.lists(READIES, max_size=3).map(tuple), st.lists(READIES, max_size=3).map(tuple))
def test_two_rosters_have_two_contexts(first: tuple[Ready, ...], second: tuple[Ready, ...]) -> None:
    assert (context(first) == context(second)) == (first == second)


CHANGES: dict[str, Any] = {
    "site": "c", "job_sha256": "2" * 64, "round_number": 4, "attempt": 2, "adapter_sha256": "2" * 64,
    "declared_records": 65, "public_key": bytes(32), "certificate": b"certificatf", "signature": b"x",
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(Ready)])
def test_every_byte_of_a_roster_is_in_its_context(name: str) -> None:
    other = replace(READY, site="b")
    found = {
        context(roster)
        for roster in (
            (READY, other),
            (other, READY),
            (READY,),
            (READY, other, other),
            (replace(READY, **{name: CHANGES[name]}), other),
            (READY, replace(other, **{name: CHANGES[name]})),
        )
    }
    assert len(found) == 6


# --- signatures ---


def test_a_signature_is_deterministic_and_of_the_documented_bytes() -> None:
    assert Ready(**WHAT).signed_by(KEY) == READY
    READY.verify(KEY.public_key())
    signed = canonical_json({
        "site": "a", "job_sha256": "0" * 64, "round": 3, "attempt": 1, "adapter_sha256": "1" * 64, "declared_records": 64,
        "public_key": READY.public_key.hex(), "certificate_sha256": hashlib.sha256(b"certificate").hexdigest(),
    })  # fmt: skip
    KEY.public_key().verify(
        READY.signature, b"silotune/secure-sum-ready\0" + signed.encode(), ec.ECDSA(hashes.SHA256())
    )
    MASKED.verify(KEY.public_key(), READY)
    signed = canonical_json({
        "site": "a", "job_sha256": "0" * 64, "round": 3, "attempt": 1, "context": MASKED.context.hex(),
        "words_sha256": hashlib.sha256(MASKED.words).hexdigest(),
    })  # fmt: skip
    KEY.public_key().verify(
        MASKED.signature, b"silotune/secure-sum-masked\0" + signed.encode(), ec.ECDSA(hashes.SHA256())
    )


@pytest.mark.parametrize("name", [field.name for field in fields(Ready) if field.name != "signature"])
def test_a_ready_message_is_signed_in_every_field(name: str) -> None:
    other = replace(READY, **{name: CHANGES[name]})
    with pytest.raises(
        TrustError, match=f"the ready message of {other.site} is not signed with the key of its certificate"
    ):
        other.verify(KEY.public_key())


def test_a_masked_input_is_signed_in_every_field_and_for_its_job_round_and_attempt() -> None:
    other = bytes(24)
    for masked, entry in (
        (replace(MASKED, site="c"), READY),
        (replace(MASKED, context=bytes(32)), READY),
        (replace(MASKED, words=other), READY),
        *((MASKED, replace(READY, **{name: CHANGES[name]})) for name in ("job_sha256", "round_number", "attempt")),
    ):
        with pytest.raises(TrustError, match=f"the masked message of {masked.site} is not signed"):
            masked.verify(KEY.public_key(), entry)


def test_a_signature_of_one_kind_is_none_of_another() -> None:
    with pytest.raises(TrustError, match="not signed"):
        replace(MASKED, signature=READY.signature).verify(KEY.public_key(), READY)
    with pytest.raises(TrustError, match="not signed"):
        replace(READY, signature=MASKED.signature).verify(KEY.public_key())
    with pytest.raises(TrustError, match="not signed"):
        READY.verify(new_key().public_key())


def forged() -> dict[str, bytes]:
    """Return signatures by whoever does not have the key, or in another writing (the classes of Wycheproof for ECDSA)."""
    r, s = decode_dss_signature(READY.signature)
    body, length = READY.signature[2:], READY.signature[1]
    numbers = {
        "r 0": (0, s), "s 0": (r, 0), "both 0": (0, 0), "both 1": (1, 1), "r the order": (ORDER, s), "s the order": (r, ORDER),
        "r and the order": (r + ORDER, s), "s and the order": (r, s + ORDER), "swapped": (s, r), "r 1": (1, s), "s 1": (r, 1),
        "r -1": (ORDER - 1, s), "r negated": (ORDER - r, s),
    }  # fmt: skip
    return {
        **{name: encode_dss_signature(*pair) for name, pair in numbers.items()},
        "none": b"",
        "zeros": bytes(72),
        "long form of a length": b"\x30\x81" + bytes([length]) + body,
        "no end": b"\x30\x80" + body,
        "cut off": READY.signature[:-1],
        "another tag": b"\x31" + READY.signature[1:],
        "something after it": READY.signature + b"\0",
        "raw": r.to_bytes(32, "big") + s.to_bytes(32, "big"),
        "a zero before r": b"\x30" + bytes([length + 1, 2, body[1] + 1, 0]) + body[2:],
    }


@pytest.mark.parametrize("name", forged())
def test_a_forged_signature_is_none(name: str) -> None:
    message = signed_bytes(Purpose.READY, READY._fields())
    messages._verify(KEY.public_key(), message, READY.signature, "ready", "a")
    with pytest.raises(TrustError, match="not signed"):
        messages._verify(KEY.public_key(), message, forged()[name], "ready", "a")


def test_a_published_signature_verifies() -> None:
    """Wycheproof, ecdsa_secp256r1_sha256_test.json, test 2: the library and the way in which it is called."""
    point = (
        "0404aaec73635726f213fb8a9e64da3b8632e41495a944d0045b522eba7240fad5"
        "87d9315798aaa3a5ba01775787ced05eaaf7b4e09fc81d6d1aa546e8365d525d"
    )
    key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), bytes.fromhex(point))
    signature = bytes.fromhex(
        "30450220530bd6b0c9af2d69ba897f6b5fb59695cfbf33afe66dbadcf5b8d2a2a6538e23"
        "022100d85e489cb7a161fd55ededcedbf4cc0c0987e3e3f0f242cae934c72caa3f43e9"
    )
    messages._verify(key, b"Msg", signature, "ready", "a")
    with pytest.raises(TrustError, match="the ready message of a is not signed"):
        messages._verify(key, b"Msh", signature, "ready", "a")


def test_rfc_6979() -> None:
    """Appendix A.2.5, P-256 with SHA-256, message "sample": signatures come from key and message alone."""
    key = ec.derive_private_key(0xC9AFA9D845BA75166B5C215767B1D6934E50C3DB36E89B127B8A622B120F6721, ec.SECP256R1())
    assert decode_dss_signature(key.sign(b"sample", messages._ECDSA)) == (
        0xEFD48B2AACB6A8FD1140DD9CD45E81D69D2C877B56AAF991C34D0EA84EAF3716,
        0xF7CB1C942D657C41D436C7A1B6E29F65F3E900DBB9AFF4064DC4AB2F843ACDA8,
    )
