"""Write a version's commit (`make release VERSION=1.2.3`); it neither tags nor pushes.

Guarantee: `pyproject.toml`, `CITATION.cff`, CHANGELOG.md and the charts name one version and one day, and the commit holds
nothing else. All checks come before the first write.
"""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPEN = "## Unreleased\n"
CHARTS = ("charts/silotune-coordinator/Chart.yaml", "charts/silotune-serve/Chart.yaml")
FILES = ("pyproject.toml", "CITATION.cff", "CHANGELOG.md", *CHARTS)


def numbers(version: str) -> tuple[int, ...]:
    """Return the parts of `1.2.3`."""
    if not re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}", version):
        raise SystemExit(f"error: {version!r} is no version; name it as in: make release VERSION=1.2.3")
    return tuple(map(int, version.split(".")))


def git(root: Path, *arguments: str) -> str:
    """Return what git prints; a failure of git ends this program with git's own message."""
    done = subprocess.run(["git", *arguments], cwd=root, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: git {arguments[0]} failed; nothing was committed.")
    return done.stdout


def released(text: str, name: str, version: str, today: datetime.date) -> str:
    """Return the text of one of FILES for this version."""
    if name == "pyproject.toml":
        return re.sub(r'^version = ".*"$', f'version = "{version}"', text, count=1, flags=re.MULTILINE)
    if name == "CITATION.cff":
        kept = re.sub(r"^date-released: .*\n", "", text, flags=re.MULTILINE)
        return re.sub(
            r"^version: .*$", f"version: {version}\ndate-released: {today}", kept, count=1, flags=re.MULTILINE
        )
    if name in CHARTS:
        return re.sub(r'^(version|appVersion): "?[\d.]+("?)$', rf"\1: \g<2>{version}\2", text, flags=re.MULTILINE)
    return text.replace(OPEN, f"{OPEN}\n## {version} ({today})\n", 1)


def check(root: Path, version: str) -> None:
    """Refuse what would make no proper version."""
    texts = {name: (root / name).read_text(encoding="utf-8") for name in FILES}
    (last,) = re.findall(r'^version = "(.*)"$', texts["pyproject.toml"], flags=re.MULTILINE)
    if numbers(version) <= numbers(last):
        raise SystemExit(f"error: {version} is not above {last}, which pyproject.toml names; choose a higher one.")
    _, found, rest = texts["CHANGELOG.md"].partition(OPEN)
    if not found or not re.search(r"^- ", rest.partition("\n## ")[0], flags=re.MULTILINE):
        raise SystemExit('error: CHANGELOG.md has no entry under "Unreleased"; say there what changed.')
    if changed := git(root, "status", "--porcelain"):
        raise SystemExit(
            f"error: there are uncommitted changes; commit them or put them away first:\n{changed.rstrip()}"
        )
    if git(root, "tag", "--list", f"v{version}"):
        raise SystemExit(f"error: there is a tag v{version} already; choose a higher version.")


def release(root: Path, version: str, today: datetime.date) -> None:
    """Check, write the files and commit them."""
    check(root, version)
    for name in FILES:
        path = root / name
        path.write_text(released(path.read_text(encoding="utf-8"), name, version, today), encoding="utf-8")
    git(root, "commit", "--quiet", "--message", f"Version {version}", "--", *FILES)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) != 1:
        raise SystemExit("error: name the version, as in: make release VERSION=1.2.3")
    release(ROOT, given[0], datetime.datetime.now(tz=datetime.UTC).date())
    sys.stdout.write(f'Look at it (git show), then: git tag --annotate v{given[0]} --message "Silotune {given[0]}"\n')


if __name__ == "__main__":
    main()
