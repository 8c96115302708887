"""The archive of a backup: whole or absent, and no byte or name in it goes unseen."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.errors import RunError
from shared.files.backup import LIST_FILE, Contents, Writer, new_folder, unpack, verify, writing

ROOT = Path(__file__).parents[3]
FILES = {"one": b"first" * 400, "sub/two": b"", "sub/deep/three": bytes(range(256))}


def written(path: Path, fill: Callable[[Writer], None] | None = None) -> Path:
    with writing(path, kind="site", name="north", check=lambda found: verify(found, "site")) as writer:
        for name, content in FILES.items():
            writer.add(name, content)
        if fill is not None:
            fill(writer)
    return path


@pytest.fixture
def taken(tmp_path: Path) -> Path:
    return written(tmp_path / "a.tar")


def repacked(path: Path, change: Callable[[dict[str, tuple[tarfile.TarInfo, bytes]]], None]) -> Path:
    """Write the archive anew with changed members."""
    with tarfile.open(path) as tar:
        members = {info.name: (info, tar.extractfile(info).read()) for info in tar}  # type: ignore[union-attr]
    change(members)
    out = path.with_name("changed.tar")
    with tarfile.open(out, "w") as tar:
        for info, content in members.values():
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return out


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content) if kind == tarfile.REGTYPE else 0, kind
    info.linkname = "/etc/passwd" if kind != tarfile.REGTYPE else ""
    return info, content


def test_a_backup_comes_back_byte_by_byte(taken: Path, tmp_path: Path) -> None:
    assert set(verify(taken, "site").files) == set(FILES)
    assert taken.stat().st_mode & 0o777 == 0o600
    (tmp_path / "out").mkdir()
    unpack(taken, "site", tmp_path / "out")
    found = {
        p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert found == FILES


def test_any_changed_byte_is_found(taken: Path) -> None:
    data = taken.read_bytes()
    with tarfile.open(taken) as tar:
        places = [(info.offset_data, info.size) for info in tar if info.size]
    for start, size in places:
        for offset in range(start, start + size, max(size // 12, 1)):
            taken.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
            with pytest.raises(RunError, match=r"cannot be used|damaged"):
                verify(taken, "site")


@pytest.mark.parametrize("length", [0, 1, 511, 512, 2000, 3000])
def test_a_backup_that_was_cut_is_refused(taken: Path, length: int) -> None:
    taken.write_bytes(taken.read_bytes()[:length])
    with pytest.raises(RunError, match="cannot be used"):
        verify(taken, "site")


@pytest.mark.parametrize(
    "extra",
    [
        member("more", b"x"),
        member("one-link", kind=tarfile.SYMTYPE),
        member("one-link", kind=tarfile.LNKTYPE),
        member("pipe", kind=tarfile.FIFOTYPE),
        member("folder", kind=tarfile.DIRTYPE),
    ],
    ids=["file", "symlink", "hard link", "pipe", "folder"],
)
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_foreign_member_is_refused(taken: Path, extra: tuple[tarfile.TarInfo, bytes], place: str) -> None:
    def change(members: dict[str, tuple[tarfile.TarInfo, bytes]]) -> None:
        rest = dict(members)
        members.clear()
        members.update({"x": extra, **rest} if place == "first" else {**rest, "x": extra})

    with pytest.raises(RunError, match=r"does not belong there|was added"):
        verify(repacked(taken, change), "site")


def test_a_few_bytes_that_stand_for_a_terabyte_are_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("audit/x")
    info.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"00000000000\0" * 2  # one part, of no bytes
    block[483:495] = tarfile.itn(1 << 40, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(block) + bytes(1024))
    with tarfile.open(path) as tar:
        assert [found.size for found in tar] == [1 << 40]
    with pytest.raises(RunError, match="'audit/x' does not belong there"):
        verify(path, "site")


def test_a_missing_file_and_a_missing_list_are_found(taken: Path) -> None:
    with pytest.raises(RunError, match="'one' is missing"):
        verify(repacked(taken, lambda members: members.pop("one") and None), "site")
    with pytest.raises(RunError, match=f"holds no {LIST_FILE}"):
        verify(repacked(taken, lambda members: members.pop(LIST_FILE) and None), "site")


@pytest.mark.parametrize(
    "name", ["../out", "/out", "a/../../out", "./a", "a//b", ".hidden", "a/.b", "a\\b", "a\0b", ""]
)
def test_names_that_lead_out_are_refused(
    taken: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a list that fits, as somebody else could write it."""

    def change(members: dict[str, tuple[tarfile.TarInfo, bytes]]) -> None:
        info, listed = members.pop(LIST_FILE)
        fields = json.loads(listed)
        fields["files"][name] = ["2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881", 1]
        text = json.dumps(fields).encode()
        info.size = len(text)
        members |= {"x": member(name, b"x"), LIST_FILE: (info, text)}

    monkeypatch.setattr(Contents, "own_sha256", lambda self: self.sha256)
    changed = repacked(taken, change)
    (tmp_path / "deep" / "in").mkdir(parents=True)
    with pytest.raises(RunError, match="cannot be used"):
        unpack(changed, "site", tmp_path / "deep" / "in")
    assert list((tmp_path / "deep").rglob("*")) == [tmp_path / "deep" / "in"]
    with pytest.raises(RunError, match="none of ours"):
        written(tmp_path / "b.tar", lambda writer: writer.add(name, b"x"))
    assert not (tmp_path / "b.tar").exists()


