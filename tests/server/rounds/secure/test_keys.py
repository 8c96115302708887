"""Which certificate may stand on a roster, as the coordinator sees it: one that it lets in, and nothing else with that key."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from server.link.admission import Admission
from server.rounds.roster import Authority
from server.rounds.secure.round import keys_by
from shared.errors import TrustError
from shared.secure_sum.messages import Ready
from shared.secure_sum.site import KeyOf, SecureSite
from shared.trust.certificates import pem_bytes
from shared.trust.pki import approve, create_ca, make_request
from shared.trust.trust_store import TrustStore

NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)


def entry(name: str, key: ec.EllipticCurvePrivateKey, certificate: bytes) -> Ready:
    return SecureSite(
        site=name,
        job_sha256="0" * 64,
        round_number=1,
        attempt=1,
        adapter_sha256="1" * 64,
        declared_records=8,
        key=key,
        certificate=certificate,
    ).ready()


def self_signed(genuine: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """Return a certificate of the same name and key that no CA has signed."""
    return (
        x509.CertificateBuilder()
        .subject_name(genuine.subject)
        .issuer_name(genuine.issuer)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )


def test_a_certificate_that_the_sites_would_refuse_is_not_put_on_the_roster(
    tmp_path: Path, authority_of: Callable[..., Authority]
) -> None:
    ca, trust = tmp_path / "ca", tmp_path / "trust"
    create_ca(ca, name="consortium", passphrase=None, now=NOW - timedelta(days=1))
    trust.mkdir()
    (trust / "ca.crt").write_bytes((ca / "ca.crt").read_bytes())
    holders = {}
    for name in ("south", "west", "stranger"):
        key, request = make_request(name=name, role="site", hosts=())
        certificate = approve(ca, request, role="site", hosts=(), days=365, passphrase=None, now=NOW)
        holders[name] = key, certificate
        if name != "stranger":
            TrustStore(trust).install(pem_bytes(certificate), NOW)
    admission = Admission(trust, now=lambda: NOW)
    key_of = keys_by(authority_of(holder=lambda shown: admission.visitor(pem_bytes(shown)).name))

    south, certificate = holders["south"]
    der = certificate.public_bytes(Encoding.DER)
    assert key_of(entry("south", south, der)) == south.public_key()
    for name, key, shown, reason in (
        ("south", south, self_signed(certificate, south).public_bytes(Encoding.DER), "was not signed by this CA"),
        ("west", south, der, "shows a certificate of south"),
        ("stranger", holders["stranger"][0], holders["stranger"][1].public_bytes(Encoding.DER), "does not lie in"),
        ("south", south, b"", "no certificate that can be read"),
    ):
        with pytest.raises(TrustError, match=reason):
            key_of(entry(name, key, shown))


@pytest.fixture
def authority_of() -> Callable[..., Authority]:
    from shared.trust.signed_job import sign_job
    from shared.trust.signing import SigningKey
    from tests.server.rounds.secure.secure_sites import secure_job

    def build(holder: Callable[[x509.Certificate], str]) -> Authority:
        key = SigningKey.from_bytes(bytes(range(32)))
        signed = sign_job(
            secure_job(), signer=key, coordinator=key.verify_key, issued=NOW, not_after=NOW + timedelta(days=1)
        )
        return Authority(signed_job=signed, key=key, registered=dict, holder=holder)

    return build


def test_simulated_sites_show_their_keys() -> None:
    key_of: KeyOf = keys_by(None)
    key = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(TrustError, match="shows no key"):
        key_of(entry("south", key, b""))
