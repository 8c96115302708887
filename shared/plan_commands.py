"""`silotune plan`: find the missing quantity of a plan, sweep one, or ask whether sites can afford a job.

Every epsilon that is printed, drawn or written is an upper bound, by `shared.privacy.planning`; printed ones are rounded
up. Expected utility is drawn from measurements that the user gives, and never made up.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel, ConfigDict, Field

from shared.config import finite_or_none, parse
from shared.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from shared.config import Job
    from shared.ledger_export import LedgerExport
    from shared.privacy.planning import Question, Setting, SiteAnswer

FORMAT = "silotune-plan/1"
# What stands in a scenario or a run file beside the job's own sections; a test compares it with both.
BESIDE_A_JOB = frozenset(
    {
        *("data", "partition", "simulation", "baselines", "compute"),
        *("evaluation", "evaluate_every", "valid_days"),
    }
)
MAX_POINTS = 100
_INTEGERS = frozenset({"records", "batch_size", "steps", "parameters"})
_NO_UTILITY = "Expected utility: not known. No measured points were given (--utility FILE), and none are made up."
_FILTER = (
    "Adaptive accounts are measured by a filter that also holds for runs chosen after seeing the last one; it counts more "
    "than PLD does."
)
_CLAIM = (
    "Epsilon is an upper bound by PLD accounting, at delta {delta:g}, for one record added or removed, by a site that takes "
    "every step with Poisson sampling. A person with several records is protected less."
)

INK, MUTED, GRID = "#1b2733", "#52606d", "#e3e8ee"
# Colour, dash and marker differ together, so that print in grey and colour-blind eyes tell the lines apart.
LINE_STYLES = (
    ("#0b4f8a", "solid", "o"),
    ("#a8500a", (0, (5, 2)), "s"),
    ("#0f7062", (0, (7, 2, 1.5, 2)), "^"),
)


class UtilityPoint(BaseModel):
    """One measured point; other keys of the file are left alone."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    epsilon: float = Field(gt=0)
    name: str
    metric: str | None = None
    mean: float
    sd: float = Field(default=0.0, ge=0)

    @property
    def title(self) -> str:
        """What was measured, and in which series."""
        return self.name if self.metric in (None, self.name) else f"{self.metric}, {self.name}"


class UtilityFile(BaseModel):
    """What `--utility` reads."""

    points: tuple[UtilityPoint, ...] = Field(min_length=1)


def plan(
    records: Annotated[int | None, typer.Option(help="Number of records n; public.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Expected records per step, B.")] = None,
    sample_rate: Annotated[float | None, typer.Option(help="B / n; instead of --batch-size.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Expected passes over the records.")] = None,
    steps: Annotated[int | None, typer.Option(help="Noisy steps; instead of --epochs.")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Noise in units of the clipping norm.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="The most that may be spent.")] = None,
    delta: Annotated[float | None, typer.Option(help="By default min(1e-5, 1/(10 n)).")] = None,
    parameters: Annotated[int | None, typer.Option(help="Trainable parameters, to judge the noise.")] = None,
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
    sweep: Annotated[
        str | None,
        typer.Option(metavar="NAME=VALUES", help="Vary one quantity: epochs=1:20, epsilon=0.5,1,3,8."),
    ] = None,
    utility: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measured points (JSON) to set beside the plan.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write plan.json and plan.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line and nothing else.")] = False,
) -> None:
    """Plan a privacy budget: give all but one of batch, epochs, noise and epsilon, and the missing one is found."""
    from rich.console import Console

    from shared.privacy.planning import Question

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
        points = parse(UtilityFile, _read_json(utility, "measured points"), source=str(utility)).points
    asked: Job | None = None
    if job is not None:
        asked = read_job(job, overrides or [])
        settings, sites = _plan_job(asked, question, ledgers or [], sweep)
    else:
        for given, option in ((ledgers, "--ledger"), (overrides, "--set")):
            if given:
                raise ConfigError(f"{option} speaks of a job; add --job FILE.")
        settings, sites = _plan_numbers(question, sweep), []
    document = _document(settings, sites, points, job=asked, sweep=sweep)
    # In a file or a pipe there is room for more than the 80 columns that rich assumes.
    console = Console(highlight=False, markup=False)
    console = console if console.is_terminal else Console(width=120, highlight=False, markup=False)
    if not as_json:
        _print(console, settings, sites, points, swept=sweep.partition("=")[0] if sweep else None)
    if out is not None:
        _write(out, document, settings, points)
        if not as_json:
            console.print(f"written: {out / 'plan.json'}, {out / 'plan.png'}", soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(document, allow_nan=False))


