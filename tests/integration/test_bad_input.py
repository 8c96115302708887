"""Mistakes end with a message that says what was found, what was expected and what to do; nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.runs.folder import load_job
from server.store.checkpoint import load_checkpoint
from shared.models import families
from tests.integration.disk import small_files

MakeScenario = Callable[..., Path]
Silotune = Callable[..., Any]
STATE = "silotune_state.safetensors"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def check_refused(outcome: Any, *parts: str) -> None:
    assert outcome.status not in (0, None)
    # A library's progress bar may stand before it where that library was imported before the command started.
    assert "error: " in outcome.err, outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    assert outcome.out == ""
    for part in parts:
        assert part in outcome.err


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"trainning": {"rounds": 1}}, ["unknown key 'trainning'", "did you mean 'training'?"]),
        ({"training": {"round": 1}}, ["unknown key 'training.round'", "did you mean 'rounds'?"]),
        ({"privacy": {"epsilon": 0}}, ["privacy.epsilon", "greater than or equal to 1e-06", "found 0"]),
        ({"privacy": {"epsilon": -3.0}}, ["privacy.epsilon", "greater than or equal to 1e-06", "found -3.0"]),
        ({"privacy": {"delta": 0.0}}, ["privacy.delta", "greater than or equal to 1e-30"]),
        ({"privacy": {"delta": 0.0625}}, ["site-1", "delta is 0.0625", "16 records", "use at most 1.0e-05"]),
        ({"lora": {"target_modules": ["attn"]}}, ["'attn', which matches no linear layer", "attention.self.query"]),
        ({"model": {"backbone": "/no/such"}}, ["'/no/such' is not a folder", "check the path"]),
        ({"model": {"backbone": "someone/bert"}}, ["needs model.revision", "40 hexadecimal digits"]),
        (
            {"task": {"labels": ["bad", "great"]}},
            ["have a label in column 'verdict'", "not among task.labels (bad, great)"],
        ),
        ({"partition": {"kind": "dirichlet", "num_sites": 30, "alpha": 0.05}}, ["Use"]),
        ({"simulation": {"threads": 0}}, ["simulation.threads", "found 0"]),
    ],
)
def test_a_bad_scenario_writes_nothing(
    silotune: Silotune, scenario_file: MakeScenario, tmp_path: Path, sections: dict[str, Any], parts: list[str]
) -> None:
    check_refused(silotune("simulate", scenario_file(**sections), "--out", tmp_path / "run"), *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda f: f.unlink(), ["train.csv does not exist", "Check the name"]),
        (lambda f: f.write_text("reviews,verdict\nfine,good\n"), ["no column 'review'", "Did you mean 'reviews'"]),
        (lambda f: f.write_text(""), ["is empty", "Expected a header line"]),
        (lambda f: f.write_text("review,verdict\n"), ["holds no rows", "Expected at least one record"]),
        (lambda f: f.write_bytes(b"review,verdict\n\xff\xfe,good\n"), ["is not utf-8", "Set the encoding"]),
        (lambda f: f.write_text("review,verdict\nfine,\n"), ["column 'verdict' is blank at row 1", "fill or remove"]),
        (
            lambda f: f.write_text("review,verdict\n" + "".join(f"text number {i},good\n" for i in range(60))),
            ["one and the same label"],
        ),
    ],
)
def test_bad_data_writes_nothing(
    silotune: Silotune, scenario_file: MakeScenario, tmp_path: Path, change: Callable[[Path], Any], parts: list[str]
) -> None:
    path = scenario_file()
    change(tmp_path / "train.csv")
    check_refused(silotune("simulate", path, "--out", tmp_path / "run"), *parts)
    assert not (tmp_path / "run").exists()


def test_a_site_without_records_writes_nothing(silotune: Silotune, scenario_file: MakeScenario, tmp_path: Path) -> None:
    path = scenario_file(partition={"kind": "dirichlet", "num_sites": 40, "alpha": 0.01, "min_records": 1})
    check_refused(silotune("simulate", path, "--out", tmp_path / "run"), "Use", "fewer")
    assert not (tmp_path / "run").exists()


def test_a_kill_in_a_round_that_never_comes_writes_nothing(
    silotune: Silotune, scenario_file: MakeScenario, tmp_path: Path
) -> None:
    path = scenario_file(training={"rounds": 2}, simulation={"kill_in_round": 3})
    outcome = silotune("federation", path, "--out", tmp_path / "run")
    check_refused(outcome, "simulation.kill_in_round is 3, but the run has 2 rounds")
    assert not (tmp_path / "run").exists()


def test_pickle_weights_and_remote_code_write_nothing(
    silotune: Silotune, scenario_file: MakeScenario, tiny_bert: Path, tmp_path: Path
) -> None:
    pickled, remote = tmp_path / "pickled", tmp_path / "remote"
    shutil.copytree(tiny_bert, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    shutil.copytree(tiny_bert, remote)
    config = json.loads((remote / "config.json").read_text())
    (remote / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x.Y"}}))
    for backbone, parts in (
        (pickled, ["only pickle files (pytorch_model.bin)", "safe_serialization=True"]),
        (remote, ["auto_map", "use a backbone of a built-in architecture"]),
    ):
        path = scenario_file(model={"backbone": str(backbone)})
        check_refused(silotune("simulate", path, "--out", tmp_path / "run"), *parts)
        assert not (tmp_path / "run").exists()


def test_a_backbone_with_batch_norm_writes_nothing(
    silotune: Silotune, scenario_file: MakeScenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PatchTSTConfig, PatchTSTModel

    small = PatchTSTConfig(num_input_channels=1, d_model=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8)
    PatchTSTModel(small).save_pretrained(tmp_path / "bn")
    table = {**families.ARCHITECTURES, "patchtst": families.ARCHITECTURES["bert"]}
    monkeypatch.setattr(families, "ARCHITECTURES", table)
    path = scenario_file(model={"backbone": str(tmp_path / "bn")})
    outcome = silotune("simulate", path, "--out", tmp_path / "run")
    check_refused(outcome, "BatchNorm1d: it mixes the records of a batch", "Use GroupNorm or LayerNorm")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda s: s | {"head.linear.bias": torch.tensor([float("nan"), 0.0])}, ["NaN or infinity"]),
        (lambda s: s | {"head.linear.bias": torch.zeros(3)}, ["shape (3,), expected (2,)"]),
        (lambda s: s | {"head.linear.bias": torch.zeros(2).half()}, ["dtype torch.float16, expected torch.float32"]),
        (lambda s: s | {"more": torch.zeros(1_000_000)}, ["more than the", "that this job's adapter can have"]),
        (lambda s: {"x": torch.zeros(1)}, ["lacks", "was it made for another job?"]),
    ],
)
def test_a_foreign_adapter_is_not_used(
    silotune: Silotune,
    finished_run: Path,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    parts: list[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    save_file(change(load_file(run / "adapter" / STATE)), run / "adapter" / STATE)
    before = snapshot(run)
    check_refused(silotune("predict", run, "a fine film"), *parts)
    assert snapshot(run) == before


def test_an_adapter_that_is_missing_or_no_adapter(silotune: Silotune, finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "adapter" / STATE).write_bytes(b"\x80\x04pickle")
    check_refused(silotune("predict", run, "x"), "cannot be read", "give the run's adapter folder")
    shutil.rmtree(run / "adapter")
    check_refused(silotune("predict", run, "x"), "holds no tuned adapter", "Finish the run first")
    check_refused(silotune("predict", tmp_path, "x"), "holds no job.json", "expected the folder of a run")
    check_refused(silotune("generate", finished_run, "x"), "does not continue texts", "silotune predict")


def test_a_folder_that_holds_a_run_is_left_alone(
    silotune: Silotune, scenario_file: MakeScenario, finished_run: Path, tmp_path: Path
) -> None:
    before = snapshot(finished_run)
    same = scenario_file(training={"rounds": 2})
    check_refused(silotune("simulate", same, "--out", finished_run), "holds a run already", "--resume")
    other = scenario_file(training={"rounds": 9})
    check_refused(
        silotune("simulate", other, "--out", finished_run, "--resume"),
        "holds a run with another configuration",
        "Choose another folder",
    )
    check_refused(silotune("simulate", same, "--resume"), "--resume needs --out")
    assert snapshot(finished_run) == before


@pytest.mark.slow
def test_two_processes_on_one_folder(
    silotune: Silotune,
    scenario_file: MakeScenario,
    tmp_path: Path,
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    folder = tmp_path / "run"
    path = scenario_file(training={"rounds": 400}, privacy={"epsilon": 1000.0})
    with start("simulate", path, "--out", folder) as first:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
            assert first.poll() is None
            time.sleep(0.01)
        homes = {n: b for n, b in snapshot(folder).items() if n.endswith(("site.toml", "data.jsonl", "job.json"))}
        check_refused(silotune("simulate", path, "--out", folder, "--resume"), "another process is running in", "wait")
        assert first.poll() is None
        first.kill()
        first.communicate()
    after = snapshot(folder)
    assert {name: after[name] for name in homes} == homes
    assert not any("Traceback" in str(content) for content in after.values())


@pytest.mark.slow
def test_a_full_disk_while_the_checkpoint_is_written(
    silotune: Silotune, scenario_file: MakeScenario, tmp_path: Path
) -> None:
    """The kernel refuses files above a limit, as a full disk would."""
    folder = tmp_path / "run"
    # Residuals make the checkpoint the largest file of the run.
    path = scenario_file(
        lora={"train": "both", "rank": 1, "target_modules": ["query", "key", "value"], "last_layers": 3}
    )
    assert silotune("simulate", path, "--out", folder, "--stop-after", "1").status == 0
    checkpoint = folder / "checkpoint.safetensors"
    before = checkpoint.read_bytes()
    limit = 34_000
    assert len(before) > limit > max(p.stat().st_size for p in folder.rglob("*.db"))

    with small_files(limit):
        outcome = silotune("simulate", path, "--out", folder, "--resume")
    assert outcome.status == 1, outcome.err
    assert "error: could not write" in outcome.err
    assert "checkpoint.safetensors: File too large" in outcome.err
    assert "The old content is untouched; free space" in outcome.err
    assert "Traceback" not in outcome.err
    assert checkpoint.read_bytes() == before
    assert not list(folder.glob(".checkpoint*")), "the half-written file must be removed"
    kept = load_checkpoint(checkpoint, job_sha256=load_job(folder).sha256)
    assert kept is not None
    assert kept.round_number == 1
    assert silotune("simulate", path, "--out", folder, "--resume").status == 0
    assert json.loads((folder / "run.json").read_text())["status"] == "completed"


def test_an_unknown_command_line_is_explained(silotune: Silotune, tmp_path: Path) -> None:
    check_refused(silotune("simulate", tmp_path / "none.toml"), "none.toml does not exist", "check the path")
    for arguments in (["simulte"], ["simulate", "x.toml", "--rounds", "3"], ["simulate"]):
        outcome = silotune(*arguments)
        assert outcome.status == 2
        assert "Traceback" not in outcome.err
        assert "Usage" in outcome.err


def test_a_real_process_shows_no_traceback(scenario_file: MakeScenario, tmp_path: Path) -> None:
    path = scenario_file(privacy={"epsilon": 0.0})
    done = subprocess.run(
        [Path(sys.executable).with_name("silotune"), "simulate", path, "--out", tmp_path / "run", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "privacy.epsilon" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
