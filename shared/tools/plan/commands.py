"""`silotune plan`: find the missing quantity of a plan, sweep one, or ask whether sites can afford a job.

Every epsilon that is printed, drawn or written is an upper bound, by `shared.tools.plan.planning`; printed ones are rounded
up. Expected utility is drawn from measurements that the user gives, and never made up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from shared import terminal
from shared.epsilons import delta_rounded_up, noise_rounded_down, rate_rounded_up, rounded_up
from shared.errors import ConfigError, SilotuneError
from shared.files.atomic import write_bytes, write_json
from shared.files.json_files import finite_or_none
from shared.files.outputs import JSON_MARK, PNG_MARK, check_file
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.parsing import nearest, parse
from shared.numbers import read_number
from shared.options import OnlyJsonOption
from shared.tools.plan.figure import UtilityFile, UtilityPoint, draw
from shared.tools.plan.tables import Planned, print_answers, print_shares
from shared.trust.job_files import read_job, read_json

if TYPE_CHECKING:
    from shared.tools.plan.planning import Question, Setting
    from shared.tools.plan.sharing import SharesPlan, Sharing

FORMAT = "silotune-plan/1"
MAX_POINTS = 100
MAX_SIZE = 10**12
_INTEGERS = frozenset({"records", "batch_size", "steps", "parameters"})


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

    from shared.tools.plan.planning import Question

    if out is not None:
        check_file(out / "plan.json", JSON_MARK, way_out="choose another folder")
        check_file(out / "plan.png", PNG_MARK, way_out="choose another folder")
    sharing = _sharing(sites, colluding, epsilon_alone, spare_attempts)
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
    asked: Job | None = None
    if job is not None:
        asked = read_job(job, overrides or [])
        if unit not in (None, asked.privacy.unit):
            raise ConfigError(f"--unit is {unit!r}, but the job protects each {asked.privacy.unit}; leave it out.")
        if sharing is not None:
            raise ConfigError(
                "the job says how its noise is shared; leave out --sites and what belongs to it, or use --set."
            )
        _check_sizes(asked, site_sizes, ledgers or [])
        planned = _plan_job(asked, question, ledgers or [], sweep)
    else:
        for given, option in ((ledgers, "--ledger"), (overrides, "--set"), (site_sizes, "--site-sizes")):
            if given:
                raise ConfigError(f"{option} speaks of a job; add --job FILE.")
        planned = _plan_numbers(question, sweep, sharing)
    protected = asked.privacy.unit if asked is not None else unit or "record"
    sizes = _sizes(site_sizes, planned)
    document = _document(planned, points, job=asked, sweep=sweep, unit=protected, sizes=sizes)
    console = terminal.console(120)
    if not as_json:
        swept = sweep.partition("=")[0] if sweep else None
        print_answers(console, planned, points, swept=swept, unit=protected)
        if asked is not None and sizes:
            print_shares(console, sizes, asked.aggregation)
    if out is not None:
        _write(out, document, planned, points)
        if not as_json:
            console.print(f"written: {out / 'plan.json'}, {out / 'plan.png'}", soft_wrap=True)
    if as_json:
        terminal.print_json(document)


# --- what is asked ---


def _sharing(
    sites: int | None, colluding: int | None, epsilon_alone: float | None, spare_attempts: int | None
) -> Sharing | None:
    """Return who shares the noise; None if nothing says that it is shared."""
    from shared.tools.plan.sharing import Sharing

    if sites is None and colluding is None:
        for given, option in ((epsilon_alone, "--epsilon-alone"), (spare_attempts, "--spare-attempts")):
            if given is not None:
                raise ConfigError(f"{option} speaks of sites that share the noise; add --sites and --colluding.")
        return None
    if sites is None or colluding is None:
        raise ConfigError(
            "--sites and --colluding say together how many stay honest; give both, for example 8 and 2, or with --job neither: "
            "the job says it."
        )
    return Sharing(sites=sites, colluding=colluding, epsilon_alone=epsilon_alone, spare_attempts=spare_attempts)


def _plan_job(job: Job, question: Question, ledgers: Sequence[Path], sweep: str | None) -> Planned:
    """Return the one setting of `job`, and every site's answer."""
    from shared.privacy.ledger_export import load_export
    from shared.privacy.plan import PrivacyPlan
    from shared.tools.plan.affordability import can_afford
    from shared.tools.plan.planning import Setting, check_delta_for, check_statable
    from shared.tools.plan.sharing import shares_of_job

    for name, value in asdict(question).items():
        if value is not None and name not in ("records", "parameters"):
            raise ConfigError(
                f"--{name.replace('_', '-')} is given and the job says it too; leave it out, or change the job with --set."
            )
    if sweep is not None:
        raise ConfigError("--sweep takes numbers, not a job; give --records, --batch-size and so on instead of --job.")
    exports = [load_export(path) for path in ledgers]
    for path, export in zip(ledgers, exports, strict=True):
        if export.unit != job.privacy.unit:
            raise ConfigError(
                f"{path} keeps the budget of each {export.unit}, but the job protects each {job.privacy.unit}; the two cannot "
                f"be compared. Export the account with the unit {job.privacy.unit!r}."
            )
    if job.privacy.central:
        central = PrivacyPlan.of_coordinator(job)
        raise ConfigError(
            "the planner answers for the noise of sites; this job's is added by a trusted coordinator (privacy.mechanism "
            f"'central'). Its plan: noise multiplier {noise_rounded_down(central.noise_multiplier)}, {central.planned_steps} "
            f"rounds at sampling rate {rate_rounded_up(central.sample_rate)}, epsilon {rounded_up(central.epsilon())} at delta "
            f"{delta_rounded_up(central.delta)}, unit site."
        )
    made = PrivacyPlan.from_job(job)
    if not made.private:
        raise ConfigError('the job adds no noise (privacy.mechanism = "none"), so there is no epsilon to plan.')
    check_statable(made.mechanism(made.planned_steps))
    if question.records is not None:
        check_delta_for(made.delta, question.records)
    setting = Setting(
        noise_multiplier=made.noise_multiplier,
        sample_rate=made.sample_rate,
        steps=made.planned_steps,
        epsilon=made.epsilon(),
        delta=made.delta,
        records=question.records,
        parameters=question.parameters or _count_parameters(job),
        solved_for="noise" if job.privacy.noise_multiplier is None else "epsilon",
    )
    answers = [
        can_afford(
            export,
            setting.mechanism,
            local_steps=job.training.local_steps,
            delta=setting.delta,
            honest=made.honest or 1,
            spare_attempts_for=job.privacy.spare_attempts_for,
        )
        for export in exports
    ]
    shares = shares_of_job(job, made, setting) if made.honest else None
    return Planned(settings=[setting], sites=list(zip(exports, answers, strict=True)), shares=shares)


