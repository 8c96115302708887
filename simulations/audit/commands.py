"""`silotune audit`: one tier on one run, a table, a figure and `audit/tierN.json`; status 3 if the claim is violated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from shared import terminal
from shared.epsilons import bound_rounded_down, delta_rounded_up, rounded_up
from shared.errors import ConfigError, RunError, excerpt
from shared.options import JsonAtEndOption, RunArgument

if TYPE_CHECKING:
    from simulations.audit.one_run import Training
    from simulations.audit.result import AuditResult
    from simulations.audit.run import Progress as Telling

VIOLATED_STATUS = 3
LEAST_SHADOWS, LEAST_CANARIES = 64, 32
MOST_OF_AN_AUDIT = 1_000_000
_COLOURS = {"consistent": "cyan", "violated": "bold red", "inconclusive": "yellow"}


def audit(
    run: RunArgument,
    tier: Annotated[
        int, typer.Option(help="1: mechanism, in seconds; 2: one run with canaries; 3: shadow models.")
    ] = 1,
    canaries: Annotated[
        str, typer.Option(help="Of tier 2: gradient (sees every step) or text (final adapter).")
    ] = "gradient",
    num_canaries: Annotated[int, typer.Option(help="Of tier 2, in each training.")] = 1000,
    trainings: Annotated[int, typer.Option(help="Independent trainings of tier 2, attacked models of tier 3.")] = 5,
    shadows: Annotated[int, typer.Option(help="Shadow models of tier 3, at least 64.")] = 64,
    alpha: Annotated[float, typer.Option(help="Chance of accusing a correct run, at most 0.001.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Public seed of canaries and coins.")] = 0,
    as_json: JsonAtEndOption = False,
) -> None:
    """Put the claimed epsilon of a run to the test; the verdict is consistent, violated or inconclusive."""
    _check_options(tier, canaries, num_canaries, trainings, shadows)  # before anything that is slow to import
    from simulations.audit import run as audits
    from simulations.audit.models import audit_shadow_models, audit_text_canaries
    from simulations.audit.plots import write_figure
    from simulations.audit.result import check_alpha

    check_alpha(alpha)
    console = terminal.console(as_json=as_json)
    opened = audits.open_run(run)
    scored: Sequence[Training] = ()
    if tier == 1:
        with console.status("the trainer runs on canaries"):
            result = audits.mechanism_result(opened, audits.audit_run_mechanism(run, alpha=alpha, seed=seed))
        seeds = [seed]
    else:
        audits.check_simulation(opened)
        with _progress(console) as tell:
            if tier == 2:
                attack = audits.audit_gradient_canaries if canaries == "gradient" else audit_text_canaries
                result, scored = attack(
                    opened, num_canaries=num_canaries, trainings=trainings, alpha=alpha, seed=seed, progress=tell
                )
                seeds = list(range(seed, seed + trainings))
            else:
                result, scored = audit_shadow_models(
                    opened, shadows=shadows, targets=trainings, alpha=alpha, seed=seed, progress=tell
                )
                seeds = list(range(seed, seed + shadows + trainings))
    record = audits.save_result(opened, result, seeds=seeds)
    figure = run / "audit" / f"tier{tier}.png"
    write_figure(figure, result, scored)
    stale = _update_report(run)
    if as_json:
        terminal.print_json(asdict(record))
    else:
        console.print(result_table(result))
        for reason in result.reasons:
            console.print(f"  {reason}", soft_wrap=True)
        console.print(f"\naudited: {result.audited}\nfigure: {figure}", soft_wrap=True)
    if stale is not None:
        typer.echo(f"the run's report does not have this audit yet: {stale}", err=True)
    if result.verdict == "violated":
        raise typer.Exit(VIOLATED_STATUS)


def _update_report(run: Path) -> str | None:
    """Write the run's report anew, so that it has the audit; return why not, if that does not go."""
    from server.reports.run import write_report

    try:
        write_report(run)
    except RunError as error:
        return str(error)
    return None


def result_table(result: AuditResult) -> Table:
    """Return the result as a table for the terminal."""
    table = Table(title=f"audit, tier {result.tier}", title_justify="left", title_style="bold")
    for heading in ("CLAIM", "LOWER BOUND", "CEILING"):
        table.add_column(heading, justify="right")
    table.add_column("delta", justify="right")
    table.add_column("alpha", justify="right")
    table.add_column("verdict", style=_COLOURS[result.verdict])
    numbers = (rounded_up(result.claim), bound_rounded_down(result.lower_bound), bound_rounded_down(result.ceiling))
    table.add_row(*numbers, delta_rounded_up(result.delta), f"{result.alpha:g}", result.verdict)
    return table


def _check_options(tier: int, canaries: str, num_canaries: int, trainings: int, shadows: int) -> None:
    if tier not in (1, 2, 3):
        raise ConfigError(f"--tier is {tier}; expected 1 (mechanism), 2 (one run) or 3 (shadow models).")
    if canaries not in ("gradient", "text"):
        raise ConfigError(f"--canaries is {canaries!r}; expected 'gradient' or 'text'.")
    if num_canaries < LEAST_CANARIES or trainings < 1:
        raise ConfigError(
            f"--num-canaries is {num_canaries} and --trainings {trainings}; expected at least {LEAST_CANARIES} and 1."
        )
    for name, value in (("num-canaries", num_canaries), ("trainings", trainings), ("shadows", shadows)):
        if value > MOST_OF_AN_AUDIT:
            raise ConfigError(f"--{name} is {excerpt(value)}; expected at most {MOST_OF_AN_AUDIT:,}.")
    if shadows < LEAST_SHADOWS:
        raise ConfigError(
            f"--shadows is {shadows}; fewer than {LEAST_SHADOWS} shadow models make the attack too weak to mean anything."
        )


@contextmanager
def _progress(console: Console) -> Iterator[Telling]:
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("")

        def tell(done: int, total: int, what: str) -> None:
            progress.update(bar, completed=done, total=total, description=what)

        yield tell
