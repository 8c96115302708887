"""The consortium's CA: who gets a certificate, who may connect, and that OpenSSL agrees."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.errors import RunError, TrustError
from shared.trust import certificates, keystore, node_keys, pki, trust_store
from shared.trust.keystore import save_secret
from shared.trust.pki import approve, create_ca, make_request, publish, revoke
from shared.trust.trust_store import TrustStore

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
PEM = serialization.Encoding.PEM
NO_WORD: dict[str, Any] = {"passphrase": None, "now": NOW}


@dataclass(frozen=True)
class Consortium:
    """A CA, a trust store, and short forms of what their keepers do."""

    ca: Path
    store: TrustStore

    def site(self, name: str, *, now: datetime = NOW, **options: Any) -> tuple[ec.EllipticCurvePrivateKey, Any]:
        key, csr = make_request(name=name, role="site")
        certificate = approve(self.ca, csr, role="site", passphrase=None, now=now, **options)
        return key, certificate

    def install(self, certificate: x509.Certificate, now: datetime = NOW) -> certificates.SiteIdentity:
        return self.store.install(certificate.public_bytes(PEM), now)

    def states(self, now: datetime = NOW) -> list[tuple[str, str]]:
        return [(found.name, found.state) for found in self.store.sites(now)]

    def revoke(self, target: str, now: datetime = NOW) -> None:
        assert revoke(self.ca, target, passphrase=None, now=now) == 1
        publish(self.ca, self.store.folder)


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    create_ca(tmp_path / "ca", name="North Group", **NO_WORD)
    publish(tmp_path / "ca", tmp_path / "trust")
    return Consortium(tmp_path / "ca", TrustStore(tmp_path / "trust"))


@pytest.fixture
def other_ca(tmp_path: Path) -> Path:
    create_ca(tmp_path / "other", name="North Group", **NO_WORD)  # the same name, another key
    return tmp_path / "other"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def csr(
    *,
    key: Any = None,
    name: list[tuple[x509.ObjectIdentifier, str]] | None = None,
    extensions: tuple[x509.ExtensionType, ...] = (),
) -> bytes:
    """A request that `make_request` would not make."""
    subject = name or [(NameOID.COMMON_NAME, "north"), (NameOID.ORGANIZATIONAL_UNIT_NAME, "site")]
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(oid, value) for oid, value in subject])
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    key = key or ec.generate_private_key(ec.SECP256R1())
    return builder.sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()).public_bytes(PEM)


# --- the CA -------------------------------------------------------------------------------------------------------


def test_the_ca_folder(tmp_path: Path) -> None:
    certificate = create_ca(tmp_path, name="Nördliche Gruppe", days=100, **NO_WORD)
    assert {path.name: mode(path) for path in tmp_path.iterdir()} == {
        "ca.key": 0o600,
        "ca.crt": 0o644,
        "crl.pem": 0o644,
    }
    extensions = certificate.extensions
    assert extensions.get_extension_for_class(x509.BasicConstraints).critical
    assert extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    usage = extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature) == (True, True, False)
    assert certificate.not_valid_before_utc == NOW - timedelta(minutes=5)
    assert certificate.not_valid_after_utc == NOW + 100 * DAY
    crl = x509.load_pem_x509_crl((tmp_path / "crl.pem").read_bytes())
    assert len(crl) == 0
    assert crl.next_update_utc == NOW + 3650 * DAY


@pytest.mark.parametrize("present", ["ca.key", "ca.crt"])
def test_a_ca_is_never_overwritten(tmp_path: Path, present: str) -> None:
    (tmp_path / present).write_text("x")
    with pytest.raises(TrustError, match=rf"holds a CA already \({present}\); choose another folder"):
        create_ca(tmp_path, name="x", **NO_WORD)
    assert (tmp_path / present).read_text() == "x"


@pytest.mark.parametrize(
    ("name", "days", "text"),
    [
        ("", 1, "1 to 64 printable"),
        (" x", 1, "1 to 64 printable"),
        ("x\n", 1, "1 to 64 printable"),
        ("x" * 65, 1, "1 to 64 printable"),
        ("x", 0, "days is 0; expected 1 to 36500"),
        ("x", 36_501, "days is 36501"),
    ],
)
def test_a_ca_with_bad_settings_is_refused(tmp_path: Path, name: str, days: int, text: str) -> None:
    with pytest.raises(TrustError, match=text):
        create_ca(tmp_path, name=name, days=days, **NO_WORD)


def test_a_ca_key_under_a_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keystore, "SCRYPT_N", 2**4)
    create_ca(tmp_path, name="x", passphrase="word", now=NOW)  # noqa: S106
    request = make_request(name="north", role="site")[1]
    for passphrase, text in [(None, "there is no passphrase"), ("wrong", "passphrase is wrong")]:
        with pytest.raises(TrustError, match=text):
            approve(tmp_path, request, role="site", passphrase=passphrase, now=NOW)
    certificate = approve(tmp_path, request, role="site", passphrase="word", now=NOW)  # noqa: S106
    with pytest.raises(TrustError, match="there is no passphrase"):
        revoke(tmp_path, "north", passphrase=None, now=NOW)
    assert revoke(tmp_path, f"{certificate.serial_number:x}", passphrase="word", now=NOW) == 1  # noqa: S106


def test_a_folder_without_a_ca_or_with_parts_missing(tmp_path: Path, consortium: Consortium, other_ca: Path) -> None:
    request = make_request(name="north", role="site")[1]
    with pytest.raises(TrustError, match="holds no CA"):
        approve(tmp_path / "nowhere", request, role="site", **NO_WORD)
    crl = (consortium.ca / "crl.pem").read_bytes()
    (consortium.ca / "crl.pem").unlink()
    with pytest.raises(TrustError, match=r"revocation list .*crl\.pem does not exist; .*backup"):
        approve(consortium.ca, request, role="site", **NO_WORD)
    (consortium.ca / "crl.pem").write_bytes(crl)
    shutil.copy(other_ca / "ca.key", consortium.ca / "ca.key")
    with pytest.raises(TrustError, match=r"ca\.key and ca\.crt in .* do not belong together"):
        approve(consortium.ca, request, role="site", **NO_WORD)


# --- requests and approval ----------------------------------------------------------------------------------------


def test_an_issued_site_certificate(consortium: Consortium) -> None:
    key, certificate = consortium.site("north", days=30)
    assert certificates.identity(certificate) == ("north", "site")
    assert certificate.public_key() == key.public_key()
    assert certificate.not_valid_before_utc == NOW - timedelta(minutes=5)
    assert certificate.not_valid_after_utc == NOW + 30 * DAY
    extensions = {type(extension.value): extension for extension in certificate.extensions}
    assert extensions[x509.BasicConstraints].critical
    assert extensions[x509.BasicConstraints].value == x509.BasicConstraints(False, None)
    assert extensions[x509.KeyUsage].critical
    assert extensions[x509.KeyUsage].value.digital_signature
    assert not extensions[x509.KeyUsage].value.key_cert_sign
    assert list(extensions[x509.ExtendedKeyUsage].value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    names = extensions[x509.SubjectAlternativeName].value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["silotune:site:north"]
    ca = certificates.load_certificate(consortium.ca / "ca.crt")
    authority = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert extensions[x509.AuthorityKeyIdentifier].value.key_identifier == authority.digest
    path = consortium.ca / "issued" / f"north-{certificate.serial_number:x}.crt"
    assert certificates.load_certificate(path) == certificate
    trust_store.verify_certificate(certificate, ca, NOW)


def test_an_issued_server_certificate_has_its_hosts(consortium: Consortium) -> None:
    _, request = make_request(name="coordinator", role="server", hosts=["fl.example.org", "127.0.0.1", "::1"])
    assert pki.read_request(request).hosts == ("fl.example.org", "127.0.0.1", "::1")
    hosts = ["::1", "FL.example.org", "127.0.0.1"]
    certificate = approve(consortium.ca, request, role="server", hosts=hosts, **NO_WORD)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"name": "../x"}, "the name is '../x'; expected 1 to 64 letters"),
        ({"name": "x\n"}, "the name is"),
        ({"name": "x" * 65}, "the name is"),
        ({"role": "boss"}, "the role is 'boss'; expected server or site"),
        ({"hosts": ["localhost"]}, "the request of a site names hosts"),
        ({"role": "server"}, "names no host"),
        ({"role": "server", "hosts": ["localhost:9092"]}, "the host is 'localhost:9092'; expected a DNS name"),
        ({"role": "server", "hosts": ["*.example.org"]}, "without a port or a wildcard"),
        ({"role": "server", "hosts": ["bücher.de"]}, "the host is"),
        ({"role": "server", "hosts": ["a." * 126 + "a"]}, None),
        ({"role": "server", "hosts": ["a." * 126 + "aa"]}, "the host is"),
        ({"role": "server", "hosts": [""]}, "the host is"),
    ],
)
def test_a_request_is_checked_where_it_is_made(arguments: dict[str, Any], text: str | None) -> None:
    arguments = {"name": "north", "role": "site"} | arguments
    if text is None:
        make_request(**arguments)
    else:
        with pytest.raises(TrustError, match=text):
            make_request(**arguments)


def test_a_request_is_checked_at_the_ca(consortium: Consortium) -> None:
    oid_cn, oid_ou = NameOID.COMMON_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME
    p256 = ec.generate_private_key(ec.SECP256R1())
    # The signature's last byte lies in the last line of the PEM; change the DER instead.
    der = bytearray(x509.load_pem_x509_csr(csr()).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    altered = ssl.DER_cert_to_PEM_cert(bytes(der)).replace("CERTIFICATE", "CERTIFICATE REQUEST").encode()
    refused = [
        (b"", "is no PEM certificate request"),
        (b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "is no PEM"),
        (csr(key=p256)[:-40], "is no PEM"),
        (altered, "not signed by the key in it"),
        (csr(key=ec.generate_private_key(ec.SECP384R1())), "not ECDSA P-256"),
        (csr(key=rsa.generate_private_key(65537, 2048)), "not ECDSA P-256"),
        (csr(key=ed25519.Ed25519PrivateKey.generate()), "not ECDSA P-256"),
        (csr(name=[(oid_cn, "north")]), r"name its holder \(CN\) and its role \(OU\)"),
        (csr(name=[(oid_cn, "a"), (oid_cn, "b"), (oid_ou, "site")]), "and nothing else"),
        (csr(name=[(oid_cn, "a"), (oid_ou, "site"), (NameOID.COUNTRY_NAME, "DE")]), "and nothing else"),
        (csr(name=[(oid_cn, "../a"), (oid_ou, "site")]), "the name is '../a'"),
        (csr(name=[(oid_cn, "a"), (oid_ou, "boss")]), "the role is 'boss'"),
        (csr(name=[(oid_cn, "a"), (oid_ou, "server")]), "names no host"),
        (csr(extensions=(x509.SubjectAlternativeName([x509.DNSName("localhost")]),)), "names hosts"),
        (csr(extensions=(x509.SubjectAlternativeName([x509.RFC822Name("a@b.de")]),)), "neither a DNS name nor"),
        (
            csr(
                name=[(oid_cn, "a"), (oid_ou, "server")],
                extensions=(x509.SubjectAlternativeName([x509.DNSName("*")]),),
            ),
            "the host is",
        ),
    ]
    for request, text in refused:
        with pytest.raises(TrustError, match=text):
            approve(consortium.ca, request, role="site", **NO_WORD)
    assert not (consortium.ca / "issued").exists()


def test_wishes_of_a_request_are_ignored(consortium: Consortium) -> None:
    wishes = (
        x509.BasicConstraints(ca=True, path_length=5),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CODE_SIGNING]),
        pki._key_usage(ca=True),
    )
    certificate = approve(consortium.ca, csr(extensions=wishes), role="site", **NO_WORD)
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]


@pytest.mark.parametrize(
    ("asked", "hosts_asked", "role", "hosts", "text"),
    [
        ("server", ["localhost"], "site", [], "the request of x asks for a certificate of a server, not of a site"),
        ("site", [], "server", ["localhost"], "the request of x asks for a certificate of a site, not of a server"),
        ("server", ["localhost", "fl.example.org"], "server", ["localhost"], r"asks for fl\.example\.org too"),
        ("server", ["localhost"], "server", ["localhost", "::1"], "does not ask for ::1"),
        ("server", ["localhost"], "server", [], "the approval of a server names no host"),
        ("site", [], "site", ["localhost"], "the approval of a site names hosts"),
        ("site", [], "boss", [], "the role is 'boss'"),
        ("server", ["localhost"], "server", ["*"], "the host is"),
    ],
)
def test_who_approves_names_role_and_hosts(
    consortium: Consortium, asked: str, hosts_asked: list[str], role: str, hosts: list[str], text: str
) -> None:
    """A request alone does not decide what it becomes: else a site's would become the coordinator's certificate."""
    request = make_request(name="x", role=asked, hosts=hosts_asked)[1]
    with pytest.raises(TrustError, match=text):
        approve(consortium.ca, request, role=role, hosts=hosts, **NO_WORD)
    assert not (consortium.ca / "issued").exists()


def test_the_folder_of_a_ca_is_for_its_keeper(tmp_path: Path) -> None:
    create_ca(tmp_path / "new" / "ca", name="x", **NO_WORD)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new" / "ca").iterdir()}
    assert stat.S_IMODE((tmp_path / "new" / "ca").stat().st_mode) == 0o700
    assert modes["ca.key"] == 0o600
    request = make_request(name="north", role="site")[1]
    for mode, part in ((0o770, "."), (0o707, "."), (0o777, "issued")):
        folder = tmp_path / f"{mode:o}{part}"
        create_ca(folder, name="x", **NO_WORD)
        approve(folder, request, role="site", **NO_WORD)
        (folder / part).chmod(mode)
        for act in (
            lambda folder=folder: approve(folder, request, role="site", **NO_WORD),
            lambda folder=folder: revoke(folder, "north", **NO_WORD),
            lambda folder=folder: publish(folder, tmp_path / "trust"),
        ):
            with pytest.raises(TrustError, match=rf"others may write into .* \(mode {mode:04o}\).*chmod 700"):
                act()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(TrustError, match="others may write into"):
        create_ca(tmp_path / "open", name="x", **NO_WORD)
    assert list((tmp_path / "open").iterdir()) == []


def test_an_older_list_is_not_put_over_a_newer_one(consortium: Consortium, tmp_path: Path) -> None:
    """A CA folder from an old backup would else stop all sites, or let a revoked one in where no list was read yet."""
    old = tmp_path / "old"
    consortium.site("north")
    shutil.copytree(consortium.ca, old)
    consortium.revoke("north")
    newest = (consortium.store.folder / "crl.pem").read_bytes()
    (consortium.store.folder / "crl.number").unlink(missing_ok=True)  # nobody looked at the store since
    with pytest.raises(TrustError, match="the revocation list is number 1, but number 2 was seen before"):
        publish(old, consortium.store.folder)
    assert (consortium.store.folder / "crl.pem").read_bytes() == newest
    # A damaged list is mended by the newest.
    (consortium.store.folder / "crl.pem").write_text("damaged")
    assert publish(consortium.ca, consortium.store.folder) == 2


def test_a_certificate_does_not_outlive_the_ca(tmp_path: Path) -> None:
    create_ca(tmp_path, name="x", days=100, **NO_WORD)
    request = make_request(name="north", role="site")[1]
    with pytest.raises(TrustError, match=r"but the CA expires on .*choose fewer --days"):
        approve(tmp_path, request, role="site", days=101, **NO_WORD)
    with pytest.raises(TrustError, match="days is 0"):
        approve(tmp_path, request, role="site", days=0, **NO_WORD)
    approve(tmp_path, request, role="site", days=100, **NO_WORD)


def test_another_key_under_a_known_name_needs_rotation(consortium: Consortium) -> None:
    _, old = consortium.site("north", days=10)
    with pytest.raises(TrustError, match=rf"another key \(serial {old.serial_number:x}.*approve with --rotate"):
        consortium.site("north")
    consortium.site("north", now=NOW + 11 * DAY)  # the first has expired


def test_rotation_keeps_both_keys_until_the_old_one_is_revoked(consortium: Consortium) -> None:
    old_key, old = consortium.site("north", days=100)
    new_key, new = consortium.site("north", days=200, rotate=True)
    for certificate in (old, new):
        consortium.install(certificate)
    assert consortium.states() == [("north", "valid"), ("north", "valid")]
    assert [found.public_key for found in consortium.store.sites(NOW)] == [old_key.public_key(), new_key.public_key()]
    consortium.revoke(f"{old.serial_number:x}")
    assert consortium.states() == [("north", "revoked"), ("north", "valid")]
    assert consortium.states(NOW + 150 * DAY) == [("north", "revoked"), ("north", "valid")]
    consortium.site("north", days=200, rotate=True)  # and again


def test_a_renewal_with_the_same_key_needs_no_rotation(consortium: Consortium) -> None:
    _, request = make_request(name="north", role="site")
    first = approve(consortium.ca, request, role="site", **NO_WORD)
    second = approve(consortium.ca, request, role="site", passphrase=None, now=NOW + DAY)
    assert first.serial_number != second.serial_number


def test_one_key_has_one_name(consortium: Consortium) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    approve(consortium.ca, csr(key=key), role="site", **NO_WORD)
    name = [(NameOID.COMMON_NAME, "south"), (NameOID.ORGANIZATIONAL_UNIT_NAME, "site")]
    with pytest.raises(TrustError, match="the key of this request belongs to north, and south asks for it"):
        approve(consortium.ca, csr(key=key, name=name), role="site", rotate=True, **NO_WORD)


def test_a_revoked_key_never_comes_back(consortium: Consortium) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    approve(consortium.ca, csr(key=key), role="site", days=10, **NO_WORD)
    consortium.revoke("north")
    for when in (NOW, NOW + 20 * DAY):
        with pytest.raises(TrustError, match=r"cannot be certified again: .* was revoked on .*Make a new request"):
            approve(consortium.ca, csr(key=key), role="site", passphrase=None, now=when, rotate=True)
    consortium.site("north")  # a new key may


def test_a_damaged_record_stops_the_ca(consortium: Consortium) -> None:
    _, certificate = consortium.site("north")
    path = consortium.ca / "issued" / f"north-{certificate.serial_number:x}.crt"
    path.write_bytes(path.read_bytes()[:100])
    for action in (lambda: consortium.site("south"), lambda: consortium.revoke("north")):
        with pytest.raises(TrustError, match=r"record of what this CA issued is damaged.*north-.*backup"):
            action()
    assert [found.state for found in pki.issued(consortium.ca, NOW)] == ["unreadable"]


def test_a_request_is_compared_with_few_of_many_certificates(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        consortium.site(f"s{number:02}")
    judged: list[str] = []
    real = certificates.Judge.judged

    def count(judge: Any, certificate: x509.Certificate) -> Any:
        judged.append(certificates.common_name(certificate))
        return real(judge, certificate)

    monkeypatch.setattr(certificates.Judge, "judged", count)
    consortium.site("new")
    assert judged == [], "checking a signature takes longer than all the rest, and nobody has this name or key"
    with pytest.raises(TrustError, match="s07 has a certificate with another key"):
        consortium.site("s07")
    assert judged == ["s07"]


# --- revocation ---------------------------------------------------------------------------------------------------


def test_revoking_by_name_and_by_serial(consortium: Consortium) -> None:
    serials = [consortium.site("north", rotate=True)[1].serial_number for _ in range(2)]
    consortium.site("south")
    with_colons = ":".join(f"{serials[0]:040X}"[i : i + 2] for i in range(0, 40, 2))
    assert revoke(consortium.ca, with_colons, **NO_WORD) == 1
    assert revoke(consortium.ca, "north", **NO_WORD) == 1
    before = (consortium.ca / "crl.pem").read_bytes()
    assert revoke(consortium.ca, "north", **NO_WORD) == 0
    assert (consortium.ca / "crl.pem").read_bytes() == before
    crl = x509.load_pem_x509_crl(before)
    assert {entry.serial_number for entry in crl} == set(serials)
    assert crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 3
    assert [(f.name, f.state) for f in pki.issued(consortium.ca, NOW)] == [
        ("north", "revoked"),
        ("north", "revoked"),
        ("south", "valid"),
    ]


@pytest.mark.parametrize("target", ["nobody", "", "0", "abcdef"])
def test_revoking_what_was_not_issued_is_refused(consortium: Consortium, target: str) -> None:
    with pytest.raises(TrustError, match=f"no certificate was issued for '{target}'; .*: nobody"):
        revoke(consortium.ca, target, **NO_WORD)
    consortium.site("south")
    with pytest.raises(TrustError, match=f"no certificate was issued for '{target}'; .*: south"):
        revoke(consortium.ca, target, **NO_WORD)


def test_a_failed_write_leaves_the_old_list(consortium: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    consortium.site("north")
    before = (consortium.ca / "crl.pem").read_bytes()

    def fail(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(RunError, match=r"could not write .*crl\.pem: No space left"):
            revoke(consortium.ca, "north", **NO_WORD)
    assert (consortium.ca / "crl.pem").read_bytes() == before
    assert [path for path in consortium.ca.iterdir() if path.name.startswith(".")] == []


def test_an_older_crl_is_refused(consortium: Consortium) -> None:
    consortium.install(consortium.site("north")[1])
    assert consortium.states() == [("north", "valid")]
    old = (consortium.store.folder / "crl.pem").read_bytes()
    consortium.revoke("north")
    assert consortium.states() == [("north", "revoked")]
    (consortium.store.folder / "crl.pem").write_bytes(old)
    with pytest.raises(TrustError, match="revocation list is number 1, but number 2 was seen before"):
        consortium.store.sites(NOW)
    with pytest.raises(TrustError, match="was seen before"):
        consortium.install(consortium.site("south")[1])
    publish(consortium.ca, consortium.store.folder)
    assert consortium.states() == [("north", "revoked")]


def test_a_removed_crl_is_refused(consortium: Consortium) -> None:
    consortium.store.sites(NOW)
    (consortium.store.folder / "crl.pem").unlink()
    with pytest.raises(TrustError, match=r"has no crl\.pem, but revocation list 1 was there before"):
        consortium.store.sites(NOW)


def test_a_trust_store_may_start_without_a_crl(consortium: Consortium) -> None:
    (consortium.store.folder / "crl.pem").unlink()
    consortium.install(consortium.site("north")[1])
    assert consortium.states() == [("north", "valid")]


def test_a_ca_folder_restored_from_an_old_backup_is_noticed(consortium: Consortium, tmp_path: Path) -> None:
    consortium.site("north")
    consortium.site("south")
    shutil.copytree(consortium.ca, tmp_path / "backup")
    consortium.revoke("north")
    consortium.store.sites(NOW)
    with pytest.raises(TrustError, match="was seen before"):
        publish(tmp_path / "backup", consortium.store.folder)
    revoke(tmp_path / "backup", "south", **NO_WORD)
    with pytest.raises(TrustError, match="two revocation lists of number 2"):
        publish(tmp_path / "backup", consortium.store.folder)
    shutil.copy(tmp_path / "backup" / "crl.pem", consortium.store.folder)
    with pytest.raises(TrustError, match="two revocation lists of number 2"):
        consortium.store.sites(NOW)


def test_a_crl_of_another_ca_or_damaged_is_refused(consortium: Consortium, other_ca: Path) -> None:
    target = consortium.store.folder / "crl.pem"
    good = target.read_bytes()
    shutil.copy(other_ca / "crl.pem", target)
    with pytest.raises(TrustError, match="was not signed by this CA"):
        consortium.store.sites(NOW)
    for content in (b"", good[:-60], b"garbage"):
        target.write_bytes(content)
        with pytest.raises(TrustError, match="is no PEM revocation list"):
            consortium.store.sites(NOW)
    with pytest.raises(TrustError, match="belongs to another CA"):
        publish(other_ca, consortium.store.folder)


def test_a_damaged_crl_number_is_refused(consortium: Consortium) -> None:
    consortium.store.sites(NOW)
    path = consortium.store.folder / "crl.number"
    assert mode(path) == 0o644
    for content in (b"", b"1\n", b"-1 " + b"a" * 64 + b"\n", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(TrustError, match=r"crl\.number is damaged"):
            consortium.store.sites(NOW)


def test_a_crl_number_that_cannot_be_written_is_an_error(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, data: bytes) -> None:
        raise RunError("could not write crl.number: Read-only file system")

    monkeypatch.setattr(trust_store, "write_public", fail)
    with pytest.raises(TrustError, match=r"newest revocation list cannot be remembered: .*Read-only"):
        consortium.store.sites(NOW)


def test_a_crl_without_a_number_is_refused(consortium: Consortium) -> None:
    ca = certificates.load_certificate(consortium.ca / "ca.crt")
    key = node_keys.load_private_key(consortium.ca / "ca.key", None)
    builder = x509.CertificateRevocationListBuilder().issuer_name(ca.subject).last_update(NOW).next_update(NOW + DAY)
    crl = builder.sign(key, hashes.SHA256())
    (consortium.store.folder / "crl.pem").write_bytes(crl.public_bytes(PEM))
    with pytest.raises(TrustError, match="has no number"):
        consortium.store.sites(NOW)


# --- the trust store ----------------------------------------------------------------------------------------------


def test_states_over_time(consortium: Consortium) -> None:
    key, certificate = consortium.site("north", days=30)
    found = consortium.install(certificate)
    assert found == consortium.store.sites(NOW)[0]
    assert found.path == consortium.store.folder / "sites" / f"north-{certificate.serial_number:x}.crt"
    assert (found.name, found.role, found.serial) == ("north", "site", certificate.serial_number)
    assert (found.not_after, found.public_key, found.reason) == (NOW + 30 * DAY, key.public_key(), "")
    assert mode(found.path) == 0o644
    for when, state, reason in [
        (NOW - timedelta(minutes=5), "valid", ""),
        (NOW - timedelta(minutes=6), "not yet valid", "check the clock"),
        (NOW + 30 * DAY, "valid", ""),
        (NOW + 31 * DAY, "expired", f"expired on {NOW + 30 * DAY:%Y-%m-%d %H:%M} UTC; request a new one"),
    ]:
        [found] = consortium.store.sites(when)
        assert found.state == state
        assert reason in found.reason


def test_an_empty_trust_store(consortium: Consortium, tmp_path: Path) -> None:
    assert consortium.store.sites(NOW) == []
    with pytest.raises(TrustError, match=r"certificate .*ca\.crt does not exist"):
        TrustStore(tmp_path / "nowhere").sites(NOW)
    (consortium.store.folder / "ca.crt").write_bytes(b"half")
    with pytest.raises(TrustError, match=r"ca\.crt is not a PEM file of one certificate"):
        consortium.store.sites(NOW)


def test_a_half_copied_file_does_not_disturb_the_others(consortium: Consortium) -> None:
    consortium.install(consortium.site("north")[1])
    _, certificate = consortium.site("south")
    pem = certificate.public_bytes(PEM)
    path = consortium.store.folder / "sites" / "south.crt"
    for end in range(0, len(pem) - 1, 7):
        path.write_bytes(pem[:end])
        found = consortium.store.sites(NOW)
        assert [(f.name, f.state) for f in found] == [("north", "valid"), ("south", "unreadable")]
        assert "half copied" in found[1].reason
        assert found[1].public_key is None
    path.write_bytes(pem)
    assert consortium.states() == [("north", "valid"), ("south", "valid")]


def test_odd_files_are_shown_and_not_trusted(consortium: Consortium, other_ca: Path) -> None:
    folder = consortium.store.folder / "sites"
    folder.mkdir()
    (folder / ".hidden.crt").write_bytes(b"x")
    (folder / "notes.txt").write_bytes(b"x")
    (folder / "a-folder.crt").mkdir()
    (folder / "b\x1b[31m.crt").write_bytes(b"x")
    pem = consortium.site("north")[1].public_bytes(PEM)
    (folder / "c-two.crt").write_bytes(pem + pem)
    shutil.copy(other_ca / "ca.crt", folder / "d-ca.crt")
    (folder / "e-long.crt").write_bytes(bytes(17 << 20))
    assert consortium.states() == [
        ("a-folder", "unreadable"),
        ("b?[31m", "unreadable"),
        ("c-two", "unreadable"),
        ("d-ca", "not signed by this CA"),
        ("e-long", "unreadable"),
    ]


def test_certificates_of_others_are_refused(consortium: Consortium, other_ca: Path) -> None:
    certificate = approve(other_ca, make_request(name="north", role="site")[1], role="site", **NO_WORD)
    with pytest.raises(TrustError, match=r"not installed: .*north was not signed by this CA \(North Group\)"):
        consortium.install(certificate)
    (consortium.store.folder / "sites").mkdir()
    (consortium.store.folder / "sites" / "north.crt").write_bytes(certificate.public_bytes(PEM))
    [found] = consortium.store.sites(NOW)
    assert (found.name, found.state) == ("north", "not signed by this CA")


def test_a_server_certificate_does_not_let_a_site_in(consortium: Consortium) -> None:
    request = make_request(name="coordinator", role="server", hosts=["localhost"])[1]
    certificate = approve(consortium.ca, request, role="server", hosts=["localhost"], **NO_WORD)
    with pytest.raises(TrustError, match="coordinator is one for a server, not a site"):
        consortium.install(certificate)
    (consortium.store.folder / "sites").mkdir()
    (consortium.store.folder / "sites" / "x.crt").write_bytes(certificate.public_bytes(PEM))
    assert consortium.states() == [("coordinator", "not a site's certificate")]


def test_what_is_not_valid_is_not_installed(consortium: Consortium) -> None:
    _, certificate = consortium.site("north", days=10)
    for when, text in [(NOW + 11 * DAY, "expired on"), (NOW - DAY, "not valid before")]:
        with pytest.raises(TrustError, match=f"not installed: .*{text}"):
            consortium.install(certificate, when)
    consortium.revoke("north")
    with pytest.raises(TrustError, match=r"not installed: .*was revoked on"):
        consortium.install(certificate)
    with pytest.raises(TrustError, match="the certificate is not a PEM file"):
        consortium.store.install(b"x")
    assert not (consortium.store.folder / "sites").exists()


def test_a_certificate_by_this_ca_of_another_kind_is_unreadable(consortium: Consortium) -> None:
    ca = certificates.load_certificate(consortium.ca / "ca.crt")
    ca_key = node_keys.load_private_key(consortium.ca / "ca.key", None)
    for key, name, text in [
        (ec.generate_private_key(ec.SECP384R1()), pki._subject("north", "site"), "not ECDSA P-256"),
        (ec.generate_private_key(ec.SECP256R1()), pki._subject("north", "boss"), "the role is 'boss'"),
        (ec.generate_private_key(ec.SECP256R1()), x509.Name([]), "must name its holder"),
    ]:
        certificate = pki._builder(name, ca.subject, key.public_key(), NOW, DAY).sign(ca_key, hashes.SHA256())
        with pytest.raises(TrustError, match=text):
            consortium.install(certificate)
        with pytest.raises(TrustError, match=text):
            certificates.identity(certificate)


def test_a_name_of_an_unknown_kind_of_text_stops_nobody(consortium: Consortium) -> None:
    """`cryptography` raises a KeyError for it, and only when the name is read."""
    _, certificate = consortium.site("north")
    consortium.install(certificate)
    odd = bytearray(certificate.public_bytes(serialization.Encoding.DER))
    odd[odd.index(b"\x0c\x05north")] = 0xCC
    pem = x509.load_der_x509_certificate(bytes(odd)).public_bytes(PEM)
    with pytest.raises(TrustError):
        consortium.store.install(pem, NOW)
    (consortium.store.folder / "sites" / "x.crt").write_bytes(pem)
    assert sorted(state for _, state in consortium.states()) == ["not signed by this CA", "valid"]
    # A request, before its signature is looked at.
    odd = bytearray(
        x509.load_pem_x509_csr(make_request(name="south", role="site")[1]).public_bytes(serialization.Encoding.DER)
    )
    odd[odd.index(b"\x0c\x05south")] = 0xCC
    with pytest.raises(TrustError, match="is no PEM certificate request"):
        approve(
            consortium.ca, x509.load_der_x509_csr(bytes(odd)).public_bytes(PEM), role="site", passphrase=None, now=NOW
        )


def test_verify_certificate_says_what_is_wrong(consortium: Consortium, other_ca: Path) -> None:
    ca, stranger = (certificates.load_certificate(folder / "ca.crt") for folder in (consortium.ca, other_ca))
    _, certificate = consortium.site("north", days=10)
    trust_store.verify_certificate(certificate, ca, NOW)
    with pytest.raises(TrustError, match="north was not signed by this CA"):
        trust_store.verify_certificate(certificate, stranger, NOW)
    with pytest.raises(TrustError, match=r"north expired on \d{4}-\d\d-\d\d \d\d:\d\d UTC"):
        trust_store.verify_certificate(certificate, ca, NOW + 11 * DAY)
    with pytest.raises(TrustError, match="check the clock"):
        trust_store.verify_certificate(certificate, ca, NOW - DAY)


def test_an_expired_ca_vouches_for_nobody(tmp_path: Path) -> None:
    ca = create_ca(tmp_path, name="x", days=10, **NO_WORD)
    certificate = approve(tmp_path, make_request(name="north", role="site")[1], role="site", days=10, **NO_WORD)
    long_lived = pki._builder(certificate.subject, ca.subject, certificate.public_key(), NOW, 20 * DAY).sign(
        node_keys.load_private_key(tmp_path / "ca.key", None), hashes.SHA256()
    )
    with pytest.raises(TrustError, match="the certificate of the CA expired"):
        trust_store.verify_certificate(long_lived, ca, NOW + 11 * DAY)


def test_expiry_warning(consortium: Consortium) -> None:
    _, certificate = consortium.site("north", days=60)
    assert certificates.expiry_warning(certificate, NOW) is None
    assert certificates.expiry_warning(certificate, NOW, days=60) is not None
    assert "expires in 29 days, on" in str(certificates.expiry_warning(certificate, NOW + timedelta(days=30, hours=1)))
    assert "expires in 1 day, on" in str(certificates.expiry_warning(certificate, NOW + 59 * DAY))
    assert "north expired on" in str(certificates.expiry_warning(certificate, NOW + 61 * DAY))


# --- keys ---------------------------------------------------------------------------------------------------------


def test_private_key_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keystore, "SCRYPT_N", 2**4)
    key, _ = make_request(name="north", role="site")
    for passphrase in (None, "word"):
        path = tmp_path / f"{passphrase}.key"
        node_keys.save_private_key(path, key, passphrase)
        assert node_keys.load_private_key(path, passphrase).private_numbers() == key.private_numbers()
    with pytest.raises(TrustError, match="exists already"):
        node_keys.save_private_key(tmp_path / "None.key", key, None)
    p384 = ec.generate_private_key(ec.SECP384R1())
    node_keys.save_private_key(tmp_path / "p384.key", p384, None)
    save_secret(tmp_path / "signer.key", bytes(32), passphrase=None)
    for name in ("p384.key", "signer.key"):
        with pytest.raises(TrustError, match="holds a key of another kind; expected an ECDSA P-256 key"):
            node_keys.load_private_key(tmp_path / name, None)
    node_keys.save_server_key(tmp_path / "server.pem", key, None)
    assert mode(tmp_path / "server.pem") == 0o600
    loaded = serialization.load_pem_private_key((tmp_path / "server.pem").read_bytes(), None)
    assert isinstance(loaded, ec.EllipticCurvePrivateKey)
    assert loaded.private_numbers() == key.private_numbers()


def test_a_fingerprint_is_the_hash_of_the_public_key() -> None:
    key = make_request(name="north", role="site")[0].public_key()
    groups = certificates.fingerprint(key).split(" ")
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(spki)
    assert "".join(groups) == digest.finalize().hex()
    assert {len(group) for group in groups} == {4}


# --- OpenSSL, by way of Python's ssl ------------------------------------------------------------------------------


def server_files(ca: Path, folder: Path, hosts: list[str], now: datetime = NOW, days: int = 10) -> tuple[Path, Path]:
    key, request = make_request(name="coordinator", role="server", hosts=hosts)
    certificate = approve(ca, request, role="server", hosts=hosts, days=days, passphrase=None, now=now, rotate=True)
    folder.mkdir(exist_ok=True)
    (folder / "server.pem").write_bytes(certificate.public_bytes(PEM))
    node_keys.save_server_key(folder / "server.key", key, None)
    return folder / "server.pem", folder / "server.key"


def shake_hands(server: tuple[Path, Path], trusted: Path, dialled: str) -> str:
    """Connect to a TLS server on loopback as `dialled`, with everything that OpenSSL can check; return its version."""
    listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    listening.load_cert_chain(*server)
    dialling = ssl.create_default_context(cafile=str(trusted))
    dialling.verify_flags |= ssl.VERIFY_X509_STRICT
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            try:
                with listening.wrap_socket(connection, server_side=True) as wrapped:
                    wrapped.sendall(b"hello")
            except (ssl.SSLError, ConnectionError):
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=5) as plain,
                dialling.wrap_socket(plain, server_hostname=dialled) as wrapped,
            ):
                assert wrapped.recv(5) == b"hello"
                return str(wrapped.version())
        finally:
            thread.join(5)


@pytest.mark.parametrize("dialled", ["localhost", "127.0.0.1"])
def test_openssl_accepts_the_server_certificate(consortium: Consortium, tmp_path: Path, dialled: str) -> None:
    server = server_files(consortium.ca, tmp_path / "server", ["localhost", "127.0.0.1"])
    assert shake_hands(server, consortium.ca / "ca.crt", dialled) == "TLSv1.3"


@pytest.mark.parametrize(
    ("hosts", "change", "text"),
    [
        (["fl.example.org"], None, "Hostname mismatch"),
        (
            ["localhost"],
            "wrong CA",
            "certificate signature failure|unable to get local issuer|self.signed|key identifier",
        ),
        (["localhost"], "expired", "certificate has expired"),
        (["localhost"], "future", "certificate is not yet valid"),
        (["localhost"], "site", "unsuitable certificate purpose|unsupported certificate purpose|mismatch"),
    ],
)
def test_openssl_refuses(tmp_path: Path, other_ca: Path, hosts: list[str], change: str | None, text: str) -> None:
    create_ca(tmp_path / "ca", name="North Group", passphrase=None, now=NOW - 30 * DAY)
    when = {"expired": NOW - 20 * DAY, "future": NOW + DAY}.get(change or "", NOW)
    server = server_files(tmp_path / "ca", tmp_path / "server", hosts, now=when)
    if change == "site":
        key, request = make_request(name="north", role="site")
        server[0].write_bytes(approve(tmp_path / "ca", request, role="site", **NO_WORD).public_bytes(PEM))
        node_keys.save_server_key(server[1], key, None)
    trusted = (other_ca if change == "wrong CA" else tmp_path / "ca") / "ca.crt"
    with pytest.raises(ssl.SSLCertVerificationError, match=text):
        shake_hands(server, trusted, "localhost")


def test_openssl_reads_the_crl(consortium: Consortium, tmp_path: Path) -> None:
    server = server_files(consortium.ca, tmp_path / "server", ["localhost"])
    both = tmp_path / "both.pem"

    def with_crl() -> Callable[[], str]:
        both.write_bytes((consortium.ca / "ca.crt").read_bytes() + (consortium.ca / "crl.pem").read_bytes())
        context = ssl.create_default_context(cafile=str(both))
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        return lambda: shake_hands_with(context, server)

    def shake_hands_with(context: ssl.SSLContext, files: tuple[Path, Path]) -> str:
        """A handshake in memory."""
        listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        listening.load_cert_chain(*files)
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(down, up, server_hostname="localhost")
        other = listening.wrap_bio(up, down, server_side=True)
        for _ in range(10):
            for side in (client, other):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
        return str(client.version())

    assert with_crl()() == "TLSv1.3"
    # A list is in force from its own time on, so that it must not lie in the future of OpenSSL's clock.
    revoke(consortium.ca, "coordinator", passphrase=None, now=NOW - timedelta(minutes=1))
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate revoked"):
        with_crl()()


def test_grpc_accepts_the_server_certificate(consortium: Consortium, tmp_path: Path) -> None:
    grpc = pytest.importorskip("grpc")
    from concurrent.futures import ThreadPoolExecutor

    certificate, key = (p.read_bytes() for p in server_files(consortium.ca, tmp_path / "server", ["localhost"]))
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    server.start()
    try:
        trusted = grpc.ssl_channel_credentials((consortium.ca / "ca.crt").read_bytes())
        with grpc.secure_channel(f"localhost:{port}", trusted) as channel:
            grpc.channel_ready_future(channel).result(timeout=8)
    finally:
        server.stop(0)