def _count_parameters(job: Job) -> int | None:
    """Return the trainable parameters of a job whose backbone is on this machine; nothing is fetched for it."""
    from shared.runtime.runtime import load_runtime

    here = job.model.is_image_network or job.model.backbone.startswith("embedded:")
    if not (here or Path(job.model.backbone).is_dir()):
        return None
    try:
        model = load_runtime(job, ComputeConfig(device="cpu")).model
    except SilotuneError:
        return None  # whoever runs the job is told; its budget can be planned all the same
    return sum(parameter.numel() for parameter in model.trainable().values())


def _plan_numbers(question: Question, sweep: str | None, sharing: Sharing | None) -> Planned:
    from shared.tools.plan.planning import solve
    from shared.tools.plan.sharing import solve_shares

    if sharing is not None:
        if sweep is not None:
            raise ConfigError("--sweep varies a plan without --sites; leave out one of the two.")
        shares = solve_shares(question, sharing)
        return Planned(settings=[shares.share], shares=shares)
    if sweep is None:
        return Planned(settings=[solve(question)])
    name, values = parse_sweep(sweep)
    if getattr(question, name) is not None:
        option = "--" + name.replace("_", "-")
        raise ConfigError(f"{option} is given and swept; leave out {option}.")
    settings = []
    for value in values:
        try:
            settings.append(solve(replace(question, **{name: value})))  # type: ignore[arg-type]
        except ConfigError as error:
            raise ConfigError(f"at {name}={value:g} of --sweep: {error}") from None
    return Planned(settings=settings)


def parse_sweep(text: str) -> tuple[str, list[float]]:
    """Return the quantity and the values of `NAME=A:B`, `NAME=A:B:STEP` or `NAME=V,W,...`.

    Raises:
        ConfigError: if the text is not of that form.
    """
    from shared.tools.plan.planning import Question

    name, separator, spec = text.partition("=")
    name = name.strip().replace("-", "_")
    known = [field.name for field in fields(Question)]
    if not separator:
        raise ConfigError(f"--sweep {text!r} is not of the form NAME=VALUES, for example epochs=1:20 or epsilon=1,3,8.")
    if name not in known:
        raise ConfigError(f"--sweep names {name!r}; {nearest(name, known)}")
    try:
        values = _values(spec)
    except ValueError:
        raise ConfigError(
            f"--sweep {text!r} holds no values; expected FROM:TO, FROM:TO:STEP or a list with commas, for example 1:20, "
            "0.5:2:0.25 or 1,3,8."
        ) from None
    if len(values) > MAX_POINTS:
        raise ConfigError(
            f"--sweep {text!r} has {len(values)} points; at most {MAX_POINTS} are computed. Use a wider step."
        )
    if name in _INTEGERS:
        if any(value != int(value) for value in values):
            raise ConfigError(f"--sweep {text!r} holds a fraction; {name} is a whole number.")
        values = [int(value) for value in values]
    return name, values


