"""A signature counts for one purpose, one key and one set of fields; keys have one text."""

from __future__ import annotations

import base64
import json
import pickle
import re
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shared.errors import TrustError
from shared.trust import keystore
from shared.trust.keystore import save_secret
from shared.trust.signing import (
    Purpose,
    SigningKey,
    VerifyKey,
    find_verify_key,
    load_signing_key,
    load_verify_key,
    save_signing_key,
)

SIGNER = SigningKey.from_bytes(bytes(32))
OTHER = SigningKey.from_bytes(b"\1" * 32)
FIELDS = {"b": "ü", "a": 1}


def test_the_signed_bytes_are_the_documented_ones() -> None:
    expected = Ed25519PrivateKey.from_private_bytes(bytes(32)).sign('silotune/job\0{"a":1,"b":"ü"}'.encode())
    assert SIGNER.sign(Purpose.JOB, FIELDS) == expected


def test_a_signature_counts_for_its_purpose_fields_and_key_only() -> None:
    signature = SIGNER.sign(Purpose.JOB, FIELDS)
    SIGNER.verify_key.verify(Purpose.JOB, dict(reversed(FIELDS.items())), signature)
    for key, purpose, fields, bad in [
        *((SIGNER, purpose, FIELDS, signature) for purpose in Purpose if purpose != Purpose.JOB),
        (SIGNER, Purpose.JOB, FIELDS | {"a": 2}, signature),
        (SIGNER, Purpose.JOB, FIELDS | {"c": 1}, signature),
        (SIGNER, Purpose.JOB, {"b": "ü"}, signature),
        (SIGNER, Purpose.JOB, {}, signature),
        (OTHER, Purpose.JOB, FIELDS, signature),
        (SIGNER, Purpose.JOB, FIELDS, signature[:-1]),
        (SIGNER, Purpose.JOB, FIELDS, signature + signature),
        (SIGNER, Purpose.JOB, FIELDS, b""),
        (SIGNER, Purpose.JOB, FIELDS, signature[:-1] + bytes([signature[-1] ^ 1])),
    ]:
        with pytest.raises(TrustError, match=rf"signature of the {purpose} is not one by ed25519:.*Do not use it"):
            key.verify_key.verify(purpose, fields, bad)


def test_no_two_purposes_sign_the_same_bytes() -> None:
    # A zero byte in one would blur where the fields start; so would one text for two purposes.
    assert all(re.fullmatch("[a-z0-9-]+", purpose) for purpose in Purpose)
    assert len({SIGNER.sign(purpose, FIELDS) for purpose in Purpose}) == len(Purpose) == 10
    with pytest.raises(ValueError, match="is not a valid Purpose"):
        SIGNER.sign("job\0", FIELDS)  # type: ignore[arg-type]


def test_half_a_character_is_refused() -> None:
    with pytest.raises(TrustError, match="half a character"):
        SIGNER.verify_key.verify(Purpose.ROUND, {"sent_at": "\ud800"}, bytes(64))


def test_a_public_key_has_one_text() -> None:
    key = SIGNER.verify_key
    assert key.text == "ed25519:O2onvM62pC1io6jQKm8Nc2UyFXcd4kOmOsBIoYtZ2ik"
    assert VerifyKey.parse(key.text) == key
    assert {key, VerifyKey.parse(key.text)} == {key}
    assert key != OTHER.verify_key
    assert key != key.text
    assert pickle.loads(pickle.dumps(key)) == key  # noqa: S301


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ed25519:",
        "O2onvM62pC1io6jQKm8Nc2UyFXcd4kOmOsBIoYtZ2ik",
        "rsa:O2onvM62pC1io6jQKm8Nc2UyFXcd4kOmOsBIoYtZ2ik",
        "ed25519:O2onvM62pC1io6jQKm8Nc2UyFXcd4kOmOsBIoYtZ2ik=",
        "ed25519:O2onvM62pC1io6jQKm8Nc2UyFXcd4kOmOsBIoYtZ2il",  # unused bits set
        "ed25519:O2onvM62pC1io6jQKm8Nc2UyFXcd4kOmOsBIoYtZ2i",
        "ed25519: O2onvM62pC1io6jQKm8Nc2UyFXcd4kOmOsBIoYtZ2ik",
        "ed25519:O2onvM62pC1io6jQKm8Nc2UyFXcd4kOmOsBIoYtZ2ik\n",
        "ed25519:üüü",
        "ed25519:\ud800",
        "ed25519:" + "A" * 10_000,
    ],
)
def test_a_malformed_public_key_is_refused(text: str) -> None:
    with pytest.raises(TrustError, match="is not a public key; expected ed25519:") as caught:
        VerifyKey.parse(text)
    assert len(str(caught.value)) < 400


