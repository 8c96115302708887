"""`silotune console`: loads nothing of the console before it is asked for, and says what to install where it is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def console(
    runs: Annotated[Path, typer.Argument(help="Folder with runs and sweeps, at any depth; nothing is written there.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback only with --certificate and --accounts.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any that is free.")] = 8472,
    certificate: Annotated[Path | None, typer.Option(help="Certificate for TLS, PEM, with its chain.")] = None,
    key: Annotated[Path | None, typer.Option(help="Its key, PEM, without a passphrase.")] = None,
    accounts: Annotated[
        Path | None,
        typer.Option(help="Folder of accounts, for several people; without it the terminal prints a link to open."),
    ] = None,
) -> None:
    """Show runs and sweeps in a browser: a table, curves side by side, the frontier, reports. Read only."""
    from shared.web import require_web

    require_web()
    from shared.trust.keystore import passphrase_from_environment
    from simulations.console.start import run_console

    run_console(
        runs,
        host=host,
        port=port,
        certificate=certificate,
        key=key,
        accounts=accounts,
        passphrase=passphrase_from_environment(),
        say=lambda text: typer.echo(text),
    )
