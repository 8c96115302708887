"""Who may stand on a roster: certificates of a real CA, and what is wrong with the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

import client.site.secure.peers as peers_module
from client.site.secure.peers import peer_keys
from shared.errors import RosterError, TrustError
from shared.secure_sum.messages import Ready
from shared.secure_sum.site import SecureSite
from shared.trust.certificates import fingerprint
from shared.trust.pki import approve, create_ca, make_request, publish, revoke
from shared.trust.trust_store import TrustStore

NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)


@dataclass
class Holder:
    """Somebody with a certificate."""

    name: str
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def entry(self, name: str | None = None) -> Ready:
        return SecureSite(
            site=name or self.name,
            job_sha256="0" * 64,
            round_number=1,
            attempt=1,
            adapter_sha256="1" * 64,
            declared_records=8,
            key=self.key,
            certificate=self.certificate.public_bytes(Encoding.DER),
        ).ready()


@dataclass
class Consortium:
    """A CA, and the home of one site that looks at the others."""

    ca: Path
    home: Path

    def holder(self, name: str, *, role: str = "site", ca: Path | None = None, days: int = 365) -> Holder:
        hosts = ("localhost",) if role == "server" else ()
        key, request = make_request(name=name, role=role, hosts=hosts)
        certificate = approve(
            ca or self.ca, request, role=role, hosts=hosts, days=days, passphrase=None, now=NOW, rotate=True
        )
        return Holder(name, key, certificate)

    def key_of(self, entry: Ready, *, now: datetime = NOW, **pinned: str) -> ec.EllipticCurvePublicKey:
        return peer_keys(self.home, pinned=pinned, now=now)(entry)


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    create_ca(tmp_path / "ca", name="consortium", passphrase=None, now=NOW - timedelta(days=1))
    home = tmp_path / "home"
    home.mkdir()
    (home / "ca.crt").write_bytes((tmp_path / "ca" / "ca.crt").read_bytes())
    return Consortium(tmp_path / "ca", home)


def test_a_valid_certificate_gives_its_key(consortium: Consortium) -> None:
    south = consortium.holder("south")
    assert consortium.key_of(south.entry()) == south.key.public_key()
    assert consortium.key_of(south.entry(), south=fingerprint(south.key.public_key())) == south.key.public_key()
    assert consortium.key_of(south.entry(), south=fingerprint(south.key.public_key()).replace(" ", "").upper())


BAD: dict[str, tuple[Callable[[Consortium, Path], Ready], str]] = {
    "of another CA": (lambda c, tmp: c.holder("south", ca=_other_ca(tmp)).entry(), "was not signed by this CA"),
    "a server's": (lambda c, tmp: c.holder("south", role="server").entry(), "is one for a server"),
    "another site's": (lambda c, tmp: c.holder("west").entry("south"), "shows the certificate of west"),
    "no certificate": (lambda c, tmp: _without(c, b"\x30\x03\x02\x01\x01"), "no certificate that can be read"),
    "a bare key": (lambda c, tmp: _without(c, b""), "no certificate that can be read"),
}


def _other_ca(tmp: Path) -> Path:
    create_ca(tmp / "other", name="consortium", passphrase=None, now=NOW - timedelta(days=1))
    return tmp / "other"


def _without(consortium: Consortium, certificate: bytes) -> Ready:
    south = consortium.holder("south")
    return SecureSite(
        site="south",
        job_sha256="0" * 64,
        round_number=1,
        attempt=1,
        adapter_sha256="1" * 64,
        declared_records=8,
        key=south.key,
        certificate=certificate,
    ).ready()


@pytest.mark.parametrize("why", BAD)
def test_a_certificate_that_does_not_count_is_refused(consortium: Consortium, tmp_path: Path, why: str) -> None:
    make, reason = BAD[why]
    with pytest.raises(TrustError, match=reason):
        consortium.key_of(make(consortium, tmp_path))


def test_an_expired_certificate_is_refused(consortium: Consortium) -> None:
    entry = consortium.holder("south", days=1).entry()
    assert consortium.key_of(entry)
    with pytest.raises(TrustError, match="expired on"):
        consortium.key_of(entry, now=NOW + timedelta(days=2))
    with pytest.raises(TrustError, match="not valid before"):
        consortium.key_of(entry, now=NOW - timedelta(hours=12))


def test_a_revoked_certificate_is_refused_once_the_list_is_there(consortium: Consortium) -> None:
    south = consortium.holder("south")
    publish(consortium.ca, consortium.home)
    assert consortium.key_of(south.entry())
    revoke(consortium.ca, "south", passphrase=None, now=NOW)
    assert consortium.key_of(south.entry())  # nobody has brought the new list yet
    publish(consortium.ca, consortium.home)
    with pytest.raises(TrustError, match="was revoked"):
        consortium.key_of(south.entry())


def test_an_older_revocation_list_is_noticed(consortium: Consortium, caplog: pytest.LogCaptureFixture) -> None:
    south = consortium.holder("south")
    publish(consortium.ca, consortium.home)
    old = (consortium.home / "crl.pem").read_bytes()
    revoke(consortium.ca, "south", passphrase=None, now=NOW)
    publish(consortium.ca, consortium.home)
    with pytest.raises(TrustError, match="was revoked"):
        consortium.key_of(south.entry())
    (consortium.home / "crl.pem").write_bytes(old)
    with pytest.raises(
        RosterError, match="list of revoked certificates is not in order; its own log says why"
    ) as caught:
        consortium.key_of(south.entry())
    # What lies in its folder stays there.
    assert str(consortium.home) not in str(caught.value)
    assert "un-revoke" in caplog.text
    assert {record.name for record in caplog.records} == {"silotune.site"}


def test_the_files_of_the_ca_are_read_once_for_a_roster(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [consortium.holder(name).entry() for name in ("south", "west", "east")]
    publish(consortium.ca, consortium.home)
    read = []
    monkeypatch.setattr(peers_module, "TrustStore", lambda home: read.append(home) or TrustStore(home))
    key_of = peer_keys(consortium.home, pinned={}, now=NOW)
    assert [key_of(entry) for entry in entries]
    assert read == [consortium.home]


def test_a_second_certificate_for_a_pinned_name_is_refused(consortium: Consortium) -> None:
    """A CA that makes up a site under a known name."""
    first, second = consortium.holder("south"), consortium.holder("south")
    pin = fingerprint(first.key.public_key())
    assert consortium.key_of(second.entry())  # without a pin it passes
    with pytest.raises(TrustError, match="pins another"):
        consortium.key_of(second.entry(), south=pin)
