"""`silotune plan`: tables, JSON, figures, and errors without a traceback."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

import cli
from server.coordinator.run_file import RunSettings
from shared.epsilons import rounded_up
from shared.errors import ConfigError, LedgerError, SilotuneError
from shared.job.job import Job
from shared.privacy.ledger_export import ChargedSteps, LedgerExport, save_export
from shared.privacy.plan import PrivacyPlan
from shared.tools.plan.answering import parse_sweep
from shared.tools.plan.commands import plan
from shared.tools.plan.figure import UtilityPoint
from shared.trust.job_files import BESIDE_A_JOB, read_job
from simulations.scenario import Scenario, load_scenario
from tests.loading import HEAVY, run_and_list

DEMO = Path(str(files("simulations"))) / "demo.toml"
NUMBERS = ("--records", 4000, "--batch-size", 200, "--epochs", 5)
UTILITY = {
    "points": [
        {"epsilon": 1, "name": "accuracy", "mean": 0.7, "sd": 0.02},
        {"epsilon": 8, "name": "accuracy", "mean": 0.8},
    ]
}
WARD = "St. Anna"


def run(*arguments: object, columns: int = 120) -> Result:
    app = typer.Typer()
    app.command()(plan)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": str(columns)})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def answer(*arguments: object) -> Any:
    output = run(*arguments, "--json").stdout
    assert output.count("\n") == 1
    return json.loads(output)


@pytest.fixture
def job_file(write_scenario: Callable[..., Path], tmp_path: Path) -> Path:
    return write_scenario(tmp_path)


@pytest.fixture
def ledger(tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        time = "2031-05-04T12:00:00.000+00:00"
        charge = {"job_id": "a" * 64, "noise_multiplier": 1.2, "sample_rate": 0.1, "steps": 20, "committed": True}
        raw: dict[str, Any] = {
            "site": WARD,
            "dataset": "notes",
            "unit": "record",
            "declared_records": 2048,
            "epsilon": 30.0,
            "delta": 1e-5,
            "composition": "fixed",
            "charges": (ChargedSteps(**charge, round=1, time=time),),  # type: ignore[arg-type]
            "num_entries": 3,
            "head_sha256": "0" * 64,
            "exported_at": time,
        }
        path = tmp_path / f"export-{len(list(tmp_path.glob('export-*')))}.json"
        save_export(path, LedgerExport(**(raw | changes)))
        return path

    return write


def size_of(png: Path) -> tuple[int, int]:
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])  # type: ignore[return-value]


def test_the_missing_quantity_is_found_and_marked() -> None:
    output = run(*NUMBERS, "--epsilon", 3).output
    (found,) = [line for line in output.splitlines() if "found" in line]
    (point,) = answer(*NUMBERS, "--epsilon", 3)["points"]
    assert found.split() == ["noise", "multiplier", f"{point['noise_multiplier']:.4f}", "found"]
    assert f"epsilon {rounded_up(point['epsilon'])}" in " ".join(output.split())
    assert (point["solved_for"], point["steps"], point["delta"]) == ("noise", 100, 1e-5)
    assert 2.99 <= point["epsilon"] <= 3
    assert "Expected utility: not known." in output
    assert "A person with several records is protected less." in " ".join(output.split())


def test_warnings_are_printed_and_written() -> None:
    arguments = (*NUMBERS, "--noise-multiplier", 0.5, "--delta", 1e-4)
    assert "warning: delta 0.0001 is weak" in run(*arguments).output
    assert len(answer(*arguments)["points"][0]["warnings"]) == 2


def test_nothing_is_wider_than_the_terminal(
    ledger: Callable[..., Path], job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Console, "is_terminal", property(lambda self: True))
    long_name = ledger(epsilon=2.0, site="a-clinic-with-a-long-name")
    for arguments in (
        (*NUMBERS, "--sweep", "epsilon=1,8"),
        ("--job", job_file, "--ledger", ledger(), "--ledger", long_name),
    ):
        output = run(*arguments, columns=80).stdout
        assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", output).splitlines())) <= 80


def test_a_job_costs_what_its_plan_says() -> None:
    job = load_scenario(DEMO).job
    found = answer("--job", DEMO)
    (point,) = found["points"]
    assert point["epsilon"] == PrivacyPlan.from_job(job).epsilon()
    assert point["noise_multiplier"] == PrivacyPlan.from_job(job).noise_multiplier
    assert (point["steps"], point["sample_rate"], point["delta"]) == (16, 0.125, 1e-5)
    assert found["job"] == {"name": "demo", "sha256": job.sha256}


def test_a_job_in_every_form_that_there_is(job_file: Path, tmp_path: Path) -> None:
    from datetime import UTC, datetime, timedelta

    from shared.trust.signed_job import sign_job
    from shared.trust.signing import SigningKey

    job = load_scenario(job_file).job
    assert read_job(job_file, []) == job
    (tmp_path / "job.json").write_text(job.canonical_json())
    key, now = SigningKey.from_bytes(bytes(range(32))), datetime(2031, 5, 4, tzinfo=UTC)
    signed = sign_job(job, signer=key, coordinator=key.verify_key, issued=now, not_after=now + timedelta(days=1))
    (tmp_path / "signed.json").write_text(signed.to_json())
    for name in ("job.json", "signed.json"):
        assert read_job(tmp_path / name, []) == job
    assert read_job(job_file, ["training.rounds=7"]).training.rounds == 7


def test_what_stands_beside_a_job_is_known() -> None:
    """In scenarios and run files; `shared` cannot ask their classes."""
    beside = {*Scenario.model_fields, *RunSettings.model_fields} - {*Job.model_fields, "job", "base"}
    assert beside == BESIDE_A_JOB


def test_the_job_s_parameters_are_counted(job_file: Path) -> None:
    from shared.job.compute import ComputeConfig
    from shared.runtime.runtime import load_runtime

    job = load_scenario(job_file).job
    expected = sum(p.numel() for p in load_runtime(job, ComputeConfig()).model.trainable().values())
    (point,) = answer("--job", job_file, "--records", 2000)["points"]
    assert point["parameters"] == expected
    assert point["signal_to_noise"] == 500.0
    assert point["signal_to_noise_vector"] == pytest.approx(500 / expected**0.5)
    (point,) = answer(
        "--job", job_file, "--set", "model.backbone=org/elsewhere", "--set", f"model.revision={'0' * 40}"
    )["points"]
    assert point["parameters"] is None


def test_sites_get_their_answers(job_file: Path, ledger: Callable[..., Path]) -> None:
    paths = [
        ledger(),
        ledger(site="poor", epsilon=1.0),
        ledger(site="filter", composition="adaptive"),
        ledger(delta=1e-6),
    ]
    options = [item for path in paths for item in ("--ledger", path)]
    sites = answer("--job", job_file, *options)["sites"]
    assert [site["verdict"] for site in sites] == ["yes, all three", "no", "yes, all three", "no"]
    assert sites[0]["epsilon_now"] < sites[0]["epsilon_after"][0] < sites[0]["epsilon_after"][2] <= 30
    assert sites[2]["epsilon_now"] > sites[0]["epsilon_now"]
    assert [site["warnings"] for site in sites] == [[]] * 4
    output = run("--job", job_file, *options).output
    assert f"{WARD}, notes (fixed)" in output
    assert "poor, notes: The budget is spent" in output
    assert "weaker than the site's 1e-06" in output
    assert "Adaptive accounts are measured by a filter" in output


def test_a_small_site_is_warned_about_its_own_size(job_file: Path, ledger: Callable[..., Path]) -> None:
    (site,) = answer("--job", job_file, "--ledger", ledger(declared_records=16))["sites"]
    assert "noise dominates" in site["warnings"][0]


def test_a_sweep_is_a_table_a_figure_and_a_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    output = run("--records", 4000, "--batch-size", 200, "--epsilon", 3, "--sweep", "epochs=1:4", "--out", out).output
    document = json.loads((out / "plan.json").read_text())
    assert [point["epochs"] for point in document["points"]] == [1, 2, 3, 4]
    assert all(f"{point['noise_multiplier']:.4f}" in output for point in document["points"])
    noise = [point["noise_multiplier"] for point in document["points"]]
    assert noise == sorted(noise)
    assert document["utility"] is None
    assert size_of(out / "plan.png") == (1600, 704)


def test_measured_utility_is_a_third_panel(tmp_path: Path) -> None:
    (tmp_path / "utility.json").write_text(json.dumps(UTILITY))
    out = tmp_path / "out"
    arguments = (*NUMBERS, "--sweep", "noise-multiplier=1,2", "--utility", tmp_path / "utility.json", "--out", out)
    output = run(*arguments).output
    assert "Measured utility, as given" in output
    assert "Expected utility" not in output
    assert size_of(out / "plan.png") == (2400, 704)
    utility = json.loads((out / "plan.json").read_text())["utility"]
    assert utility == [UtilityPoint.model_validate(point).model_dump() for point in UTILITY["points"]]


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("epochs=1:3", "epochs", [1, 2, 3]),
        ("epsilon=0.5,1,8", "epsilon", [0.5, 1, 8]),
        ("noise-multiplier=0.5:1:0.25", "noise_multiplier", [0.5, 0.75, 1.0]),
        ("sample_rate=0.1:0.3:0.1", "sample_rate", [0.1, 0.2, 0.3]),
        ("batch-size=64", "batch_size", [64]),
    ],
)
def test_sweeps(text: str, name: str, values: list[float]) -> None:
    assert parse_sweep(text) == (name, values)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((), ConfigError, "4 quantities are missing"),
        ((*NUMBERS, "--epsilon", 3, "--noise-multiplier", 1), ConfigError, "nothing is left to find"),
        ((*NUMBERS, "--epsilon", 3, "--ledger", "x.json"), ConfigError, "--ledger speaks of a job; add --job"),
        ((*NUMBERS, "--epsilon", 3, "--set", "a=1"), ConfigError, "--set speaks of a job; add --job"),
        ((*NUMBERS, "--sweep", "epochs=1:3", "--epsilon", 1), ConfigError, "--epochs is given and swept"),
        ((*NUMBERS, "--sweep", "epsilom=1:3"), ConfigError, "did you mean 'epsilon'"),
        ((*NUMBERS, "--sweep", "epsilon"), ConfigError, "not of the form NAME=VALUES"),
        ((*NUMBERS, "--sweep", "epsilon=high"), ConfigError, "holds no values"),
        ((*NUMBERS, "--sweep", "epsilon=3:1"), ConfigError, "holds no values"),
        ((*NUMBERS, "--sweep", "epsilon=1:2:3:4"), ConfigError, "holds no values"),
        ((*NUMBERS, "--sweep", "epsilon=1,nan"), ConfigError, "holds no values"),
        ((*NUMBERS, "--sweep", "epsilon=1,1_3"), ConfigError, "holds no values"),
        ((*NUMBERS, "--sweep", "epsilon=1:1e9"), ConfigError, "at most 100 are computed"),
        ((*NUMBERS, "--epsilon", 1, "--sweep", "parameters=1.5,2"), ConfigError, "parameters is a whole number"),
        ((*NUMBERS, "--sweep", "epsilon=0,1"), ConfigError, "at epsilon=0 of --sweep: --epsilon is 0"),
        (("--job", "/dev/zero"), ConfigError, "cannot be read as TOML: it is longer than 67,108,864 bytes"),
        ((*NUMBERS, "--epsilon", 3, "--utility", "/dev/zero"), ConfigError, "it is longer than"),
        (("--job", DEMO, "--ledger", "/dev/zero"), LedgerError, "it is longer than"),
        (("--job", DEMO, "--epochs", 3), ConfigError, "--epochs is given and the job says it too"),
        (("--job", DEMO, "--sweep", "epochs=1:3"), ConfigError, "--sweep takes numbers, not a job"),
        (("--job", "missing.toml"), ConfigError, "missing.toml does not exist"),
        (("--job", "missing.json"), ConfigError, "missing.json does not exist"),
        (("--job", DEMO, "--set", "trainig.rounds=3"), ConfigError, "unknown key 'trainig'; did you mean 'training'"),
        (("--job", DEMO, "--set", "training.rounds=0"), ConfigError, "training.rounds"),
        (("--job", DEMO, "--set", "privacy.mechanism=none"), ConfigError, "adds no noise"),
        (("--job", DEMO, "--records", 200_000), ConfigError, "publish a whole record"),
        (("--job", DEMO, "--ledger", "missing.json"), LedgerError, "cannot be read"),
        (("--job", DEMO, "--ledger", DEMO), LedgerError, "is not an export"),
        ((*NUMBERS, "--epsilon", 3, "--utility", "missing.json"), ConfigError, "missing.json does not exist"),
        ((*NUMBERS, "--epsilon", 3, "--utility", DEMO), ConfigError, r"cannot be read as .* \(JSON\)"),
    ],
)
def test_a_mistake_is_explained(arguments: tuple[object, ...], error: type[SilotuneError], text: str) -> None:
    with pytest.raises(error, match=text):
        run(*arguments)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[]", "it holds a list, not an object"),
        ("{}", "points is missing"),
        ('{"points": []}', "points"),
        ('{"points": [{"epsilon": 0, "name": "a", "mean": 1}]}', "points.0.epsilon"),
        ('{"points": [{"epsilon": 1, "name": "a", "mean": NaN}]}', "it holds NaN, which is no number"),
    ],
)
def test_a_bad_utility_file_is_explained(content: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "utility.json").write_text(content)
    with pytest.raises(ConfigError, match=text):
        run(*NUMBERS, "--epsilon", 3, "--utility", tmp_path / "utility.json")


def test_the_command_is_mounted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--records", "10"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: 4 quantities are missing")


def test_a_plan_of_numbers_loads_nothing_that_it_does_not_need() -> None:
    """A compliance officer waits for the answer, not for the libraries of a training."""
    out, loaded = run_and_list("plan", *NUMBERS, "--sweep", "epsilon=3,8")
    assert "epsilon" in out
    assert not loaded & ({*HEAVY} - {"numpy", "scipy"})


def test_a_plan_for_patients_counts_patients_and_says_so(tmp_path: Path) -> None:
    arguments = (*NUMBERS, "--noise-multiplier", 1.3)
    by_record, by_patient = answer(*arguments), answer(*arguments, "--unit", "patient")
    assert by_patient["points"] == by_record["points"]
    assert (by_record["unit"], by_patient["unit"]) == ("record", "patient")
    assert by_patient["relation"] == "add or remove one patient with all their records"
    shown = " ".join(run(*arguments, "--unit", "patient").output.split())
    assert "under add or remove one patient with all their records" in shown
    assert "All numbers count patients, not records." in shown
    assert "patients 4,000" in shown
    assert "protected less" not in shown


def test_a_plan_tells_who_brings_the_noise_and_warns(job_file: Path) -> None:
    sizes = ("--site-sizes", "64, 256,1024")
    loud = run("--job", job_file, *sizes, "--set", "aggregation.weights=equal").stdout
    assert "Who brings the noise of a round" in loud
    assert "warning: site-1 declares 64 records, 4.8% of all, but brings 93.8% of the noise" in " ".join(loud.split())
    quiet = answer("--job", job_file, *sizes)
    assert quiet["share_warnings"] == []
    assert [share["weight"] for share in quiet["shares"]] == pytest.approx([64 / 640, 256 / 640, 320 / 640])
    assert answer("--job", job_file)["shares"] == []


def test_ledgers_tell_the_sizes_for_the_shares(job_file: Path, ledger: Callable[..., Path]) -> None:
    large = ledger(site="large", declared_records=4096)
    small = ledger(site="small", declared_records=64)
    found = answer("--job", job_file, "--ledger", large, "--ledger", small, "--set", "aggregation.weights=equal")
    assert [share["far_above"] for share in found["shares"]] == [False, True]
    with pytest.raises(ConfigError, match="leave out --site-sizes"):
        run("--job", job_file, "--ledger", large, "--site-sizes", "64,64")


@pytest.mark.parametrize("sizes", ["64", "64,", "0,64", "-1,64", "64,many", "64,10000000000000"])
def test_sizes_that_are_none_are_refused(job_file: Path, sizes: str) -> None:
    with pytest.raises(ConfigError, match="expected two or more whole numbers from 1"):
        run("--job", job_file, "--site-sizes", sizes)


def test_sizes_without_a_job_are_refused() -> None:
    with pytest.raises(ConfigError, match="--site-sizes speaks of a job; add --job FILE"):
        run(*NUMBERS, "--site-sizes", "64,64")
