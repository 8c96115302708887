"""The cache of frozen activations: its two tiers, their bounds, and what goes wrong with files."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

import shared.files.scratch_file as scratch_file
from shared.files.scratch_file import OVERHEAD
from shared.models.batches import Example
from shared.models.frozen_cache import FrozenCache

HIDDEN = 8
GENEROUS = 1 << 30


def examples(count: int = 20) -> list[Example]:
    """Texts of 1 to `count` tokens, longest first."""
    return [Example(torch.arange(length) + 100 * length) for length in range(count, 0, -1)]


def compute(ids: Tensor, mask: Tensor) -> Tensor:
    """Different for each text and position, and not exactly representable."""
    return torch.sin(ids[..., None] * torch.arange(1, HIDDEN + 1) + 0.1) * mask[..., None]


def fill(cache: FrozenCache, texts: list[Example], *, dtype: torch.dtype = torch.float32, **bounds: object) -> None:
    options = {"max_tokens": 40, "max_bytes": GENEROUS, **bounds}
    cache.fill(texts, lambda ids, mask: compute(ids, mask).to(dtype), **options)  # type: ignore[arg-type]


def held(cache: FrozenCache, texts: list[Example]) -> list[Example]:
    return [text for text in texts if cache.get([text])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("in_memory", [0, 1_000, GENEROUS])
def test_both_tiers_return_what_was_computed(dtype: torch.dtype, in_memory: int, tmp_path: Path) -> None:
    cache, texts = FrozenCache(), examples()
    fill(cache, texts, dtype=dtype, max_bytes=in_memory, max_file_bytes=GENEROUS, folder=tmp_path)
    stored = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    found = cache.get(texts)
    assert found is not None
    for text, state in zip(texts, found, strict=True):
        expected = compute(text.input_ids[None], torch.ones(1, text.length))[0].to(dtype).to(stored)
        assert state.dtype == stored
        assert torch.equal(state, expected)
    values = sum(text.length for text in texts) * HIDDEN * stored.itemsize
    in_file = cache.file_bytes - OVERHEAD * sum(not isinstance(state, Tensor) for state in cache._states.values())
    assert cache.num_bytes + in_file == values
    assert cache.num_bytes <= in_memory


def test_what_is_missing_is_told_of_as_it_is_computed() -> None:
    cache, texts, seen = FrozenCache(), examples(), list[tuple[int, int]]()
    fill(cache, texts[:3])
    fill(cache, [*texts, *texts], told=lambda done, of: seen.append((done, of)))
    missing = len({text.key for text in texts} - {text.key for text in texts[:3]})
    assert seen[0] == (0, missing)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert len(seen) > 1
    fill(cache, texts, told=lambda *_: pytest.fail("nothing was missing"))


def test_the_shortest_go_to_memory_and_longer_ones_to_the_file(tmp_path: Path) -> None:
    """Both bounds hold, to the byte: 1 to 5 tokens fit in memory, 6 to 8 in the file, the rest nowhere."""
    cache, texts = FrozenCache(), examples()
    memory, file = 15 * HIDDEN * 4, (6 + 7 + 8) * HIDDEN * 4 + 3 * OVERHEAD
    fill(cache, texts, max_bytes=memory, max_file_bytes=file, folder=tmp_path)
    assert (cache.num_bytes, cache.file_bytes) == (memory, file)
    assert [text.length for text in held(cache, texts)] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert cache.get(texts) is None
    tight = FrozenCache()
    fill(tight, texts, max_bytes=memory - 1, max_file_bytes=file - 1, folder=tmp_path)
    assert tight.num_bytes == 10 * HIDDEN * 4
    assert tight.file_bytes == (5 + 6 + 7) * HIDDEN * 4 + 3 * OVERHEAD
    assert list(tmp_path.iterdir()) == []


def test_without_a_bound_for_it_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.models.frozen_cache.ScratchFile", None)
    cache = FrozenCache()
    fill(cache, examples(), max_bytes=100, folder=tmp_path)
    assert (cache.num_bytes, cache.file_bytes) == (3 * HIDDEN * 4, 0)


def test_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    cache, texts = FrozenCache(), examples()
    calls: list[torch.Size] = []
    counts = []
    for _ in range(2):
        cache.fill(
            texts,
            lambda ids, mask: calls.append(ids.shape) or compute(ids, mask),  # type: ignore[func-returns-value]
            max_tokens=1_000,
            max_bytes=500,
            max_file_bytes=GENEROUS,
            folder=tmp_path,
        )
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0
    assert texts[0].key is texts[0].key  # made once, not in every step


def test_the_system_s_temporary_folder_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    make = scratch_file._open_nameless
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch_file, "_open_nameless", lambda folder: opened.append(folder) or make(folder))
    fill(FrozenCache(), examples(), max_bytes=0, max_file_bytes=GENEROUS)
    assert opened == [tmp_path]


def test_a_full_disk_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was written before stays, nothing half-written is read, and it is said once."""
    write, room = os.pwrite, [1_000]

    def pwrite(descriptor: int, data: memoryview, place: int) -> int:
        part = data[: min(len(data), max(room[0] - place, 0))]
        if not part:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, part, place)

    monkeypatch.setattr(os, "pwrite", pwrite)
    cache, texts = FrozenCache(), examples()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            fill(cache, texts, max_bytes=320, max_file_bytes=GENEROUS, folder=tmp_path)
    (record,) = caplog.records
    assert "No space left" in record.getMessage()
    assert "compute.cache_file_folder" in record.getMessage()
    kept = held(cache, texts)
    assert [text.length for text in kept] == [8, 7, 6, 5, 4, 3, 2, 1][-len(kept) :]
    assert len(kept) > 4
    for text in kept:
        assert torch.equal(cache.get([text])[0], compute(text.input_ids[None], torch.ones(1, text.length))[0])  # type: ignore[index]


