"""Which files of a run or a model folder come into a registry: weights, tokenizers, JSON and text, and nothing that runs.

Formal guarantees (tests: tests/server/registry/test_intake.py)
    * A link, a device, a pipe or a file that is not of these kinds, by its name or by its content, is refused; so are too many
      and too large ones (test_hostile_folders_are_refused).
    * Of a run, its records and its adapter are copied and nothing else: no checkpoint, no ledger, no site's folder
      (test_adding.py: test_only_what_is_needed_is_copied).
    * What is checked is the copy, so nothing can be exchanged between check and use.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from shared.errors import ModelError, RunError, excerpt
from shared.files.atomic import sync_folder
from shared.files.bounded import MOST_TEXT_BYTES
from shared.models.model_files import MOST_BYTES, MOST_FILES
from shared.runtime.export.folder import ADAPTER_FOLDER, MODEL_FILE, ModelFolder, lineage_files

_CHUNK = 1 << 20

# How pickles of every protocol with a header, and zip archives (PyTorch's files), begin.
_CODE = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def check_sizes(path: Path) -> None:
    """Raise `ModelError` if a record in a folder, which is read whole, is longer than any."""
    for record in (path / name for name in (MODEL_FILE, *lineage_files(path))):
        if record.exists() and record.stat().st_size > MOST_TEXT_BYTES:
            raise _refused(record, f"as text it is longer than {MOST_TEXT_BYTES >> 20} MiB")


def model_files(folder: ModelFolder) -> tuple[str, ...]:
    """Return the places of a model's files below its folder.

    Raises:
        ModelError: if something lies among them that is no part of the model. Of a run that is its adapter's folder alone.
    """
    known = set(folder.files)
    inner = folder.path if folder.record.files else folder.path / ADAPTER_FOLDER
    for path in _below(inner):
        if path.relative_to(folder.path).as_posix() not in known:
            _check_of(path)
            raise _refused(path, "it is no part of the model, or a link")
    return folder.files


def copy_files(source: Path, names: Iterable[str], target: Path) -> int:
    """Copy these files below `source` into `target`, each checked; return how many bytes they have.

    Raises:
        ModelError: if one of them may not come in.
        RunError: if one cannot be read or written.
    """
    total = 0
    for number, name in enumerate(names, start=1):
        if number > MOST_FILES:
            raise ModelError(f"{source} holds more than {MOST_FILES:,} files, which no model does.")
        check = _check_of(source / name)
        copied = target / name
        copied.parent.mkdir(parents=True, exist_ok=True)
        total += _copy_file(source, name, copied, most_bytes=MOST_BYTES - total)
        check(copied, source / name)
    return total


def sync_tree(folder: Path) -> None:
    """Wait until every file below `folder` is on the disk."""
    for place, _, files in os.walk(folder):
        for name in files:
            with Path(place, name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))


def _below(folder: Path) -> Iterator[Path]:
    """Give everything below `folder` that is no folder; links are not followed."""

    def refuse(error: OSError) -> None:
        raise RunError(f"{error.filename} cannot be read ({error.strerror}); mend its permissions.") from None

    for place, folders, files in os.walk(folder, onerror=refuse):
        links = [name for name in folders if Path(place, name).is_symlink()]
        yield from (Path(place, name) for name in (*links, *files))


def _copy_file(source: Path, name: str, target: Path, *, most_bytes: int) -> int:
    """Copy one plain file, no folder on whose way below `source` is a link; return its size."""
    *folders, last = name.split("/")
    handle = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in (*folders, last):
            kind = os.O_DIRECTORY if part is not last else os.O_NONBLOCK
            found = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | kind, dir_fd=handle)
            os.close(handle)
            handle = found
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise _refused(source / name, "it is no plain file")
        if status.st_size > most_bytes:
            raise _refused(source / name, f"with it the model would have more than {MOST_BYTES >> 30} GiB")
        with os.fdopen(os.dup(handle), "rb") as file, target.open("xb") as copy:
            left = status.st_size  # a file that grows is copied up to where it ended
            while left and (data := file.read(min(left, _CHUNK))):
                copy.write(data)
                left -= len(data)
        return target.stat().st_size
    except OSError as error:
        if stat.S_ISLNK(_mode(source / name)):
            raise _refused(source / name, "it is a link") from None
        raise RunError(f"{source / name} cannot be copied: {error.strerror}.") from None
    finally:
        os.close(handle)


def _mode(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except OSError:
        return 0


def _check_of(path: Path) -> Callable[[Path, Path], None]:
    """Return what checks the content of a file of this name.

    Raises:
        ModelError: if no such file may come in.
    """
    name, suffix = path.name, path.suffix
    if name.endswith(".index.json"):
        raise _refused(path, "it names other files to be read as weights, also outside the folder")
    if not name.startswith("."):
        if name in _SENTENCEPIECE or name.endswith((".onnx.data", ".onnx_data")):
            return _check_binary
        if found := _CHECKS.get(suffix):
            return found
    raise _refused(path, "models are safetensors, ONNX, JSON, text and tokenizer files, and nothing else is taken")


def _check_safetensors(copied: Path, path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(copied, framework="numpy"):  # reads the header and compares it with the file's size
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise _refused(path, f"it is no safetensors file ({error})") from None


def _check_binary(copied: Path, path: Path) -> None:
    with copied.open("rb") as file:
        if file.read(4).startswith(_CODE):
            raise _refused(path, "it begins as a pickle or an archive does, whatever its name says")


def _check_onnx(copied: Path, path: Path) -> None:
    _check_binary(copied, path)
    with copied.open("rb") as file:
        if file.read(1) != b"\x08":  # the version of the format, field 1 of ModelProto
            raise _refused(path, "it is no ONNX file")


def _check_text(copied: Path, path: Path) -> None:
    _text(copied, path)


def _check_json(copied: Path, path: Path) -> None:
    try:
        json.loads(_text(copied, path))
    except (ValueError, RecursionError):
        raise _refused(path, "it is no JSON") from None


def _text(copied: Path, path: Path) -> str:
    if copied.stat().st_size > MOST_TEXT_BYTES:
        raise _refused(path, f"as text it is longer than {MOST_TEXT_BYTES >> 20} MiB")
    try:
        text = copied.read_bytes().decode()
    except UnicodeDecodeError:
        raise _refused(path, "it is no text") from None
    if "\0" in text:
        raise _refused(path, "it is no text")
    return text


_CHECKS: dict[str, Callable[[Path, Path], None]] = {
    ".safetensors": _check_safetensors,
    ".onnx": _check_onnx,
    ".json": _check_json,
    ".jsonl": _check_text,
    ".txt": _check_text,
    ".md": _check_text,
    ".jinja": _check_text,
}


def _refused(path: Path, reason: str) -> ModelError:
    return ModelError(
        f"{excerpt(str(path), 200)} is not taken: {reason}. Remove it, or give the folder as Silotune made it."
    )
