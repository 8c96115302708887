"""Finding runs: what is read, what is not, and how often."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from simulations.console import files, index
from simulations.console.index import Found, Index
from simulations.console.runs import Run
from tests.simulations.console.conftest import files_of, make_folder
from tests.simulations.console.folders import make_run, make_sweep, write_json


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that is opened from now on."""
    opened: list[Path] = []
    real = files.read_plain

    def counted(path: Path) -> bytes:
        opened.append(path)
        return real(path)

    monkeypatch.setattr(files, "read_plain", counted)
    return opened


def by_path(found: Found) -> dict[str, Run]:
    return {run.path: run for run in found.runs.values()}


def test_every_kind_of_run(tmp_path: Path) -> None:
    found = Index(make_folder(tmp_path / "runs")).now()
    runs = by_path(found)
    first = runs["first"]
    assert (first.executed, first.asked, first.planned, first.delta) == (2.98765, 3.0, 3.0, 1e-5)
    assert first.spread is not None
    assert (first.value, first.spread.num) == (pytest.approx(0.80333, abs=1e-4), 3)
    assert (first.central, first.open) == (0.82, 0.88)
    assert first.gap == pytest.approx(0.80333 - 0.88, abs=1e-4)
    assert (first.num_sites, first.partition, first.task) == (3, "iid", "sequence_classification")
    assert (runs["early"].executed, runs["early"].planned) == (5.1, 7.999)
    assert (runs["open"].private, runs["open"].executed) == (False, None)
    assert runs["deep/er/lm"].partition == "dirichlet 0.3"
    assert not runs["deep/er/lm"].higher
    going = runs["going"]
    assert (going.status, going.value, going.executed) == ("running", 0.6, 2.98765)
    assert "run.json is damaged" in runs["broken"].problem
    assert len(found.sweeps) == 1
    assert sum(run.sweep != "" for run in runs.values()) == 12
    assert not found.cut


def test_the_folder_may_be_a_run_itself(tmp_path: Path) -> None:
    (run,) = Index(make_run(tmp_path / "run")).now().runs.values()
    assert (run.path, run.problem, run.executed) == ("", "", 2.98765)


