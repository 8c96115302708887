"""docs/architecture.md names only what there is, and every room."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGES = ("shared", "client", "server", "simulations", "cli")


def test_every_file_and_folder_that_it_names_exists() -> None:
    named = set(re.findall(r"[`\"]((?:(?:shared|client|server|simulations|cli)/[\w/.]+|pyproject\.toml))[`\"]", TEXT))
    assert len(named) > 40
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_name_in_parentheses_stands_in_the_file_before_it() -> None:
    pairs = re.findall(r"`([\w/]+\.py)` \(`(\w+)`\)", TEXT)
    assert pairs
    assert [pair for pair in pairs if pair[1] not in (ROOT / pair[0]).read_text(encoding="utf-8")] == []


def test_every_room_is_named() -> None:
    rooms = {
        folder.name
        for package in PACKAGES
        for folder in (ROOT / package).iterdir()
        if (folder / "__init__.py").exists()
    }
    assert [room for room in sorted(rooms) if f"`{room}/`" not in TEXT] == []


def test_no_folder_holds_more_than_fifteen_files_of_code() -> None:
    """A newcomer looks a folder over in one glance."""
    counts = {
        folder.relative_to(ROOT).as_posix(): len([file for file in folder.glob("*.py") if file.name != "__init__.py"])
        for package in PACKAGES
        for folder in [ROOT / package, *(ROOT / package).rglob("*")]
        if folder.is_dir()
    }
    assert {name: count for name, count in counts.items() if count > 15} == {}
