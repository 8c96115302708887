"""Cross-validation: folds are disjoint, cover all and part nothing that belongs together; what is reported is what was run."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ConfigError, DataError, PrivacyError, RunError, SilotuneError
from shared.privacy.persons import Persons
from simulations.data.demo_data import fold_rows
from simulations.scenario import load_scenario
from simulations.sweep.spec import load_sweep

MakeScenario = Callable[..., Path]

SYNTHETIC = {"kind": "synthetic"}


def texts(*counts: int) -> list[dict[str, Any]]:
    """Records of as many texts as there are counts, each text so often, written in different ways, in random order."""
    records = [
        {"text": f"Text  {index}" if copy % 2 else f"text {index}", "label": str(copy % 2)}
        for index, count in enumerate(counts)
        for copy in range(count)
    ]
    random.Random(0).shuffle(records)
    return records


@pytest.mark.parametrize("folds", [2, 3, 5, 20])
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_folds_are_disjoint_and_cover_all_and_no_text_is_parted(folds: int, seed: int) -> None:
    records = texts(*[1] * 70, 2, 2, 3, 5, 8)
    parts = fold_rows(records, folds, seed=seed)
    assert sorted(row for part in parts for row in part) == list(range(90))
    assert all(part == sorted(part) for part in parts)
    sides = [{" ".join(records[row]["text"].casefold().split()) for row in part} for part in parts]
    assert sum(map(len, sides)) == len(set().union(*sides)) == 75
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= (1 if folds < 20 else 4)  # the text with eight records is larger than a twentieth


def test_the_seed_and_nothing_else_decides() -> None:
    records = texts(*[1] * 40)
    drawn = [
        {records[row]["text"].lower().replace("  ", " ") for row in part} for part in fold_rows(records, 4, seed=3)
    ]
    shuffled = random.Random(5).sample(records, len(records))
    again = [
        {shuffled[row]["text"].lower().replace("  ", " ") for row in part} for part in fold_rows(shuffled, 4, seed=3)
    ]
    assert drawn == again
    other = [{records[row]["text"] for row in part} for part in fold_rows(records, 4, seed=4)]
    assert other != drawn


def test_no_person_is_parted() -> None:
    records = texts(*[2] * 30)
    ids = [f"p{index % 13}" for index in range(60)]
    parts = fold_rows(records, 4, seed=0, persons=Persons.from_ids(ids))
    assert sorted(row for part in parts for row in part) == list(range(60))
    of = [{ids[row] for row in part} for part in parts]
    assert sum(map(len, of)) == 13


def test_too_few_texts_for_the_folds() -> None:
    with pytest.raises(DataError, match="3 different texts cannot make 4 folds"):
        fold_rows(texts(5, 5, 5), 4, seed=0)


def rows() -> list[tuple[str, str]]:
    """60 rows of 50 texts: ten texts occur twice."""
    words = ["warm", "dull", "quiet", "clever", "late", "bright", "worse", "funny", "made", "joy"]
    unique = [
        (f"the film is {a} and {b}", ["good", "bad"][(i + j) % 2])
        for i, a in enumerate(words)
        for j, b in enumerate(words[:5])
    ]
    return [*unique, *unique[::5]]


def test_every_fold_is_a_run_and_the_figures_are_theirs(
    scenario_file: MakeScenario, tmp_path: Path, silotune: Callable[..., Any]
) -> None:
    folder = tmp_path / "run"
    path = scenario_file(
        rows=rows(), data=SYNTHETIC, baselines={"arms": ["non-private"]}, training={"rounds": 1, "local_steps": 2}
    )
    done = silotune("simulate", path, "--out", folder, "--folds", 3, "--json")
    assert done.status == 0, done.err
    places = [folder, folder / "folds" / "fold-2", folder / "folds" / "fold-3"]
    scenario = load_scenario(path, ["simulation.folds=3"])
    every = [fold.test for fold in scenario.load_folds()]
    assert sorted(record["text"] for part in every for record in part) == sorted(text for text, _ in rows())
    for number, (place, test) in enumerate(zip(places, every, strict=True), start=1):
        run = json.loads((place / "run.json").read_text())
        assert (run["dataset"]["fold"], run["dataset"]["folds"]) == (number, 3)
        assert run["dataset"]["test_records"] == len(test)
        trained = [
            json.loads(line)["text"]
            for home in sorted(place.glob("sites/*/home/data.jsonl"))
            for line in home.read_text().splitlines()
        ]
        assert len(trained) == 60 - len(test)
        assert not {*trained} & {str(record["text"]) for record in test}
        # Each is a whole run, with ledgers and a statement of its own.
        assert (place / "statement.json").exists()
        assert json.loads((place / "sites" / "site-1" / "privacy.json").read_text())["steps_executed"] == 2
    found = json.loads((folder / "folds.json").read_text())
    assert (found["folds"], found["test_records"]) == (3, [len(test) for test in every])
    for arm, at in (("federated", "."), ("non-private", "baselines/non-private")):
        for metric in ("accuracy", "loss", "macro_f1"):
            values = [json.loads((place / at / "evaluation.json").read_text())["metrics"][metric] for place in places]
            assert found["arms"][arm][metric] == values
    accuracies = found["arms"]["federated"]["accuracy"]
    figures = json.loads(done.out)
    assert figures["accuracy_federated_dp_fold_mean"] == round(statistics.mean(accuracies), 4)
    assert figures["accuracy_federated_dp_fold_std"] == round(statistics.stdev(accuracies), 4)
    report = (folder / "report.html").read_text()
    assert "Cross-validation over 3 folds" in report
    assert "understates" in report
    assert f"{100 * statistics.mean(accuracies):.1f}" in report


def test_folds_that_were_cut_short_are_resumed(
    scenario_file: MakeScenario, tmp_path: Path, silotune: Callable[..., Any]
) -> None:
    folder = tmp_path / "run"
    path = scenario_file(
        rows=rows(), data=SYNTHETIC, simulation={"threads": 1, "folds": 2}, training={"rounds": 2, "local_steps": 1}
    )
    stopped = silotune("simulate", path, "--out", folder, "--stop-after", 1, "--json")
    assert stopped.status == 0, stopped.err
    assert not (folder / "folds").exists()
    assert not (folder / "folds.json").exists()
    assert silotune("simulate", path, "--out", folder, "--resume", "--json").status == 0
    first = (folder / "folds.json").read_bytes()
    # As a kill between the last fold and the summary leaves it, or in the middle of a fold.
    (folder / "folds.json").unlink()
    (folder / "folds" / "fold-2" / "evaluation.json").unlink()
    assert silotune("simulate", path, "--out", folder, "--resume", "--json").status == 0
    assert (folder / "folds.json").read_bytes() == first
    # A folder whose records were split otherwise is not gone on with.
    one = silotune("simulate", path, "--out", folder, "--resume", "--set", "simulation.folds=3")
    assert (one.status, "was made from other data" in one.err) == (RunError("").exit_code, True)


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"data": {}}, PrivacyError, "the records are private"),
        ({"data": {"kind": "private"}}, PrivacyError, "the records are private"),
        ({"data": {**SYNTHETIC, "num_confirm": 3}}, ConfigError, "num_confirm is for sweeps"),
        ({"data": SYNTHETIC, "simulation": {"repeats": 2}}, ConfigError, "both repeat the scenario"),
        (
            {"data": SYNTHETIC, "rows": [("one text", "good"), ("One  text", "bad")] * 20},
            DataError,
            "1 different texts",
        ),
    ],
)
def test_what_cannot_be_cross_validated_is_refused(
    scenario_file: MakeScenario,
    tmp_path: Path,
    silotune: Callable[..., Any],
    sections: dict[str, Any],
    error: type[SilotuneError],
    message: str,
) -> None:
    done = silotune("simulate", scenario_file(**sections), "--out", tmp_path / "run", "--folds", 2)
    assert done.status == error("").exit_code
    assert message in done.err
    assert not (tmp_path / "run").exists()


def test_not_together_with_a_test_file(scenario_file: MakeScenario) -> None:
    test = {"path": "train.csv", "columns": {"text": "review", "label": "verdict"}}
    path = scenario_file(data={"kind": "public", "test": test})
    with pytest.raises(ConfigError, match=r"data\.test gives other evaluation data"):
        load_scenario(path, ["simulation.folds=2"])


def test_not_in_a_sweep(scenario_file: MakeScenario) -> None:
    with pytest.raises(ConfigError, match="a trial of a sweep is one run"):
        load_sweep(
            scenario_file(data=SYNTHETIC, simulation={"folds": 2}),
            axes=["training.learning_rate=0.1,0.2"],
            overrides=[],
        )
