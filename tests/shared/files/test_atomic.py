"""Files are replaced in full or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.errors import RunError
from shared.files import atomic


def test_content_is_replaced_and_no_temporary_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    atomic.write_bytes(path, b"one")
    atomic.write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["file"]


def test_a_file_is_private_until_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes, fsync = [], os.fsync
    for mode in (0o600, 0o644):
        with monkeypatch.context() as patch:
            patch.setattr(
                os, "fchmod", lambda handle, to: (modes.append(os.fstat(handle).st_mode & 0o777), fsync(handle))
            )
            atomic.write_bytes(tmp_path / "file", b"x", mode=mode)
        atomic.write_bytes(tmp_path / "file", b"x", mode=mode)
        assert (tmp_path / "file").stat().st_mode & 0o777 == mode
    assert modes == [0o600, 0o600]


@pytest.mark.parametrize("call", ["fsync", "replace", "fdopen"])
def test_a_full_disk_leaves_the_old_content_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    atomic.write_bytes(path, b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(RunError, match=r"No space left on device.*free space"):
        atomic.write_bytes(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_made_is_an_error_for_people(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="could not write"):
        atomic.write_text(tmp_path / "file" / "below", "x")


def test_data_reaches_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    atomic.write_bytes(tmp_path / "file", b"x")
    assert calls == ["fsync", "replace", "fsync"]  # the data, the new name, the folder that holds the name


def test_json_is_sorted_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    atomic.write_json(path, {"b": 1, "a": "é"})
    assert path.read_text() == '{\n  "a": "\\u00e9",\n  "b": 1\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(path, {"a": float("nan")})
    assert "é" not in path.read_text()
    assert '"b": 1' in path.read_text()


def test_a_kill_leaves_one_of_the_two_contents(tmp_path: Path) -> None:
    program = (
        "import sys, itertools\nfrom pathlib import Path\nfrom shared.files.atomic import write_bytes\n"
        "for i in itertools.cycle(b'ab'): write_bytes(Path(sys.argv[1]), bytes([i]) * 3_000_000)\n"
    )
    path = tmp_path / "file"
    for attempt in range(3):
        child = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=Path(__file__).parents[3])
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05 + 0.07 * attempt)
        child.send_signal(signal.SIGKILL)
        child.wait()
        content = path.read_bytes()
        assert len(content) == 3_000_000
        assert len(set(content)) == 1
