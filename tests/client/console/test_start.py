"""`silotune site console`: where it listens, what it says, and what it needs."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from shared.errors import ConfigError, TrustError
from shared.http.serving import address_of, place_at
from shared.web import require_web
from tests.client.console.conftest import PASSWORD, Serving
from tests.client.console.homes import make_home
from tests.conftest import Outcome

ROOT = Path(__file__).parents[3]


def certificate(folder: Path, *names: str) -> tuple[Path, Path]:
    """Write a certificate of its own for hosts, and its key."""
    import ipaddress

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "console")])
    hosts: list[x509.GeneralName] = [
        x509.IPAddress(ipaddress.ip_address(one)) if one[0].isdigit() else x509.DNSName(one) for one in names
    ]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=9))
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "console.crt", folder / "console.pem"
    paths[0].write_bytes(made.public_bytes(Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    paths[1].chmod(0o600)
    return paths


@contextlib.contextmanager
def started(home: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command in a process of its own and yield it with what it said once it serves."""
    command = [sys.executable, "-m", "cli", "site", "console", str(home), "--port", "0", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        said = ""
        try:
            while "stop it with Ctrl-C" not in said and (line := process.stdout.readline()):
                said += line
            yield process, said
        finally:
            process.kill()


def test_it_serves_and_ends(tmp_path: Path) -> None:
    """The process as people start it: a code for the first administrator, no PyTorch, little memory, an orderly end."""
    home = make_home(tmp_path)
    with started(home.path) as (process, said):
        (address,) = re.findall(r"console of site north: (http://127\.0\.0\.1:\d+/)\n", said)
        assert re.search(r"type this code:\n   [A-Z0-9]{4}(-[A-Z0-9]{4}){3}\n", said)
        assert httpx.get(f"{address}sign-in").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stdout is not None
        assert "Traceback" not in process.stdout.read()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "10.0.0.5"])  # noqa: S104
def test_another_address_needs_tls(silotune: Callable[..., Outcome], tmp_path: Path, host: str) -> None:
    outcome = silotune("site", "console", tmp_path, "--host", host)
    assert outcome.status == 2
    assert f"error: {host} can be reached from other machines" in outcome.err
    assert "--certificate" in outcome.err


def test_places(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "console.hospital.example", "10.0.0.5")
    assert address_of(place_at("localhost", 1, None, None), 8470) == "http://127.0.0.1:8470/"
    assert address_of(place_at("::1", 1, None, None), 8470) == "http://[::1]:8470/"
    place = place_at("10.0.0.5", 1, cert, key)
    assert address_of(place, 8470) == "https://console.hospital.example:8470/"
    assert place.names == {"console.hospital.example", "10.0.0.5"}
    with pytest.raises(ConfigError, match="belong together"):
        place_at("127.0.0.1", 1, cert, None)
    with pytest.raises(ConfigError, match="is no address"):
        place_at("console.hospital.example", 1, cert, key)
    with pytest.raises(ConfigError, match="holds no certificate"):
        place_at("10.0.0.5", 1, key, key)
    with pytest.raises(TrustError, match="does not exist"):
        place_at("10.0.0.5", 1, tmp_path / "nothing", key)


def test_over_tls_the_certificate_names_the_console(serve: Callable[..., Serving], tmp_path: Path) -> None:
    home = make_home(tmp_path)
    cert, key = certificate(tmp_path, "console.hospital.example", "127.0.0.1")
    serving = serve(home, place_at("127.0.0.1", 0, cert, key))
    serving.address = serving.address.replace("http:", "https:")
    context = ssl.create_default_context(cafile=str(cert))
    browser = serving.browser(verify=context)
    answer = browser.sign_in("viewer", PASSWORD, serving.code("viewer"))
    assert answer.status_code == 303
    cookies = answer.headers.get_list("set-cookie")
    assert all(cookie.startswith("__Host-silotune-site-") and "Secure" in cookie for cookie in cookies)
    assert answer.headers["strict-transport-security"] == "max-age=31536000"
    assert browser.get("/budget").status_code == 200
    assert browser.get("/sign-in", headers={"host": "console.hospital.example"}).status_code == 303
    assert browser.get("/sign-in", headers={"host": "other.example"}).status_code == 421


def test_a_key_of_another_certificate_is_told(silotune: Callable[..., Outcome], tmp_path: Path) -> None:
    home = make_home(tmp_path)
    cert, _ = certificate(tmp_path, "127.0.0.1")
    (tmp_path / "other").mkdir()
    _, other = certificate(tmp_path / "other", "127.0.0.1")
    outcome = silotune("site", "console", home.path, "--port", 0, "--certificate", cert, "--key", other)
    assert outcome.status == 2
    assert "cannot be used together" in outcome.err


def test_without_the_extra_it_says_what_to_install(
    silotune: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in ("segno", "argon2") else real(name, *rest)
    )
    with pytest.raises(ConfigError, match=r"needs argon2, segno.*pip install \"silotune\[console\]\""):
        require_web()
    outcome = silotune("site", "console", tmp_path)
    assert outcome.status == 2
    assert 'pip install "silotune[console]"' in outcome.err


def test_what_is_no_site(silotune: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = silotune("site", "console", tmp_path / "nothing", "--port", 0)
    assert outcome.status == 2
    assert outcome.err.startswith("error: ")
    assert not (tmp_path / "nothing").exists()
