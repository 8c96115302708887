"""A sweep from the command line on a tiny model: trials, resume, frontier, and what a plan reads of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.privacy.accounting import GaussianSteps, compose_epsilon
from simulations.sweep import trials as trials_module

MakeScenario = Callable[..., Path]
Silotune = Callable[..., Any]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def scenario(write_scenario: MakeScenario, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A public scenario of three sites with one round of two steps, calibrated, with baselines that a sweep leaves out."""
    path = write_scenario(
        tmp_path_factory.mktemp("scenario"),
        training={"rounds": 1},
        data={"kind": "public", "num_confirm": 8},
        baselines={"arms": ["non-private"]},
    )
    path.write_text(re.sub(r"noise_multiplier = .*\n", "", path.read_text()))
    return path


AXES = ("--axis", "privacy.epsilon=4,1,inf", "--axis", "training.learning_rate=0.01,0.1", "--seeds", "0,1")


@pytest.fixture(scope="module")
def done(scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished sweep; tests must not change it."""
    import cli

    folder = tmp_path_factory.mktemp("sweep") / "out"
    with pytest.raises(SystemExit) as ended:
        cli.main(["sweep", str(scenario), *AXES, "--out", str(folder), "--json"])
    assert ended.value.code in (0, None)
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def test_every_setting_is_a_normal_simulation_under_every_seed(done: Path) -> None:
    found = lines(done)
    assert len(found) == 12
    assert len({(json.dumps(line["setting"]), line["seed"]) for line in found}) == 12
    for line in found:
        run = done / "trials" / line["key"]
        evaluation = json.loads((run / "evaluation.json").read_text())
        assert line["score"] == evaluation["metrics"]["accuracy"]
        assert json.loads((run / "run.json").read_text())["status"] == "completed"
        job = json.loads((run / "job.json").read_text())
        assert job["seed"] == line["seed"]
        assert job["training"]["learning_rate"] == line["setting"]["training.learning_rate"]
        assert (run / "report.html").exists()
        assert not (run / "baselines").exists()
        assert set(line["confirmation"]) == set(line["metrics"])


def test_the_epsilon_of_a_trial_is_recomputed_from_its_own_steps(done: Path) -> None:
    for line in lines(done):
        records = [json.loads(p.read_text()) for p in (done / "trials" / line["key"]).glob("sites/*/privacy.json")]
        assert len(records) == 3
        if line["setting"]["privacy.epsilon"] == "inf":
            assert line["epsilon"] is None
            assert all(record["private"] is False for record in records)
            continue
        asked = line["setting"]["privacy.epsilon"]
        spent = [compose_epsilon([GaussianSteps(**event) for event in r["events"]], r["delta"]) for r in records]
        assert line["epsilon"] == pytest.approx(max(spent), rel=1e-9)
        assert line["epsilon"] != asked
        assert line["epsilon"] == pytest.approx(asked, rel=0.01)


def test_an_executed_epsilon_below_the_asked_one_is_what_counts(
    scenario: Path, tmp_path: Path, silotune: Silotune
) -> None:
    """With these drop-outs no site takes all of the eight steps that its noise was calibrated for."""
    changes = ("--set", "simulation.dropout_probability=0.5", "--set", "training.rounds=4", "--set", "seed=2")
    outcome = silotune("sweep", scenario, "--axis", "privacy.epsilon=4", "--out", tmp_path / "out", *changes)
    assert outcome.status == 0, outcome.err
    (line,) = lines(tmp_path / "out")
    run = tmp_path / "out" / "trials" / line["key"]
    steps = {json.loads(p.read_text())["steps_executed"] for p in run.glob("sites/*/privacy.json")}
    assert max(steps) == 6
    assert line["epsilon"] < 3.9
    worst = max(json.loads(p.read_text())["epsilon_spent"] for p in run.glob("sites/*/privacy.json"))
    assert line["epsilon"] == worst


def test_the_frontier_holds_the_best_mean_at_each_budget(done: Path) -> None:
    content = json.loads((done / "sweep.json").read_text())
    assert content["status"] == "completed"
    assert content["num_trials"] == 12
    found = lines(done)
    assert [point["budget"] for point in content["frontier"]] == [1.0, 4.0, "inf"]
    for point in content["frontier"]:
        means: dict[float, list[float]] = {}
        for line in found:
            if line["budget"] == point["budget"]:
                means.setdefault(line["setting"]["training.learning_rate"], []).append(line["score"])
        assert point["mean"] == pytest.approx(max(sum(values) / 2 for values in means.values()))
        assert point["num_settings"] == 2
        assert point["num_seeds"] == 2
        assert point["confirmation_mean"] is not None
        assert point["optimistic"] is False
    assert any("chose nothing" in note for note in content["notes"])


def test_the_confirmation_records_are_trained_and_selected_on_nowhere(scenario: Path) -> None:
    from simulations.scenario import load_scenario

    plain = load_scenario(scenario, ["data.num_confirm=0"])
    parted = load_scenario(scenario)
    train, test = parted.load_data()
    confirmation = parted.load_confirmation()
    assert (len(train), len(test), len(confirmation)) == (40, 12, 8)
    assert test == plain.load_data()[1], "the evaluation records stay the same ones"
    texts = [{record["text"] for record in part} for part in (train, test, confirmation)]
    assert all(one.isdisjoint(other) for k, one in enumerate(texts) for other in texts[k + 1 :])
    assert plain.load_confirmation() == []


def test_the_figure_is_a_picture(done: Path) -> None:
    from PIL import Image

    assert (done / "frontier.png").read_bytes().startswith(PNG)
    with Image.open(done / "frontier.png") as picture:
        assert min(picture.size) > 600
        assert len(picture.convert("RGB").getcolors(2**20) or []) > 20


def test_silotune_plan_reads_the_utility_file(done: Path, silotune: Silotune) -> None:
    numbers = ("--records", 4000, "--batch-size", 200, "--epochs", 5, "--epsilon", 3)
    outcome = silotune("plan", *numbers, "--utility", done / "utility.json", "--json")
    assert outcome.status == 0, outcome.err
    read = json.loads(outcome.out)["utility"]
    points = [p for p in json.loads((done / "sweep.json").read_text())["frontier"] if p["epsilon"] is not None]
    assert [(p["epsilon"], p["mean"], p["metric"], p["sd"]) for p in read] == [
        (p["epsilon"], p["confirmation_mean"], "accuracy", p["confirmation_sd"]) for p in points
    ]
    table = silotune("plan", *numbers, "--utility", done / "utility.json")
    assert "accuracy" in table.out


def test_a_finished_sweep_is_shown_again_without_a_trial(
    scenario: Path, done: Path, silotune: Silotune, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (done / "trials.jsonl").read_bytes()
    monkeypatch.setattr(trials_module, "run_scenario", lambda *a, **k: pytest.fail("a finished trial was run again"))
    shown = silotune("sweep", scenario, *AXES, "--out", done, "--resume")
    assert shown.status == 0, shown.err
    assert (done / "trials.jsonl").read_bytes() == before
    for text in ("frontier", "learning_rate", "confirmed", "inf", "utility.json"):
        assert text in shown.out
    figures = json.loads(silotune("sweep", scenario, *AXES, "--out", done, "--resume", "--json").out)
    assert figures["trials"] == 12
    assert figures["failed"] == 0
    assert len(figures["frontier"]) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--set", "training.rounds=2"), "other settings (different: job)"),
        (("--seeds", "0,2"), "different: seeds"),
        (("--axis", "training.momentum=0.5,0.9"), "different: axes"),
    ],
)
def test_a_sweep_is_not_resumed_with_other_settings(
    scenario: Path, done: Path, silotune: Silotune, changes: tuple[str, ...], message: str
) -> None:
    before = {p: p.read_bytes() for p in done.rglob("*") if p.is_file()}
    outcome = silotune("sweep", scenario, *AXES, *changes, "--out", done, "--resume")
    assert outcome.status == 1
    assert message in outcome.err
    assert {p: p.read_bytes() for p in done.rglob("*") if p.is_file()} == before


def test_a_sweep_is_not_resumed_on_other_data(scenario_file: MakeScenario, tmp_path: Path, silotune: Silotune) -> None:
    common = ("--axis", "training.learning_rate=0.1", "--out", tmp_path / "out")
    public = {"data": {"kind": "public"}, "training": {"rounds": 1}}
    assert silotune("sweep", scenario_file(**public), *common).status == 0
    again = silotune("sweep", tmp_path / "scenario.toml", *common)
    assert again.status == 1
    assert "holds a sweep already; continue it with --resume" in again.err
    rows = [(f"another text {i}", ["good", "bad"][i % 2]) for i in range(60)]
    outcome = silotune("sweep", scenario_file(rows=rows, **public), *common, "--resume")
    assert outcome.status == 1
    assert "different: data_sha256" in outcome.err


def test_a_trial_that_fails_is_told_and_run_again_by_resume(
    scenario: Path, tmp_path: Path, silotune: Silotune, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shared.errors import RunError

    real, runs = trials_module.run_scenario, []

    def second_fails(scenario: Any, folder: Path, **options: Any) -> Any:
        runs.append(scenario.job.training.learning_rate)
        if len(runs) == 2:
            raise RunError("the power went out")
        return real(scenario, folder, **options)

    monkeypatch.setattr(trials_module, "run_scenario", second_fails)
    arguments = (scenario, "--axis", "training.learning_rate=0.01,0.1,0.2", "--out", tmp_path / "out")
    outcome = silotune("sweep", *arguments)
    assert outcome.status == 0, outcome.err
    assert "failed: the power went out" in outcome.out
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["status"] == "completed, with failures"
    (point,) = json.loads((tmp_path / "out" / "sweep.json").read_text())["frontier"]
    assert point["num_settings"] == 2
    assert silotune("sweep", *arguments, "--resume").status == 0
    assert runs == [0.01, 0.1, 0.2, 0.1], "only the failed one again"
    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert (content["status"], content["failed"], content["frontier"][0]["num_settings"]) == ("completed", [], 3)


def test_a_mistake_in_a_setting_is_found_before_anything_is_written(
    scenario: Path, tmp_path: Path, silotune: Silotune
) -> None:
    for arguments, message in (
        (("--axis", "training.learning_rat=1,2"), "did you mean 'learning_rate'"),
        (("--axis", 'lora.target_modules=["quary"]'), "did you mean 'query'"),
        (("--axis", "lora.rank=2,4", "--set", "partition.num_sites=99"), "cannot give 99 sites"),
        (("--axis", "training.learning_rate=1", "--mean-trials", "3"), "for --account-tuning"),
    ):
        outcome = silotune("sweep", scenario, *arguments, "--out", tmp_path / "out")
        assert outcome.status != 0
        assert message in outcome.err
        assert "Traceback" not in outcome.err
        assert not (tmp_path / "out").exists()
    outcome = silotune("sweep", scenario, "--axis", "training.learning_rate=1", "--resume")
    assert "--resume needs --out" in outcome.err


@pytest.mark.parametrize(
    ("data", "refused"),
    [
        ({}, "records that the sites train on are private"),
        ({"kind": "private"}, "records that the sites train on are private"),
        ({"kind": "public", "test": "file", "test_kind": "private"}, "evaluation records are private"),
        ({"kind": "public"}, None),
        ({"kind": "synthetic"}, None),
        ({"kind": "public", "test": "file"}, None),
    ],
)
def test_private_data_is_refused_and_what_is_not_declared_is_private(
    scenario_file: MakeScenario, tmp_path: Path, silotune: Silotune, data: dict[str, Any], refused: str | None
) -> None:
    columns = {"text": "review", "label": "verdict"}
    if "test" in data:
        (tmp_path / "test.csv").write_text("review,verdict\nfine,good\npoor,bad\n")
        data = {**data, "test": {"path": "test.csv", "columns": columns}}
    path = scenario_file(data=data, training={"rounds": 1, "local_steps": 1})
    outcome = silotune("sweep", path, "--axis", "training.learning_rate=0.1", "--out", tmp_path / "out")
    if refused is None:
        assert outcome.status == 0, outcome.err
        return
    assert outcome.status == 1
    assert refused in outcome.err
    assert "--account-tuning" in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


def test_the_demos_data_is_public_and_can_be_declared_private() -> None:
    from simulations.scenario import builtin_scenario

    assert builtin_scenario("demo").data.declared_kind == "public"
    assert builtin_scenario("demo", ["data.kind=private"]).data.declared_kind == "private"