def test_the_backup_of_another_kind_is_refused(taken: Path) -> None:
    with pytest.raises(RunError, match="backup of a site, not of a coordinator"):
        verify(taken, "coordinator")


def test_nothing_is_overwritten(taken: Path, tmp_path: Path) -> None:
    before = taken.read_bytes()
    with pytest.raises(RunError, match="overwrites nothing"):
        written(taken)
    (tmp_path / "link.tar").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunError, match="overwrites nothing"):
        written(tmp_path / "link.tar")
    with pytest.raises(RunError, match="File exists"):  # somebody is quicker
        written(tmp_path / "b.tar", lambda writer: (tmp_path / "b.tar").write_text("theirs") and None)
    assert (tmp_path / "b.tar").read_text() == "theirs"
    assert taken.read_bytes() == before


def test_a_disk_without_hard_links_gets_a_backup_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    written(tmp_path / "a.tar")
    verify(tmp_path / "a.tar", "site")
    with pytest.raises(RunError, match="not permitted"):
        written(tmp_path / "b.tar", lambda writer: (tmp_path / "b.tar").write_text("theirs") and None)
    assert (tmp_path / "b.tar").read_text() == "theirs"
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "b.tar"}


def test_a_link_and_a_pipe_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(RunError, match="expected a plain file"):
        written(tmp_path / "a.tar", lambda writer: writer.add_folder(folder, "folder"))
    (folder / "link").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(RunError, match="no plain file"):
        written(tmp_path / "a.tar", lambda writer: writer.add_folder(folder, "folder"))
    (folder / "pipe").unlink()
    (folder / "linked").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(RunError, match="does not follow"):
        written(tmp_path / "a.tar", lambda writer: writer.add_folder(folder, "folder"))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_file_that_grows_is_copied_up_to_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"12345678")
    written(tmp_path / "a.tar", lambda writer: writer.add_file("log", path, size=5) and None)
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.extractfile("log").read() == b"12345"  # type: ignore[union-attr]
    with pytest.raises(RunError, match="was not made"):  # and one that became shorter is not filled up
        written(tmp_path / "b.tar", lambda writer: writer.add_file("log", path, size=9) and None)


def test_a_kill_leaves_no_backup(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom shared.files.backup import writing\n"
        "with writing(Path(sys.argv[1]), kind='site', name='n', check=lambda p: os.kill(os.getpid(), signal.SIGKILL)) as w:\n"
        "    w.add('one', b'1')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.tar")], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "a.tar").exists()
    written(tmp_path / "a.tar")


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Is a directory"), new_folder(tmp_path / "new") as folder:
        folder.read_bytes()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "file").touch()
    assert (tmp_path / "empty" / "file").exists()
    for taken in (tmp_path / "empty", tmp_path / "empty" / "file"):
        with pytest.raises(RunError, match="is there already"), new_folder(taken):
            pass
