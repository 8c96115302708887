"""Central DP in a simulation: a hundred real sites with a tiny model, from the scenario to the report."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.reports.ensembles import composed_privacy
from server.rounds.observer import Observer
from shared.errors import ConfigError, DataError, PrivacyError, RunError, SilotuneError
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.statement import STOPPED_EARLY
from simulations.audit.run import audit_run_mechanism, check_simulation, open_run
from simulations.running.engine import run_scenario
from simulations.scenario import load_scenario
from simulations.simulating import summary

COLUMNS = {"text": "review", "label": "verdict", "film": "review"}


@pytest.fixture
def many_sites(write_scenario: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a writer of a scenario with one site for each of a hundred texts, both labels at each."""

    def write(*, texts: int = 100, **sections: Any) -> Path:
        rows = [(f"film {i % 10} cast {i // 10}", label) for i in range(texts) for label in ("good", "bad")]
        with (tmp_path / "test.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("review", "verdict"), ("a dull plot", "bad"), ("a quiet joy", "good")])
        given: dict[str, Any] = {
            "training": {"rounds": 3, "local_steps": 1},
            "privacy": {
                "mechanism": "central",
                "unit": "site",
                "sample_rate": 1.0,
                "noise_multiplier": 2.0,
                "central": {"num_sites": 100, "site_sample_rate": 0.3},
            },
            "federation": {"min_sites": 100},
            "data": {
                "train": {"path": "train.csv", "columns": COLUMNS},
                "test": {"path": "test.csv", "columns": COLUMNS},
            },
            "partition": {"kind": "column", "column": "film", "num_sites": texts},
        }
        return write_scenario(tmp_path, rows=rows, **given | sections)

    return write


def run(path: Path, folder: Path, **options: Any) -> Any:
    return run_scenario(load_scenario(path), folder, observer=lambda arm: Observer(), **options)


def test_without_its_account_nothing_is_stated_anew(many_sites: Callable[..., Path], tmp_path: Path) -> None:
    path, folder = many_sites(training={"rounds": 2, "local_steps": 1}), tmp_path / "run"
    for options in ({"stop_after": 1}, {"resume": True}):
        run(path, folder, **options)
        stated = (folder / "privacy.json").read_text()
        account = (folder / "central_ledger.json").read_text()
        assert '"time"' not in account, "how long rounds took would tell who was drawn"
        (folder / "central_ledger.json").unlink()
        with pytest.raises(RunError, match="does not hold the charge of round 1"):
            run(path, folder, resume=True)
        assert (folder / "privacy.json").read_text() == stated
        (folder / "central_ledger.json").write_text(account)


def test_a_run_names_the_unit_and_no_participant(many_sites: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    path = many_sites(
        baselines={
            "arms": ["federated-non-private"],
            "federated_non_private": {
                "training": {"rounds": 1},
                "federation": {"min_sites": 1, "sites_per_round": 3},
            },
        },
        simulation={"threads": 1, "dropout_probability": 0.2},
    )
    stopped = run(path, folder, stop_after=1)
    assert stopped.round_number == 1
    run(path, folder, resume=True)
    epsilon = compose_epsilon([GaussianSteps(noise_multiplier=2.0, sample_rate=0.3, steps=3)], 1e-5)
    record = json.loads((folder / "privacy.json").read_text())
    assert (record["unit"], record["steps_executed"], record["num_sites_declared"]) == ("site", 3, 100)
    assert record["epsilon_spent"] == pytest.approx(epsilon)
    told = summary(folder, load_scenario(path), seconds=1.0)["epsilon"]
    assert epsilon <= told < epsilon + 1.1e-4, "told to people, so rounded up"
    statement = json.loads((folder / "statement.json").read_text())
    assert statement["one_site"].startswith("Unit: one site")
    assert "TRUSTED COORDINATOR" in statement["one_site"]
    # No account and no record of a single site, and nobody's name in anything that is passed on.
    assert list(folder.glob("sites/*/privacy.json")) == []
    assert list(folder.glob("sites/*/home/ledger.db")) == []
    for name in ("metrics.jsonl", "statement.json", "privacy.json", "run.json", "central_ledger.json", "report.html"):
        assert not re.search(r"film-\d-cast-\d", (folder / name).read_text()), name
    report = (folder / "report.html").read_text()
    assert "Epsilon of every site" in report
    assert "unit: site" in report
    assert "Federated, central DP over sites" in report
    assert "largest of all sites" not in report
    assert "It does not protect against the coordinator itself." in report
    # The sites consented to a trusted coordinator, and in the baseline to no protection at all.
    home = "sites/film-0-cast-0/home/site.toml"
    assert "allow_trusted_coordinator = true\nallow_non_private = false" in (folder / home).read_text()
    baseline = folder / "baselines" / "federated-non-private"
    consents = (baseline / home).read_text()
    assert "allow_non_private = true" in consents
    assert "allow_trusted_coordinator" not in consents
    # The mechanism that ran is put to the test like that of sites.
    audit = audit_run_mechanism(folder)
    assert (audit.verdict, audit.claim) == ("consistent", record["epsilon_spent"])
    result = json.loads((folder / "audit" / "tier1.json").read_text())
    assert result["audited"].startswith(
        "the coordinator's round (with a fixed clipping bound) of this installation under"
    )
    with pytest.raises(RunError, match=r"tiers 2 and 3 train one site .* Use --tier 1"):
        check_simulation(open_run(folder))


def test_a_resumed_run_is_the_same(many_sites: Callable[..., Path], tmp_path: Path) -> None:
    path = many_sites(training={"rounds": 2, "local_steps": 1})
    run(path, tmp_path / "through", injected_seed="s")
    run(path, tmp_path / "stopped", injected_seed="s", stop_after=1)
    run(path, tmp_path / "stopped", injected_seed="s", resume=True)
    adapters = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("through", "stopped")
    ]
    assert adapters[0] == adapters[1]
    report = (tmp_path / "through" / "report.html").read_text()
    assert "No privacy guarantee holds for this run." in report
    assert json.loads((tmp_path / "through" / "privacy.json").read_text())["epsilon_spent"] is None


CENTRAL = {"mechanism": "central", "unit": "site", "noise_multiplier": 2.0}


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"baselines": {"arms": ["central-dp"]}}, ConfigError, "their epsilons cannot be compared"),
        ({"privacy": {**CENTRAL, "central": {"num_sites": 130}}}, DataError, "the partition has 100 sites"),
        (
            {"privacy": {**CENTRAL, "central": {"num_sites": 100, "count_noise": 0.9}}},
            PrivacyError,
            "count_noise is 0.9",
        ),
        ({"texts": 50, "privacy": {**CENTRAL, "central": {"num_sites": 50}}}, ConfigError, "fewer than 100 sites"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(
    many_sites: Callable[..., Path], tmp_path: Path, sections: dict[str, Any], error: type[SilotuneError], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(many_sites(**sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_stops_early_is_charged_for_what_it_executed(
    many_sites: Callable[..., Path], tmp_path: Path, silotune: Callable[..., Any]
) -> None:
    test = {"path": "test.csv", "columns": COLUMNS}
    path = many_sites(
        training={"rounds": 3, "local_steps": 1, "early_stopping": {"patience": 1, "min_delta": 1.0}},
        data={"train": {"path": "train.csv", "columns": COLUMNS}, "test": test, "test_kind": "synthetic"},
    )
    folders = [tmp_path / "run", tmp_path / "again"]
    for folder in folders:
        assert run(path, folder).round_number == 1
    record = json.loads((folders[0] / "privacy.json").read_text())
    executed = GaussianSteps(noise_multiplier=2.0, sample_rate=0.3, steps=1)
    assert (record["steps_executed"], record["steps_planned"], record["rounds"]) == (1, 3, [1])
    assert record["epsilon_spent"] == compose_epsilon([executed], 1e-5) < record["epsilon_budget"]
    assert json.loads((folders[0] / "statement.json").read_text())["not_covered"][-1] == STOPPED_EARLY
    assert run(path, folders[0], resume=True).round_number == 1
    assert json.loads((folders[0] / "privacy.json").read_text()) == record
    assert silotune("report", folders[0], "--format", "html").status == 0
    text = (folders[0] / "compliance-report.html").read_text()
    assert "1 of 3; ended by the job" in text
    assert "none found" in text
    both = composed_privacy(folders)
    assert both is not None
    assert both.epsilon == pytest.approx(compose_epsilon([replace(executed, steps=2)], 1e-5), rel=1e-6)
    assert both.unit == "site"
