"""Every library that the code imports is declared in pyproject.toml, and every version that is installed is locked by hash."""

from __future__ import annotations

import ast
import re
import sys
import sysconfig
import tomllib
from collections.abc import Iterable
from importlib.metadata import distributions, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "locks"
OWN = {"shared", "client", "server", "simulations", "silotune", "cli", "tests", "benchmarks", "tools"}
# Not installed here; by the name of its distribution.
OPTIONAL = {
    "presidio_analyzer": ["presidio-analyzer"],
    "pynvml": ["nvidia-ml-py"],
    "spacy": ["spacy"],
}


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def asked(extras: Iterable[str]) -> dict[str, Requirement]:
    """Return what pyproject.toml asks for, by name."""
    lines = [*project()["dependencies"], *(line for e in extras for line in project()["optional-dependencies"][e])]
    return {canonicalize_name(found.name): found for found in map(Requirement, lines)}


def lock_lines(name: str) -> list[Requirement]:
    """Return the requirements of one lock; each has at least one hash."""
    text = (LOCKS / f"{name}.txt").read_text(encoding="utf-8")
    joined = [line for line in text.replace("\\\n", "").splitlines() if not line.startswith("#")]
    assert joined
    assert all(re.fullmatch(r"[^ ]+==[^ ]+ (; .+? )?(\s*--hash=sha256:[0-9a-f]{64})+", line) for line in joined)
    return [Requirement(line.partition("--hash")[0]) for line in joined]


def here(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate()


def versions(lines: Iterable[Requirement]) -> dict[str, str]:
    return {line.name: str(line.specifier).removeprefix("==") for line in lines if here(line)}


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def undeclared(files: Iterable[Path], declared: set[str]) -> set[str]:
    """Return the libraries that files import and pyproject.toml does not ask for."""
    found = {name for path in files for name in imported_modules(path) if not (path.parent / name).is_dir()}
    used = found - OWN - set(sys.stdlib_module_names)
    known = packages_distributions() | OPTIONAL
    return {name for name in used if not {canonicalize_name(n) for n in known.get(name, [name])} & declared}


def test_every_imported_library_is_declared() -> None:
    files = {folder: sorted((ROOT / folder).rglob("*.py")) for folder in OWN}
    development = [path for folder in ("tests", "benchmarks", "tools") for path in files[folder]]
    product = [path for paths in files.values() for path in paths if path not in development]
    assert len(product) > 100
    extras = set(project()["optional-dependencies"])
    assert undeclared(product, set(asked(extras - {"dev", "docs"}))) == set()
    assert undeclared(development, set(asked(extras))) == set()


def test_an_undeclared_library_is_found(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("import numpy\nfrom httpx2 import get\n")
    assert undeclared([tmp_path / "module.py"], {"numpy"}) == {"httpx2"}


@pytest.mark.parametrize("extra", ["", *project()["optional-dependencies"]])
def test_locks_hold_what_the_project_asks_for(extra: str) -> None:
    locked = versions([*lock_lines("base"), *(lock_lines(extra) if extra else [])])
    for name, requirement in asked([extra] if extra else []).items():
        if name != "torch":
            assert requirement.specifier.contains(locked[name]), f"make lock: {requirement}"


def test_there_is_a_lock_for_each_extra() -> None:
    assert {path.stem for path in LOCKS.glob("*.txt")} == {"base", "build", "sbom", *project()["optional-dependencies"]}


def test_locks_and_constraints_name_the_same_versions() -> None:
    locked = {line.name: line.specifier for path in LOCKS.glob("*.txt") for line in lock_lines(path.stem) if here(line)}
    pinned = {line.name: line.specifier for line in constraints() if here(line)}
    assert pinned.pop("torch")
    assert locked == pinned


def test_no_lock_names_a_build_that_only_the_machine_knows() -> None:
    locked = {line.name for path in LOCKS.glob("*.txt") for line in lock_lines(path.stem)}
    assert not {name for name in locked if re.fullmatch(r"torch|triton|nvidia-(?!ml-py$).*|cuda-.*", name)}


def test_torch_finds_what_it_needs_installed_already() -> None:
    locked = versions(lock_lines("base"))
    needed = [Requirement(line) for line in requires("torch") or []]
    needed = [line for line in needed if here(line) and not re.match(r"triton|nvidia-|cuda-", line.name)]
    assert needed
    assert all(line.specifier.contains(locked[canonicalize_name(line.name)]) for line in needed)


def test_what_builds_the_project_is_locked() -> None:
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines = configuration["build-system"]["requires"] + configuration["dependency-groups"]["build"]
    locked = versions(lock_lines("build"))
    assert all(Requirement(line).specifier.contains(locked[Requirement(line).name]) for line in lines)


def test_what_is_installed_is_what_is_locked() -> None:
    pinned = versions(constraints())
    # Not all of sys.path: once a test has imported setuptools, it holds the copies that setuptools brings for itself.
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    found = distributions(path=folders)
    installed = {canonicalize_name(one.name): one.version.partition("+")[0] for one in found}
    assert {"flwr", "torch"} <= set(installed) & set(pinned)
    other = {
        name: (installed[name], pinned[name])
        for name in set(installed) & set(pinned)
        if installed[name] != pinned[name]
    }
    assert other == {}, "make install"


def test_installing_compares_every_hash() -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("$(BIN)/.installed:")[2].partition("\n\n")[0]
    (build, hashed, torch, own) = [line for line in recipe.splitlines() if "pip install" in line]
    assert build.endswith(" $(LOCKED) -r locks/build.txt")
    assert hashed.endswith(" $(LOCKED) $(addprefix -r ,$(LOCKS))")
    assert "\nLOCKED := --no-compile --require-hashes --no-deps --no-build-isolation" in (ROOT / "Makefile").read_text(
        encoding="utf-8"
    )
    assert torch.endswith(" -c constraints.txt torch")
    assert own.endswith(" --no-deps --no-build-isolation -e .")


PUBLIC_FLOWER = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.grid", "flwr.simulation"}


def test_the_product_uses_only_what_flower_documents() -> None:
    """Each of these modules is named in Flower's reference; what lies below changes from one release to the next."""
    used: dict[str, list[str]] = {}
    for package in sorted(OWN - {"tests", "benchmarks", "tools"}):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
                for name in names:
                    if name.partition(".")[0] == "flwr":
                        used.setdefault(name, []).append(path.relative_to(ROOT).as_posix())
    assert used.keys() == PUBLIC_FLOWER, used
