"""Every library that the code imports is declared in pyproject.toml: none is there only because another one needs it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
OWN = {"shared", "client", "server", "simulations", "cli", "tests", "benchmarks"}
# Not installed here; by the name of its distribution.
OPTIONAL = {"presidio_analyzer": ["presidio-analyzer"], "spacy": ["spacy"]}


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_imported_library_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {normal(re.split(r"[\[<>=~! ;]", line, maxsplit=1)[0]) for line in lines}
    assert "numpy" in declared
    files = [ROOT / "cli.py", *(path for folder in OWN for path in (ROOT / folder).rglob("*.py"))]
    product = [path for path in files if path.relative_to(ROOT).parts[0] not in ("tests", "benchmarks")]
    used = {name for path in product for name in imported_modules(path)} - OWN - set(sys.stdlib_module_names)
    known = packages_distributions() | OPTIONAL
    missing = {name for name in used if not {normal(found) for found in known.get(name, [name])} & declared}
    assert missing == set()
