"""A folder of files, signed: an adapter that is handed on can be checked for who made it.

Formal guarantees (tests: tests/shared/trust/test_signed_folder.py)
    * `verify_folder` raises if a file was changed, added or removed, whatever its name and however deep
      (test_any_change_of_a_file_is_found).
    * A link, a device or a pipe is never followed, read or passed over: a folder that holds one is neither signed nor
      verified (test_what_is_no_plain_file_is_refused).

Not guaranteed: empty folders, modes and times are not signed; and a folder can be changed after it was verified.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from shared.errors import TrustError
from shared.files.atomic import write_json
from shared.trust.signed_file import plain_file, sha256_and_size
from shared.trust.signing import Purpose, SignedDocument, SigningKey, VerifyKey

SIGNATURE_FILE = "signature.json"


class _FolderSignature(SignedDocument):
    """`signature.json`: the SHA-256 of every other file, by its place below the folder."""

    purpose = Purpose.FOLDER
    what = "the signature of a folder"
    advice = "Do not rely on the folder; ask its sender."
    most_bytes = 16 << 20

    files: dict[str, str]

    def signed_fields(self) -> dict[str, Any]:
        """Return what is signed: the files alone, and of the signer no more than what the signature itself proves."""
        return self.files


def sign_folder(folder: Path, key: SigningKey) -> None:
    """Write `signature.json`: the SHA-256 of every other file below `folder`, and a signature over them (Ed25519).

    Raises:
        TrustError: if something below it is no plain file or cannot be read.
        RunError: if the signature cannot be written.
    """
    signature = _FolderSignature.sign(key, files=_signed_files(folder))
    write_json(folder / SIGNATURE_FILE, signature.model_dump())


def verify_folder(folder: Path, key: VerifyKey | None = None) -> VerifyKey:
    """Return the key that signed `folder` after checking every file.

    Args:
        key: the key that must have signed it; None accepts any, which proves only that nothing was changed since.

    Raises:
        TrustError: no signature, another signer, or a file that was changed, added or removed.
    """
    # 1. The signature, before any other file is looked at.
    path = folder / SIGNATURE_FILE
    if not os.path.lexists(path):
        raise TrustError(f"{folder} carries no {SIGNATURE_FILE}; it was not signed by a coordinator.")
    with plain_file(path) as file:
        content = file.read(_FolderSignature.most_bytes + 1)
    signature = _FolderSignature.open(content, source=str(path), key=key)

    # 2. Every file that is there or should be.
    found, signed = _signed_files(folder), signature.files
    for name in sorted({*signed, *found}):
        if signed.get(name) != found.get(name):
            what = "is missing" if name not in found else "was added" if name not in signed else "was changed"
            raise TrustError(f"{str(folder / name)!r} {what} after the folder was signed; do not use it.")
    return VerifyKey.parse(signature.signer)


def _signed_files(folder: Path) -> dict[str, str]:
    return {name: sha256 for name, sha256 in file_hashes(folder).items() if name != SIGNATURE_FILE}


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below `folder`, by its place there.

    Raises:
        TrustError: if something below it is no plain file or cannot be read.
    """

    def refuse(error: OSError) -> NoReturn:
        raise TrustError(f"{str(error.filename)!r} cannot be read ({error.strerror}); mend its permissions.") from None

    found = {}
    for place, folders, files in os.walk(folder, onerror=refuse):
        for path in (Path(place, name) for name in (*folders, *files)):
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                found[path.relative_to(folder).as_posix()], _ = sha256_and_size(path)
            elif not stat.S_ISDIR(mode):
                raise TrustError(
                    f"{str(path)!r} is no plain file, which a signature cannot cover; do not use the folder."
                )
    return found
