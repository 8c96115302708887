"""`silotune pki`, from the first CA to a revoked site, as people type it."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

from shared.errors import TrustError
from shared.tools.pki_commands import pki_app
from shared.trust import certificates, keystore, node_keys, pki, signing, trust_store

WORD = "correct horse"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(keystore, "SCRYPT_N", 2**4)
    monkeypatch.delenv("SILOTUNE_PASSPHRASE", raising=False)
    monkeypatch.delenv("SILOTUNE_PASSPHRASE_FILE", raising=False)


def run(line: str) -> str:
    """Run one command line and return what it printed; its errors are raised as they are."""
    result = CliRunner().invoke(pki_app, line.split(), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return str(result.output)


def consortium() -> None:
    run("init ca --name North-Group")
    run("request site --name north --role site")
    run("approve ca site/north.csr --role site")
    run("publish ca trust")
    run("install trust site/north.crt")


def fingerprint(output: str) -> str:
    [line] = [line for line in output.splitlines() if line.startswith("fingerprint of the key: ")]
    return line.partition(": ")[2]


def test_from_the_ca_to_a_connected_site() -> None:
    output = run("init ca --name North-Group --days 1000")
    assert "CA North-Group: ca/ca.crt, valid until" in output
    assert "ca/ca.key (not encrypted: only its mode 0600 protects it)" in output
    asked = run("request site --name north --role site")
    assert stat.S_IMODE(Path("site/north.key").stat().st_mode) == 0o600
    issued = run("approve ca site/north.csr --role site --days 90")
    assert fingerprint(asked) == fingerprint(issued)
    certificate = certificates.load_certificate(Path("site/north.crt"))
    assert f"site north, serial {certificate.serial_number:x}" in issued
    pem = Path("site/north.crt").read_text()
    assert pem.startswith("-----BEGIN CERTIFICATE-----\n")
    assert pem.endswith("-----END CERTIFICATE-----\n")
    assert pem.count("BEGIN") == 1
    assert "revocation list 1 published to trust" in run("publish ca trust")
    assert "north may connect until" in run("install trust site/north.crt")
    [site] = trust_store.TrustStore(Path("trust")).sites(datetime.now(UTC))
    assert site.state == "valid"
    assert site.public_key == node_keys.load_private_key(Path("site/north.key"), None).public_key()


def test_a_server_and_its_hosts() -> None:
    consortium()
    run("request coordinator --name main --role server --host localhost --host 127.0.0.1")
    output = run("approve ca coordinator/main.csr --role server --host localhost --host 127.0.0.1 --out tls/server.pem")
    assert "hosts: localhost, 127.0.0.1" in output
    assert certificates.identity(certificates.load_certificate(Path("tls/server.pem"))) == ("main", "server")
    assert not Path("coordinator/main.crt").exists()
    with pytest.raises(TrustError, match=r"tls/server\.pem: the certificate is not installed: .*one for a server"):
        run("install trust tls/server.pem")


def test_who_approves_names_the_role() -> None:
    consortium()
    run("request other --name hub --role server --host fl.example.org")
    for missing in ("", " --role server"):
        result = CliRunner().invoke(pki_app, f"approve ca other/hub.csr{missing}".split())
        assert result.exit_code != 0
    with pytest.raises(TrustError, match="asks for a certificate of a server, not of a site"):
        run("approve ca other/hub.csr --role site")
    with pytest.raises(TrustError, match=r"asks for fl\.example\.org too"):
        run("approve ca other/hub.csr --role server --host localhost")
    assert not Path("other/hub.crt").exists()


def test_revoking_and_publishing() -> None:
    consortium()
    output = run("revoke ca north")
    assert "1 certificate of north revoked" in output
    assert "silotune pki publish ca TRUST_DIR" in output
    assert [found["state"] for found in json.loads(run("show trust --json"))] == ["valid"]
    output = run("revoke ca north --publish trust")
    assert "0 certificates of north revoked before" in output
    assert "revocation list 2 published to trust" in output
    [found] = json.loads(run("show trust --json"))
    assert found["state"] == "revoked"
    assert "was revoked on" in found["reason"]
    assert "was revoked on" in run("show trust")


def test_rotation() -> None:
    consortium()
    run("request new --name north --role site")
    with pytest.raises(TrustError, match="approve with --rotate"):
        run("approve ca new/north.csr --role site")
    run("approve ca new/north.csr --role site --rotate")
    run("install trust site/north.crt new/north.crt")
    old = certificates.load_certificate(Path("site/north.crt"))
    assert [found["state"] for found in json.loads(run("show trust --json"))] == ["valid", "valid"]
    run(f"revoke ca {old.serial_number:x} --publish trust")
    states = {found["serial"]: found["state"] for found in json.loads(run("show trust --json"))}
    assert states.pop(f"{old.serial_number:x}") == "revoked"
    assert list(states.values()) == ["valid"]


def test_show() -> None:
    consortium()
    certificate = certificates.load_certificate(Path("site/north.crt"))
    text = certificates.fingerprint(node_keys.load_private_key(Path("site/north.key"), None).public_key())
    assert json.loads(run("show ca --json")) == [
        {
            "file": f"north-{certificate.serial_number:x}.crt",
            "name": "north",
            "role": "site",
            "state": "valid",
            "reason": "",
            "not_after": certificate.not_valid_after_utc.isoformat(),
            "fingerprint": text,
            "serial": f"{certificate.serial_number:x}",
        }
    ]
    for folder in ("ca", "trust"):
        table = run(f"show {folder}")
        assert "north" in table
        assert "valid" in table
        assert text[:19] in table
        assert f"{certificate.not_valid_after_utc:%Y-%m-%d}" in table
        assert "warning" not in table
    Path("trust/sites/x[red]half.crt").write_text("x")
    table = run("show trust")
    assert "unreadable" in table
    assert "x[red]half" in table
    assert json.loads(run("show trust --json"))[1]["serial"] is None


def test_show_warns_before_something_expires() -> None:
    run("init ca --name North-Group --days 25")
    run("request site --name north --role site")
    run("approve ca site/north.csr --role site --days 20")
    result = CliRunner().invoke(pki_app, ["show", "ca", "--json"], catch_exceptions=False)
    assert len(json.loads(result.stdout)) == 1  # warnings do not disturb the JSON
    assert "warning: the certificate of north expires in 19 days" in result.stderr
    assert "warning: the certificate of North-Group expires in 24 days" in result.stderr


def test_show_of_an_expired_site() -> None:
    now = datetime.now(UTC)
    pki.create_ca(Path("ca"), name="x", passphrase=None, now=now - timedelta(days=100))
    request = pki.make_request(name="north", role="site")[1]
    pki.approve(Path("ca"), request, role="site", days=10, passphrase=None, now=now - timedelta(days=50))
    [found] = json.loads(run("show ca --json"))
    assert found["state"] == "expired"


def test_a_passphrase_from_a_file_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, word in [("word", WORD), ("wrong", "wrong")]:
        Path(name).write_text(word + "\n")
        Path(name).chmod(0o600)
    assert "ca/ca.key (encrypted)" in run("init ca --name x --passphrase-file word")
    run("request site --name north --role site --passphrase-file word")
    with pytest.raises(TrustError, match=r"ca\.key is encrypted and there is no passphrase"):
        run("approve ca site/north.csr --role site")
    with pytest.raises(TrustError, match="passphrase is wrong"):
        run("approve ca site/north.csr --role site --passphrase-file wrong")
    monkeypatch.setenv("SILOTUNE_PASSPHRASE_FILE", "word")
    run("approve ca site/north.csr --role site")
    run("revoke ca north")
    assert node_keys.load_private_key(Path("site/north.key"), WORD)
    Path("word").chmod(0o644)
    with pytest.raises(TrustError, match="run: chmod 600 word"):
        run("signer ops")


def test_signer() -> None:
    output = run("signer keys/ops.v1")
    key = signing.load_signing_key(Path("keys/ops.v1.key"), None)
    assert stat.S_IMODE(Path("keys/ops.v1.key").stat().st_mode) == 0o600
    assert Path("keys/ops.v1.pub").read_text() == f"{key.verify_key.text}\n"
    assert signing.load_verify_key(Path("keys/ops.v1.pub")) == key.verify_key
    line = output.splitlines()[-1]
    assert tomllib.loads(f"[signers]\n{line}") == {"signers": {"ops.v1": key.verify_key.text}}
    with pytest.raises(TrustError, match=r"ops\.v1\.key exists already"):
        run("signer keys/ops.v1")
    assert signing.load_verify_key(Path("keys/ops.v1.pub")) == key.verify_key


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            "approve ca nowhere.csr --role site",
            r"nowhere\.csr cannot be read \(No such file or directory\); check the path",
        ),
        ("approve ca site/north.crt --role site", "is no PEM certificate request"),
        ("approve nowhere site/north.csr --role site", "nowhere holds no CA"),
        ("install trust nowhere.crt", r"nowhere\.crt cannot be read"),
        ("install trust /dev/zero", r"/dev/zero cannot be read \(it is longer than 67,108,864 bytes\)"),
        ("install trust site/north.csr", r"site/north\.csr: the certificate is not a PEM file"),
        ("install nowhere site/north.crt", r"nowhere/ca\.crt does not exist"),
        ("revoke ca south", "no certificate was issued for 'south'; there are certificates for: north"),
        ("publish nowhere trust", "nowhere holds no CA"),
        ("show nowhere", r"nowhere/ca\.crt does not exist"),
        ("init ca --name x", "ca holds a CA already"),
        ("request site --name north --role site", r"site/north\.key exists already"),
        ("request site --name a/b --role site", "the name is 'a/b'"),
        ("request site --name x --role site --host h", "the request of a site names hosts"),
        ("request site --name x --role server", "names no host"),
        ("signer keys/_x", "the name is '_x'"),
        ("signer ops --passphrase-file nowhere", "passphrase file nowhere does not exist"),
    ],
)
def test_mistakes_are_explained(line: str, text: str) -> None:
    consortium()
    with pytest.raises(TrustError, match=text):
        run(line)


def test_the_command_line_refuses_what_it_does_not_know() -> None:
    for line in ("request site --name x --role boss", "approve ca x.csr --role site --days 0", "frobnicate"):
        assert CliRunner().invoke(pki_app, line.split()).exit_code == 2
    assert CliRunner().invoke(pki_app, ["--help"]).exit_code == 0


def test_the_written_files_are_the_ones_that_x509_tools_read() -> None:
    consortium()
    assert x509.load_pem_x509_csr(Path("site/north.csr").read_bytes()).is_signature_valid
    assert x509.load_pem_x509_crl(Path("trust/crl.pem").read_bytes()).issuer.rfc4514_string() == "CN=North-Group"


def test_the_module_is_quick_to_import() -> None:
    code = (
        "import sys, shared.tools.pki_commands, shared.trust.pki, shared.trust.signing, shared.trust.keystore;"
        "print([m for m in ('torch', 'flwr', 'numpy', 'server', 'client', 'simulations') if m in sys.modules])"
    )
    root = Path(__file__).parents[3]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
