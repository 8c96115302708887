"""The signature beside a file: every byte counts, the purpose counts, the key counts."""

from __future__ import annotations

import base64
import json
import os
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path

import pytest

from shared.errors import TrustError
from shared.trust.signed_file import Signer, fingerprint, sign_file, signature_file, verify_file
from shared.trust.signing import Purpose, SigningKey

NOW = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)


@pytest.fixture
def signer() -> Signer:
    return Signer(role="coordinator", name="Köln", key=SigningKey.generate())


@pytest.fixture
def signed(tmp_path: Path, signer: Signer) -> Path:
    path = tmp_path / "report.pdf"
    path.write_bytes(b"%PDF a report of a few bytes")
    sign_file(path, signer, now=NOW)
    return path


def test_what_was_signed_verifies(signed: Path, signer: Signer) -> None:
    for key in (None, signer.verify_key):
        found = verify_file(signed, key)
        assert (found.role, found.name, found.signer) == ("coordinator", "Köln", signer.verify_key.text)
        assert found.signed_at == "2026-03-02T09:00:00+00:00"


def test_any_changed_byte_of_the_file_is_detected(signed: Path) -> None:
    content = signed.read_bytes()
    for changed in (content + b"\n", content[:-1], b"", *_flipped(content)):
        signed.write_bytes(changed)
        with pytest.raises(TrustError, match="was changed after it was signed"):
            verify_file(signed)


def test_any_changed_byte_of_the_signature_is_detected(signed: Path) -> None:
    place = signature_file(signed)
    content = place.read_bytes()
    for changed in (content + b" ", content[:-1], b"", b"[]", b"null", *_flipped(content)):
        place.write_bytes(changed)
        with pytest.raises(TrustError):
            verify_file(signed)


def _flipped(content: bytes) -> list[bytes]:
    return [
        content[:i] + bytes([content[i] ^ bit]) + content[i + 1 :] for i in range(len(content)) for bit in (1, 2, 32)
    ]


def test_another_key_is_refused(signed: Path) -> None:
    with pytest.raises(TrustError, match="expected"):
        verify_file(signed, SigningKey.generate().verify_key)


def test_signatures_for_other_purposes_are_refused(signed: Path, signer: Signer) -> None:
    place = signature_file(signed)
    fields = json.loads(place.read_text())
    fields.pop("signature")
    signature = signer.key.sign(Purpose.FOLDER, fields)
    fields["signature"] = base64.b64encode(signature).decode()
    place.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    with pytest.raises(TrustError, match="signature of the report"):
        verify_file(signed)


def test_missing_files_are_named(signed: Path) -> None:
    signature_file(signed).rename(signed.with_name("away"))
    with pytest.raises(TrustError, match=r"report\.pdf\.sig\.json"):
        verify_file(signed)
    signed.with_name("away").rename(signature_file(signed))
    signed.unlink()
    with pytest.raises(TrustError, match=r"report\.pdf cannot be read"):
        verify_file(signed)


def test_what_is_no_plain_file_is_refused(signed: Path, signer: Signer) -> None:
    for place in (signed, signature_file(signed)):
        away = place.rename(place.with_name("away"))
        os.mkfifo(place)  # nobody writes to it: reading would wait for ever
        with pytest.raises(TrustError, match="is no plain file"):
            verify_file(signed)
        place.unlink()
        place.mkdir()
        with pytest.raises(TrustError, match="Is a directory"):
            verify_file(signed)
        place.rmdir()
        away.rename(place)
    assert verify_file(signed)


def test_a_large_file_is_not_held_in_memory(tmp_path: Path, signer: Signer) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(256 << 20)  # holes: it takes no place on the disk
    tracemalloc.start()
    sign_file(large, signer, now=NOW)
    assert verify_file(large).bytes == 256 << 20
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_fingerprint_is_of_the_key() -> None:
    one, other = (SigningKey.from_bytes(bytes([n]) * 32).verify_key for n in (1, 2))
    assert fingerprint(one) != fingerprint(other)
    assert len(fingerprint(one).replace(" ", "")) == 64
