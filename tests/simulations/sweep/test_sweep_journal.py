"""The lines of a sweep: durable, complete or dropped, and never silently wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from shared.errors import RunError
from simulations.sweep.journal import Journal, TrialResult


def result(key: str, score: float | None = 0.5, **changes: Any) -> TrialResult:
    fields: dict[str, Any] = {
        "key": key,
        "setting": {"privacy.epsilon": 3, "lora.target_modules": ["query", "value"]},
        "seed": 0,
        "status": "completed",
        "budget": 3.0,
        "epsilon": 2.97,
        "delta": 1e-5,
        "metric": "accuracy",
        "higher_is_better": True,
        "score": score,
        "metrics": {"accuracy": score, "loss": 1.0},
        "seconds": 1.5,
        "job_sha256": "0" * 64,
    }
    return TrialResult.model_validate({**fields, **changes})


def test_lines_come_back_as_they_were(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "trials.jsonl")
    kept = [
        result("a"),
        result("b", budget="inf", epsilon=None),
        result("c", status="failed", reason="x", score=None, metrics={}),
    ]
    for line in kept:
        journal.append(line)
    again = Journal(tmp_path / "trials.jsonl")
    assert list(again.results.values()) == kept
    assert again.finished("a") == kept[0]
    assert again.finished("c") is None, "a failed trial is run again"
    assert again.finished("z") is None
    again.append(result("c", 0.7))
    assert Journal(tmp_path / "trials.jsonl").finished("c") == result("c", 0.7), "the later line counts"


def test_a_line_is_on_the_disk_when_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order: the line is written, then synchronised, then `append` returns."""
    calls: list[str] = []
    write, sync = os.pwrite, os.fsync
    monkeypatch.setattr(os, "pwrite", lambda *a: (calls.append("write"), write(*a))[1])
    monkeypatch.setattr(os, "fsync", lambda *a: (calls.append("sync"), sync(*a))[1])
    Journal(tmp_path / "trials.jsonl").append(result("a"))
    assert calls[:2] == ["write", "sync"]
    assert len(calls) == 3, "the new file's folder is synchronised too"


@pytest.mark.parametrize("cut", range(1, 12, 3))
def test_a_cut_line_is_dropped_and_overwritten(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "trials.jsonl"
    journal = Journal(path)
    journal.append(result("a"))
    first = path.read_bytes()
    journal.append(result("b"))
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path)
    assert list(again.results) == ["a"]
    again.append(result("c"))
    assert path.read_bytes().startswith(first)
    assert list(Journal(path).results) == ["a", "c"]


def test_a_full_disk_leaves_complete_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trials.jsonl"
    journal = Journal(path)
    journal.append(result("a"))
    before, write = path.read_bytes(), os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda handle, line, at: write(handle, line[:20], at))
        with pytest.raises(RunError, match="Free space"):
            journal.append(result("b"))
    assert path.read_bytes() == before
    assert journal.finished("b") is None
    journal.append(result("b"))
    assert list(Journal(path).results) == ["a", "b"]


def test_a_score_that_no_trial_can_have_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    Journal(path).append(result("a", score=0.5))
    content = path.read_text()
    for old, new in (('"score":0.5', '"score":7.5'), ('"accuracy":0.5', '"accuracy":7.5'), ('"loss":1.0', '"loss":-1')):
        assert old in content
        path.write_text(content.replace(old, new))
        with pytest.raises(RunError, match="line 1, is not a trial's result"):
            Journal(path)


@pytest.mark.parametrize("damage", [b"nonsense\n", b"{}\n", b'{"key": "a"}\n'])
def test_a_changed_line_is_refused(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "trials.jsonl"
    Journal(path).append(result("a"))
    path.write_bytes(path.read_bytes() + damage)
    with pytest.raises(RunError, match="line 2, is not a trial's result"):
        Journal(path)
