"""`silotune tokens`: who may ask a service, and what each used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import click
import typer

from shared import terminal
from shared.options import JsonOption

tokens_app = typer.Typer(
    name="tokens",
    help="API tokens of `silotune serve`: scopes, quotas, and what each used by day.",
    no_args_is_help=True,
)

FileOption = Annotated[
    Path, typer.Option("--tokens", envvar="SILOTUNE_TOKENS", help="The token file, which services are given too.")
]
NameArgument = Annotated[str, typer.Argument(help="Name of the token.")]


@tokens_app.command()
def init(tokens: FileOption) -> None:
    """Make the token file, without a token, unless it is there."""
    from server.serving.access.tokens import TokenFile

    TokenFile(tokens, create=True).close()


@tokens_app.command()
def add(
    name: NameArgument,
    tokens: FileOption,
    scopes: Annotated[
        list[str] | None,
        typer.Option(
            "--scope",
            click_type=click.Choice(["predict", "completions", "explain", "metrics"]),
            help="What it may ask for, repeatable; by default predict and completions.",
        ),
    ] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", help="A model that it may ask, repeatable; by default all.")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="At most.")] = None,
    requests_per_day: Annotated[int | None, typer.Option(min=1, help="At most, by UTC days.")] = None,
    tokens_per_day: Annotated[
        int | None, typer.Option(min=1, help="Of the model's own tokens, read and written, at most.")
    ] = None,
    days: Annotated[
        int | None, typer.Option(min=1, max=36_500, help="For so many days; by default without end.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a token and print it, this one time; the file keeps only its hash."""
    from server.serving.access.tokens import SCOPES, TokenFile

    asked = scopes or ("predict", "completions")
    secret = TokenFile(tokens, create=True).add(
        name,
        scopes=[scope for scope in SCOPES if scope in asked],
        models=models,
        requests_per_minute=requests_per_minute,
        requests_per_day=requests_per_day,
        tokens_per_day=tokens_per_day,
        days=days,
    )
    if as_json:
        terminal.print_json({"name": name, "token": secret})
        return
    typer.echo(secret)
    typer.echo("It is not shown again; whoever has it may ask. It is sent as: Authorization: Bearer TOKEN", err=True)


@tokens_app.command("list")
def list_tokens(tokens: FileOption, as_json: JsonOption = False) -> None:
    """List tokens with scopes, models and quotas; revoked ones too."""
    from dataclasses import asdict

    from rich.table import Table

    from server.serving.access.tokens import TokenFile

    found = TokenFile(tokens).tokens()
    if as_json:
        terminal.print_json([asdict(token) for token in found])
        return
    table = Table("name", "scopes", "models", "a minute", "a day", "tokens a day", "made", "until", box=None)
    for token in found:
        bounds = (token.requests_per_minute, token.requests_per_day, token.tokens_per_day)
        until = f"revoked {token.revoked[:10]}" if token.revoked else (token.expires or "")[:10]
        table.add_row(
            token.name,
            " ".join(token.scopes),
            "all" if token.models is None else " ".join(token.models),
            *("" if bound is None else f"{bound:,}" for bound in bounds),
            token.made[:10],
            until,
        )
    terminal.console(width=140).print(table)


@tokens_app.command()
def revoke(name: NameArgument, tokens: FileOption) -> None:
    """Refuse a token from the next request on, for good; what it used stays for billing."""
    from server.serving.access.tokens import TokenFile

    TokenFile(tokens).revoke(name)
    typer.echo(f"{name} is revoked: services refuse it from now on")


@tokens_app.command()
def usage(
    tokens: FileOption,
    name: Annotated[str | None, typer.Argument(help="Only of this token.")] = None,
    since: Annotated[str, typer.Option(metavar="DAY", help="From this day on, such as 2026-03-01.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Show what each token used, by day (UTC) and model."""
    from rich.table import Table

    from server.serving.access.tokens import TokenFile

    rows = TokenFile(tokens).usage(name, since)
    if as_json:
        terminal.print_json(rows)
        return
    table = Table("day", "token", "model", "requests", "tokens read", "tokens written", box=None)
    for row in rows:
        counts = (row["requests"], row["read_tokens"], row["written_tokens"])
        table.add_row(row["day"], row["token"], row["model"], *(f"{count:,}" for count in counts))
    terminal.console(width=140).print(table)