def _values(spec: str) -> list[float]:
    if ":" not in spec:
        values = [read_number(part) for part in spec.split(",")]
    else:
        first, last, step = [*(read_number(part) for part in spec.split(":")), 1.0][:3]
        if not (math.isfinite(first + last + step) and step > 0 and last >= first) or spec.count(":") > 2:
            raise ValueError(spec)
        count = min(math.floor((last - first) / step + 1e-9), MAX_POINTS)  # one point too many is refused later
        values = [round(first + step * k, 12) for k in range(count + 1)]
    return values


def _check_sizes(job: Job, given: str | None, ledgers: Sequence[Path]) -> None:
    """Raise `ConfigError` unless `--site-sizes` can be of this job; before anything is computed."""
    if given is None:
        return
    if job.privacy.shares_noise:
        raise ConfigError(
            "sites that share the noise all bring as much of it, whatever their size; leave out --site-sizes."
        )
    if ledgers:
        raise ConfigError("--site-sizes and --ledger both tell the sites' sizes; leave out --site-sizes.")
    _parse_sizes(given)


def _sizes(given: str | None, planned: Planned) -> dict[str, int]:
    """Return the declared size of every site, from `--site-sizes` or their exports; empty if fewer than two are known."""
    if planned.shares is not None:
        return {}
    if given is None:
        found = {f"{export.site}, {export.dataset}": export.declared_records for export, _ in planned.sites}
        return found if len(found) > 1 else {}
    return _parse_sizes(given)


def _parse_sizes(given: str) -> dict[str, int]:
    parts = given.split(",")
    if not all(part.strip().isdecimal() and 0 < int(part) <= MAX_SIZE for part in parts) or len(parts) < 2:
        raise ConfigError(
            f"--site-sizes is {given!r}; expected two or more whole numbers from 1 to {MAX_SIZE:,} with commas between, for "
            "example 64,256,1024."
        )
    return {f"site-{number}": int(part) for number, part in enumerate(parts, start=1)}


# --- what is answered ---


def _document(
    planned: Planned,
    utility: Sequence[UtilityPoint] | None,
    *,
    job: Job | None,
    sweep: str | None,
    unit: str,
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    """Return the content of plan.json and of the line of `--json`."""
    from shared.privacy.statement import relation
    from shared.site_weights import noise_warnings, site_shares

    return {
        "format": FORMAT,
        "relation": relation(unit),
        "unit": unit,
        "accountant": "PLD",
        "sampling": "poisson",
        "job": None if job is None else {"name": job.name, "sha256": job.sha256},
        "sweep": sweep,
        "points": [_point(setting, planned.warnings(setting)) for setting in planned.settings],
        "sharing": None if planned.shares is None else _of_shares(planned.shares),
        "sites": [
            asdict(answer)
            | {
                "epsilon_now": finite_or_none(answer.epsilon_now),
                "epsilon_after": [finite_or_none(epsilon) for epsilon in answer.epsilon_after],
                "alone_now": finite_or_none(answer.alone_now),
                "alone_after": [finite_or_none(epsilon) for epsilon in answer.alone_after],
                "verdict": answer.verdict,
                "advice": answer.advice,
                "warnings": list(planned.site_warnings(export).values()),
            }
            for export, answer in planned.sites
        ],
        "shares": [asdict(share) for share in site_shares(sizes, job.aggregation)] if job and sizes else [],
        "share_warnings": noise_warnings(sizes, job.aggregation) if job and sizes else [],
        "utility": None if utility is None else [point.model_dump() for point in utility],
    }


def _point(setting: Setting, warnings: Mapping[str, str]) -> dict[str, Any]:
    return asdict(setting) | {
        "batch_size": setting.batch_size,
        "epochs": setting.epochs,
        "signal_to_noise": setting.signal_to_noise,
        "signal_to_noise_vector": setting.signal_to_noise_vector,
        "warnings": list(warnings.values()),
    }


def _of_shares(shares: SharesPlan) -> dict[str, Any]:
    prices = {
        name: None if price is None else {key: finite_or_none(value) for key, value in asdict(price).items()}
        for name, price in (
            ("without_spare", shares.without_spare),
            ("by_epsilon", shares.by_epsilon),
            ("by_epsilon_alone", shares.by_epsilon_alone),
        )
    }
    return prices | {
        "sites": shares.sharing.sites,
        "colluding": shares.sharing.colluding,
        "honest": shares.sharing.honest,
        "rounds": shares.rounds,
        "spare_attempts": shares.spare_attempts,
        "noise_multiplier": shares.share.noise_multiplier,
        "noise_together": shares.together.noise_multiplier,
        "epsilon": finite_or_none(shares.together.epsilon),
        "epsilon_alone": finite_or_none(shares.share.epsilon),
        "ruled_by": shares.ruled_by or None,
        "by_honest": [{"honest": count, "epsilon": finite_or_none(epsilon)} for count, epsilon in shares.by_honest()],
    }


def _write(out: Path, document: dict[str, Any], planned: Planned, utility: Sequence[UtilityPoint] | None) -> None:
    write_json(out / "plan.json", document)
    write_bytes(out / "plan.png", draw(planned.settings, utility, planned.shares))
