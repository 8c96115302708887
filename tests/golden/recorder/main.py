"""Runs the cases, each in a process of its own that is forked after the libraries were imported once."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from .cases import CASES, Case
from .gather import gather
from .stillness import RandomBytes, be_still
from .wire import note_messages

_LIBRARIES = (
    "flwr.clientapp",
    "flwr.serverapp",
    "flwr.serverapp.grid",
    "matplotlib.pyplot",
    "opacus",
    "peft",
    "scipy.stats",
    "sklearn.datasets",
    "transformers",
)


def main(arguments: list[str]) -> None:
    """Record cases: CHECKOUT, WORK (an empty folder), OUT, and the names of cases."""
    checkout, work, out = (Path(argument) for argument in arguments[:3])
    os.umask(0o022)
    _import_libraries()
    source = be_still("start")
    import cli

    _require_from(checkout, "cli", cli.__file__)
    failed = []
    for name in arguments[3:]:
        child = os.fork()
        if child == 0:
            _record_and_exit(CASES[name], checkout, work / name, out / name, source)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
            failed.append(name)
    if failed:
        sys.exit(f"could not be recorded: {', '.join(failed)}")


def _import_libraries() -> None:
    """Import what the product's commands need; of the product nothing."""
    for name in _LIBRARIES:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def _record_and_exit(case: Case, checkout: Path, folder: Path, out: Path, source: RandomBytes) -> None:
    """Record `case` in this process, a child, and end it."""
    status = 1
    try:
        _record(case, folder, out, source)
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] in ("cli", "client", "server", "shared", "silotune", "simulations"):
                _require_from(checkout, name, getattr(module, "__file__", None))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _record(case: Case, folder: Path, out: Path, source: RandomBytes) -> None:
    source.restart(case.name)
    folder.mkdir(parents=True)
    os.chdir(folder)
    inputs = case.write(folder) if case.write else ()
    messages: list[dict[str, Any]] = []
    note_messages(messages)
    (out / "commands").mkdir(parents=True)
    commands = _all_helps() if case.helps else case.commands
    for number, command in enumerate(commands, start=1):
        if callable(command):
            command(folder)
            continue
        text = _run(list(command), case.stdin)
        name = " ".join(command[:-1]) or "silotune" if case.helps else f"{number:02d} {command[0]}"
        (out / "commands" / f"{name}.txt").write_text(text, encoding="utf-8")
    lines = [json.dumps(message, ensure_ascii=False) + "\n" for message in messages]
    (out / "messages.jsonl").write_text("".join(lines), encoding="utf-8")
    os.chdir("/")
    gather(folder, out / "files", without=inputs)


def _run(command: list[str], stdin: str) -> str:
    """Run one command line in this process and return how it ended and what it printed."""
    import cli

    logging.getLogger().handlers.clear()  # they would write to an earlier command's stream
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
    status: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(command)
        except SystemExit as end:
            status = end.code or 0
        except Exception as defect:
            status = f"{type(defect).__name__}: {defect}"
    printed = []
    for stream in (out, err):
        stream.flush()
        printed.append(stream.buffer.getvalue().decode("utf-8"))  # type: ignore[attr-defined]
    return f"$ silotune {' '.join(command)}\nstatus {status}\n--- out\n{printed[0]}--- err\n{printed[1]}"


def _all_helps() -> list[list[str]]:
    """Return the command lines that print the help of every command there is."""
    found: list[click.Command] = []
    made = click.Command.make_context

    def noted(self: click.Command, *args: Any, **options: Any) -> click.Context:
        found.append(self)
        return made(self, *args, **options)

    click.Command.make_context = noted  # type: ignore[method-assign]
    _run(["--help"], "")
    click.Command.make_context = made  # type: ignore[method-assign]
    return [[*path, "--help"] for path in _paths(found[0], [])]


def _paths(command: click.Command, path: list[str]) -> Iterator[list[str]]:
    yield path
    if isinstance(command, click.Group):  # whose commands may be imported only when they are asked for
        context = click.Context(command)
        for name in sorted(command.list_commands(context)):
            if (inner := command.get_command(context, name)) is not None:
                yield from _paths(inner, [*path, name])


def _require_from(checkout: Path, name: str, file: str | None) -> None:
    if file is not None and not Path(file).resolve().is_relative_to(checkout.resolve()):
        raise RuntimeError(f"{name} was imported from {file}, not from {checkout}")
