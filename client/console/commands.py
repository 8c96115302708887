"""`silotune site console`: loads nothing of the console before it is asked for, and says what to install where it is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shared.options import CertificateOption, DatabaseOption, HostOption, KeyOption, PortOption


def start_console(
    home: Annotated[Path, typer.Argument(help="The site's folder.")],
    host: HostOption = "127.0.0.1",
    port: PortOption = 8470,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    database: DatabaseOption = None,
    sweep: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a sweep (`silotune sweep`): What if shows what each epsilon reached there; read only."
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
        sweep=sweep,
        passphrase=passphrase_from_environment(),
        say=typer.echo,
    )
