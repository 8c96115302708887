"""`silotune coordinator console`: loads nothing of the console before it is asked for, and says what to install."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shared.options import CertificateOption, DatabaseOption, HostOption, KeyOption, PortOption


def start_console(
    home: Annotated[Path, typer.Argument(help="The coordinator's folder.")],
    host: HostOption = "127.0.0.1",
    port: PortOption = 8471,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    database: DatabaseOption = None,
) -> None:
    """Serve the coordinator's console, pages for a browser, until it is stopped; the coordinator runs with or without it."""
    from shared.web import require_web

    require_web()
    from server.console.start import run_console
    from server.store.home import CoordinatorHome
    from shared.trust.keystore import passphrase_from_environment

    run_console(
        CoordinatorHome(home),
        host=host,
        port=port,
        certificate=certificate,
        key=key,
        database=database,
        passphrase=passphrase_from_environment(),
        say=typer.echo,
    )
