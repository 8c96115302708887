"""Where commands may write: files of somebody else stay, and impossible places are refused before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.errors import RunError
from shared.files.atomic import write_text
from shared.files.outputs import HTML_MARK, check_file, check_folder, check_new_files, check_own_folder


def test_a_new_file_and_one_of_ours_may_be_written(tmp_path: Path) -> None:
    check_file(tmp_path / "new.html", HTML_MARK)
    check_file(tmp_path / "a" / "b" / "new.html", HTML_MARK)
    (tmp_path / "ours.html").write_bytes(b"<!doctype html>" + HTML_MARK)
    check_file(tmp_path / "ours.html", HTML_MARK)


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / "theirs.html").write_text("<p>mine")
    (tmp_path / "link.html").symlink_to(tmp_path / "theirs.html")
    (tmp_path / "dangling.html").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.html").mkdir()
    os.mkfifo(tmp_path / "pipe.html")
    for name, message in (
        ("theirs.html", "Silotune did not make it"),
        ("link.html", "is a symbolic link"),
        ("dangling.html", "is a symbolic link"),
        ("folder.html", "is a folder"),
        ("pipe.html", "is a device"),
    ):
        with pytest.raises(RunError, match=message):
            check_file(tmp_path / name, HTML_MARK)
        if name != "theirs.html":
            with pytest.raises(RunError, match="no plain file, so it is not replaced"):
                write_text(tmp_path / name, "new")
    with pytest.raises(RunError, match="not replaced; add --overwrite"):
        check_file(tmp_path / "theirs.html", None, way_out="add --overwrite")
    assert (tmp_path / "theirs.html").read_text() == "<p>mine"
    assert (tmp_path / "link.html").is_symlink()


@pytest.mark.parametrize("check", [lambda path: check_file(path, HTML_MARK), check_folder])
def test_impossible_places_are_told(tmp_path: Path, check: object) -> None:
    assert callable(check)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="file is a file; choose another place"):
        check(tmp_path / "file" / "below" / "x")
    with pytest.raises(RunError, match=r"File name too long.*|choose another path"):
        check(tmp_path / ("n" * 300))
    with pytest.raises(RunError, match="choose another path"):
        check(tmp_path / "nul\0byte")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        for check in (lambda: check_file(tmp_path / "x", None), lambda: check_folder(tmp_path / "x" / "y")):
            with pytest.raises(RunError, match="cannot be written"):
                check()
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_is_ours_by_its_marker(tmp_path: Path) -> None:
    def check() -> None:
        check_own_folder(tmp_path, marker="job.json", own=(".lock",), what="run")

    check()
    (tmp_path / ".lock").touch()
    (tmp_path / ".job.json.abc").touch()  # left by a kill
    check()
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).touch()
    with pytest.raises(RunError, match=r"holds no run \(no job.json, but a, b, c and 1 more\); what is there is left"):
        check()
    (tmp_path / "job.json").touch()
    check()


def test_names_that_are_taken_are_told(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").touch()
    check_new_files(tmp_path, ["site.toml"])
    with pytest.raises(RunError, match=r"holds policy.toml already, which would be overwritten"):
        check_new_files(tmp_path, ["site.toml", "policy.toml"])
