"""`silotune audit-log`: check a log and look into it; both only read."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from rich.table import Table
from rich.text import Text

from shared.errors import ConfigError, TrustError
from shared.files.json_files import canonical_json
from shared.options import JsonLineOption, JsonOption
from shared.terminal import console, print_json
from shared.trust import audit_log
from shared.trust.audit_chain import Entry
from shared.trust.certificates import load_certificate, spki
from shared.trust.receipts import proven_releases, read_receipts
from shared.trust.signing import find_verify_key

audit_log_app = typer.Typer(
    name="audit-log", help="Check the audit log of a site or of the coordinator, or show it.", no_args_is_help=True
)

Folder = Annotated[Path, typer.Argument(help="Folder of the log: the one that holds head.json.")]


@audit_log_app.command()
def verify(
    folder: Folder,
    key: Annotated[
        str | None,
        typer.Option("--key", metavar="KEY", help="Public key of the log's owner: ed25519:... or a .pub file."),
    ] = None,
    as_json: JsonLineOption = False,
) -> None:
    """Check every entry and the head; a log that was changed in any way ends with status 1."""
    found = audit_log.verify(folder, verify_head=None if key is None else find_verify_key(key))
    if as_json:
        print_json(asdict(found))
        return
    span = f" from {found.first_time} to {found.last_time}" if found.entries else ""
    signed = ", head signed with the given key" if found.signature_checked else ""
    typer.echo(f"{found.entries} entries{span}, unbroken, last sha256 {found.sha256}{signed}")
    for note in found.notes:
        typer.echo(f"note: {note}")


@audit_log_app.command()
def show(
    folder: Folder,
    event: Annotated[str | None, typer.Option("--event", metavar="NAME", help="Only this event.")] = None,
    last: Annotated[int | None, typer.Option("--last", min=1, help="Only the last N entries.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per entry, as it stands.")] = False,
) -> None:
    """Show the entries, oldest first; where the log is broken, those before the break."""
    if event is not None and event not in list(audit_log.Event):
        raise ConfigError(f"there is no event {event!r}; choose one of: {', '.join(audit_log.Event)}.")
    entries = (entry for entry in audit_log.read(folder) if event in (None, entry.event))
    if as_json and last is None:
        for entry in entries:
            typer.echo(entry.line())
        return
    shown: deque[Entry] = deque(maxlen=last)
    try:
        shown.extend(entries)
    finally:  # a broken log shows what comes before the break, then the error
        if as_json:
            for entry in shown:
                typer.echo(entry.line())
        else:
            console(160).print(_table(shown))


@audit_log_app.command()
def compare(
    site_log: Annotated[Path, typer.Argument(help="Folder of the site's log.")],
    coordinator_log: Annotated[Path, typer.Argument(help="Folder of the coordinator's log.")],
    site: Annotated[str, typer.Option(help="Name of the site in the coordinator's log.")],
    receipts: Annotated[
        list[Path] | None,
        typer.Option(help="A run's receipts.jsonl, which decides; with --certificate. Repeat it for each run."),
    ] = None,
    certificate: Annotated[
        list[Path] | None, typer.Option(help="The site's certificate; repeat it if the key was exchanged.")
    ] = None,
    site_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="The site's key of the log: its log.pub, or ed25519:... Its head must be signed with it.",
        ),
    ] = None,
    coordinator_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="The coordinator's: its round.pub, or ed25519:..."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Hold a site's log against the coordinator's and name every difference; status 1 if they contradict each other."""
    from shared.tools.compare_logs import compare as compared

    if bool(receipts) != bool(certificate):
        raise ConfigError("--receipts and --certificate go together: a receipt holds by the key of a certificate.")
    proven, jobs = None, set()
    if receipts and certificate:
        given = [receipt for path in receipts for receipt in read_receipts(path)]
        proven = proven_releases(given, [_key_of(path) for path in certificate], site=site)
        jobs = {receipt.what.job_sha256 for receipt in given}
    found = compared(
        site_log,
        coordinator_log,
        site=site,
        proven=proven,
        jobs=jobs,
        site_key=None if site_key is None else find_verify_key(site_key),
        coordinator_key=None if coordinator_key is None else find_verify_key(coordinator_key),
    )
    for path, key, option in (
        (site_log, site_key, "--site-key"),
        (coordinator_log, coordinator_key, "--coordinator-key"),
    ):
        if key is None:
            text = f"note: who signed the head of {path} was not checked; give its owner's public key with {option}"
            typer.echo(text, err=True)
    if as_json:
        print_json([asdict(difference) for difference in found])
    for difference in found if not as_json else []:
        kind = "undecided" if difference.undecided else "lost on the way"
        kind = "contradiction" if difference.contradicts else kind
        where = (
            f"job {difference.job[:12]}, round {difference.round}" if difference.round else f"job {difference.job[:12]}"
        )
        typer.echo(f"{kind}: {where}: {_printable(difference.text)}")
    if not found and not as_json:
        typer.echo(f"both logs are unbroken and say the same of {_printable(site)}")
    if any(difference.contradicts for difference in found):
        raise typer.Exit(1)


def _key_of(path: Path) -> bytes:
    key = load_certificate(path).public_key()
    if not isinstance(key, EllipticCurvePublicKey):
        raise TrustError(f"{path} is for a key of another kind than a site's (ECDSA on P-256).")
    return spki(key)


def _table(entries: deque[Entry]) -> Table:
    table = Table("#", "time", "event")
    table.add_column("details", overflow="fold")  # hashes are one long word, and none of it may be lost
    for entry in entries:
        details = canonical_json(entry.details)
        table.add_row(str(entry.sequence), entry.time, Text(_printable(entry.event)), Text(_printable(details)))
    return table


def _printable(text: str) -> str:
    # what others sent may stand in the details; it must not steer the terminal
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