# --- what is asked ---


def read_job(path: Path, overrides: Sequence[str]) -> Job:
    """Return the job in a run file or scenario (TOML), or in a job or signed job (JSON).

    Raises:
        ConfigError, TrustError: as their texts say.
    """
    from shared.config import Job, apply_overrides, load_toml, nearest

    raw = _read_json(path, "a job") if path.suffix == ".json" else load_toml(path)
    if "signature" in raw:
        from shared.signing import SignedJob

        signed = SignedJob.from_json(path.read_text(encoding="utf-8"), source=str(path))
        raw = signed.job.model_dump(mode="json")
    raw = apply_overrides(raw, overrides)
    for key in raw:
        if key not in Job.model_fields and key not in BESIDE_A_JOB:
            raise ConfigError(f"{path} is not valid:\n  - unknown key {key!r}; {nearest(key, list(Job.model_fields))}")
    return parse(Job, {key: value for key, value in raw.items() if key in Job.model_fields}, source=str(path))


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; check the path.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no JSON object; expected {what}.")
    return raw


def _plan_job(
    job: Job, question: Question, ledgers: Sequence[Path], sweep: str | None
) -> tuple[list[Setting], list[tuple[LedgerExport, SiteAnswer]]]:
    """Return the one setting of `job`, and every site's answer."""
    from shared.ledger_export import load_export
    from shared.privacy.plan import PrivacyPlan
    from shared.privacy.planning import Setting, can_afford, check_delta_for, check_statable

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
        can_afford(export, setting.mechanism, local_steps=job.training.local_steps, delta=setting.delta)
        for export in exports
    ]
    return [setting], list(zip(exports, answers, strict=True))


def _count_parameters(job: Job) -> int | None:
    """Return the trainable parameters of a job whose backbone is on this machine; nothing is fetched for it."""
    from shared.config import ComputeConfig
    from shared.errors import SilotuneError
    from shared.runtime import load_runtime

    if not (job.model.backbone.startswith("embedded:") or Path(job.model.backbone).is_dir()):
        return None
    try:
        model = load_runtime(job, ComputeConfig(device="cpu")).model
    except SilotuneError:
        return None  # whoever runs the job is told; its budget can be planned all the same
    return sum(parameter.numel() for parameter in model.trainable().values())


def _plan_numbers(question: Question, sweep: str | None) -> list[Setting]:
    from shared.privacy.planning import solve

    if sweep is None:
        return [solve(question)]
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
    return settings


def parse_sweep(text: str) -> tuple[str, list[float]]:
    """Return the quantity and the values of `NAME=A:B`, `NAME=A:B:STEP` or `NAME=V,W,...`.

    Raises:
        ConfigError: if the text is not of that form.
    """
    from dataclasses import fields

    from shared.config import nearest
    from shared.privacy.planning import Question

    name, separator, spec = text.partition("=")
    name = name.strip().replace("-", "_")
    known = [field.name for field in fields(Question)]
    if not separator:
        raise ConfigError(f"--sweep {text!r} is not of the form NAME=VALUES, for example epochs=1:20 or epsilon=1,3,8.")
    if name not in known:
        raise ConfigError(f"--sweep names {name!r}; {nearest(name, known)}.")
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
    import math

    if ":" not in spec:
        values = [float(part) for part in spec.split(",")]
    else:
        first, last, step = [*(float(part) for part in spec.split(":")), 1.0][:3]
        if not (math.isfinite(first + last + step) and step > 0 and last >= first) or spec.count(":") > 2:
            raise ValueError(spec)
        count = min(math.floor((last - first) / step + 1e-9), MAX_POINTS)  # one point too many is refused later
        values = [round(first + step * k, 12) for k in range(count + 1)]
    if not all(map(math.isfinite, values)):
        raise ValueError(spec)
    return values


