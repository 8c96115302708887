"""How a model comes into a registry: examined, copied, signed, and there whole or not at all.

Guarantees (tests: tests/server/registry/test_adding.py)
    * What does not verify is not added, and nothing in the source is changed (test_what_does_not_verify_is_not_added).
    * Wherever a process is killed, a version is there whole or not at all, and the next `add` removes what was left
      (test_a_kill_leaves_the_old_state_or_the_new_one).
    * Versions that are added at the same time get numbers of their own (test_two_processes_add_at_the_same_time).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from server.registry.intake import check_sizes, copy_files, model_files, sync_tree
from server.registry.manifest import MANIFEST_FILE, Manifest, Parent
from server.registry.registry import SIGNED_JOB_FILE, Registry, Version
from server.registry.verification import Examined, examine, read_signed_job
from shared.errors import ConfigError, ModelError, RunError, SilotuneError, TrustError
from shared.files.atomic import sync_folder, write_text
from shared.runtime.export.folder import ModelFolder
from shared.trust.signed_folder import file_hashes
from shared.trust.signed_job import SignedJob
from shared.trust.signing import SigningKey

ROUNDS_FILE = "metrics.jsonl"
"""Which updates were aggregated; without it no record of a site would be missed. Reasons of sites stand in it, so it is no part
of a model folder that is handed on."""
_DRAFT = ".draft-"
_EVALUATION_FILE = "evaluation.json"
_MAY_DIFFER = (_EVALUATION_FILE,)  # a smaller model is measured anew
_MOST_NOTE = 1000


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model folder and what belongs to its run.

    Attributes:
        rounds: the folder that has the run's metrics.jsonl.
        signed: the run's job as it was signed, if the folder itself does not lead to it.
        parent: what it was made from; None of a run.
    """

    folder: ModelFolder
    rounds: Path
    signed: SignedJob | None = None
    parent: Parent | None = None


