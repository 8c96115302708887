"""The adapter folder: whole or not at all, and nothing foreign is loaded from it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import AdapterError, RunError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.runtime.export import peft
from shared.runtime.export.peft import load_state, save_peft_folder
from shared.runtime.runtime import Runtime, load_runtime

STATE = "silotune_state.safetensors"


@pytest.fixture
def job(classification_job: Callable[..., Job]) -> Job:
    return classification_job()


@pytest.fixture
def runtime(job: Job) -> Runtime:
    return load_runtime(job, ComputeConfig(device="cpu", precision="float32"))


@pytest.fixture
def state(runtime: Runtime) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(t.shape, generator=generator) for name, t in runtime.initial.items()}


@pytest.fixture
def folder(tmp_path: Path, runtime: Runtime, job: Job, state: dict[str, torch.Tensor]) -> Path:
    save_peft_folder(tmp_path / "adapter", runtime, job, state)
    return tmp_path / "adapter"


def test_the_state_comes_back_bit_for_bit(
    folder: Path, runtime: Runtime, job: Job, state: dict[str, torch.Tensor]
) -> None:
    back = load_state(folder, runtime, job)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert sorted(os.listdir(folder)) == sorted(
        ["README.md", "adapter_config.json", "adapter_model.safetensors", "head.safetensors", STATE]
    )
    assert os.listdir(folder.parent) == ["adapter"]


def test_peft_finds_its_own_two_files(folder: Path, state: dict[str, torch.Tensor], tiny_bert: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    assert config["target_modules"] == ["query", "value"]
    assert config["layers_to_transform"] == [1, 2]
    assert config["base_model_name_or_path"] == str(tiny_bert)
    factors = load_file(folder / "adapter_model.safetensors")
    assert len(factors) == 8
    for name, tensor in state.items():
        if name.endswith("lora_B.weight"):
            assert torch.equal(factors[name], tensor)


def test_saving_again_replaces_our_files_and_no_other(
    folder: Path, runtime: Runtime, job: Job, state: dict[str, torch.Tensor]
) -> None:
    # Somebody's own files, beside ours and with names like those of our temporary folders.
    foreign = [folder / "notes.txt", folder / "merged" / "model.bin", folder.parent / ".adapter.backup" / "a"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    before = sorted(os.listdir(folder))
    save_peft_folder(folder, runtime, job, {name: t + 1 for name, t in state.items()})
    assert all(path.read_text() == "mine" for path in foreign)
    assert sorted(os.listdir(folder)) == before
    assert sorted(os.listdir(folder.parent)) == [".adapter.backup", "adapter"]
    assert torch.equal(load_state(folder, runtime, job)["head.linear.bias"], state["head.linear.bias"] + 1)


def test_a_full_disk_keeps_the_old_folder(
    folder: Path, runtime: Runtime, job: Job, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(peft, "save_file", full)
    with pytest.raises(RunError, match="No space left on device"):
        save_peft_folder(folder, runtime, job, {name: t + 1 for name, t in state.items()})
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
    assert torch.equal(load_state(folder, runtime, job)["head.linear.bias"], state["head.linear.bias"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"head.linear.bias": torch.tensor([float("nan"), 0.0])}, "NaN or infinity"),
        (lambda s: s | {"head.linear.bias": torch.zeros(3)}, r"shape \(3,\), expected \(2,\)"),
        (lambda s: s | {"head.linear.bias": torch.zeros(2, dtype=torch.float64)}, "dtype torch.float64"),
        (lambda s: s | {"extra": torch.zeros(1)}, "unknown tensors, first 'extra'"),
        (lambda s: {n: t for n, t in s.items() if not n.startswith("head.")}, "lacks 2 tensors"),
        (lambda s: s | {"extra": torch.zeros(100_000)}, "more than the .* that this job's adapter can have"),
    ],
)
def test_a_foreign_state_is_refused(
    folder: Path,
    runtime: Runtime,
    job: Job,
    state: dict[str, torch.Tensor],
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    message: str,
) -> None:
    save_file(change(state), folder / STATE)
    with pytest.raises(AdapterError, match=message):
        load_state(folder, runtime, job)


def test_a_missing_or_damaged_state_is_refused(folder: Path, runtime: Runtime, job: Job) -> None:
    (folder / STATE).write_bytes(b"\x80\x04pickle")
    with pytest.raises(AdapterError, match="cannot be read"):
        load_state(folder, runtime, job)
    (folder / STATE).unlink()
    with pytest.raises(AdapterError, match=r"holds no tuned adapter .*is missing"):
        load_state(folder, runtime, job)


def test_a_huge_state_is_refused_before_it_is_read(folder: Path, runtime: Runtime, job: Job) -> None:
    with (folder / STATE).open("r+b") as file:
        file.truncate(10 * 2**30)  # sparse: takes no room on the disk
    with pytest.raises(AdapterError, match="10,737,418,240 bytes"):
        load_state(folder, runtime, job)