# --- what is answered ---


def _document(
    settings: Sequence[Setting],
    sites: Sequence[tuple[LedgerExport, SiteAnswer]],
    utility: Sequence[UtilityPoint] | None,
    *,
    job: Job | None,
    sweep: str | None,
) -> dict[str, Any]:
    """Return the content of plan.json and of the line of `--json`."""
    from shared.privacy.statement import RELATION

    return {
        "format": FORMAT,
        "relation": RELATION,
        "unit": "record",
        "accountant": "PLD (dp-accounting)",
        "sampling": "poisson",
        "job": None if job is None else {"name": job.name, "sha256": job.sha256},
        "sweep": sweep,
        "points": [_point(setting) for setting in settings],
        "sites": [
            asdict(answer)
            | {
                "epsilon_now": finite_or_none(answer.epsilon_now),
                "epsilon_after": [finite_or_none(epsilon) for epsilon in answer.epsilon_after],
                "verdict": answer.verdict,
                "advice": answer.advice,
                "warnings": list(_site_warnings(settings[0], export).values()),
            }
            for export, answer in sites
        ],
        "utility": None if utility is None else [point.model_dump() for point in utility],
    }


def _point(setting: Setting) -> dict[str, Any]:
    return asdict(setting) | {
        "batch_size": setting.batch_size,
        "epochs": setting.epochs,
        "signal_to_noise": setting.signal_to_noise,
        "signal_to_noise_vector": setting.signal_to_noise_vector,
        "warnings": list(setting.warnings().values()),
    }


def _site_warnings(setting: Setting, export: LedgerExport) -> dict[str, str]:
    """Return what depends on the size of the site, as it is declared in its export."""
    of_site = replace(setting, records=export.declared_records).warnings()
    return {subject: text for subject, text in of_site.items() if subject not in setting.warnings()}


def _write(
    out: Path, document: dict[str, Any], settings: Sequence[Setting], utility: Sequence[UtilityPoint] | None
) -> None:
    from shared.atomic import write_bytes, write_json

    write_json(out / "plan.json", document)
    write_bytes(out / "plan.png", draw(settings, utility))


def _print(
    console: Console,
    settings: Sequence[Setting],
    sites: Sequence[tuple[LedgerExport, SiteAnswer]],
    utility: Sequence[UtilityPoint] | None,
    *,
    swept: str | None,
) -> None:
    console.print(_setting_table(settings[0]) if swept is None else _sweep_table(settings))
    told: set[str] = set()
    for setting in settings:
        for subject, text in setting.warnings().items():
            if subject not in told:
                told.add(subject)
                console.print(f"warning: {text}", style="yellow")
    if sites:
        console.print(_site_table([answer for _, answer in sites]))
    for export, answer in sites:
        name = f"{answer.site}, {answer.dataset}"
        if answer.advice:
            console.print(f"{name}: {answer.advice}", style="yellow")
        for text in _site_warnings(settings[0], export).values():
            console.print(f"{name}: warning: {text}", style="yellow")
    if any(answer.composition == "adaptive" for _, answer in sites):
        console.print(_FILTER)
    if utility is None:
        console.print(_NO_UTILITY)
    else:
        console.print(_utility_table(utility))
    console.print(_CLAIM.format(delta=max(setting.delta for setting in settings)))


