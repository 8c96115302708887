"""Private keys of nodes and servers on disk: ECDSA P-256, in a key file (`shared.trust.keystore`) or, where Flower wants it,
plain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from shared.errors import TrustError
from shared.files import atomic
from shared.trust import keystore
from shared.trust.certificates import is_p256, read_file


def save_private_key(
    path: Path, key: ec.EllipticCurvePrivateKey, passphrase: str | None, *, replace: bool = False
) -> None:
    """Write a private key (PKCS #8) to a key file; see `shared.trust.keystore.save_secret` for the errors."""
    der = key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    keystore.save_secret(path, der, passphrase=passphrase, replace=replace)


def load_private_key(path: Path, passphrase: str | None) -> ec.EllipticCurvePrivateKey:
    """Read a private key from a key file.

    Raises:
        TrustError: if the file does not open (see `shared.trust.keystore.load_secret`) or holds a key of another kind.
    """
    der = keystore.load_secret(path, passphrase=passphrase)
    return _parsed(path, lambda: serialization.load_der_private_key(der, password=None))


def write_plain_pem_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Write an unencrypted PEM key of mode 0600, of a server that starts without anybody who could type a passphrase.

    Raises:
        RunError: if the file cannot be written.
    """
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    atomic.write_bytes(path, pem)


def load_plain_pem_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a key that `write_plain_pem_key` wrote.

    Raises:
        TrustError: if the file cannot be read, is damaged, or holds a key of another kind.
    """
    pem = read_file(path, "private key")
    return _parsed(path, lambda: serialization.load_pem_private_key(pem, password=None))


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
