"""The accuracy figures of the README: `python -m benchmarks.results [NAME ...] [--seeds 3] [--again]`, or `make results`.

Every row is a scenario that ships with the project, run with its baselines under several seeds. The mean and spread of each arm,
the date and the machine go into `benchmarks/results-accuracy.json`, and from there into the README's tables, between markers.
A row whose scenario has not changed since is left alone; one that was interrupted goes on where it stopped, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import harness
from benchmarks.accuracy_tables import ROWS, Row, fill_tables
from server.rounds.observer import Observer
from shared.errors import SilotuneError
from shared.files.atomic import write_json, write_text
from simulations.running.repeats import run_repeats
from simulations.scenario import Scenario, load_scenario

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results-accuracy.json")
SCENARIOS = ROOT / "simulations"


def measure(row: Row, *, seeds: int, work: Path, process: Executor, scenarios: Path = SCENARIOS) -> dict[str, Any]:
    """Run `row` in `process`, going on in `work` if it was interrupted there, and return its figures.

    Raises:
        SilotuneError: if the run failed; what it did so far is kept in `work`.
        BrokenProcessPool: if the process ended in it.
    """
    folder = work / row.name
    changes = [*row.changes, f"simulation.repeats={seeds}"]
    process.submit(_simulate, scenarios / f"{row.scenario}.toml", changes, folder).result()
    figures = read_figures(folder, seeds=seeds)
    shutil.rmtree(folder)  # made by the run
    return figures


def _simulate(scenario: Path, changes: list[str], folder: Path) -> None:
    """What `silotune simulate` trains, without its audit, in a process that may do it again: a text is embedded once in it."""
    loaded = load_scenario(scenario, changes)
    run_repeats(loaded, folder, observer=lambda arm: Observer(), resume=(folder / "job.json").exists())


def _in_processes(rows: Iterable[Row]) -> Iterator[tuple[Row, Executor]]:
    """Yield every row with the process to run it in: one for all that follow each other with the same scenario."""
    for _, of_one_scenario in groupby(rows, key=lambda row: row.scenario):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            for row in of_one_scenario:
                yield row, process


def read_figures(folder: Path, *, seeds: int) -> dict[str, Any]:
    """Return what a finished run folder and its repeats hold: every metric of every arm by seed, and what they took."""
    places = [
        folder,
        *sorted((folder / "repeats").glob("seed-*"), key=lambda place: int(place.name.rpartition("-")[2])),
    ]
    if len(places) != seeds:
        raise ValueError(f"{folder} holds {len(places)} seeds, expected {seeds}")
    evaluation = _json(folder / "evaluation.json")
    arms = ["federated", *sorted(path.name for path in (folder / "baselines").glob("*"))]
    values: dict[str, list[float | None]] = {}
    untrained = []
    for place in places:
        first = json.loads((place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
        untrained.append(first["metrics"].get(evaluation["primary_metric"]))
        for arm in arms:
            path = (place if arm == "federated" else place / "baselines" / arm) / "evaluation.json"
            found = _json(path)["metrics"][evaluation["primary_metric"]] if path.exists() else None
            values.setdefault(arm, []).append(found)
    infos = [_json(path) for place in places for path in (place / "run.json", *place.glob("baselines/*/run.json"))]
    spent = [_json(path)["epsilon_spent"] for place in places for path in place.glob("sites/*/privacy.json")]
    return {
        "job_sha256": _json(folder / "run.json")["job_sha256"],
        "metric": evaluation["primary_metric"],
        "higher_is_better": evaluation["higher_is_better"],
        "test_records": _json(folder / "run.json")["public_records"]["reported"],
        "seeds": len(places),
        "arms": values,
        "untrained": untrained,
        "epsilon_largest": max((epsilon for epsilon in spent if epsilon is not None), default=None),
        "seconds_each": round(sum(info["seconds"] for info in infos) / len(places), 1),
        "peak_rss_mb": max(info["peak_rss_mb"] for info in infos),
    }


def is_current(row: Row, results: dict[str, Any], *, seeds: int, scenarios: Path = SCENARIOS) -> bool:
    """Return whether the figures of `row` are of its scenario as it is now, baselines included, and of enough seeds."""
    known = results.get("rows", {}).get(row.name)
    return bool(known) and known["seeds"] >= seeds and known.get("asked") == asked(row, scenarios)


def asked(row: Row, scenarios: Path = SCENARIOS) -> dict[str, Any]:
    """Return what decides the figures of a row: its job, data and baselines."""
    scenario: Scenario = load_scenario(scenarios / f"{row.scenario}.toml", list(row.changes))
    beside = scenario.model_dump(mode="json", include={"seed", "data", "partition", "baselines"})
    return {"job_sha256": scenario.job.sha256, **beside}


def run(
    rows: Iterable[Row],
    *,
    seeds: int,
    out: Path,
    readme: Path,
    work: Path,
    again: bool,
    console: Console,
    scenarios: Path = SCENARIOS,
) -> list[str]:
    """Measure what is not current, write the JSON file and the tables after every row, and return the names of failed rows."""
    failed = []
    for row, process in _in_processes(rows):
        results: dict[str, Any] = _json(out) if out.exists() else {"rows": {}}
        if not again and is_current(row, results, seeds=seeds, scenarios=scenarios):
            console.print(f"{row.name}: as it is, measured {results['rows'][row.name]['date']}", highlight=False)
        else:
            console.print(f"{row.name}: {seeds} seeds", highlight=False)
            try:
                figures = measure(row, seeds=seeds, work=work, process=process, scenarios=scenarios)
            except (SilotuneError, BrokenProcessPool) as error:
                console.print(f"{row.name}: failed: {error}", style="red", highlight=False, soft_wrap=True)
                failed.append(row.name)
                continue
            about = {"date": datetime.now(UTC).date().isoformat(), "machine": harness.machine()}
            results["rows"][row.name] = {**figures, **about, "asked": asked(row, scenarios)}
            results["versions"] = harness.versions()
            write_json(out, results)
        write_text(readme, fill_tables(readme.read_text(encoding="utf-8"), results["rows"]))
    return failed


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the chosen rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ROWS)}; none: all of them")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row, three or more")
    parser.add_argument("--again", action="store_true", help="measure also what has not changed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write or to merge into")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file whose tables are filled in")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "results", help="folder of unfinished rows")
    options = parser.parse_args(arguments)
    harness.calm_environment()  # also of the processes
    if unknown := [name for name in options.names if name not in ROWS]:
        parser.error(f"unknown row {unknown[0]!r}; there are {', '.join(ROWS)}")
    if options.seeds < 3:
        parser.error(f"--seeds is {options.seeds}; a spread takes three or more")
    rows = [ROWS[name] for name in options.names or ROWS]
    failed = run(
        rows,
        seeds=options.seeds,
        out=options.out,
        readme=options.readme,
        work=options.work,
        again=options.again,
        console=Console(stderr=True),
    )
    if failed:
        raise SystemExit(f"not measured: {', '.join(failed)}; run the command again to go on with them")


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