def _setting_table(setting: Setting) -> Table:
    from rich import box
    from rich.table import Table

    from shared.privacy.statement import rounded_up

    rows = [
        ("records", "" if setting.records is None else f"{setting.records:,}", ""),
        ("expected batch size", _number(setting.batch_size), "rate"),
        ("sample rate", f"{setting.sample_rate:.6g}", "rate"),
        ("steps", f"{setting.steps:,}", "steps"),
        ("epochs", _number(setting.epochs), "steps"),
        ("noise multiplier", _noise(setting.noise_multiplier), "noise"),
        ("epsilon", rounded_up(setting.epsilon), "epsilon"),
        ("delta", f"{setting.delta:.3g}", ""),
        ("trainable parameters", "" if setting.parameters is None else f"{setting.parameters:,}", ""),
        ("signal to noise, one coordinate", _number(setting.signal_to_noise), ""),
        ("signal to noise, all parameters", _number(setting.signal_to_noise_vector), ""),
    ]
    table = Table("quantity", box=box.SIMPLE_HEAD)
    table.add_column("value", justify="right")
    table.add_column("")
    for name, value, quantity in rows:
        if value:
            found = quantity != "" and quantity == setting.solved_for
            table.add_row(name, value, "found" if found else "", style="bold" if found else None)
    return table


def _sweep_table(settings: Sequence[Setting]) -> Table:
    from rich import box
    from rich.table import Table

    from shared.privacy.statement import rounded_up

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    found = settings[0].solved_for
    for title, quantity in (
        ("epochs", "steps"),
        ("steps", "steps"),
        ("batch", "rate"),
        ("rate", "rate"),
        ("noise", "noise"),
        ("epsilon", "epsilon"),
        ("delta", ""),
        ("signal", ""),
    ):
        table.add_column(title, justify="right", style="bold" if quantity == found else None)
    table.add_column("mind")
    for setting in settings:
        table.add_row(
            _number(setting.epochs),
            f"{setting.steps:,}",
            _number(setting.batch_size),
            f"{setting.sample_rate:.6g}",
            _noise(setting.noise_multiplier),
            rounded_up(setting.epsilon),
            f"{setting.delta:.3g}",
            _number(setting.signal_to_noise),
            ", ".join(setting.warnings()),
        )
    return table