def weak_keys() -> list[bytes]:
    """Return the encodings of the eight points that eight times themselves are none, and of the same with the prime added."""
    prime = 2**255 - 19
    eighth = int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little")
    places = [0, 1, prime - 1, eighth, prime - eighth, prime, prime + 1]
    return [(y + (sign << 255)).to_bytes(32, "little") for y in places for sign in (0, 1)]


@pytest.mark.parametrize("raw", weak_keys(), ids=bytes.hex)
def test_a_key_under_which_everybody_can_sign_is_refused(raw: bytes) -> None:
    with pytest.raises(TrustError, match="is a key under which everybody can sign"):
        VerifyKey(raw)
    with pytest.raises(TrustError, match="everybody can sign"):
        VerifyKey.parse("ed25519:" + base64.urlsafe_b64encode(raw).decode().rstrip("="))


def test_such_a_key_would_verify_what_nobody_signed() -> None:
    # Why they are refused: the library below takes this signature, made without any secret, for some text or all.
    nobodys = (1).to_bytes(32, "little") + bytes(32)
    fooled = 0
    for raw in weak_keys():
        for text in range(64):
            try:
                Ed25519PublicKey.from_public_bytes(raw).verify(nobodys, bytes([text]))
            except InvalidSignature:
                continue
            fooled += 1
            break
    assert fooled >= 8


def test_keys_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(TrustError, match="has 32 bytes; found 31"):
        VerifyKey(bytes(31))
    with pytest.raises(TrustError, match="has 32 bytes; found 33"):
        SigningKey.from_bytes(bytes(33))


def test_a_private_key_does_not_show_itself() -> None:
    key = SigningKey.generate()
    assert key.verify_key.text in repr(key)
    assert key.secret_bytes.hex() not in repr(key)
    assert SigningKey.from_bytes(key.secret_bytes).verify_key == key.verify_key


def test_key_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keystore, "SCRYPT_N", 2**4)
    save_signing_key(tmp_path / "a.key", SIGNER, "word")
    assert load_signing_key(tmp_path / "a.key", "word").verify_key == SIGNER.verify_key
    with pytest.raises(TrustError, match="passphrase is wrong"):
        load_signing_key(tmp_path / "a.key", "other")
    with pytest.raises(TrustError, match="exists already"):
        save_signing_key(tmp_path / "a.key", OTHER, None)
    save_signing_key(tmp_path / "a.key", OTHER, None, replace=True)
    assert load_signing_key(tmp_path / "a.key", None).verify_key == OTHER.verify_key
    save_secret(tmp_path / "b.key", b"something else", passphrase=None)
    with pytest.raises(TrustError, match=r"b\.key: a private Ed25519 key has 32 bytes; found 14"):
        load_signing_key(tmp_path / "b.key", None)


def test_public_key_files(tmp_path: Path) -> None:
    path = tmp_path / "a.pub"
    path.write_text(SIGNER.verify_key.text + "\n")
    assert load_verify_key(path) == SIGNER.verify_key
    with pytest.raises(TrustError, match=r"none\.pub does not exist"):
        load_verify_key(tmp_path / "none.pub")
    with pytest.raises(TrustError, match="cannot be read"):
        load_verify_key(tmp_path)
    for content in (b"", b"\xff\xff", b"x" * 1000, f"{SIGNER.verify_key.text}\n{SIGNER.verify_key.text}\n".encode()):
        path.write_bytes(content)
        with pytest.raises(TrustError, match=r"a\.pub: .* is not a public key"):
            load_verify_key(path)
    path.write_bytes(b"x" * 1001)
    with pytest.raises(TrustError, match=r"a\.pub is longer than 1000 bytes"):
        load_verify_key(path)


def test_a_user_names_a_key_or_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.pub").write_text(SIGNER.verify_key.text)
    assert find_verify_key(SIGNER.verify_key.text) == find_verify_key(str(tmp_path / "a.pub")) == SIGNER.verify_key
    for text in ("ed25519:short", str(tmp_path / "none.pub")):
        with pytest.raises(TrustError):
            find_verify_key(text)


def test_a_private_key_that_is_given_as_the_public_one_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "signer.key"
    path.write_text(json.dumps({"format": "silotune-signing-key/1", "secret": "XqlgHRAwF0"}))
    with pytest.raises(
        TrustError, match=r"signer\.key: what it holds is not a public key; expected ed25519:"
    ) as caught:
        load_verify_key(path)
    assert "XqlgHRAwF0" not in str(caught.value)
