"""Simulations whose sites add shares of the noise: the run folder, the promises in it, and what other tools make of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import PoissonSampledDpEvent, SelfComposedDpEvent, dp_event
from dp_accounting.pld import PLDAccountant

from server.records.results import DROPOUTS_FILE
from server.rounds.loop import TooFewSites
from server.rounds.observer import Observer
from server.rounds.secure.attempts import ATTEMPTS_FILE
from server.runs.folder import foreign_entries
from shared.errors import RunError
from shared.privacy.shared_noise import SharedNoise
from simulations.audit.run import audit_run_mechanism, check_simulation, open_run
from simulations.running.engine import run_scenario
from simulations.scenario import load_scenario
from simulations.simulating import summary

SECURE: dict[str, Any] = {
    "training": {"rounds": 3, "local_steps": 1, "optimizer": "sgd", "learning_rate": 0.5},
    "privacy": {
        "mechanism": "distributed",
        "max_colluding": 0,
        "epsilon": 2.0,
        "epsilon_alone": 8.0,
        "delta": 1e-5,
        "sample_rate": 0.25,
        "noise_multiplier": None,
    },
    "federation": {"min_sites": 2},
}


def secure(**sections: Any) -> dict[str, Any]:
    merged = dict(SECURE)
    for name, values in sections.items():
        merged[name] = {**merged.get(name, {}), **values}
    # TOML has no null.
    merged["privacy"] = {key: value for key, value in merged["privacy"].items() if value is not None}
    return merged


@pytest.fixture
def run(write_scenario: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a runner of small secure scenarios; it gives the run folder."""

    def runs(name: str = "run", *, options: dict[str, Any] | None = None, **sections: Any) -> Path:
        folder = tmp_path / f"of-{name.partition('/')[0]}"
        folder.mkdir(exist_ok=True)
        path = write_scenario(folder, **secure(**sections))
        text = path.read_text().replace("noise_multiplier = 1.0\n", "")
        path.write_text(text)
        run_scenario(load_scenario(path), folder / name, observer=lambda arm: Observer(), **(options or {}))
        return folder / name

    return runs


def test_a_run_folder_holds_both_promises_and_dp_accounting_alone_gives_the_first(run: Callable[..., Path]) -> None:
    folder = run()
    rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["sites"] for record in rounds[1:]] == [["site-1", "site-2", "site-3"]] * 3
    attempts = json.loads((folder / ATTEMPTS_FILE).read_text())
    assert attempts["rounds"] == [1, 2, 3]
    statement = json.loads((folder / "statement.json").read_text())
    assert "finite precision" not in statement["text"].lower()
    for path in sorted(folder.glob("sites/*/privacy.json")):
        record = json.loads(path.read_text())
        shared = SharedNoise(**record["shared"])
        (event,) = record["events"]
        # From privacy.json with another accountant: planned attempts, the noise of H shares.
        for factor, stated in ((shared.honest**0.5, "epsilon_planned"), (1.0, "epsilon_alone")):
            accountant = PLDAccountant()
            step = PoissonSampledDpEvent(
                event["sample_rate"], dp_event.GaussianDpEvent(event["noise_multiplier"] * factor)
            )
            accountant.compose(SelfComposedDpEvent(step, record["steps_planned"]))
            assert accountant.get_epsilon(record["delta"]) == pytest.approx(record[stated], rel=2e-3)
        assert record["epsilon_planned"] <= 2.0 * (1 + 1e-6)
        assert record["epsilon_alone"] <= 8.0 * (1 + 1e-6)
        assert record["epsilon_spent"] < record["epsilon_planned"]  # the spare attempt was not needed
    rows = {row["sites"]: row["epsilon"] for row in statement["up_to_m_sites"]}
    assert sorted(rows) == [1, 2, 3]
    assert rows[1] == pytest.approx(record["epsilon_planned"], rel=1e-6)
    assert 2 * rows[1] < rows[2] < rows[3]  # inside one sum they add up to more than as many accounts
    scenario = load_scenario(folder.parent / "scenario.toml")
    figures = summary(folder, scenario, seconds=1.0)
    for key, stated in (("epsilon_max_site", record["epsilon_planned"]), ("epsilon_alone", record["epsilon_alone"])):
        assert stated <= figures[key] <= stated + 1.01e-4, "rounded up"
    assert figures["delta"] == record["delta"]
    report = (folder / "report.html").read_text()
    assert "Epsilon, against the coordinator" in report
    assert "Epsilon of an upload alone" in report
    assert "noise in a round's sum" in report.replace("&#39;", "'")
    assert "so few of them mean much noise" not in report
    assert "It stands beside what was spent, and is of the same attempts." in report
    assert "Both are of all planned attempts." in " ".join(report.split())


