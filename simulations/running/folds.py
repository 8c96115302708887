"""k-fold cross-validation: the same scenario k times, each time with another k-th of the records as evaluation data.

Guarantee (test: tests/simulations/running/test_folds.py): every record is evaluation data in exactly one fold and trains in all
others; no text, or with persons as the unit no person, stands on both sides of one.

Each fold is a run of its own over the same records, with its own epsilon; they compose. So only records that are declared public
or synthetic are cross-validated, as in a sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from server.records.results import FOLDS_FILE, Folds, read_evaluation
from server.reports.run import write_report_if_possible
from server.rounds.early_stopping import is_over
from server.store.checkpoint import Checkpoint
from shared.errors import PrivacyError
from shared.files.atomic import write_json
from simulations.running.engine import FEDERATED, MakeObserver, arm_folder, run_scenario
from simulations.scenario import Scenario


def run_folds(
    scenario: Scenario,
    folder: Path,
    *,
    observer: MakeObserver,
    resume: bool = False,
    stop_after: int | None = None,
    report: bool = True,
) -> Checkpoint:
    """Run the first fold into `folder`, the others into `folder/folds/fold-N`, and return the first's checkpoint.

    `folds.json` then holds the final metrics of every arm and fold, and the report shows mean and spread. See
    `simulations.running.engine.run_scenario` for the arguments; `stop_after` stops the first fold, and the others wait for the
    resume.

    Raises:
        PrivacyError: if the records count as private.
    """
    _require_unprivate(scenario)
    folds = scenario.load_folds()
    places = [folder, *(folder / "folds" / f"fold-{fold.number}" for fold in folds[1:])]
    finished: list[Checkpoint] = []
    for fold, place in zip(folds, places, strict=True):
        checkpoint = run_scenario(
            scenario,
            place,
            observer=observer,
            resume=resume,
            stop_after=None if finished else stop_after,
            fold=fold,
        )
        finished.append(checkpoint)
        if not is_over(checkpoint, scenario.job):
            return finished[0]
    arms = {arm: found for arm in [FEDERATED, *scenario.baselines.arms] if (found := _by_metric(places, arm))}
    test_records = tuple(len(fold.test) for fold in folds)
    write_json(folder / FOLDS_FILE, Folds(folds=len(folds), test_records=test_records, arms=arms))
    if report:
        write_report_if_possible(folder)
    return finished[0]


def _by_metric(places: Sequence[Path], arm: str) -> dict[str, tuple[float, ...]]:
    """Return every metric of an arm over the folds; one that a fold could not measure is left out."""
    found: list[dict[str, float | None]] = []
    for place in places:
        path = arm_folder(place, arm) / "evaluation.json"
        if arm != FEDERATED and not path.exists():
            return {}  # a baseline that diverged so far that it could not go on
        found.append(read_evaluation(path).metrics)
    values = {name: [value for metrics in found if (value := metrics.get(name)) is not None] for name in found[0]}
    return {name: tuple(of_folds) for name, of_folds in values.items() if len(of_folds) == len(found)}


def _require_unprivate(scenario: Scenario) -> None:
    if scenario.data.declared_kind == "private":
        raise PrivacyError(
            "the records are private (a file counts as private unless it is declared otherwise). Cross-validation evaluates on "
            "every one of them without noise and trains on each several times, which no single run's epsilon counts. Declare "
            'data.kind = "public" or "synthetic" if they are; else remove simulation.folds and hold public records out.'
        )
