"""Copy the files that belong to one image into a folder, with a `pyproject.toml` that installs only them.

    python docker/stage.py site DEST            copy the files of the site image
    python docker/stage.py site --list          print them, one a line
    python docker/stage.py site --requirements  print what pip has to install first

Every file of a folder is code or read by it (templates, style sheets), so all are copied. The Dockerfiles and
tests/integration/test_docker.py share this list, so what is tested is what is shipped: a site gets neither `server/` nor
`simulations/`, a coordinator and a service of models no `client/`, and nobody tests or
data. It needs only the standard library, since it runs
before anything is installed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Folders of code by image.
IMAGES = {
    "site": ("cli", "client", "shared"),
    "coordinator": ("cli", "server", "shared"),
    "serve": ("cli", "server", "shared"),
}
# Files of the repository root that all have.
ROOT_FILES = ("LICENSE",)
# What a folder of code may hold that is no part of it.
LEFT_OUT = (".pyc", ".pyo", ".swp", ".orig", ".rej")


def image_files(image: str, root: Path = ROOT) -> list[Path]:
    """Return the files of an image, relative to `root`, sorted."""
    found = [path for folder in IMAGES[image] for path in (root / folder).rglob("*") if path.is_file()]
    code = [path for path in found if path.suffix not in LEFT_OUT and "__pycache__" not in path.parts]
    return sorted([*(Path(name) for name in ROOT_FILES), *(path.relative_to(root) for path in code)])


def requirements(extras: Sequence[str], root: Path = ROOT) -> str:
    """Return the versions and hashes of everything that the project and its `extras` need, but for torch."""
    known = {path.stem: path for path in sorted((root / "locks").glob("*.txt"))}
    if unknown := set(extras) - set(known):
        raise SystemExit(f"error: no such extra: {', '.join(sorted(unknown))}; there are {', '.join(known)}.")
    lines = "".join(known[name].read_text(encoding="utf-8") for name in ("base", *extras)).splitlines(keepends=True)
    blocks = re.split(r"^(?=\S)", "".join(line for line in lines if line[0] != "#"), flags=re.MULTILINE)
    return "".join(dict.fromkeys(blocks))  # extras may share a package, at the same version and hashes


def image_pyproject(image: str, root: Path = ROOT) -> str:
    """Return the `pyproject.toml` of an image: the project's own, without what the image does not hold."""
    project = _project(root)
    kept = ("name", "version", "description", "license", "license-files", "requires-python", "dependencies")
    lines = [
        "[build-system]",
        'requires = ["setuptools>=77"]',
        'build-backend = "setuptools.build_meta"',
        "",
        "[project]",
    ]
    # JSON strings and lists of strings are TOML too.
    lines += [f"{key} = {json.dumps(project[key])}" for key in kept]
    lines += ["", "[project.scripts]", *(f"{name} = {json.dumps(to)}" for name, to in project["scripts"].items())]
    files = [path for path in image_files(image, root) if len(path.parts) > 1]
    packages = sorted({path.parent.as_posix().replace("/", ".") for path in files if path.name == "__init__.py"})
    lines += ["", "[tool.setuptools]", f"packages = {json.dumps(packages)}"]
    # What is no code lies in a package, or in a folder of one.
    data = sorted(
        {
            f"*{path.suffix}" if path.parent.as_posix().replace("/", ".") in packages else f"{path.parent.name}/*"
            for path in files
            if path.suffix != ".py"
        }
    )
    lines += ["", "[tool.setuptools.package-data]", f'"*" = {json.dumps(data)}', ""]
    return "\n".join(lines)


def stage(image: str, destination: Path, root: Path = ROOT) -> None:
    """Copy an image's files and its `pyproject.toml` into `destination`, which must be empty or not exist."""
    if destination.exists() and any(destination.iterdir()):
        raise SystemExit(f"error: {destination} is not empty; remove it or name another folder.")
    for path in image_files(image, root):
        target = destination / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, target)
    (destination / "pyproject.toml").write_text(image_pyproject(image, root), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("image", choices=sorted(IMAGES))
    parser.add_argument("destination", nargs="?", type=Path, metavar="DEST")
    parser.add_argument("--list", action="store_true", help="print the files instead of copying them")
    parser.add_argument("--requirements", action="store_true", help="print the dependencies instead of copying")
    parser.add_argument("--extras", default="", help="with --requirements: extras to add, separated by commas")
    options = parser.parse_args(arguments)
    if options.list:
        sys.stdout.writelines(f"{path.as_posix()}\n" for path in image_files(options.image))
    elif options.requirements:
        extras = [extra for extra in options.extras.split(",") if extra]
        sys.stdout.write(requirements(extras))
    elif options.destination:
        stage(options.image, options.destination)
    else:
        parser.error("name a folder to copy to, or --list or --requirements")


def _project(root: Path) -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project


if __name__ == "__main__":
    main()