def add(
    registry: Registry,
    path: Path,
    name: str,
    *,
    signer: tuple[str, SigningKey] | None = None,
    note: str = "",
    parent: Version | Path | None = None,
    now: datetime | None = None,
) -> Version:
    """Add the model in a run folder or model folder as a new version of `name`; return it.

    Args:
        signer: name and key of who signs; None: the registry's own key.
        note: for people, up to 1,000 characters.
        parent: what an exported or compressed model was made from; None looks for it in the registry.

    Raises:
        ConfigError: if name or note cannot be, or it is not known what the model was made from.
        ModelError, RunError: if the folder is no model, or holds what no model does.
        TrustError: if it does not fit together, or the signer is not trusted.
    """
    registry.check_name(name)
    check_sizes(path)
    if len(note) > _MOST_NOTE or not note.isprintable():
        raise ConfigError(f"the note has {len(note):,} characters; expected up to {_MOST_NOTE:,} printable ones.")
    folder = ModelFolder.read(path)
    key = registry.found(signer)
    source = _source(registry, folder, parent)

    with _draft(registry, name) as draft:
        # 1. The copy; all that follows is about it.
        size = copy_files(path, model_files(folder), draft / "model")
        if not (draft / "model" / ROUNDS_FILE).exists():
            copy_files(source.rounds, [ROUNDS_FILE], draft / "model")

        # 2. What it says. A run that lies at its coordinator is looked at there first, beside the audit log and the signed job.
        signed = source.signed
        if (path.resolve().parent / SIGNED_JOB_FILE).exists():
            signed = examine(path).signed
        try:
            examined = examine(draft / "model", signed)
        except SilotuneError as error:
            raise type(error)(str(error).replace(str(draft / "model"), str(path))) from None
        if signed is not None:
            write_text(draft / SIGNED_JOB_FILE, signed.to_json())
        sync_tree(draft)

        # 3. The number, the signature, and the one moment in which the version appears.
        moment = (now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds")
        return _publish(registry, draft, name, key, examined, added=moment, note=note, parent=source.parent, size=size)


def _publish(
    registry: Registry,
    draft: Path,
    name: str,
    key: SigningKey,
    examined: Examined,
    *,
    added: str,
    note: str,
    parent: Parent | None,
    size: int,
) -> Version:
    files = file_hashes(draft)
    with registry.locked(name) as folder:
        number = max(registry.numbers(name), default=0) + 1
        manifest = Manifest.sign(
            key,
            name=name,
            version=number,
            added=added,
            note=note,
            summary=examined.summary,
            parent=parent,
            num_bytes=size,
            files=files,
        )
        try:
            write_text(draft / MANIFEST_FILE, manifest.text())
            draft.rename(folder / "versions" / str(number))
            sync_folder(folder / "versions")
        except OSError as error:
            raise RunError(
                f"the version could not be put into {folder}: {error.strerror}; nothing was added."
            ) from None
    return registry.version(name, number)


@contextmanager
def _draft(registry: Registry, name: str) -> Iterator[Path]:
    """Give a new folder beside the versions, which is locked as long as we live; it is removed unless it was renamed."""
    with registry.locked(name) as folder:
        _remove_abandoned(folder / "versions")
        draft = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=folder / "versions"))
        handle = os.open(draft, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield draft
    finally:
        os.close(handle)
        if draft.exists():
            shutil.rmtree(draft, ignore_errors=True)


def _remove_abandoned(versions: Path) -> None:
    """Remove drafts of processes that were killed: nobody holds their locks."""
    for draft in versions.glob(f"{_DRAFT}*"):
        try:
            handle = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:  # it was removed meanwhile
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(draft, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(handle)


def _source(registry: Registry, folder: ModelFolder, parent: Version | Path | None) -> Source:
    """Find what a model was made from: a run is its own beginning."""
    if not folder.record.files:
        if parent is not None:
            raise ConfigError(f"{folder.path} is a run, which was made from no other model; leave out --parent.")
        return Source(folder=folder, rounds=folder.path)
    found = parent if parent is not None else _parent_of(registry, folder)
    if isinstance(found, Path):
        run = ModelFolder.read(found)
        _check_same_run(folder, run)
        signed = examine(found).signed
        made_from = Parent(
            reference=None,
            manifest_sha256=None,
            model_sha256=folder.record.made_from_sha256,
            same_evaluation=_same_evaluation(folder, run),
        )
        return Source(folder=folder, rounds=found, signed=signed, parent=made_from)
    origin = ModelFolder.read(found.model)
    _check_same_run(folder, origin)
    made_from = Parent(
        reference=found.reference,
        manifest_sha256=found.manifest_sha256,
        model_sha256=folder.record.made_from_sha256,
        same_evaluation=_same_evaluation(folder, origin),
    )
    return Source(folder=folder, rounds=found.model, signed=read_signed_job(found), parent=made_from)


def _parent_of(registry: Registry, folder: ModelFolder) -> Version:
    """Return the version that `folder` was made from, by the hash that its model.json names."""
    made_from, job = folder.record.made_from_sha256, folder.record.job_sha256
    for name in registry.names():
        for number in reversed(registry.numbers(name)):
            try:
                version = registry.version(name, number)
            except TrustError:
                continue  # it is no parent of anything
            if made_from in version.manifest.files.values() and version.manifest.summary.job_sha256 == job:
                return version
    raise ConfigError(
        f"{folder.path} was made from a model (SHA-256 {made_from[:12]}…) that is not in this registry, and has no record of its "
        "rounds itself. Add the run first, or name it with --parent RUN."
    )


def _same_evaluation(folder: ModelFolder, origin: ModelFolder) -> bool:
    return folder.lineage.get(_EVALUATION_FILE) == origin.lineage.get(_EVALUATION_FILE)


def _check_same_run(folder: ModelFolder, origin: ModelFolder) -> None:
    """A model that was made from another has the records of the same run, byte for byte: its statement carries over unchanged.

    Raises:
        ModelError: naming the first record that differs.
    """
    mine, theirs = folder.lineage, origin.lineage
    for name in sorted({*mine, *theirs}):
        if name not in _MAY_DIFFER and not name.startswith("audit/") and mine.get(name) != theirs.get(name):
            raise ModelError(
                f"{folder.path / name} is not what {origin.path} has, from which the model was made. Its records carry over "
                "unchanged, or its statement is none; make the model anew."
            )
