"""`silotune plan`: find the missing quantity of a plan, sweep one, or ask whether sites can afford a job.

Every epsilon that is printed, drawn or written is an upper bound, by `shared.tools.plan.planning`; printed ones are rounded
up. Expected utility is drawn from measurements that the user gives, and never made up.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from shared import terminal
from shared.errors import ConfigError
from shared.files.outputs import JSON_MARK, PNG_MARK, check_file
from shared.job.job import Job
from shared.job.parsing import parse
from shared.options import OnlyJsonOption
from shared.tools.plan.figure import UtilityFile
from shared.trust.job_files import read_job, read_json

MAX_SIZE = 10**12


def plan(
    records: Annotated[
        int | None, typer.Option(help="Number n of records, or of patients or customers if these are the unit; public.")
    ] = None,
    unit: Annotated[
        Literal["record", "patient", "customer"] | None,
        typer.Option(help="What is protected; with --job the job says it. By default each record."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Expected records (patients, customers) per step, B.")] = None,
    sample_rate: Annotated[float | None, typer.Option(help="B / n; instead of --batch-size.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Expected passes over the records.")] = None,
    steps: Annotated[int | None, typer.Option(help="Noisy steps; instead of --epochs.")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Noise in units of the clipping norm.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="The most that may be spent.")] = None,
    delta: Annotated[float | None, typer.Option(help="By default min(1e-5, 1/(10 n)), rounded down.")] = None,
    parameters: Annotated[int | None, typer.Option(help="Trainable parameters, to judge the noise.")] = None,
    sites: Annotated[
        int | None,
        typer.Option(
            help="Sites that share the noise: the least number in a sum (secure aggregation), one step a round."
        ),
    ] = None,
    colluding: Annotated[
        int | None, typer.Option(help="With --sites: so many of them may work together with the coordinator.")
    ] = None,
    epsilon_alone: Annotated[
        float | None, typer.Option(help="With --sites: the most that may be spent if everything else is broken.")
    ] = None,
    spare_attempts: Annotated[
        int | None,
        typer.Option(help="With --sites: repetitions of rounds to plan for; by default a tenth, rounded up."),
    ] = None,
    job: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A job (run file, scenario, signed job) instead of numbers.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the job.")
    ] = None,
    ledgers: Annotated[
        list[Path] | None,
        typer.Option("--ledger", metavar="FILE", help="Export of a site's ledger: can it afford the job? Repeatable."),
    ] = None,
    site_sizes: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Declared records of each site of the job: who brings the noise?"),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(metavar="NAME=VALUES", help="Vary one quantity: epochs=1:20, epsilon=0.5,1,3,8."),
    ] = None,
    utility: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measured points (JSON) to set beside the plan.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write plan.json and plan.png.")] = None,
    as_json: OnlyJsonOption = False,
) -> None:
    """Plan a privacy budget: give all but one of batch, epochs, noise and epsilon, and the missing one is found."""

    from shared.privacy.ledger_export import load_export
    from shared.tools.plan.answering import Answer, plan_job, plan_numbers
    from shared.tools.plan.planning import Question
    from shared.tools.plan.sharing import Sharing

    if out is not None:
        check_file(out / "plan.json", JSON_MARK, way_out="choose another folder")
        check_file(out / "plan.png", PNG_MARK, way_out="choose another folder")
    sharing = Sharing.asked(sites, colluding, epsilon_alone, spare_attempts)
    question = Question(
        records=records,
        batch_size=batch_size,
        sample_rate=sample_rate,
        steps=steps,
        epochs=epochs,
        noise_multiplier=noise_multiplier,
        epsilon=epsilon,
        delta=delta,
        parameters=parameters,
    )
    points = None
    if utility is not None:
        points = parse(UtilityFile, read_json(utility, "measured points"), source=str(utility)).points
    if job is not None:
        asked = read_job(job, overrides or [])
        if unit not in (None, asked.privacy.unit):
            raise ConfigError(f"--unit is {unit!r}, but the job protects each {asked.privacy.unit}; leave it out.")
        if sharing is not None:
            raise ConfigError(
                "the job says how its noise is shared; leave out --sites and what belongs to it, or use --set."
            )
        sizes = _sizes(asked, site_sizes, ledgers or [])
        if sweep is not None:
            raise ConfigError(
                "--sweep takes numbers, not a job; give --records, --batch-size and so on instead of --job."
            )
        planned = plan_job(asked, question, {str(path): load_export(path) for path in ledgers or []})
        answer = Answer(planned=planned, unit=asked.privacy.unit, job=asked, site_sizes=sizes, utility=points)
    else:
        for given, option in ((ledgers, "--ledger"), (overrides, "--set"), (site_sizes, "--site-sizes")):
            if given:
                raise ConfigError(f"{option} speaks of a job; add --job FILE.")
        planned = plan_numbers(question, sweep, sharing)
        answer = Answer(planned=planned, unit=unit or "record", sweep=sweep, utility=points)
    console = terminal.console(120)
    if not as_json:
        answer.print(console)
    if out is not None:
        answer.write(out)
        if not as_json:
            console.print(f"written: {out / 'plan.json'}, {out / 'plan.png'}", soft_wrap=True)
    if as_json:
        terminal.print_json(answer.document())


def _sizes(job: Job, given: str | None, ledgers: Sequence[Path]) -> dict[str, int] | None:
    """Return what `--site-sizes` says; `ConfigError` unless it can be of this job. Before anything is computed."""
    if given is None:
        return None
    if job.privacy.shares_noise:
        raise ConfigError(
            "sites that share the noise all bring as much of it, whatever their size; leave out --site-sizes."
        )
    if ledgers:
        raise ConfigError("--site-sizes and --ledger both tell the sites' sizes; leave out --site-sizes.")
    parts = given.split(",")
    if not all(part.strip().isdecimal() and 0 < int(part) <= MAX_SIZE for part in parts) or len(parts) < 2:
        raise ConfigError(
            f"--site-sizes is {given!r}; expected two or more whole numbers from 1 to {MAX_SIZE:,} with commas between, for "
            "example 64,256,1024."
        )
    return {f"site-{number}": int(part) for number, part in enumerate(parts, start=1)}
