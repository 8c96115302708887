"""Key files open only for their owner or with the passphrase; sealed bytes open only unchanged."""

from __future__ import annotations

import base64
import json
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import TrustError
from shared.trust import keystore
from shared.trust.keystore import (
    Seal,
    is_sealed,
    load_secret,
    new_key,
    passphrase_from_environment,
    read_passphrase,
    save_secret,
)

SECRET = b"a secret of some length"
WORD = "x"
PLAIN_SEAL = Seal(bytes(32))


@pytest.fixture(autouse=True)
def _quick_and_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keystore, "SCRYPT_N", 2**4)
    monkeypatch.delenv("SILOTUNE_PASSPHRASE", raising=False)
    monkeypatch.delenv("SILOTUNE_PASSPHRASE_FILE", raising=False)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("passphrase", [None, "correct horse", "süß ﬁ"])
@pytest.mark.parametrize("secret", [b"", SECRET, bytes(range(256))])
def test_a_secret_comes_back_and_the_file_is_private(tmp_path: Path, passphrase: str | None, secret: bytes) -> None:
    path = tmp_path / "new" / "node.key"
    save_secret(path, secret, passphrase=passphrase)
    assert load_secret(path, passphrase=passphrase) == secret
    assert mode(path) == 0o600


def test_an_encrypted_file_does_not_hold_the_secret(tmp_path: Path) -> None:
    save_secret(tmp_path / "a", SECRET, passphrase=WORD)
    save_secret(tmp_path / "b", SECRET, passphrase=WORD)
    content = (tmp_path / "a").read_bytes()
    assert SECRET not in content
    assert base64.b64encode(SECRET) not in content
    assert content != (tmp_path / "b").read_bytes()  # salt and nonce are fresh


def test_the_default_cost_is_the_declared_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    path = tmp_path / "node.key"
    save_secret(path, SECRET, passphrase=WORD)
    document = json.loads(path.read_text())
    assert (document["n"], document["r"], document["p"]) == (2**17, 8, 1)
    assert load_secret(path, passphrase=WORD) == SECRET


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    save_secret(path, b"old", passphrase=None)
    with pytest.raises(TrustError, match="exists already and is not overwritten"):
        save_secret(path, b"new", passphrase=None)
    assert load_secret(path, passphrase=None) == b"old"
    save_secret(path, b"new", passphrase=None, replace=True)
    assert load_secret(path, passphrase=None) == b"new"
    dangling = tmp_path / "link"
    dangling.symlink_to(tmp_path / "nowhere")
    with pytest.raises(TrustError, match="exists already"):
        save_secret(dangling, b"new", passphrase=None)


def test_an_empty_passphrase_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="passphrase is empty"):
        save_secret(tmp_path / "k", SECRET, passphrase="")
    assert not (tmp_path / "k").exists()


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620, 0o644, 0o666])
def test_an_unencrypted_file_that_others_may_use_is_refused(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "node.key"
    save_secret(path, SECRET, passphrase=None)
    path.chmod(bits)
    with pytest.raises(TrustError, match=rf"mode {bits:04o}\); run: chmod 600 {path}"):
        load_secret(path, passphrase=None)
    path.chmod(0o400)
    assert load_secret(path, passphrase=None) == SECRET


def test_an_encrypted_file_may_be_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    save_secret(path, SECRET, passphrase=WORD)
    path.chmod(0o644)
    assert load_secret(path, passphrase=WORD) == SECRET


def test_a_wrong_or_missing_passphrase_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    save_secret(path, SECRET, passphrase=WORD)
    with pytest.raises(TrustError, match="does not open: the passphrase is wrong, or the file was changed"):
        load_secret(path, passphrase=WORD + "x")
    with pytest.raises(TrustError, match="there is no passphrase; set SILOTUNE_PASSPHRASE_FILE"):
        load_secret(path, passphrase=None)


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match=r"key file .*node\.key does not exist; check the path"):
        load_secret(tmp_path / "node.key", passphrase=None)
    with pytest.raises(TrustError, match="cannot be read"):
        load_secret(tmp_path, passphrase=None)
    (tmp_path / "large").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(TrustError, match="longer than 1048576 bytes"):
        load_secret(tmp_path / "large", passphrase=None)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": "other"}', b"[" * 200_000, b"9" * 5000]
)
def test_what_is_no_key_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(TrustError, match="is damaged: it is not a key file of silotune"):
        load_secret(path, passphrase=None)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"version": 2}, "version 2; this silotune reads version 1"),
        ({"protection": "rot13"}, "its fields are not"),
        ({"extra": 1}, "its fields are not"),
        ({"n": 2**21}, "n must be a power of two, at most 1048576"),
        ({"n": 17}, "n must be a power of two"),
        ({"n": 1}, "n must be a power of two"),
        ({"n": -16}, "n must be a power of two"),
        ({"n": 16.0}, "n must be a power of two"),
        ({"n": "16"}, "n must be a power of two"),
        ({"r": 2**20}, "r must be 8"),
        ({"p": 5}, "p at most 4"),
        ({"p": True}, "p at most 4"),
        ({"nonce": "AAAA"}, "nonce must have 12 bytes"),
        ({"salt": "%"}, "damaged"),
        ({"salt": 7}, "a field is not text"),
        ({"n": 2**5}, "does not open"),
        ({"p": 2}, "does not open"),
        ({"ciphertext": ""}, "does not open"),
        ({"ciphertext": "AAAA"}, "does not open"),
    ],
)
def test_a_changed_encrypted_file_is_refused(tmp_path: Path, fields: dict[str, Any], text: str) -> None:
    path = tmp_path / "node.key"
    save_secret(path, SECRET, passphrase=WORD)
    change(path, **fields)
    with pytest.raises(TrustError, match=text):
        load_secret(path, passphrase=WORD)


