"""A console from its command to its end: it is served until it is told to end, and says where."""

from __future__ import annotations

from collections.abc import Callable

from shared.http.serving import Place, address_of, listen, make_server, serve
from shared.web.accounting import bound_memory
from shared.web.application import make_application
from shared.web.asked import Routes
from shared.web.console import Console


def run(
    open_console: Callable[[Place, int], Console],
    routes: tuple[Routes, ...],
    place: Place,
    *,
    last: str,
    again: str,
    say: Callable[[str], None],
    greet: Callable[[Console, str], None] | None = None,
) -> None:
    """Serve a console until Ctrl-C or SIGTERM.

    Args:
        open_console: of the place, and the port that is listened on.
        routes: of its own pages.
        last: behind the sentence that says how to stop it.
        again: the command that serves again.
        say: prints a line for whoever started it.
        greet: says where the console is, given it and its address; None: `invite`, with its kind and owner.
    """
    bound_memory()
    listener = listen(place)
    with listener:
        bound = listener.getsockname()[1]
        console = open_console(place, bound)
        server = make_server(make_application(console, routes)[0], place)
        address = address_of(place, bound)

        def ready() -> None:
            if greet is None:
                invite(console, f"{console.kind} {console.owner}", address, say)
            else:
                greet(console, address)
            say(f"stop it with Ctrl-C{last}")

        serve(server, listener, ready=ready, again=again)


def invite(console: Console, of: str, address: str, say: Callable[[str], None]) -> None:
    """Say where a console is, and by which code its first administrator comes in, if there is none."""
    say(f"console of {of}: {address}")
    if (code := console.accounts.invite_first()) is not None:
        say(f"there is no administrator yet. Within 15 minutes, open {address}welcome and type this code:\n   {code}")
