"""A signed folder: whoever gets it can tell who made it, and that it is whole."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.errors import TrustError
from shared.trust.signed_folder import SIGNATURE_FILE, sign_folder, verify_folder
from shared.trust.signing import Purpose, SigningKey


@pytest.fixture
def key() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture
def folder(tmp_path: Path, key: SigningKey) -> Path:
    made = tmp_path / "adapter"
    (made / "sub").mkdir(parents=True)
    (made / "adapter.safetensors").write_bytes(bytes(range(256)))
    (made / "empty").write_bytes(b"")
    (made / "sub" / "config.json").write_text('{"r": 8}')
    sign_folder(made, key)
    return made


def rewritten(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Replace the signature file by what `change` makes of its content."""
    path = folder / SIGNATURE_FILE
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))


def test_an_unchanged_folder_names_its_signer(folder: Path, key: SigningKey) -> None:
    assert verify_folder(folder) == key.verify_key
    assert verify_folder(folder, key.verify_key) == key.verify_key


def test_a_copy_elsewhere_holds_as_well(folder: Path, key: SigningKey, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert verify_folder(tmp_path / "copy", key.verify_key) == key.verify_key


def test_a_folder_is_signed_anew_after_a_change(folder: Path, key: SigningKey) -> None:
    (folder / "more").write_text("more")
    sign_folder(folder, key)
    assert verify_folder(folder, key.verify_key) == key.verify_key


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one byte": (lambda f: (f / "adapter.safetensors").write_bytes(b"\1" + bytes(range(1, 256))), "was changed"),
    "longer": (lambda f: (f / "empty").write_bytes(b"\0"), "was changed"),
    "in a folder below": (lambda f: (f / "sub" / "config.json").write_text('{"r": 9}'), "was changed"),
    "removed": (lambda f: (f / "empty").unlink(), "is missing"),
    "moved": (lambda f: (f / "empty").rename(f / "void"), "is missing"),
    "added": (lambda f: (f / "zzz.py").write_text("print()"), "was added"),
    "hidden": (lambda f: (f / ".hidden").write_text(""), "was added"),
    "another signature below": (lambda f: shutil.copy(f / SIGNATURE_FILE, f / "sub" / SIGNATURE_FILE), "was added"),
    "exchanged": (lambda f: shutil.copy(f / "empty", f / "adapter.safetensors"), "was changed"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_any_change_of_a_file_is_found(what: str, folder: Path, key: SigningKey) -> None:
    change, text = CHANGES[what]
    change(folder)
    with pytest.raises(TrustError, match=f"{text} after the folder was signed; do not use it"):
        verify_folder(folder, key.verify_key)


def test_a_name_that_is_no_unicode_is_found(folder: Path, key: SigningKey) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\x1b[2J")).write_text("more")
    with pytest.raises(TrustError, match=r"was added after the folder was signed") as refused:
        verify_folder(folder, key.verify_key)
    assert str(refused.value).isprintable()
    with pytest.raises(TrustError, match="half a character"):
        sign_folder(folder, key)


# Each is made beside a folder that holds the same files, so that whoever follows links finds nothing wrong.
STRANGE: dict[str, Callable[[Path, Path], Any]] = {
    "a link to a file": lambda f, same: (f / "more").symlink_to(same / "empty"),
    "a file replaced by a link to its like": lambda f, same: swapped(f / "empty", same / "empty"),
    "a link to a file within": lambda f, same: (f / "more").symlink_to("empty"),
    "a link to a folder": lambda f, same: (f / "more").symlink_to(same / "sub"),
    "a folder replaced by a link to its like": lambda f, same: swapped(f / "sub", same / "sub"),
    "a link to nothing": lambda f, same: (f / "more").symlink_to(same / "nothing"),
    "a link to itself": lambda f, same: (f / "more").symlink_to(f),
    "a link in a folder below": lambda f, same: (f / "sub" / "more").symlink_to(same),
    "the signature replaced by a link": lambda f, same: swapped(f / SIGNATURE_FILE, same / SIGNATURE_FILE),
    "a pipe": lambda f, same: os.mkfifo(f / "more"),
    "a socket": lambda f, same: bound(f / "more"),
}


def swapped(place: Path, target: Path) -> None:
    """Replace what lies at `place` by a link."""
    place.rename(target.parent.parent / f"was {place.name}")
    place.symlink_to(target)


def bound(place: Path) -> None:
    """Leave a socket at `place`."""
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(place.parent)  # the path of a socket may have 108 characters
        made.bind(place.name)


@pytest.mark.parametrize("what", STRANGE)
def test_what_is_no_plain_file_is_refused(
    what: str, folder: Path, key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "same")
    STRANGE[what](folder, tmp_path / "same")
    for use in (lambda: verify_folder(folder, key.verify_key), lambda: sign_folder(folder, key)):
        with pytest.raises(TrustError, match="is no plain file"):
            use()


def test_a_folder_may_be_reached_by_a_link(folder: Path, key: SigningKey, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(folder)
    assert verify_folder(tmp_path / "latest", key.verify_key) == key.verify_key


def test_a_folder_that_cannot_be_listed_is_refused(
    folder: Path, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir

    def refusing(path: Any) -> Any:  # a mode of 000 does not stop the account that tests run as everywhere
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(TrustError, match=r"sub' cannot be read \(Permission denied\)"):
        verify_folder(folder, key.verify_key)


def test_another_signer_is_named(folder: Path, key: SigningKey) -> None:
    other = SigningKey.generate().verify_key
    with pytest.raises(TrustError, match="was signed by") as refused:
        verify_folder(folder, other)
    assert key.verify_key.text in str(refused.value)
    assert other.text in str(refused.value)


def test_a_list_of_files_that_was_made_to_fit_is_found(folder: Path, key: SigningKey) -> None:
    before = json.loads((folder / SIGNATURE_FILE).read_text())
    (folder / "empty").write_text("poison")
    sign_folder(folder, SigningKey.generate())
    rewritten(folder, lambda new: new | {"signer": before["signer"], "signature": before["signature"]})
    with pytest.raises(TrustError, match="was made with another key, or what was signed has changed"):
        verify_folder(folder, key.verify_key)


def test_a_signature_made_for_something_else_is_worth_nothing(folder: Path, key: SigningKey) -> None:
    files = json.loads((folder / SIGNATURE_FILE).read_text())["files"]
    signature = base64.b64encode(key.sign(Purpose.JOB, files)).decode()
    rewritten(folder, lambda content: content | {"signature": signature})
    with pytest.raises(TrustError, match="what was signed has changed"):
        verify_folder(folder, key.verify_key)


MALFORMED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda c: [c],
    "no files": lambda c: {k: v for k, v in c.items() if k != "files"},
    "files as text": lambda c: c | {"files": "adapter.safetensors"},
    "a number that is none": lambda c: c | {"files": {"empty": float("nan")}},
    "half a character": lambda c: c | {"files": {"\ud800": "0" * 64}},
    "no signature": lambda c: c | {"signature": None},
    "signature of other letters": lambda c: c | {"signature": "ü"},
    "short signature": lambda c: c | {"signature": "AAAA"},
    "no signer": lambda c: {k: v for k, v in c.items() if k != "signer"},
    "signer of another kind": lambda c: c | {"signer": "rsa:AAAA"},
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_signature_file_is_refused_without_a_traceback(what: str, folder: Path) -> None:
    rewritten(folder, MALFORMED[what])
    with pytest.raises(TrustError):
        verify_folder(folder)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"null"], ids=["empty", "cut", "bytes", "null"])
def test_a_signature_file_that_cannot_be_read_is_refused(data: bytes, folder: Path) -> None:
    (folder / SIGNATURE_FILE).write_bytes(data)
    with pytest.raises(TrustError, match=r"signature\.json is not the signature of a folder"):
        verify_folder(folder)


def test_a_folder_without_a_signature_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / SIGNATURE_FILE).unlink()
    for unsigned in (folder, tmp_path / "nowhere"):
        with pytest.raises(TrustError, match="it was not signed by a coordinator"):
            verify_folder(unsigned)
