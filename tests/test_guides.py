"""What the guides quote of the product is what it says."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What operating systems say, and names that stand where the product puts one in.
_NOT_OURS = {"Connection refused", "timed out", "mode"}
_NAMES = re.compile(r"\.\.\.|'[^']*'|\b[A-Z]\b|\bsite A\b|\b[A-Z]{2,}\b|\S*\d\S*|\S*/\S*|\S+\.(?:crt|toml|key)\b")


@cache
def said() -> list[str]:
    """Return every text in the code, with a star where a value goes."""
    found = []
    for package in ("shared", "server", "client", "cli", "simulations", "silotune"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values)
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def quoted(guide: str) -> list[str]:
    """Return the messages of a guide's table of troubles."""
    rows = (ROOT / "docs" / guide).read_text(encoding="utf-8").partition("## Troubleshooting")[2].splitlines()
    return [text for row in rows if row.startswith("| ") for text in re.findall(r"`([^`]*)`", row.split("|")[1])]


@pytest.mark.parametrize("guide", ["site-guide.md", "coordinator-guide.md"])
def test_every_message_of_the_table_of_troubles_can_come(guide: str) -> None:
    messages = quoted(guide)
    assert len(messages) > 10
    for message in messages:
        parts = [part.strip(" ,;:()") for part in _NAMES.split(message)]
        for part in parts:
            # One text, or words on both sides of where a value goes.
            pieces = [part] if any(part in text for text in said()) else re.split(r"[,:;().]| and ", part)
            for piece in (piece.strip() for piece in pieces):
                known = len(piece) < 3 or piece in _NOT_OURS or any(piece in text for text in said())
                assert known, f"{guide} quotes {message!r}; nothing says {piece!r}"


def attacks(guide: str) -> list[str]:
    """Return the rows of a document's tables of attacks."""
    tables = (ROOT / "docs" / guide).read_text(encoding="utf-8").split("\n| attack ")[1:]
    return [row for table in tables for row in table.split("\n\n")[0].splitlines()[2:]]


@pytest.mark.parametrize(("guide", "least"), [("attacks.md", 31), ("secure-aggregation.md", 15)])
def test_every_attack_has_a_test_that_is_there(guide: str, least: int) -> None:
    rows = attacks(guide)
    assert len(rows) >= least
    for row in rows:
        named = re.findall(r"`(tests/[^`:]+\.py)(?:::(\w+))?`", row.split("|")[3])
        assert named, row
        for path, name in named:
            text = (ROOT / path).read_text(encoding="utf-8")
            assert "def test_" in text
            assert not name or f"def {name}(" in text, f"{path} has no {name}"
