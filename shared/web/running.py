"""A console from its command to its end: it is served until it is told to end, and says where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shared.web.application import make_application
from shared.web.asked import Routes
from shared.web.console import Console
from shared.web.serving import Place, address_of, listen, make_server, place_at, serve


def run(
    open_console: Callable[[Place, int], Console],
    routes: tuple[Routes, ...],
    *,
    host: str,
    port: int,
    certificate: Path | None,
    key: Path | None,
    last: str,
    again: str,
    say: Callable[[str], None],
) -> None:
    """Serve a console until Ctrl-C or SIGTERM.

    Args:
        open_console: of the place, and the port that is listened on.
        routes: of its own pages.
        last: a sentence for whoever started it.
        again: the command that serves again.
        say: prints a line for them.
    """
    place = place_at(host, port, certificate, key)
    listener = listen(place)
    with listener:
        bound = listener.getsockname()[1]
        console = open_console(place, bound)
        server = make_server(make_application(console, routes)[0], place)
        address = address_of(place, bound)

        def ready() -> None:
            say(f"console of {console.kind} {console.owner}: {address}")
            if (code := console.accounts.invite_first()) is not None:
                say(
                    f"there is no administrator yet. Within 15 minutes, open {address}welcome and type this code:\n   {code}"
                )
            say(f"stop it with Ctrl-C; {last}")

        serve(server, listener, ready=ready, again=again)
