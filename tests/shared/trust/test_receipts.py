"""A receipt is for one release and nothing else, by a key of the site's certificate and no other."""

from __future__ import annotations

import base64
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from shared.errors import TrustError
from shared.files.atomic import append_line
from shared.trust.certificates import spki
from shared.trust.receipts import (
    MOST_RECEIPT_BYTES,
    Receipt,
    Released,
    check_release,
    proven_releases,
    read_receipts,
    sign_release,
)

WHAT = Released(
    site="a",
    job_sha256="0" * 64,
    round=3,
    sent_at="2026-11-30T12:00:00.000+00:00",
    adapter_sha256="1" * 64,
    release_sha256="2" * 64,
    declared_records=64,
)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def test_a_receipt_holds_for_what_was_signed_and_names_the_key() -> None:
    old, new = new_key(), new_key()
    keys = [spki(new.public_key()), spki(old.public_key())]
    for key in (old, new):
        receipt = sign_release(key, WHAT)
        assert len(receipt) <= MOST_RECEIPT_BYTES
        assert check_release(keys, WHAT, receipt) == spki(key.public_key())
        assert sign_release(key, WHAT) == receipt


@pytest.mark.parametrize("name", [field.name for field in fields(Released)])
def test_a_receipt_is_for_nothing_else(name: str) -> None:
    key = new_key()
    value: Any = getattr(WHAT, name)
    other = replace(WHAT, **{name: value + 1 if isinstance(value, int) else value + "x"})
    with pytest.raises(TrustError, match=f"not signed with the key of {other.site}'s certificate"):
        check_release([spki(key.public_key())], other, sign_release(key, WHAT))


@pytest.mark.parametrize("receipt", [b"", b"x", bytes(72), bytes(MOST_RECEIPT_BYTES)])
def test_what_is_no_signature_is_no_receipt(receipt: bytes) -> None:
    with pytest.raises(TrustError, match="not signed"):
        check_release([spki(new_key().public_key())], WHAT, receipt)


def test_another_key_or_none_is_not_enough() -> None:
    receipt = sign_release(new_key(), WHAT)
    for keys in ([spki(new_key().public_key())], []):
        with pytest.raises(TrustError, match="not signed"):
            check_release(keys, WHAT, receipt)


def test_a_line_gives_the_receipt_back_and_what_is_none_is_refused() -> None:
    key = new_key()
    receipt = Receipt(WHAT, spki(key.public_key()), sign_release(key, WHAT))
    line = receipt.line()
    assert Receipt.of_line(line, source="x") == receipt
    signature = base64.b64encode(receipt.signature).decode()
    for broken in ("", "[]", "{}", line[:-1], line.replace('"round":3', '"round":"3"'), line.replace(signature, "?"),
                   line.replace('"round":3', '"round":true'), line.replace(',"site":"a"', "")):  # fmt: skip
        with pytest.raises(TrustError, match="x holds a line that is no receipt"):
            Receipt.of_line(broken, source="x")


def test_a_file_of_receipts_is_read_with_what_a_crash_left_in_it(tmp_path: Path) -> None:
    path, key = tmp_path / "receipts.jsonl", new_key()
    receipts = [
        Receipt(what, spki(key.public_key()), sign_release(key, what))
        for what in (WHAT, replace(WHAT, round=4, release_sha256="3" * 64))
    ]
    append_line(path, receipts[0].line())
    with path.open("a") as file:
        file.write(receipts[1].line()[:100])  # killed here
    assert read_receipts(path) == receipts[:1]
    append_line(path, receipts[1].line())
    assert read_receipts(path) == receipts
    append_line(path, '{"round":3}')
    with pytest.raises(TrustError, match="no receipt"):
        read_receipts(path)


def test_only_what_the_sites_key_signed_is_proven() -> None:
    key, other = new_key(), new_key()

    def receipt(signer: ec.EllipticCurvePrivateKey, what: Released) -> Receipt:
        return Receipt(what, spki(signer.public_key()), sign_release(signer, what))

    genuine = receipt(key, WHAT)
    foreign = receipt(other, replace(WHAT, round=4))
    changed = replace(genuine, what=replace(WHAT, release_sha256="3" * 64))
    elsewhere = receipt(key, replace(WHAT, site="b"))
    found = proven_releases([genuine, foreign, changed, elsewhere], [spki(key.public_key())], site="a")
    assert found == {(WHAT.job_sha256, WHAT.round, WHAT.release_sha256)}
