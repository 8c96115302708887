"""The link names every module of Flower that it uses, and all of them are public."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[3]
PUBLIC = {"flwr.app", "flwr.serverapp.grid"}


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_only_public_modules_of_flower_are_imported() -> None:
    rooms = [ROOT / package / "link" for package in ("shared", "server", "client")]
    used = {name for room in rooms for path in room.glob("*.py") for name in imported(path)}
    assert {name for name in used if name.partition(".")[0] == "flwr"} == PUBLIC
