"""A folder of files, signed: an adapter that is handed on can be checked for who made it."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from shared.errors import TrustError
from shared.files.atomic import write_json
from shared.files.json_files import canonical_json
from shared.trust.signing import SigningKey, VerifyKey

SIGNATURE_FILE = "signature.json"
_PURPOSE = "folder"


def sign_folder(folder: Path, key: SigningKey) -> None:
    """Write `signature.json`: the SHA-256 of every other file below `folder`, and a signature over them (Ed25519)."""
    files = _hashes(folder)
    signature = base64.b64encode(key.sign(_PURPOSE, canonical_json(files).encode())).decode("ascii")
    write_json(folder / SIGNATURE_FILE, {"files": files, "signer": key.verify_key.text, "signature": signature})


def verify_folder(folder: Path, key: VerifyKey | None = None) -> VerifyKey:
    """Return the key that signed `folder` after checking every file.

    Args:
        key: the key that must have signed it; None accepts any, which proves only that nothing was changed since.

    Raises:
        TrustError: no signature, another signer, or a file that was changed, added or removed.
    """
    path = folder / SIGNATURE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files, text = dict(content["files"]), str(content["signer"])
        signature = base64.b64decode(content["signature"], validate=True)
        signed = canonical_json(files).encode()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise TrustError(
            f"{folder} carries no readable {SIGNATURE_FILE}; it was not signed by a coordinator."
        ) from None
    signer = VerifyKey.parse(text, source=str(path))
    if key is not None and signer != key:
        raise TrustError(f"{folder} was signed by {signer.text}, expected {key.text}.")
    signer.verify(_PURPOSE, signed, signature)
    found = _hashes(folder)
    for name in sorted({*files, *found}):
        if files.get(name) != found.get(name):
            what = "is missing" if name not in found else "was added" if name not in files else "was changed"
            raise TrustError(f"{folder / name} {what} after the folder was signed; do not use it.")
    return signer


def _hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() != SIGNATURE_FILE
    }
