"""Files that decide who is trusted, or hold a secret: what others may do with them is told, and so are dates of a certificate."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from server.registry.registry import Registry
from server.serving.access.tokens import TokenFile
from shared.errors import TrustError
from shared.http.serving import make_server, place_at
from tests.client.console.test_start import certificate
from tests.server.serving.live import Live


@pytest.mark.parametrize("mode", [0o604, 0o606, 0o777])
def test_a_key_of_tls_is_nobody_elses(mode: int, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "127.0.0.1")
    key.chmod(mode)
    with pytest.raises(TrustError, match=r"holds the key of TLS and others may use .* chmod 640"):
        place_at("127.0.0.1", 0, cert, key)


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o440, 0o640])
def test_a_group_may_read_it(mode: int, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "127.0.0.1")
    key.chmod(mode)
    assert place_at("127.0.0.1", 0, cert, key).secure


def test_a_token_file_is_nobody_elses(tmp_path: Path) -> None:
    path = tmp_path / "tokens.db"
    TokenFile(path, create=True).close()
    for mode in (0o604, 0o602):
        path.chmod(mode)
        with pytest.raises(TrustError, match="others may use the file"):
            TokenFile(path)
    path.chmod(0o660)
    TokenFile(path).close()
    tmp_path.chmod(0o777)
    with pytest.raises(TrustError, match=f"everybody may write its folder .* chmod o-w {tmp_path}"):
        TokenFile(path)
    tmp_path.chmod(0o1777)
    TokenFile(path).close()


def test_whom_a_registry_trusts_not_everybody_decides(registry: Registry) -> None:
    def policy() -> object:
        return Registry(registry.path).policy

    registry.policy_file.chmod(0o664)
    policy()
    registry.policy_file.chmod(0o666)
    with pytest.raises(TrustError, match="everybody may write the file"):
        policy()
    registry.policy_file.chmod(0o644)
    registry.path.chmod(0o777)
    with pytest.raises(TrustError, match="everybody may write its folder"):
        policy()


@pytest.mark.parametrize(("days", "said"), [(-2, "is not valid before"), (0, None), (20, "was valid until")])
def test_dates_of_a_certificate_are_told(
    days: int, said: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = place_at("127.0.0.1", 0, *certificate(tmp_path, "127.0.0.1"))
    assert place.valid is not None
    begin, end = (moment - timedelta(days=days) for moment in place.valid)
    moved = replace(place, valid=(begin, end))

    async def app(*given: object) -> None: ...

    with caplog.at_level(logging.WARNING):
        make_server(app, moved)
    assert (said is None) == (not caplog.records)
    if said is not None:
        assert said in caplog.text


def test_health_has_it(films: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    told = films.ask("GET", "/healthz").json()
    assert told["warning"] is None
    monkeypatch.setattr(films.service, "warning", lambda: "the certificate was valid until")
    told = films.ask("GET", "/healthz").json()
    assert told["healthy"]
    assert told["warning"] == "the certificate was valid until"