@pytest.mark.parametrize("reason", ["missing", "read-only"])
def test_a_folder_that_cannot_be_used_is_no_error(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "missing"
    if reason == "read-only":  # whoever runs the tests may be allowed everything, so the system's answer is played

        def refuse(*_: object, **__: object) -> int:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(os, "open", refuse)
        folder = tmp_path
    cache = FrozenCache()
    with caplog.at_level(logging.WARNING):
        fill(cache, examples(), max_bytes=320, max_file_bytes=GENEROUS, folder=folder)
    assert str(folder) in caplog.text
    assert (cache.num_bytes, cache.file_bytes) == (320, 0)


def test_changed_bytes_are_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, texts = FrozenCache(), examples()
    fill(cache, texts, max_bytes=0, max_file_bytes=GENEROUS, folder=tmp_path)
    assert cache._file is not None
    os.pwrite(cache._file._descriptor, b"\0\0\0\0", 5)  # in the first entry, the shortest text
    with caplog.at_level(logging.WARNING):
        assert cache.get(texts) is None
    assert "not those that were written" in caplog.text
    assert held(cache, texts) == texts[:-1]
    fill(cache, texts, max_bytes=0, max_file_bytes=GENEROUS, folder=tmp_path)
    assert cache.get(texts) is not None


_CHILD = """
import sys, time, torch
from pathlib import Path
from shared.models.batches import Example
from shared.models.frozen_cache import FrozenCache

cache = FrozenCache()
texts = [Example(torch.arange(50) + k) for k in range(10_000)]
def compute(ids, mask):
    if cache.file_bytes:
        print("writing", flush=True)
    return torch.randn(*ids.shape, 64)
cache.fill(texts, compute, max_tokens=500, max_bytes=0, max_file_bytes=1 << 40, folder=Path(sys.argv[1]))
"""


def test_a_kill_leaves_nothing(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        assert list(tmp_path.iterdir()) == []  # not even while it writes
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
