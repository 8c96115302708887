"""`audit-log verify` and `audit-log show`."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from shared.errors import ConfigError, TrustError
from shared.tools.audit_log_commands import audit_log_app
from shared.trust.audit_log import AuditLog, Event, read
from shared.trust.signing import SigningKey

KEY = SigningKey.from_bytes(bytes(range(32)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    times = (datetime(2031, 5, 4, 12, tzinfo=UTC) + timedelta(seconds=n) for n in range(100))
    log = AuditLog(tmp_path / "log", seal_head=KEY, max_bytes=1000, clock=lambda: next(times))
    log.append(Event.NODE_STARTED, version="1.2.3")
    for number in range(5):
        log.append(Event.REQUEST_RECEIVED, round=number)
    log.append(Event.REQUEST_REFUSED, reason="\x1b[31m\x9b31m [bold]red[/bold]")
    return tmp_path / "log"


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(audit_log_app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def break_line(folder: Path, name: str = "audit-00001.jsonl") -> None:
    path = folder / name
    path.write_bytes(path.read_bytes().replace(b'"round":1', b'"round":7'))


def test_verify_prints_one_line_for_an_unbroken_log(folder: Path, tmp_path: Path) -> None:
    last = list(read(folder))[-1]
    span = "7 entries from 2031-05-04T12:00:00.000+00:00 to 2031-05-04T12:00:06.000+00:00, unbroken"
    (tmp_path / "node.pub").write_text(f"{KEY.verify_key.text}\n")
    for key in (KEY.verify_key.text, tmp_path / "node.pub"):
        result = run("verify", folder, "--key", key)
        assert result.output == f"{span}, last sha256 {last.sha256}, head signed with the given key\n"
    result = run("verify", folder)
    assert result.output.startswith(f"{span}, last sha256 {last.sha256}\nnote: no key was given")


def test_verify_prints_json(folder: Path) -> None:
    found = json.loads(run("verify", folder, "--key", KEY.verify_key.text, "--json").output)
    assert (found["entries"], found["signature_checked"], found["notes"]) == (7, True, [])


def test_verify_of_an_empty_log(tmp_path: Path) -> None:
    AuditLog(tmp_path)
    assert run("verify", tmp_path).output.startswith(f"0 entries, unbroken, last sha256 {'0' * 64}")


def test_verify_refuses_a_broken_log_and_a_foreign_key(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="was not signed with this key"):
        run("verify", folder, "--key", SigningKey.generate().verify_key.text)
    for key in ("ed25519:short", tmp_path / "missing.pub"):
        with pytest.raises(TrustError, match="key"):
            run("verify", folder, "--key", key)
    with pytest.raises(TrustError, match="holds no audit log"):
        run("verify", tmp_path)
    break_line(folder)
    with pytest.raises(TrustError, match=r"audit-00001\.jsonl, line 3, \(entry 3\) was changed"):
        run("verify", folder)


def test_a_broken_log_ends_the_command_line_with_status_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import cli

    break_line(folder)
    with pytest.raises(SystemExit) as stop:
        cli.main(["audit-log", "verify", str(folder)])
    assert stop.value.code == 1
    assert "cannot be trusted" in capsys.readouterr().err


def test_show_prints_a_table_that_cannot_steer_the_terminal(folder: Path) -> None:
    output = run("show", folder).output
    assert all(text in output for text in ("node.started", "2031-05-04T12:00:06.000+00:00", '{"version":"1.2.3"}'))
    assert "\x1b" not in output
    assert "\x9b" not in output
    assert "\\x9b31m [bold]red[/bold]" in output


def test_show_prints_the_lines_as_they_stand(folder: Path) -> None:
    lines = run("show", folder, "--json").output.splitlines(keepends=True)
    assert "".join(lines).encode() == b"".join(path.read_bytes() for path in sorted(folder.glob("audit-*.jsonl")))


def test_show_filters(folder: Path) -> None:
    def rounds(*options: object) -> list[int]:
        output = run("show", folder, "--json", "--event", "request.received", *options).output
        return [json.loads(line)["details"]["round"] for line in output.splitlines()]

    assert rounds() == [0, 1, 2, 3, 4]
    assert rounds("--last", 2) == [3, 4]
    assert rounds("--last", 50) == [0, 1, 2, 3, 4]
    table = run("show", folder, "--last", 1).output
    assert "request.refused" in table
    assert "request.received" not in table
    with pytest.raises(ConfigError, match=r"no event 'request\.lost'; choose one of: node\.started"):
        run("show", folder, "--event", "request.lost")


@pytest.mark.parametrize("options", [[], ["--json"], ["--json", "--last", "9"]])
def test_show_of_a_broken_log_prints_what_comes_before_the_break(folder: Path, options: list[str]) -> None:
    break_line(folder)
    result = CliRunner().invoke(audit_log_app, ["show", str(folder), *options], env={"COLUMNS": "200"})
    assert isinstance(result.exception, TrustError)
    assert '{"round":0}' in result.output
    assert '"round":7' not in result.output


def test_the_app_has_a_name_to_be_mounted_by() -> None:
    assert isinstance(audit_log_app, typer.Typer)
    assert audit_log_app.info.name == "audit-log"
