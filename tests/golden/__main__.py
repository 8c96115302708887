"""Golden runs: `record OUT`, `compare BEFORE AFTER`, `against COMMIT`; `make golden BASE=COMMIT` is the last."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.golden.compare import compare
from tests.golden.record import CHECKOUT, record
from tests.golden.recorder.cases import CASES


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if everything is equal or recorded, 1 if something differs, 2 if that is not known."""
    asked = _parser().parse_args(arguments)
    if asked.command == "record":
        record(asked.out, project=asked.project, cases=asked.cases, keep=asked.keep)
        return 0
    if asked.command == "compare":
        try:
            return _told(compare(asked.before, asked.after, ignored=asked.ignore))
        except FileNotFoundError as error:
            print(error, file=sys.stderr)
            return 2
    return _against(asked.commit, cases=asked.cases, ignored=asked.ignore)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="record a checkout into a new folder")
    recording.add_argument("out", type=Path)
    recording.add_argument("--project", type=Path, default=CHECKOUT, help="another checkout")
    recording.add_argument("--keep", type=Path, help="new folder for the files as they were left")
    comparing = commands.add_parser("compare", help="say what differs between two records")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    against = commands.add_parser("against", help="record a commit and this working tree, and compare")
    against.add_argument("commit")
    for parsed in (recording, against):
        parsed.add_argument("--cases", nargs="+", choices=sorted(CASES), default=[], metavar="CASE")
    for parsed in (comparing, against):
        parsed.add_argument(
            "--ignore", action="append", default=[], metavar="PATTERN", help="files whose change is wanted"
        )
    return parser


def _against(commit: str, *, cases: Sequence[str], ignored: Sequence[str]) -> int:
    folder = Path(tempfile.mkdtemp(prefix="silotune-golden-"))
    base = folder / "checkout"
    git = ["git", "-C", str(CHECKOUT), "worktree"]
    try:
        subprocess.run([*git, "add", "--quiet", "--detach", str(base), commit], check=True)
        try:
            record(folder / "before", project=base, cases=cases)
        finally:
            subprocess.run([*git, "remove", "--force", str(base)], check=True)
        record(folder / "after", cases=cases)
        found = compare(folder / "before", folder / "after", ignored=ignored)
        if not found:
            shutil.rmtree(folder)
        else:
            print(f"records: {folder / 'before'}, {folder / 'after'}")
        return _told(found)
    except subprocess.CalledProcessError as error:
        print(f"no comparison: {error}; what was recorded is in {folder}", file=sys.stderr)
        return 2


def _told(found: Sequence[str]) -> int:
    print("\n".join(found) if found else "equal byte for byte")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
