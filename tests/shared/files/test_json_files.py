"""JSON files of ours, read back: every damage is one error that names the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import BaseModel

from shared.errors import ConfigError, RunError
from shared.files.json_files import read_object, read_record
from shared.job.job_file import load_job


class Shape(BaseModel):
    """What is expected."""

    number: float


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "Expecting value"),
        (b"not json", "Expecting value"),
        (b"\xff\xfe", "codec can't decode"),
        (b"[]", "it holds a list, not an object"),
        (b"null", "it holds a NoneType, not an object"),
        (b'{"number": 1, "number": 2}', "it holds a key twice"),
        (b'{"number": NaN}', "it holds NaN, which is no number"),
        (b'{"number": 1e999}', "it holds 1e999, which is too large for a number"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"number": ' + b"9" * 5000 + b"}", "which is too large for a number"),
        (b'{"number": 1, "other": 1' + b"0" * 400 + b"}", "which is too large for a number"),
        (b"{}", "number: Field required"),
        (b'{"number": []}', "number: Input should be a valid number"),
    ],
)
def test_damage_is_told_with_the_name_of_the_file(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"run\.json is damaged or not of Silotune: .*restore it from a backup") as found:
        read_record(path, Shape)
    assert why in str(found.value)
    (tmp_path / "job.json").write_bytes(content)
    with pytest.raises((RunError, ConfigError), match=r"job\.json"):
        load_job(tmp_path)


def test_what_is_missing_or_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"run\.json is missing"):
        read_object(tmp_path / "run.json")
    (tmp_path / "run.json").mkdir()
    with pytest.raises(RunError, match="Is a directory"):
        read_object(tmp_path / "run.json")
    for name, make in (("pipe.json", os.mkfifo), ("device.json", lambda path: path.symlink_to("/dev/zero"))):
        make(tmp_path / name)
        with pytest.raises(RunError, match="it is no plain file"):
            read_object(tmp_path / name)


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"number": 1.5, "more": [1]}')
    assert read_record(tmp_path / "a.json", Shape).number == 1.5
