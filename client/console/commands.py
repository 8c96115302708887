"""`silotune site console`: loads nothing of the console before it is asked for, and says what to install where it is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def start_console(
    home: Annotated[Path, typer.Argument(help="The site's folder.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback only with --certificate.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any that is free.")] = 8470,
    certificate: Annotated[Path | None, typer.Option(help="Certificate for TLS, PEM, with its chain.")] = None,
    key: Annotated[Path | None, typer.Option(help="Its key, PEM, without a passphrase.")] = None,
    database: Annotated[
        str | None,
        typer.Option(
            envvar="SILOTUNE_CONSOLE_DATABASE",
            help="PostgreSQL for accounts: postgresql://...; by default a file in HOME.",
        ),
    ] = None,
) -> None:
    """Serve the site's console, pages for a browser, until it is stopped; the node runs with or without it."""
    from shared.web import require_web

    require_web()
    from client.console.start import run_console
    from client.site.home import SiteHome
    from shared.trust.keystore import passphrase_from_environment

    run_console(
        SiteHome(home),
        host=host,
        port=port,
        certificate=certificate,
        key=key,
        database=database,
        passphrase=passphrase_from_environment(),
        say=typer.echo,
    )
