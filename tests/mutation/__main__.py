"""`python -m tests.mutation [MODULE ...]`: mutation runs over the modules of `targets.toml`; see `make mutants`."""

from __future__ import annotations

import argparse
import json
import sys
import time
import tomllib
from dataclasses import asdict
from pathlib import Path

from tests.mutation.runner import MutationRun, Store, Target, report

PROJECT = Path(__file__).parents[2]


def targets(file: Path, names: list[str]) -> list[Target]:
    """Return the modules of `targets.toml`, or those whose path contains one of `names`."""
    content = tomllib.loads(file.read_text(encoding="utf-8"))
    everything = [
        Target(path=path, **{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()})
        for path, entry in content.items()
    ]
    return [target for target in everything if not names or any(name in target.path for name in names)]


def main() -> int:
    """Examine the modules and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("modules", nargs="*", help="parts of paths of modules; all by default")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--again", action="store_true", help="also repeat what was found before")
    parser.add_argument("--project", type=Path, default=PROJECT, help="whose modules; with tests/mutation/*.toml")
    parser.add_argument("--seconds", type=float, help="of processor time, then stop; the next run goes on from there")
    parser.add_argument(
        "--sample", type=int, help="mutants of each module to try at most, drawn at random; all by default"
    )
    arguments = parser.parse_args()
    project = arguments.project.resolve()
    settings, folder = project / "tests" / "mutation", project / ".mutation"
    chosen = targets(settings / "targets.toml", arguments.modules)
    if not chosen:
        parser.error(f"no module of {settings / 'targets.toml'} is named like {arguments.modules}")
    run = MutationRun(
        project,
        folder / "copies",
        Store(folder / "verdicts.json"),
        jobs=arguments.jobs,
        seconds=arguments.seconds,
        sample=arguments.sample,
        say=lambda line: print(line, flush=True),
    )
    findings = []
    for target in chosen:
        started = time.monotonic()
        findings.append(run.examine(target, again=arguments.again))
        print(f"{target.path}: {time.monotonic() - started:.0f} s", flush=True)
        if not findings[-1].complete:
            print("stopped in the middle; run it again to go on")
            return 2
    explained = tomllib.loads((settings / "survivors.toml").read_text(encoding="utf-8"))
    text, good = report(findings, explained)
    print(text)
    content = {found.path: {name: asdict(v) for name, v in found.verdicts.items()} for found in findings}
    (folder / "report.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
