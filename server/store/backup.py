"""A coordinator's backup, taken while it runs.

What is copied, in this order: settings, keys, who may connect, every job as it is at one moment, the audit log as it is at
one moment. So the log of a backup knows of everything that its jobs asked of sites.

Formal guarantees (tests: tests/server/store/test_backup.py)
    * A job is copied between two writes to it, or there is no backup (test_a_job_that_is_being_written_is_copied_at_one_moment).
    * Every backup opens: files as they were read, an unbroken log (test_a_backup_comes_back_as_it_was).
    * Of a newer revocation list that is given and an older one in the backup, the newer is in force before the folder has its
      name; one that the CA did not sign leaves no folder (test_of_two_revocation_lists_the_newer_is_kept).
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from server.store.home import CoordinatorHome
from shared.errors import RunError, TrustError
from shared.files import backup
from shared.files.atomic import write_bytes
from shared.files.backup import LIST_FILE, Contents, Writer
from shared.trust import audit_chain, audit_log, key_changes
from shared.trust.audit_log import Event
from shared.trust.certificates import load_certificate
from shared.trust.revocation import check_newer, crl_number, load_crl
from shared.trust.signing import load_verify_key

_PLAIN = ("coordinator.toml", "round.pub", "server.csr")
_ATTEMPTS = 20
_PAUSE_SECONDS = 0.1


def back_up(home: CoordinatorHome, destination: Path) -> Contents:
    """Write a backup of a coordinator's folder to the new file `destination`; it may run, and no passphrase is needed.

    Raises:
        RunError, TrustError: something cannot be read or written, or is damaged; there is no backup then.
    """
    name = home.load_config().name
    with backup.writing(destination, kind="coordinator", name=name, check=verify_backup) as writer:
        for file in _PLAIN:
            writer.add_file(file, home.path / file)
        key_changes.back_up(writer, home.round_key.parent)
        writer.add_folder(home.trust, "trust")
        for job in sorted(home.jobs.glob("[0-9]*")):
            _add_job(writer, job)
        writer.facts["log entries"] = audit_chain.back_up(writer, home.audit)
    return backup.verify(destination, "coordinator")


def verify_backup(path: Path) -> Contents:
    """Return what a backup holds, after checking its files and its audit log.

    Raises:
        RunError, TrustError: what is wrong.
    """
    wanted = ("audit/", "round.pub")
    with backup.unpacked(path, "coordinator", wanted=lambda file: file.startswith(wanted)) as (contents, folder):
        if (folder / "audit").exists():
            audit_log.verify(folder / "audit", verify_head=load_verify_key(folder / "round.pub"))
        return contents


def put_back(
    path: Path, home: CoordinatorHome, *, passphrase: str | None, newest_list: Path | None = None
) -> tuple[Contents, str]:
    """Put a backup back into a new folder, and note that in its log.

    Args:
        newest_list: the CA's newest list of revoked certificates; of it and the backup's own the newer one is kept, for
            with an older one who was revoked since could connect.

    Returns:
        What the backup holds, and which revocation list is in force.

    Raises:
        RunError, TrustError: the backup or the list cannot be used, or the folder is not new.
    """
    contents = verify_backup(path)
    with backup.new_folder(home.path) as folder:
        backup.unpack(path, "coordinator", folder)
        (folder / LIST_FILE).unlink(missing_ok=True)
        for name in ("jobs", "logs", "trust/sites"):
            (folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        place = CoordinatorHome(folder)
        kept = _own_list(place) if newest_list is None else _newer_list(place, newest_list)
        place.open_log(place.load_round_key(passphrase)).append(Event.BACKUP_RESTORED, taken_at=contents.taken_at)
    return contents, kept


def _own_list(place: CoordinatorHome) -> str:
    """Return which revocation list the backup brought."""
    try:
        own = load_crl(place.trust / "crl.pem", load_certificate(place.ca_certificate))
    except TrustError:  # told when the coordinator starts
        return "it holds no revocation list that can be used"
    return f"its revocation list is that of the backup, {_told(own)}; who was revoked since could connect"


def _newer_list(place: CoordinatorHome, newest: Path) -> str:
    """Put the newer of two revocation lists in force, and return which."""
    authority, own = load_certificate(place.ca_certificate), None
    given = load_crl(newest, authority)
    with contextlib.suppress(TrustError):  # none, or damaged
        own = load_crl(place.trust / "crl.pem", authority)
    if own is not None and crl_number(own) > crl_number(given):
        return f"its revocation list is that of the backup, {_told(own)}; the one given is older, {_told(given)}"
    check_newer(place.trust, given, authority)
    write_bytes(place.trust / "crl.pem", given.public_bytes(Encoding.PEM))
    if own is not None and crl_number(own) == crl_number(given):
        return f"its revocation list is the one given, {_told(given)}, which the backup holds as well"
    before = "the backup holds none that can be used" if own is None else f"that of the backup is {_told(own)}"
    return f"its revocation list is the one given, {_told(given)}; {before}"


def _told(crl: x509.CertificateRevocationList) -> str:
    return f"number {crl_number(crl)} of {crl.last_update_utc:%Y-%m-%d}"


def _add_job(writer: Writer, job: Path) -> None:
    for _ in range(_ATTEMPTS):
        before = _state(job)
        contents = {name: (job / name).read_bytes() for name in before if (job / name).exists()}
        if before == _state(job) and contents.keys() == before.keys():
            for name, content in contents.items():
                writer.add(f"jobs/{job.name}/{name}", content)
            return
        time.sleep(_PAUSE_SECONDS)
    raise RunError(
        f"{job} is written to faster than it can be copied, so there is no backup; try again, or stop the coordinator for it."
    )


def _state(job: Path) -> dict[str, tuple[int, int, int]]:
    """Return what tells whether a file of a job was written to since, by name."""
    found = {}
    for place, folders, files in os.walk(job):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(place, name) for name in sorted(files) if not name.startswith(".")):
            if path.is_symlink():
                raise RunError(f"{path} is a link, which a backup does not follow; move what it names to its place.")
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found[path.relative_to(job).as_posix()] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found
