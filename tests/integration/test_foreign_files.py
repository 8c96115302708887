"""No command overwrites or removes what somebody else put where it writes, and each says so before it works."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.reports.run.formats import format_bound

MakeScenario = Callable[..., Path]
Silotune = Callable[..., Any]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def check_refused(outcome: Any, *parts: str) -> None:
    assert outcome.status not in (0, None)
    assert "error: " in outcome.err, outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    for part in parts:
        assert part in outcome.err, outcome.err


@pytest.fixture(scope="module")
def run(write_scenario: MakeScenario, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small run, beside the scenario that it is of."""
    from cli import main

    folder = tmp_path_factory.mktemp("own")
    write_scenario(folder)
    with pytest.raises(SystemExit) as ended:
        main(["simulate", str(folder / "scenario.toml"), "--out", str(folder / "run")])
    assert not ended.value.code
    return folder / "run"


@pytest.fixture
def stopped(run: Path, stopped_once: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The scenario, and a run of it that stopped after its first round, for this test to change."""
    return run.parent / "scenario.toml", shutil.copytree(stopped_once, tmp_path / "R")


@pytest.fixture(scope="module")
def stopped_once(run: Path) -> Path:
    from cli import main

    with pytest.raises(SystemExit) as ended:
        main(["simulate", str(run.parent / "scenario.toml"), "--out", str(run.parent / "R"), "--stop-after", "1"])
    assert not ended.value.code
    return run.parent / "R"


@pytest.mark.parametrize("command", ["simulate", "folds", "repeats", "demo", "sweep", "tuning", "federation"])
def test_a_folder_of_somebody_else_is_refused_before_any_work(
    silotune: Silotune, scenario_file: MakeScenario, tmp_path: Path, command: str
) -> None:
    data = {"kind": "public"}
    path, folder = scenario_file(data=data), tmp_path / "R"
    (folder / "adapter").mkdir(parents=True)
    for name in ("adapter/precious.txt", "report.html", "checkpoint.safetensors"):
        (folder / name).write_text("mine")
    (folder / ".private").mkdir()
    (folder / ".private" / "diary").write_text("mine")
    before = snapshot(folder)
    arguments = {
        "simulate": ["simulate", path],
        "folds": ["simulate", path, "--folds", 2],
        "repeats": ["simulate", path, "--set", "simulation.repeats=2"],
        "demo": ["demo"],
        "sweep": ["sweep", path, "--axis", "training.learning_rate=0.01,0.1"],
        "tuning": ["sweep", path, "--axis", "training.learning_rate=0.01,0.1", "--account-tuning", "--mean-trials", 2],
        "federation": ["federation", path],
    }[command]
    if command == "tuning":
        (tmp_path / "test.csv").write_text((tmp_path / "train.csv").read_text())
        test = 'data.test={path="test.csv", columns={text="review", label="verdict"}}'
        arguments += ["--set", test, "--set", "partition.num_sites=1"]
    check_refused(silotune(*arguments, "--out", folder), "not empty")
    assert snapshot(folder) == before


def test_foreign_files_in_a_run_survive_its_resume(silotune: Silotune, stopped: tuple[Path, Path]) -> None:
    path, folder = stopped
    foreign = [folder / "notes.md", folder / "adapter" / "merged.bin", folder / "sites" / "site-1" / "memo.txt"]
    for place in foreign:
        place.write_text("mine")
    assert silotune("simulate", path, "--out", folder, "--resume").status == 0
    assert all(place.read_text() == "mine" for place in foreign)
    assert json.loads((folder / "run.json").read_text())["status"] == "completed"


@pytest.mark.parametrize(
    ("name", "kind"), [("adapter", "folder"), ("metrics.jsonl", "file"), ("checkpoint.safetensors", "file")]
)
def test_links_in_a_run_are_not_written_through(
    silotune: Silotune, stopped: tuple[Path, Path], tmp_path: Path, name: str, kind: str
) -> None:
    path, folder = stopped
    elsewhere = tmp_path / "elsewhere"
    os.replace(folder / name, elsewhere)
    (folder / name).symlink_to(elsewhere)
    before = snapshot(tmp_path)
    check_refused(silotune("simulate", path, "--out", folder, "--resume"), f"{name} is not a {kind}", "move it away")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["report", "RUN", "--format", "html", "--out", "OUT/x"], ["x"]),
        (["report", "RUN", "--format", "pdf", "--out", "OUT/x"], ["x"]),
        (["report", "RUN", "--format", "pdf", "--out", "OUT/y"], ["y.sig.json"]),
        (["explain", "RUN", "a dull plot", "--html", "OUT/x"], ["x"]),
        (["monitor", "RUN", "IN/texts.txt", "--window", "5", "--out", "OUT"], ["monitor.json"]),
        (["monitor", "RUN", "IN/texts.txt", "--window", "5", "--out", "OUT"], ["monitor.png"]),
        (["plan", "--records", "1000", "--batch-size", "50", "--epochs", "2", "--epsilon", "3", "--out", "OUT"], ["plan.json"]),
        (["plan", "--records", "1000", "--batch-size", "50", "--epochs", "2", "--epsilon", "3", "--out", "OUT"], ["plan.png"]),
        (["deidentify", "IN/texts.txt", "--out", "OUT/x.txt"], ["x.txt"]),
        (["deidentify", "IN/texts.txt", "--out", "OUT/y.txt", "--report", "OUT/x.json"], ["x.json"]),
        (["pki", "init", "OUT", "--name", "ca"], ["crl.pem"]),
        (["pki", "request", "OUT", "--name", "a", "--role", "site"], ["a.csr"]),
        (["pki", "request", "OUT", "--name", "a", "--role", "site"], ["a.key"]),
        (["coordinator", "init", "OUT", "--host", "localhost"], ["round.pub"]),
        (
            ["site", "init", "OUT", "--name", "a", "--coordinator", "h:1", "--data", "IN/d.csv", "--column", "text=t"],
            ["policy.toml"],
        ),
    ],
    ids=lambda value: " ".join(value),
)  # fmt: skip
def test_a_file_of_somebody_else_is_not_overwritten(
    silotune: Silotune, run: Path, tmp_path: Path, arguments: list[str], names: list[str]
) -> None:
    out, given = tmp_path / "out", tmp_path / "in"
    out.mkdir()
    given.mkdir()
    (given / "texts.txt").write_text("a dull plot\n" * 12)
    (given / "d.csv").write_text("t\nx\n")
    for name in names:
        (out / name).write_text("mine")
    words = [word.replace("RUN", str(run)).replace("OUT", str(out)).replace("IN/", f"{given}/") for word in arguments]
    check_refused(silotune(*words), names[0])
    assert snapshot(out) == dict.fromkeys(names, b"mine"), "nothing was written"


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "RUN", "--format", "html", "--out", "OUT/x.html"],
        ["report", "RUN", "--format", "pdf", "--out", "OUT/x.pdf"],
        ["report", "RUN"],
        ["explain", "RUN", "a dull plot", "--html", "OUT/x.html"],
        ["monitor", "RUN", "IN/texts.txt", "--window", "5", "--out", "OUT"],
        ["plan", "--records", "1000", "--batch-size", "50", "--epochs", "2", "--epsilon", "3", "--out", "OUT"],
        ["deidentify", "IN/texts.txt", "--out", "OUT/x.txt", "--report", "OUT/r.json", "--overwrite"],
        ["audit", "RUN"],
    ],
    ids=" ".join,
)
def test_our_own_files_are_replaced(silotune: Silotune, run: Path, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "texts.txt").write_text("a dull plot\n" * 12)
    out = tmp_path / "out"
    words = [
        word.replace("RUN", str(run)).replace("OUT", str(out)).replace("IN/", f"{tmp_path}/") for word in arguments
    ]
    for _ in range(2):
        outcome = silotune(*words)
        assert outcome.status == 0, outcome.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "RUN", "--format", "html", "--out", "OUT/x.html"],
        ["explain", "RUN", "a dull plot", "--html", "OUT/x.html"],
        ["monitor", "RUN", "IN/texts.txt", "--window", "5", "--out", "OUT"],
        ["plan", "--records", "1000", "--batch-size", "50", "--epochs", "2", "--epsilon", "3", "--out", "OUT"],
        ["deidentify", "IN/texts.txt", "--out", "OUT/x.txt"],
        ["deidentify", "IN/texts.txt", "--out", "IN/x.txt", "--report", "OUT/x.json", "--overwrite"],
        ["pki", "request", "OUT", "--name", "a", "--role", "site"],
        ["simulate", "RUN/../scenario.toml", "--out", "OUT/run"],
        ["new", "IN/many.csv", "--text", "review", "--label", "verdict", "--out", "OUT/x.toml"],
    ],
    ids=" ".join,
)
def test_folders_above_what_is_written_are_made_by_every_command_alike(
    silotune: Silotune, run: Path, tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "texts.txt").write_text("a dull plot\n" * 12)
    rows = "".join(f"film {n} is {'good' if n % 2 else 'bad'},{n % 2}\n" for n in range(200))
    (tmp_path / "many.csv").write_text("review,verdict\n" + rows)
    out = tmp_path / "not" / "there"
    words = [
        word.replace("RUN", str(run)).replace("OUT", str(out)).replace("IN/", f"{tmp_path}/") for word in arguments
    ]
    outcome = silotune(*words)
    assert outcome.status == 0, outcome.err
    assert any(out.iterdir())
    (tmp_path / "a-file").write_text("mine")
    check_refused(silotune(*(word.replace(str(out), str(tmp_path / "a-file" / "below")) for word in words)), "a-file")


def test_an_audit_stands_in_the_report_of_its_run(silotune: Silotune, run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    for place in copy.glob("audit/*"):
        place.unlink()
    assert silotune("report", copy).status == 0
    before = (copy / "report.html").read_text()
    assert silotune("audit", copy).status == 0
    after = (copy / "report.html").read_text()
    bound = json.loads((copy / "audit" / "tier1.json").read_text())["lower_bound"]
    shown = format_bound(bound)
    assert after.count(shown) > before.count(shown)
    (copy / "report.html").write_text("mine")
    outcome = silotune("audit", copy)
    assert outcome.status == 0
    assert "the run's report does not have this audit yet: " in outcome.err
    assert (copy / "report.html").read_text() == "mine"


@pytest.mark.parametrize("place", ["a-file", "a-file/below", "dangling", "n" * 300, "/dev/null", "/proc/none"])
@pytest.mark.parametrize("command", ["simulate", "sweep", "federation"])
def test_an_impossible_folder_is_refused_before_any_work(
    silotune: Silotune, scenario_file: MakeScenario, tmp_path: Path, command: str, place: str
) -> None:
    path = scenario_file(data={"kind": "public"})
    (tmp_path / "a-file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = snapshot(tmp_path)
    axes = ["--axis", "training.learning_rate=0.01,0.1"] if command == "sweep" else []
    check_refused(silotune(command, path, *axes, "--out", tmp_path / place))
    assert snapshot(tmp_path) == before