def test_runs_of_other_mechanisms(tmp_path: Path) -> None:
    central = make_run(tmp_path / "central", mechanism="central", unit="site")
    record = {
        "unit": "site",
        "num_sites_declared": 100,
        "delta": 1e-5,
        "clip_norm_first": 1.0,
        "update_noise_multiplier": 1.0,
        "count_noise": None,
        "steps_planned": 6,
        "randomness": "os",
        "epsilon_spent": 1.5,
        "events": [{"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 6}],
        "rounds": [1, 2, 3, 4, 5, 6],
    }
    write_json(central / "privacy.json", record)
    make_run(tmp_path / "void", randomness="injected", executed=None)
    going = make_run(tmp_path / "going", status="running")
    for record_file in going.glob("sites/*/privacy.json"):
        record_file.unlink()
    runs = by_path(Index(tmp_path).now())
    assert runs["central"].problem == ""
    assert (runs["central"].executed, runs["central"].unit, runs["central"].num_sites) == (1.5, "site", 100)
    assert (runs["void"].executed, runs["void"].asked) == (None, 3.0), "no epsilon of a test's randomness"
    assert runs["going"].executed == 3.0, "what its last round says"


def test_a_training_that_diverged_is_no_yardstick(tmp_path: Path) -> None:
    """By the rule of the report (`server.rounds.convergence`)."""
    run = make_run(tmp_path / "run", baselines={"central-dp": 0.8, "non-private": 0.99, "federated-non-private": 0.9})
    worse = {"metrics": {"accuracy": 0.99, "loss": 5.0}, "primary_metric": "accuracy", "round": 6}
    write_json(run / "baselines" / "non-private" / "evaluation.json", worse)
    write_json(make_run(tmp_path / "itself") / "evaluation.json", worse)
    runs = by_path(Index(tmp_path).now())
    assert [arm.name for arm in runs["run"].arms if arm.diverged] == ["non-private"]
    assert runs["run"].open == 0.9
    assert runs["itself"].arms[0].diverged


def test_nothing_is_read_twice(tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_AGAIN_SECONDS", 0.0)
    runs = Index(make_folder(tmp_path / "runs"))
    first = runs.now()
    assert len(reads) == len({*reads}) > 100, "not in the first look either"
    reads.clear()
    assert runs.now() == first
    assert reads == []
    write_json(
        tmp_path / "runs" / "eps1" / "evaluation.json", {"metrics": {"accuracy": 0.9}, "primary_metric": "accuracy"}
    )
    assert by_path(runs.now())["eps1"].value == 0.9
    assert {path.relative_to(tmp_path / "runs").parts[0] for path in reads} == {"eps1"}
    reads.clear()
    make_run(tmp_path / "runs" / "new", num_sites=1)
    (tmp_path / "runs" / "first" / "repeats.json").unlink()
    found = by_path(runs.now())
    assert "new" in found
    assert found["first"].spread is None
    assert {path.relative_to(tmp_path / "runs").parts[0] for path in reads} == {"new", "first"}


def test_a_thousand_runs(tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """By files, not seconds, which another process on the machine could take."""
    monkeypatch.setattr(index, "_AGAIN_SECONDS", 0.0)
    whole = make_run(tmp_path / "one", num_sites=2, num_rounds=2)
    parts = [path.relative_to(whole) for path in whole.rglob("*.json*")]
    for number in range(1000):
        run = tmp_path / "many" / f"{number:04}"
        for folder in ("sites/site-1", "sites/site-2"):
            (run / folder).mkdir(parents=True)
        for part in parts:
            os.link(whole / part, run / part)
    runs = Index(tmp_path / "many")
    assert len(runs.now().runs) == 1000
    assert len(reads) <= 6 * 1000
    reads.clear()
    looked: list[object] = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(path) or real(path))  # type: ignore[func-returns-value]
    assert len(runs.now().runs) == 1000
    assert reads == []
    assert len(looked) == 1001


def test_nothing_is_written(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "runs")
    before = files_of(root)
    Index(root).now()
    assert files_of(root) == before


def test_no_link_is_followed(tmp_path: Path, reads: list[Path]) -> None:
    outside = make_run(tmp_path / "outside", name="secret of others")
    root = tmp_path / "runs"
    make_run(root / "mine")
    (root / "whole").symlink_to(outside)
    (root / "up").symlink_to(tmp_path)
    (root / "round").symlink_to(root)
    partly = make_run(root / "partly", value=0.7)
    for name in ("run.json", "evaluation.json"):
        (partly / name).unlink()
        (partly / name).symlink_to(outside / name)
    parts = make_run(root / "parts", value=0.6)
    (parts / "sites").rename(tmp_path / "sites")
    (parts / "sites").symlink_to(tmp_path / "sites")
    (parts / "baselines").symlink_to(outside)
    (parts / "repeats.json").symlink_to("/etc/passwd")
    found = by_path(Index(root).now())
    assert set(found) == {"mine", "partly", "parts"}
    assert "run.json is damaged or not of Silotune: it is a link" in found["partly"].problem
    assert "repeats.json is damaged or not of Silotune: it is a link" in found["parts"].problem
    assert "secret" not in str(found)
    assert all(path.is_relative_to(root) for path in reads)


def test_homes_of_sites_are_not_entered(tmp_path: Path, reads: list[Path]) -> None:
    home = tmp_path / "federation" / "sites" / "north"
    home.mkdir(parents=True)
    (home / "site.toml").write_text('name = "north"\n')
    make_run(home / "data")
    make_run(tmp_path / "federation" / "coordinator" / "jobs" / "0001-demo" / "run")
    assert set(by_path(Index(tmp_path).now())) == {"federation/coordinator/jobs/0001-demo/run"}
    assert not any("north" in path.parts for path in reads)


def test_trials_of_a_selection_stay_hidden(tmp_path: Path, reads: list[Path]) -> None:
    make_run(tmp_path / "tuned" / ".private" / "trials" / "0")
    write_json(tmp_path / "tuned" / ".private" / "state.json", {"choices": [[0, 0]]})
    assert not Index(tmp_path).now().runs
    assert reads == []
    selected = {"setting": {}, "seed": 0, "metric": "accuracy", "score": 0.77, "metrics": {"accuracy": 0.77}}
    outcome = {"format": "silotune-selection/1", "name": "tuned", "epsilon": 9.1, "delta": 1e-5, "selected": selected}
    write_json(tmp_path / "tuned" / "outcome.json", outcome)
    make_run(tmp_path / "tuned" / "selected")
    (run,) = Index(tmp_path).now().runs.values()
    assert (run.status, run.executed, run.value) == ("selected", 9.1, 0.77), "the whole selection's, not one trial's"


def test_depth_and_number_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path.joinpath(*map(str, range(8))), num_sites=0)
    make_run(tmp_path.joinpath("x", *map(str, range(8))), num_sites=0)
    assert list(by_path(Index(tmp_path).now())) == ["0/1/2/3/4/5/6/7"]
    for number in range(5):
        make_run(tmp_path / "many" / str(number), num_sites=0)
    monkeypatch.setattr(index, "MOST_RUNS", 3)
    found = Index(tmp_path / "many").now()
    assert (len(found.runs), found.cut) == (3, True)
    monkeypatch.setattr(index, "MOST_FOLDERS", 3)
    found = Index(tmp_path / "many").now()
    assert (len(found.runs), found.cut) == (2, True)


ODD: dict[str, Callable[[Path], object]] = {
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "unreadable": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "nested": lambda path: path.write_text("[" * 100_000),
    "list": lambda path: path.write_text("[]"),
    "empty": lambda path: path.write_text(""),
    "huge number": lambda path: path.write_text('{"a": 1e999}'),
    "sparse": lambda path: os.truncate(path, 1 << 36),
}
FILES = ("job.json", "run.json", "evaluation.json", "repeats.json", "sites/site-2/privacy.json")


@pytest.mark.parametrize("kind", ODD)
def test_odd_files_end_in_a_reason(tmp_path: Path, kind: str) -> None:
    for number, name in enumerate(FILES):
        run = make_run(tmp_path / str(number), baselines={"non-private": 0.9}, repeats=[0.8, 0.9])
        ODD[kind](run / name)
    make_run(tmp_path / "well")
    sweep = make_sweep(tmp_path / "sweep")
    ODD[kind](sweep / "sweep.json")
    found = Index(tmp_path).now()
    problems = {path: run.problem for path, run in by_path(found).items()}
    assert problems["well"] == ""
    for number, name in enumerate(FILES):
        assert name.rpartition("/")[2] in problems.get(str(number), f"no run without {name}"), (kind, name)
    assert all("damaged or not of Silotune" in one.problem for one in found.sweeps.values())


def test_whatever_a_file_holds_nothing_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes turned at random, in a few hundred files: always a run, with figures or a reason."""
    monkeypatch.setattr(index, "_AGAIN_SECONDS", 0.0)
    draw, runs = random.Random(7), Index(tmp_path)
    run = make_run(tmp_path / "run", baselines={"central-dp": 0.8, "non-private": 0.9}, repeats=[0.8, 0.9], num_sites=1)
    sweep = make_sweep(tmp_path / "sweep")
    places = [*run.rglob("*.json*"), sweep / "sweep.json", sweep / "trials.jsonl"]
    values = [b"null", b"-1", b"1e308", b'"x"', b"[]", b"{}", b"true", b"0", b'"\\ud800"', b"9007199254740993"]
    for _ in range(200):
        place = draw.choice(places)
        kept = place.read_bytes()
        at = draw.randrange(len(kept))
        place.write_bytes(kept[:at] + draw.choice(values) + kept[at + draw.randrange(12) :])
        found = runs.now()
        for one in found.runs.values():
            assert one.problem or one.arms
            str(one).encode()
        place.write_bytes(kept)
