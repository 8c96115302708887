"""Private keys of nodes and servers on disk: ECDSA P-256, in a key file (`shared.trust.keystore`) or, a server's, plain.

`change_passphrase` encrypts all keys of a folder anew; `shared.trust.key_changes` says what a kill leaves of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from shared.errors import TrustError
from shared.files import atomic
from shared.files.bounded import read_bounded
from shared.trust import key_changes, keystore
from shared.trust.certificates import is_p256, read_file

_MAX_BYTES = 1 << 20
_PEM_MARK = b"-----BEGIN"


def save_private_key(
    path: Path, key: ec.EllipticCurvePrivateKey, passphrase: str | None, *, replace: bool = False
) -> None:
    """Write a private key (PKCS #8) to a key file; see `shared.trust.keystore.save_secret` for the errors."""
    keystore.save_secret(path, _der(key), passphrase=passphrase, replace=replace)


def load_private_key(path: Path, passphrase: str | None) -> ec.EllipticCurvePrivateKey:
    """Read a private key from a key file.

    Raises:
        TrustError: if the file does not open (see `shared.trust.keystore.load_secret`) or holds a key of another kind.
    """
    der = keystore.load_secret(path, passphrase=passphrase)
    return _parsed(path, lambda: serialization.load_der_private_key(der, password=None))


def save_server_key(path: Path, key: ec.EllipticCurvePrivateKey, passphrase: str | None) -> None:
    """Write a server's key, mode 0600: a key file if there is a passphrase, else plain PEM.

    Raises:
        RunError: if the file cannot be written.
    """
    content = _server_key(_der(key), passphrase)
    with key_changes.alone(path.parent):
        key_changes.finish(path.parent)
        atomic.write_bytes(path, content)


def load_server_key(path: Path, passphrase: str | None) -> ec.EllipticCurvePrivateKey:
    """Read a key that `save_server_key` wrote; a passphrase is not used if it is plain.

    Raises:
        TrustError: if the file cannot be read, is damaged or open to others, does not open with this passphrase, or holds a
            key of another kind.
    """
    key_changes.finish(path.parent)
    content, mode = read_bounded(path, "private key", _MAX_BYTES)
    key = _parsed_server_key(path, content, passphrase)
    if not keystore.is_encrypted(content):
        keystore.check_private(path, mode, "holds an unencrypted key")
    return key


def plain_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a key as PEM without a passphrase."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def change_passphrase(
    files: Sequence[Path], *, old: str | None, new: str | None, server_key: Path | None = None
) -> None:
    """Encrypt keys of one folder under another passphrase: all or none, whatever is killed.

    Args:
        files: the key files.
        old: their passphrase; not used for those that are not encrypted.
        new: None leaves the keys protected by the mode of their files only.
        server_key: as `save_server_key` writes it, in the same folder.

    Raises:
        TrustError: if one does not open with `old`, or `new` is the same; nothing was changed.
        RunError: see `shared.trust.key_changes.replace_together`.
    """
    folder = files[0].parent
    with key_changes.alone(folder):
        key_changes.replace_together(folder, _changed(files, old=old, new=new, server_key=server_key))


def _changed(files: Sequence[Path], *, old: str | None, new: str | None, server_key: Path | None) -> dict[str, bytes]:
    """Return by name what `change_passphrase` makes of each file."""
    key_changes.finish(files[0].parent)
    everything = [*files, server_key] if server_key is not None else files
    if (
        old is not None
        and old == new
        and all(keystore.is_encrypted(read_file(path, "key file")) for path in everything)
    ):
        raise TrustError("the new passphrase is the old one; nothing was changed.")
    contents = {}
    for path in files:
        secret = keystore.load_secret(path, passphrase=old)
        contents[path.name] = keystore.document(secret, new)
        # Whoever loses these bytes loses the ledger: what is written is opened once before it counts.
        if keystore.opened(contents[path.name], path, passphrase=new) != secret:
            raise TrustError(f"{path} would not open with the new passphrase; nothing was changed.")
    if server_key is not None:
        secret = _der(load_server_key(server_key, old))
        contents[server_key.name] = _server_key(secret, new)
        if _der(_parsed_server_key(server_key, contents[server_key.name], new)) != secret:
            raise TrustError(f"{server_key} would not open with the new passphrase; nothing was changed.")
    return contents


def _server_key(der: bytes, passphrase: str | None) -> bytes:
    if passphrase is not None:
        return keystore.document(der, passphrase)
    key = serialization.load_der_private_key(der, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)  # noqa: S101 (it was made of one)
    return plain_pem(key)


def _parsed_server_key(path: Path, content: bytes, passphrase: str | None) -> ec.EllipticCurvePrivateKey:
    if content.lstrip().startswith(_PEM_MARK):
        return _parsed(path, lambda: serialization.load_pem_private_key(content, password=None))
    der = keystore.opened(content, path, passphrase=passphrase)
    return _parsed(path, lambda: serialization.load_der_private_key(der, password=None))


def _der(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _parsed(path: Path, parse: Callable[[], object]) -> ec.EllipticCurvePrivateKey:
    try:
        key = parse()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not is_p256(key.public_key()):
        raise TrustError(
            f"{path} is damaged, or holds a key of another kind; expected an ECDSA P-256 key, as Silotune makes it. Restore it "
            "from its backup."
        )
    return key