def test_a_file_cannot_ask_for_much_time_or_memory(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    save_secret(path, SECRET, passphrase=WORD)
    change(path, n=2**60, p=2**30)
    start = time.monotonic()
    with pytest.raises(TrustError, match="damaged"):
        load_secret(path, passphrase=WORD)
    assert time.monotonic() - start < 0.5


@pytest.mark.parametrize("fields", [{"secret": "%%"}, {"secret": None}, {"extra": 1}])
def test_a_changed_plain_file_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = tmp_path / "node.key"
    save_secret(path, SECRET, passphrase=None)
    change(path, **fields)
    with pytest.raises(TrustError, match="damaged"):
        load_secret(path, passphrase=None)


def test_the_environment_gives_the_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert passphrase_from_environment() is None
    monkeypatch.setenv("SILOTUNE_PASSPHRASE", "from the variable")
    assert passphrase_from_environment() == "from the variable"
    file = tmp_path / "passphrase"
    file.write_text("from the file \n")
    file.chmod(0o600)
    monkeypatch.setenv("SILOTUNE_PASSPHRASE_FILE", str(file))
    assert passphrase_from_environment() == "from the file "


@pytest.mark.parametrize("variable", ["SILOTUNE_PASSPHRASE", "SILOTUNE_PASSPHRASE_FILE"])
def test_an_empty_variable_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "")
    with pytest.raises(TrustError, match=f"{variable} is set but empty"):
        passphrase_from_environment()


@pytest.mark.parametrize(
    ("content", "text"), [(b"", "is empty"), (b"\n", "is empty"), (b"\xff", "not UTF-8"), (b"x" * 5000, "longer than")]
)
def test_a_bad_passphrase_file_is_refused(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "p"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(TrustError, match=text):
        read_passphrase(path)


def test_only_one_newline_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "p"
    for content, expected in [(b" a b \n\n", " a b \n"), (b"a\r\n", "a"), (b"a", "a")]:
        path.write_bytes(content)
        path.chmod(0o600)
        assert read_passphrase(path) == expected


def test_a_readable_passphrase_file_is_refused_except_below_run_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted = tmp_path / "secrets"
    (mounted / "data").mkdir(parents=True)
    (mounted / "data" / "p").write_text("word")
    (mounted / "p").symlink_to("data/p")
    (mounted / "data" / "p").chmod(0o444)
    with pytest.raises(TrustError, match=r"mode 0444\); run: chmod 600"):
        read_passphrase(mounted / "p")
    monkeypatch.setattr(keystore, "SECRETS_FOLDERS", (mounted,))
    assert read_passphrase(mounted / "p") == "word"
    outside = tmp_path / "outside"
    outside.write_text("word")
    outside.chmod(0o644)
    (mounted / "link").symlink_to(outside)
    with pytest.raises(TrustError, match="chmod 600"):
        read_passphrase(mounted / "link")


@given(plaintext=st.binary(max_size=200), context=st.text(st.characters(codec="utf-8"), max_size=20))
def test_sealed_bytes_come_back(plaintext: bytes, context: str) -> None:
    seal = Seal(new_key())
    sealed = seal.seal(plaintext, context=context)
    assert is_sealed(sealed)
    assert seal.open(sealed, context=context) == plaintext
    assert sealed != seal.seal(plaintext, context=context)


@given(plaintext=st.binary(max_size=60), data=st.data())
def test_any_flipped_bit_is_refused(plaintext: bytes, data: st.DataObject) -> None:
    sealed = bytearray(PLAIN_SEAL.seal(plaintext, context="c"))
    position = data.draw(st.integers(0, len(sealed) - 1))
    sealed[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(TrustError):
        PLAIN_SEAL.open(bytes(sealed), context="c")


@given(plaintext=st.binary(max_size=60), data=st.data())
def test_any_cut_is_refused(plaintext: bytes, data: st.DataObject) -> None:
    sealed = PLAIN_SEAL.seal(plaintext, context="c")
    start = data.draw(st.integers(0, len(sealed)))
    end = data.draw(st.integers(start, len(sealed)))
    if end - start < len(sealed):
        with pytest.raises(TrustError):
            PLAIN_SEAL.open(sealed[start:end], context="c")
    with pytest.raises(TrustError):
        PLAIN_SEAL.open(sealed + b"\0", context="c")


def test_another_key_or_context_is_refused() -> None:
    sealed = PLAIN_SEAL.seal(b"x", context="cache")
    with pytest.raises(TrustError, match="cache does not open: it was sealed with another key"):
        Seal(new_key()).open(sealed, context="cache")
    with pytest.raises(TrustError, match=r"other does not open: .* for another purpose"):
        PLAIN_SEAL.open(sealed, context="other")


@pytest.mark.parametrize("data", [b"", b"plain text that is long enough to be anything", b"SILOSEAL\x01", b"SILOSEAL"])
def test_what_is_not_sealed_is_said_to_be_so(data: bytes) -> None:
    assert not is_sealed(data)
    with pytest.raises(TrustError, match="cache is not sealed"):
        PLAIN_SEAL.open(data, context="cache")


def test_keys_are_random_and_of_the_right_length() -> None:
    assert len({new_key() for _ in range(10)}) == 10
    for length in (0, 16, 31, 33):
        with pytest.raises(TrustError, match=f"the key has {length} bytes; expected 32"):
            Seal(bytes(length))
