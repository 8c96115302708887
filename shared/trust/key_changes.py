"""Several key files of one folder replaced together: all of them or none, whatever is killed on the way.

What the files shall hold is first written to one file, the decision, atomically. Then it is carried out; whoever
opens a key file of the folder meanwhile, in this process or a later one, carries it out before. That needs no passphrase.

Formal guarantees (tests: tests/shared/trust/test_key_changes.py)
    * A kill at any call to the system leaves a folder whose files all open with the old passphrase or all with the new one
      (test_a_kill_at_any_call_leaves_one_of_both_passphrases).
    * A decision that somebody else could have written is refused, and names no file outside its folder
      (test_a_decision_of_somebody_else_is_refused, test_a_decision_about_other_places_is_refused).
    * Of several processes that replace keys of a folder, each finds what the one before it left, and none undoes another's
      (test_of_several_changes_at_once_none_is_lost, test_whoever_replaces_a_key_waits_for_a_change).
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import glob
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from shared.errors import RunError, TrustError
from shared.files import atomic
from shared.files.backup import Writer

DECISION_FILE = "passphrase-change.json"

_FORMAT = "silotune-key-change"
_MAX_BYTES = 1 << 20
_ATTEMPTS = 5


def replace_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Replace the files of these names in `folder`, all or none.

    The caller holds `alone`.

    Raises:
        TrustError, RunError: if something cannot be written; before the decision stands nothing was changed.
    """
    finish(folder)
    for name in contents:  # once it is decided, a link in its place would stop it half-way
        atomic.require_file_or_nothing(folder / name)
    for name in (DECISION_FILE, *contents):  # a process that died may have left a key in it that no passphrase protects
        for leftover in folder.glob(f".{glob.escape(name)}.????????"):
            leftover.unlink()
    texts = {name: base64.b64encode(content).decode() for name, content in contents.items()}
    atomic.write_json(folder / DECISION_FILE, {"format": _FORMAT, "files": texts})
    finish(folder)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Replace keys of `folder` with nobody else at it: others who ask for this wait.

    Where a folder cannot be locked (some network shares), or is not there yet, nobody is kept away.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            held.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def finish(folder: Path) -> None:
    """Carry out what was decided for the key files of `folder`, if anything.

    Raises:
        TrustError: if it cannot be read or carried out, or anybody but the folder's owner could have written it.
    """
    path = folder / DECISION_FILE
    try:
        # For writing, since a network share locks no file that is only read.
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        _refuse(path, "is no plain file" if error.errno == errno.ELOOP else f"cannot be read ({error.strerror})")
    with os.fdopen(handle, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            _refuse(path, f"cannot be locked ({error.strerror})")
        found = os.fstat(handle)
        if found.st_nlink:  # else another process was quicker
            _check_owner(path, found)
            contents = _parsed(path, file.read(_MAX_BYTES + 1))
            try:
                for name, content in contents.items():
                    atomic.write_bytes(folder / name, content)
                path.unlink()
                atomic.sync_folder(folder)
            except (OSError, RunError) as error:
                raise TrustError(
                    f"a change of the passphrase of {folder} was decided and cannot be carried out ({error}). Mend that, then "
                    "try again: it goes on by itself, and the new passphrase counts."
                ) from None


def back_up(writer: Writer, folder: Path) -> None:
    """Add the keys of a folder to a backup, all under one passphrase.

    Raises:
        RunError: if they cannot be read, or change all the time.
    """
    for _ in range(_ATTEMPTS):
        finish(folder)
        before = _contents(folder)
        if not (folder / DECISION_FILE).exists() and before == _contents(folder):
            for name, content in before.items():
                writer.add(f"{folder.name}/{name}", content)
            return
    raise RunError(f"the keys in {folder} are being changed; try again when that is done.")


def _contents(folder: Path) -> dict[str, bytes]:
    try:
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}
    except OSError as error:
        raise RunError(f"the keys in {folder} cannot be read: {error.strerror}; mend the permissions.") from None


def _check_owner(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        _refuse(path, "is no plain file")
    if found.st_mode & 0o077:
        _refuse(path, f"can be used by others (mode {stat.S_IMODE(found.st_mode):04o})")
    if found.st_uid not in (os.geteuid(), path.parent.stat().st_uid):
        _refuse(path, "belongs to another user")


def _parsed(path: Path, content: bytes) -> dict[str, bytes]:
    try:
        document = json.loads(content)
        if document["format"] != _FORMAT or document.keys() != {"format", "files"} or len(content) > _MAX_BYTES:
            raise ValueError
        files = {str(name): base64.b64decode(text, validate=True) for name, text in document["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        _refuse(path, "is damaged")
    if any(not name.isprintable() or not name or name != Path(name).name or name.startswith(".") for name in files):
        _refuse(path, "names a file elsewhere")
    return files


def _refuse(path: Path, what: str) -> NoReturn:
    raise TrustError(
        f"{path} {what}; expected what `passphrase` decided about the keys beside it. Find out who wrote it, and restore the "
        "folder from its backup."
    )