def _site_table(answers: Sequence[SiteAnswer]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title="Epsilon of each site: now, after this run, and after more like it",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("site", overflow="fold")
    for title in ("spent", "after it", "+1 more", "+2 more", "cap", "steps left"):
        table.add_column(title, justify="right")
    table.add_column("fits?", overflow="fold", min_width=8)
    for answer in answers:
        table.add_row(
            f"{answer.site}, {answer.dataset} ({answer.composition})",
            *(_spend(epsilon) for epsilon in (answer.epsilon_now, *answer.epsilon_after)),
            f"{answer.cap:g}",
            f"{answer.steps_affordable:,}",
            answer.verdict,
            style=None if answer.num_runs and not answer.refusal else "bold",
        )
    return table


def _utility_table(utility: Sequence[UtilityPoint]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title="Measured utility, as given", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for title in ("epsilon", "mean", "sd"):
        table.add_column(title, justify="right")
    table.add_column("name", overflow="fold")
    for point in utility:
        table.add_row(f"{point.epsilon:g}", f"{point.mean:.4g}", f"{point.sd:.2g}", point.title)
    return table


def _number(value: float | None) -> str:
    """Return four digits, more for large whole numbers."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _spend(epsilon: float) -> str:
    import math

    from shared.privacy.statement import rounded_up

    return rounded_up(epsilon) if math.isfinite(epsilon) else "unbounded"


def _noise(value: float) -> str:
    """Return four decimals, rounded up, so that the epsilon beside it is an upper bound for the printed noise too."""
    import math

    return f"{math.ceil(value * 10_000 - 1e-7) / 10_000:.4f}"


# --- the figure ---


def draw(settings: Sequence[Setting], utility: Sequence[UtilityPoint] | None) -> bytes:
    """Return a PNG: epsilon against epochs, noise multiplier against epsilon, and the measured utility if there is any."""
    import io

    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 2 if utility is None else 3
    style = {
        "font.size": 10,
        "axes.edgecolor": "#9aa5b1",
        "axes.labelcolor": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlepad": 10,
        "grid.color": GRID,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "legend.handlelength": 3.2,
        "lines.linewidth": 1.8,
        "figure.constrained_layout.w_pad": 0.12,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.0 * panels, 4.4), dpi=160, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, panels)
        for place in axes:
            place.grid(visible=True)
        _draw_epochs(axes[0], settings)
        _draw_noise(axes[1], settings)
        if utility is not None:
            _draw_utility(axes[2], utility)
        delta = max(setting.delta for setting in settings)
        note = f"Epsilon: upper bound by PLD, one record added or removed, delta {delta:g}."
        note += " No measured utility was given." if utility is None else " Utility: as measured elsewhere."
        figure.supxlabel(note, x=0.01, ha="left", fontsize=9, color=MUTED)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": "silotune"})
    return buffer.getvalue()


def _draw_epochs(axes: Any, settings: Sequence[Setting]) -> None:
    from shared.privacy.planning import epsilon_by_steps

    longest = max(setting.epochs for setting in settings)
    kinds = list(dict.fromkeys((s.noise_multiplier, s.sample_rate) for s in settings))
    rates = len({rate for _, rate in kinds})
    for (sigma, rate), (colour, dash, _) in zip(_spread(kinds), LINE_STYLES, strict=False):
        curve = epsilon_by_steps(sigma, rate, most=max(1, round(longest / rate)), delta=settings[0].delta)
        label = f"noise {_noise(sigma)}" + (f", rate {rate:.4g}" if rates > 1 else "")
        axes.plot(
            [steps * rate for steps, _ in curve], [e for _, e in curve], color=colour, linestyle=dash, label=label
        )
    _draw_settings(axes, [(s.epochs, s.epsilon) for s in settings])
    axes.set(title="Epsilon against epochs", xlabel="Epochs", ylabel="Epsilon")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend()


def _draw_noise(axes: Any, settings: Sequence[Setting]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    from shared.privacy.planning import epsilon_by_noise

    least, most = (pick(setting.noise_multiplier for setting in settings) for pick in (min, max))
    kinds = list(dict.fromkeys((s.sample_rate, s.steps) for s in settings))
    rates = len({rate for rate, _ in kinds})
    for (rate, steps), (colour, dash, _) in zip(_spread(kinds), LINE_STYLES, strict=False):
        curve = epsilon_by_noise(rate, steps, least=least / 1.4, most=most * 1.6, delta=settings[0].delta)
        label = f"{_number(steps * rate)} epochs, {steps:,} steps" + (f", rate {rate:.4g}" if rates > 1 else "")
        axes.plot([e for e, _ in curve], [sigma for _, sigma in curve], color=colour, linestyle=dash, label=label)
    _draw_settings(axes, [(s.epsilon, s.noise_multiplier) for s in settings])
    axes.set(title="Noise multiplier against epsilon", xlabel="Epsilon (logarithmic)", ylabel="Noise multiplier")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=0)
    axes.legend()


def _draw_utility(axes: Any, utility: Sequence[UtilityPoint]) -> None:
    series = dict.fromkeys(point.title for point in utility)
    for index, title in enumerate(series):
        colour, dash, marker = LINE_STYLES[index % len(LINE_STYLES)]
        points = sorted((p for p in utility if p.title == title), key=lambda p: p.epsilon)
        axes.errorbar(
            [p.epsilon for p in points],
            [p.mean for p in points],
            yerr=[p.sd for p in points],
            color=colour,
            linestyle=dash,
            marker=marker,
            capsize=3,
            label=title,
        )
    metrics = {point.metric or point.name for point in utility}
    what = metrics.pop() if len(metrics) == 1 else "Mean"
    axes.set(title="Measured utility against epsilon", xlabel="Epsilon", ylabel=f"{what}, mean and one sd")
    axes.set_xlim(left=0)
    axes.legend()


def _draw_settings(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        linestyle="none",
        marker="o",
        markersize=5.5,
        markerfacecolor="white",
        markeredgecolor=INK,
        label="this plan" if len(points) == 1 else "points of the sweep",
        zorder=5,
    )


def _spread(kinds: list[Any]) -> list[Any]:
    """Return the first, the middle and the last, or all if there are no more."""
    if len(kinds) <= len(LINE_STYLES):
        return kinds
    return [kinds[0], kinds[len(kinds) // 2], kinds[-1]]