def test_the_audit_puts_both_promises_to_the_test(run: Callable[..., Path]) -> None:
    folder = run()
    audit = audit_run_mechanism(folder)
    assert audit.verdict == "consistent", audit.text()
    assert any(name.endswith("one share") for name in audit.p_values)
    result = json.loads((folder / "audit" / "tier1.json").read_text())
    assert result["audited"].startswith("the secure sum of 2 honest sites, and one of its shares by itself,")
    with pytest.raises(RunError, match=r"noise of .* is shared by all sites"):
        check_simulation(open_run(folder))


def test_a_resumed_run_is_the_same(run: Callable[..., Path]) -> None:
    run("a/through", options={"injected_seed": "s"})
    run("a/stopped", options={"injected_seed": "s", "stop_after": 1})
    folder = run("a/stopped", options={"injected_seed": "s", "resume": True})
    adapters = [
        (folder.parent / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("through", "stopped")
    ]
    assert adapters[0] == adapters[1]


def test_side_by_side_is_as_one_after_the_other(run: Callable[..., Path]) -> None:
    """Up to rounding of another kind of product: the same coins, shares and sums."""
    losses = []
    for at_once in (1, 64):
        folder = run(f"b/{at_once}", options={"injected_seed": "s"}, simulation={"clients_at_once": at_once})
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["metrics"]["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_sites_that_are_not_ready_cost_nothing(run: Callable[..., Path]) -> None:
    folder = run("c", simulation={"dropout_probability": 0.2}, training={"rounds": 6}, partition={"num_sites": 5})
    rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    assert any(record["failed"] for record in rounds)
    for path in sorted(folder.glob("sites/*/privacy.json")):
        record = json.loads(path.read_text())
        taken = [line["round"] for line in rounds if record["site"] in line["sites"]]
        assert record["rounds"] == taken


def test_a_run_that_fell_short_of_sites_goes_on_when_it_is_resumed(run: Callable[..., Path]) -> None:
    """Every try at a round draws its drop-outs anew, or the run would lack the same sites for ever."""
    sections = {"simulation": {"dropout_probability": 0.45}, "partition": {"num_sites": 4}}
    with pytest.raises(TooFewSites, match=r"round 3: 1 sites are ready, .* mend the sites and resume"):
        run("e", **sections)
    folder = run("e", options={"resume": True}, **sections)
    noted = json.loads((folder / ATTEMPTS_FILE).read_text())
    assert noted["rounds"] == [1, 2, 3], "a round that fell short was no attempt, and nobody was charged for it"
    assert json.loads((folder / DROPOUTS_FILE).read_text()) == {"asked": {"1": 1, "2": 1, "3": 2}}
    assert foreign_entries(folder) == []
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "sections",
    [
        {"lora": {"train": "both"}},
        {"training": {"optimizer": "adamw", "learning_rate": 0.01}},
    ],
    ids=["both factors", "adamw"],
)
def test_other_kinds_of_job(run: Callable[..., Path], sections: dict[str, Any]) -> None:
    folder = run("d", **sections)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4


def test_persons_enter_one_sum(write_scenario: Callable[..., Path], tmp_path: Path) -> None:
    """The unit is the patient: one clipped vector each, and the table of sites is of persons in one sum."""
    path = write_scenario(tmp_path, **secure(privacy={"unit": "patient", "records_per_person": 2}))
    lines = (tmp_path / "train.csv").read_text().splitlines()
    (tmp_path / "train.csv").write_text(
        "\n".join([lines[0] + ",mrn", *(f"{line},p{number // 2}" for number, line in enumerate(lines[1:]))]) + "\n"
    )
    text = path.read_text().replace("noise_multiplier = 1.0\n", "")
    path.write_text(text.replace('label = "verdict"', 'label = "verdict"\nperson = "mrn"'))
    run_scenario(load_scenario(path), tmp_path / "run", observer=lambda arm: Observer())
    record = json.loads((tmp_path / "run" / "sites" / "site-1" / "privacy.json").read_text())
    assert (record["unit"], record["records_per_person"]) == ("patient", 2)
    assert "finite precision" not in record["statement"].lower()
    statement = json.loads((tmp_path / "run" / "statement.json").read_text())
    assert "A patient with records at each of m sites" in statement["text"]
    assert audit_run_mechanism(tmp_path / "run").verdict == "consistent"
