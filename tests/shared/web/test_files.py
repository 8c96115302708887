"""What a console serves and needs is part of the package, and whose it is stands beside it."""

from __future__ import annotations

import tomllib
from pathlib import Path

from shared.web.pages import StaticFiles

ROOT = Path(__file__).parents[3]
FOLDERS = ("static", "templates", "texts")


def test_everything_is_in_the_package() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "package-data"
    ]["*"]
    packages = [path.parent for path in sorted(ROOT.glob("*/__init__.py"))]
    rooms = [path.parent for folder in FOLDERS for package in packages for path in sorted(package.glob(f"*/{folder}"))]
    assert len(rooms) >= 5
    assert all((room / "__init__.py").exists() for room in rooms)
    for room in set(rooms):
        found = {path for pattern in patterns for path in room.glob(pattern)}
        wanted = {path for folder in FOLDERS for path in (room / folder).rglob("*") if path.is_file()}
        assert wanted <= found
    migrations = ROOT / "shared/web/state/migrations"
    assert all((folder / "__init__.py").exists() for folder in (migrations, migrations / "versions"))


def test_every_library_has_its_licence_beside_it() -> None:
    static = ROOT / "shared/web/static"
    libraries = {path.name.partition(".")[0] for path in static.glob("*.min.js")}
    assert libraries == {"htmx", "uplot"}
    for name in libraries:
        assert "permission" in (static / f"{name}.LICENSE.txt").read_text(encoding="utf-8").lower()


def test_a_file_has_an_address_that_changes_with_it(tmp_path: Path) -> None:
    (tmp_path / "a.css").write_text("a {}")
    before = StaticFiles([tmp_path])
    answer = before.answer("a.css")
    assert answer is not None
    assert (answer.body, answer.media_type) == (b"a {}", "text/css")
    (tmp_path / "a.css").write_text("b {}")
    assert StaticFiles([tmp_path]).address("a.css") != before.address("a.css")
    assert before.answer("../a.css") is None
