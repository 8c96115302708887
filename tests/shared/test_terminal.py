"""What commands print for people: nothing of a record or a label acts on the terminal."""

from __future__ import annotations

import pytest
from rich.table import Table

from shared import terminal


def test_what_would_steer_a_terminal_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title="t\x1b[1m")
    table.add_column("c\x07")
    table.add_row("\x1b[31mlabel\u202e")
    console = terminal.console()
    console.print(table)
    console.print("a\x9b2J")
    out = capsys.readouterr().out
    assert not set(out) & set("\x1b\x07\x9b\u202e")
    for shown in ("t\ufffd[1m", "c\ufffd", "\ufffd[31mlabel\ufffd", "a\ufffd2J"):
        assert shown in out


def test_other_characters_stay() -> None:
    text = "caf\u00e9\u00a0\u5317\u4eac \U0001f469\u200d\u2695\ttab\nline \u0639\u0627\u062c\u0644"
    assert terminal.shown_text(text) == text
