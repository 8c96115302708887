"""Checkpoints come back bit for bit, and a failed write leaves the earlier one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from server.records.rounds import RoundRecord
from server.store.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from shared.errors import RunError
from shared.privacy.accounting import GaussianSteps
from shared.privacy.statement import SiteRelease

JOB = "a" * 64


def checkpoint(round_number: int = 2) -> Checkpoint:
    release = SiteRelease(
        site="north",
        delta=1e-5,
        max_grad_norm=1.0,
        declared_records=32,
        randomness="os",
        epsilon_budget=8.0,
        steps_planned=6,
        events=(GaussianSteps(noise_multiplier=1.1, sample_rate=0.25, steps=4),),
        rounds=(1, 2),
    )
    generator = torch.Generator().manual_seed(round_number)
    return Checkpoint(
        job_sha256=JOB,
        round_number=round_number,
        adapter={"x.lora_B.weight": torch.randn(3, 2, generator=generator), "head.bias": torch.zeros(0)},
        server_state={"|step": torch.tensor(2.0), "x|m": torch.randn(2, 3, generator=generator).T},
        releases={"north": release},
        history=[
            RoundRecord(round=0, metrics={"loss": 0.1 + 0.2}),
            RoundRecord(round=1, epsilon_max=1 / 3, sites=["north"], failed={"süd": 'said "no"\n'}, bytes_up=5),
        ],
        site_metrics={"north": {"accuracy": [1 / 3, -2.0]}},
    )


def test_everything_comes_back_exactly(tmp_path: Path) -> None:
    path, original = tmp_path / "checkpoint.safetensors", checkpoint()
    save_checkpoint(path, original)
    back = load_checkpoint(path, job_sha256=JOB)
    assert back is not None
    for mine, theirs in ((original.adapter, back.adapter), (original.server_state, back.server_state)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) and mine[name].shape == theirs[name].shape for name in mine)
    assert back.releases == original.releases
    assert back.releases["north"].epsilon == original.releases["north"].epsilon
    assert back.history == original.history
    assert back.round_number == 2
    assert back.site_metrics == original.site_metrics


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none", job_sha256=JOB) is None


def test_another_jobs_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, checkpoint())
    with pytest.raises(RunError, match="another configuration"):
        load_checkpoint(path, job_sha256="b" * 64)


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[:40], lambda d: b"", lambda d: b"\x80\x04" + d[2:]])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, checkpoint())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match=r"cannot be read .* restore it from a backup"):
        load_checkpoint(path, job_sha256=JOB)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, checkpoint(1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(RunError, match=r"No space left on device.*resume"):
            save_checkpoint(path, checkpoint(2))
    back = load_checkpoint(path, job_sha256=JOB)
    assert back is not None
    assert back.round_number == 1
    assert os.listdir(tmp_path) == ["checkpoint.safetensors"]
    save_checkpoint(path, checkpoint(2))
