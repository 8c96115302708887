"""`silotune monitor` tells whoever gives it the texts that the run has seen, and nobody else."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from server.rounds.observer import Observer
from shared.data.known_texts import ContentSum, KnownTexts
from simulations.running.engine import run_scenario
from simulations.scenario import Scenario, load_scenario

Silotune = Callable[..., Any]


@pytest.fixture(scope="module")
def scenarios(write_scenario: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    """One scenario on public records and one on private ones, each with its run folder `run` beside it."""
    found = {}
    for kind in ("public", "private"):
        folder = tmp_path_factory.mktemp(kind)
        found[kind] = load_scenario(write_scenario(folder, training={"rounds": 1}, data={"kind": kind}))
        run_scenario(found[kind], folder / "run", observer=lambda arm: Observer())
    return found


def write_texts(path: Path, texts: Sequence[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["review"], *([text] for text in texts)])
    return path


def warnings_of(silotune: Silotune, scenario: Scenario, texts: Sequence[str], folder: Path) -> list[str]:
    path, out = write_texts(folder / "texts.csv", texts), folder / "out"
    common = ("monitor", scenario.base / "run", path, "--text", "review", "--window", 4, "--out", out)
    done = silotune(*common, "--json")
    assert done.status == 0, done.err
    found: list[str] = json.loads(done.out.splitlines()[-1])["warnings"]
    assert json.loads((out / "monitor.json").read_text())["warnings"] == found
    assert all(f"warning: {warning}" in silotune(*common).out for warning in found)
    assert not any(text in warning for warning in found for text in texts)
    return found


def test_training_and_evaluation_texts_are_told(
    silotune: Silotune, scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    train, test = ([record["text"] for record in part] for part in scenarios["public"].load_data())
    (said,) = warnings_of(silotune, scenarios["public"], [text.upper() for text in train], tmp_path)
    assert said.startswith(f"{len(train)} of {len(train)} texts are among those that this run was trained on")
    (said,) = warnings_of(silotune, scenarios["public"], test[::-1], tmp_path)
    assert "public evaluation records of this run" in said
    assert warnings_of(silotune, scenarios["public"], [f"new {n} text" for n in range(12)], tmp_path) == []
    assert warnings_of(silotune, scenarios["public"], [*test, "a new text"], tmp_path) == []


def test_nothing_is_kept_of_evaluation_records_that_count_as_private(
    silotune: Silotune, scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    kept = {kind: json.loads((found.base / "run" / "run.json").read_text()) for kind, found in scenarios.items()}
    assert kept["public"]["evaluation_texts"]["records"] == 12
    assert "evaluation_texts" not in kept["private"]
    test = [record["text"] for record in scenarios["private"].load_data()[1]]
    assert warnings_of(silotune, scenarios["private"], test, tmp_path) == []


def test_the_sum_is_of_the_texts_whatever_their_order_and_number() -> None:
    some = ContentSum(["a b", "c", "c"]).as_dict()
    assert ContentSum(["c", "A  b", "C"]).as_dict() == some
    assert ContentSum(["a b", "c"]).as_dict() != some
    assert ContentSum(["a b", "c", "d"]).as_dict() != some


def test_half_of_the_texts_make_a_warning_and_damaged_files_none(tmp_path: Path) -> None:
    home = tmp_path / "sites" / "a" / "home"
    home.mkdir(parents=True)
    (home / "data.jsonl").write_text('{"text": "one", "label": "x"}\n{"text": "two", "label": "x"}\n{"te')
    (tmp_path / "run.json").write_text('{"evaluation_texts": 7}')
    for texts, told in ((["one", "two", "new", "newer"], 1), (["one", "newest", "new", "newer"], 0), ([], 0)):
        known = KnownTexts(tmp_path)
        known.add(texts)
        assert len(known.warnings()) == told
    (tmp_path / "run.json").write_text("{")
    assert KnownTexts(tmp_path / "nowhere").warnings() == KnownTexts(tmp_path).warnings() == []
