"""`silotune report`: its group, and checking a signed report, which every installation can do.

Writing one is added by `cli`: it takes the coordinator's part of Silotune.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import click
import typer
from typer.core import TyperGroup

from shared.errors import TrustError, printable
from shared.options import JsonLineOption
from shared.terminal import print_json
from shared.trust.signed_file import Signer, fingerprint, sign_file, signature_file, verify_file
from shared.trust.signing import VerifyKey, find_verify_key

DEFAULT_COMMAND = "write"


class ReportGroup(TyperGroup):
    """Takes a run folder where the name of a command would stand: `report RUN` is `report write RUN`."""

    default_command = DEFAULT_COMMAND

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See `click.Group`."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [self.default_command, *args]
        return super().parse_args(ctx, args)


report_app = typer.Typer(
    name="report",
    cls=ReportGroup,
    help="Write the report of a run, sign a report, or check one that was signed.\n\n"
    "`silotune report RUN` writes RUN/report.html anew; with `--format html` or `--format pdf` it writes the compliance report, "
    "with `--out FILE` elsewhere than in RUN, with `--ledger EXPORT` beside a site's account, with `--sign WHO` signed. "
    "The options stand in `silotune report write --help`; the word “write” can be left out.",
    no_args_is_help=True,
)

FileArgument = Annotated[Path, typer.Argument(help="The report; its signature, FILE.sig.json, lies beside it.")]


@report_app.command()
def verify(
    file: FileArgument,
    key: Annotated[
        str | None, typer.Option(metavar="KEY", help="The key that must have signed: ed25519:... or a .pub file.")
    ] = None,
    as_json: JsonLineOption = False,
) -> None:
    """Check that no byte of a report was changed since it was signed, and by whom; exit status 1 if not."""
    expected = None if key is None else find_verify_key(key)
    found = verify_file(file, expected)
    if as_json:
        said = {"role": found.role, "name": found.name, "signed_at": found.signed_at, "signer": found.signer}
        print_json({"sha256": found.sha256, "num_bytes": found.bytes, **said, "key_checked": expected is not None})
        return
    typer.echo(
        f"unchanged since {printable(found.name)} ({printable(found.role)}) signed it on {printable(found.signed_at)}"
    )
    typer.echo(f"signed with {found.signer}, fingerprint {fingerprint(VerifyKey.parse(found.signer))}")
    if expected is None:
        typer.echo("whose key that is was not checked; give --key. Role, name and time are the signer's own words.")


def sign_report(file: Path, signer: Signer, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> Path:
    """Sign a report that was made elsewhere; return the path of the signature.

    Raises:
        TrustError: it carries another's signature, which would be lost, or it cannot be read.
    """
    if signature_file(file).exists() and verify_file(file).signer != signer.verify_key.text:
        raise TrustError(
            f"{file} carries another's signature already, which this one would replace; copy the file and sign the copy."
        )
    return sign_file(file, signer, now=now())
