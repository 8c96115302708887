"""The `silotune` command: the composition root, which may import everything and which nothing imports.

This file imports next to nothing at its top: Ctrl-C while Python imports the rest ends as later, with a sentence.
"""

from __future__ import annotations

import errno
import os
import sys


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake ends with a message and a status, never with a traceback."""
    open_streams()
    try:
        from shared.stopping import terminable

        with terminable():
            _require_folder()
            _run(arguments)
    except (Exception, KeyboardInterrupt) as error:
        if (explained := _explained(error)) is None:
            raise
        from rich.console import Console

        from shared.errors import printable

        text, status = explained
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(printable(text, lines=True))
        # CPython notes that Ctrl-C left code that `exec` was given as text, by which dataclasses are made, and under `python -m`
        # ends by that signal whatever status is asked for. The next such code clears the note.
        exec("")  # noqa: S102
        raise SystemExit(status) from None


def open_streams() -> None:
    """Let standard streams that whoever started us closed lead nowhere.

    The next file that is opened, a ledger for example, would get the number of a closed one, and what libraries print there
    would be written into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # the lowest free number first
        if getattr(sys, name) is None:
            nowhere = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 (stays open as long as the process)
            os.set_inheritable(nowhere.fileno(), True)
            setattr(sys, name, nowhere)


def _require_folder() -> None:
    """Raise `ConfigError` if the working folder was removed: neither we nor PyTorch's libraries can start there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        from shared.errors import ConfigError

        raise ConfigError(
            "the folder that this command was started in is not there any more; change into another."
        ) from None


def _run(arguments: list[str] | None) -> None:
    import shared.link  # noqa: F401  (limits TLS to 1.3 before Flower imports grpc)
    from cli.commands import app

    try:
        app(args=arguments, standalone_mode=True)
    except SystemExit as end:
        # typer ends with a status of its own where it meets Ctrl-C; the interruption itself is what `main` explains.
        cause = end.__context__.__cause__ if end.__context__ is not None else None
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise


def _explained(error: BaseException) -> tuple[str, int] | None:
    """Return what to say of `error` and the status to end with; None if it is a defect."""
    from shared.errors import SilotuneError
    from shared.stopping import Stopped, signal_of

    if isinstance(error, KeyboardInterrupt):
        error = Stopped("start the command again to do it from the beginning.", number=signal_of(error))
    if isinstance(error, SilotuneError):
        return str(error) if isinstance(error, Stopped) else f"error: {error}", error.exit_code
    if isinstance(error, OSError | RuntimeError):
        if (refused := _refused_path(error)) is None:
            return None
        import logging

        logging.getLogger(__name__).info("where it happened:", exc_info=error)
        return f"error: {refused}. Check the path, this account's rights and the space on its disk.", 1
    part = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if part not in ("client", "server", "simulations"):
        return None
    return (
        f"error: this command needs the part {part!r} of Silotune, which this installation does not have: images of sites and "
        "coordinators hold only what they need. Run it from a full installation."
    ), 1


def _refused_path(error: OSError | RuntimeError) -> str | None:
    """Return which path the system refuses and why; None if the error is of another kind, thus a defect."""
    from shared.errors import excerpt

    if isinstance(error, OSError):
        if error.filename is not None:
            return f"{excerpt(str(error.filename))}: {error.strerror}"
        # Of a write, which names no file: to standard output, or by a library.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
        return f"something could not be written: {error.strerror}" if full else None
    # What `Path.resolve` raises for links that lead in a circle, up to Python 3.12.
    return str(error) if str(error).startswith("Symlink loop") else None
