"""Which commands there are and where each stands; its module is imported when the command is asked for.

A command's function stands in the room that does the work, in a file that is light: what needs PyTorch is imported inside
the function. Images of sites and coordinators hold some of the rooms only, and commands of the others are not listed there.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Annotated

import click
import typer
from typer.core import TyperGroup
from typer.main import get_command, get_group

from shared.libraries import call_nobody, hide_progress
from shared.named_models import resolve_by

# In the order of `silotune --help`.
PLACES = {
    "demo": "simulations.commands:demo",
    "simulate": "simulations.commands:simulate",
    "federation": "simulations.commands:federation",
    "sweep": "simulations.commands:sweep",
    "console": "simulations.console.commands:console",
    "small-gpt2": "simulations.commands:small_gpt2",
    "predict": "shared.tools.inference_commands:predict",
    "ensemble": "cli.reports:ensemble",
    "generate": "shared.tools.inference_commands:generate",
    "export": "server.registry.export_command:export",
    "compress": "server.compression.commands:compress",
    "audit": "simulations.audit.commands:audit",
    "settings": "simulations.commands:settings",
    "version": "cli.commands:version",
    "plan": "shared.tools.plan.commands:plan",
    "monitor": "shared.tools.monitor.commands:monitor",
    "explain": "shared.tools.explain.commands:explain",
    "deidentify": "shared.tools.deidentify_commands:deidentify",
    "new": "simulations.new_scenario.commands:new",
    "site": "client.commands:site_app",
    "coordinator": "server.commands:coordinator_app",
    "data": "simulations.data.commands:data_app",
    "pki": "shared.tools.pki_commands:pki_app",
    "audit-log": "shared.tools.audit_log_commands:audit_log_app",
    "report": "cli.reports:report_app",
    "models": "server.registry.commands:models_app",
    "serve": "server.serving.commands:serve",
    "tokens": "server.serving.access.token_commands:tokens_app",
}


class Commands(TyperGroup):
    """Finds a command in `PLACES`."""

    _only_told = False

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what all commands do; their modules, which load half of what Silotune needs, are read for it and not run."""
        self._only_told = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._only_told = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands whose part of Silotune is installed."""
        here = {part for part in ("cli", "client", "server", "shared", "simulations") if importlib.util.find_spec(part)}
        return [name for name, place in PLACES.items() if place.partition(".")[0] in here]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command; a name that nobody knows is compared with all of them."""
        if self._only_told:
            return click.Command(cmd_name, help=told_of(PLACES[cmd_name]))
        for name in [cmd_name] if cmd_name in PLACES else self.list_commands(ctx):
            if name not in self.commands:
                self.commands[name] = _load(name)
        return self.commands.get(cmd_name)


def told_of(place: str) -> str:
    """Return the help of the command at `place`: the docstring of a function, or what a group of commands is given as `help`."""
    module, _, attribute = place.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None  # noqa: S101, PT018 (a test opens every place)
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and attribute in {alias.name for alias in node.names}:
            return told_of(f"{node.module}:{attribute}")
        if isinstance(node, ast.FunctionDef) and node.name == attribute:
            return ast.get_docstring(node) or ""
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.targets[0]) == attribute
        ):
            return next(str(ast.literal_eval(word.value)) for word in node.value.keywords if word.arg == "help")
    raise LookupError(place)


def _load(name: str) -> click.Command:
    module, _, attribute = PLACES[name].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if isinstance(found, typer.Typer):
        found.suggest_commands = False  # click does
        return get_group(found)
    alone = typer.Typer(add_completion=False)
    alone.command(name)(found)
    return get_command(alone)


app = typer.Typer(
    name="silotune",
    cls=Commands,
    suggest_commands=False,
    help="Tune one language model together, privately: federated LoRA under differential privacy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def version() -> None:
    """Print the version."""
    from shared.version import silotune_version

    typer.echo(silotune_version())


def _version_asked(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def _root(
    verbose: Annotated[bool, typer.Option("--verbose", help="Show log messages.")] = False,
    version_only: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version_asked, help="Print the version and exit.")
    ] = False,
) -> None:
    call_nobody()
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    if not verbose:
        hide_progress()
        warnings.simplefilter("ignore")
    if importlib.util.find_spec("server"):
        resolve_by(_from_registry)


def _from_registry(reference: str, registry: Path | None, policy: Path | None) -> Path:
    """Return the folder of a model; which version it is stands on standard error.

    Of a name the registry is opened, which loads half of what Silotune needs.
    """
    from server.registry.references import verified_folder

    return verified_folder(reference, registry, policy, lambda line: typer.echo(line, err=True))
