"""Composition root: one `silotune` command; heavy modules are imported only by the command that needs them."""

from __future__ import annotations

import errno
import functools
import importlib
import importlib.util
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from shared.terminal import print_json

if TYPE_CHECKING:
    from shared.data.text_stream import GivenTexts, Skipped
    from shared.trust.signed_file import Signer

app = typer.Typer(
    name="silotune",
    help="Tune one language model together, privately: federated LoRA under differential privacy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the scenario, for example training.rounds=10."),
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Run folder; by default runs/NAME-DATE.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON line at the end, and nothing else on standard output.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]
RunArgument = Annotated[Path, typer.Argument(help="Run folder.")]
DelimiterOption = Annotated[
    str | None, typer.Option("--delimiter", help="Between CSV cells; a comma, or a tab in .tsv.")
]
EncodingOption = Annotated[str | None, typer.Option("--encoding", help="Of CSV, JSONL and text; utf-8 by default.")]
QuotingOption = Annotated[
    Literal["checked", "trusted", "none"] | None,
    typer.Option("--quoting", help="Of CSV: none takes quotes for plain characters; see data.train.quoting."),
]


@app.callback()
def _root(verbose: Annotated[bool, typer.Option("--verbose", help="Show log messages.")] = False) -> None:
    # No part of Silotune calls home, whatever else the environment says.
    os.environ["FLWR_TELEMETRY_ENABLED"], os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "0", "1"
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    if not verbose:
        _quiet_libraries()


@app.command()
def demo(
    out: OutOption = None,
    overrides: Overrides = None,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Eight sites tune a real BERT on movie reviews under differential privacy, with baselines and a report."""
    from simulations.commands import simulate_builtin

    simulate_builtin("demo", out=out, overrides=overrides or [], resume=resume, as_json=as_json)


@app.command()
def simulate(
    scenario: Annotated[Path, typer.Argument(help="Scenario file (TOML).")],
    out: OutOption = None,
    overrides: Overrides = None,
    resume: ResumeOption = False,
    stop_after: Annotated[
        int | None, typer.Option("--stop-after", min=1, help="Stop after this round; continue with --resume.")
    ] = None,
    folds: Annotated[
        int | None, typer.Option("--folds", metavar="K", help="k-fold cross-validation: simulation.folds=K.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a scenario: many sites on one machine, through the code that real sites run."""
    from simulations.commands import simulate_file

    changes = [*(overrides or []), *([] if folds is None else [f"simulation.folds={folds}"])]
    simulate_file(scenario, out=out, overrides=changes, resume=resume, stop_after=stop_after, as_json=as_json)


@app.command()
def federation(
    scenario: Annotated[Path | None, typer.Argument(help="Scenario file; the demo by default.")] = None,
    out: OutOption = None,
    overrides: Overrides = None,
    as_json: JsonOption = False,
) -> None:
    """A coordinator and three sites as separate processes on this machine, over gRPC and TLS with authentication."""
    from simulations.federation.command import run_federation

    run_federation(scenario, out=out, overrides=overrides or [], as_json=as_json)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="Sweep file, or scenario file with --axis (TOML).")],
    axes: Annotated[
        list[str] | None,
        typer.Option(
            "--axis",
            metavar="KEY=VALUES",
            help="Vary one key: privacy.epsilon=1,3,8,inf. Repeatable; also LOW:HIGH[:log].",
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option(metavar="N,N", help="Repeat every setting under these seeds.")] = None,
    search: Annotated[str | None, typer.Option(help="grid: every combination; optuna: at each budget by TPE.")] = None,
    trials: Annotated[int | None, typer.Option(help="Settings that Optuna asks for at each budget.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder; by default sweeps/NAME-DATE.")] = None,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the sweep in --out; finished trials stay.")
    ] = False,
    account_tuning: Annotated[
        bool, typer.Option("--account-tuning", help="Private data: a random number of trials, only the best released.")
    ] = False,
    mean_trials: Annotated[float | None, typer.Option(help="Of --account-tuning: expected number of trials.")] = None,
    trial_distribution: Annotated[
        str | None, typer.Option(help="Of --account-tuning: geometric (default), logarithmic or poisson.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a scenario under many settings and draw what accuracy each privacy budget buys."""
    from simulations.sweep.commands import run_sweep

    run_sweep(
        file,
        axes=axes or [],
        seeds=seeds,
        search_by=search,
        trials=trials,
        overrides=overrides or [],
        out=out,
        resume=resume,
        account_tuning=account_tuning,
        mean_trials=mean_trials,
        trial_distribution=trial_distribution,
        as_json=as_json,
    )


@app.command("small-gpt2")
def small_gpt2() -> None:
    """Train the small GPT-2 of the built-in scenarios on public text, once, and print its folder."""
    from simulations.data.small_gpt2 import small_gpt2 as train_once

    typer.echo(train_once())


@app.command()
def predict(
    run: RunArgument,
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts or images to label; standard input, one a line, if none is given.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="Label the rows of this file: CSV, JSONL, Parquet, or one text a line."),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option("--text", metavar="COLUMN", help="Of --file: the column of the texts; by default text."),
    ] = None,
    delimiter: DelimiterOption = None,
    encoding: EncodingOption = None,
    quoting: QuotingOption = None,
    others: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            metavar="RUN",
            help="Another run, repeatable: average their outputs. Privacy is then the composition of all runs.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per text.")] = False,
) -> None:
    """Label texts or images (pixel values) with what a run trained; find entities, rate, match pairs (text, tab, text)."""
    from server.runs.folder import load_job
    from shared.job.compute import ComputeConfig
    from shared.runtime.ensembles import Ensemble, Member
    from shared.runtime.inference import load_tuned
    from shared.runtime.inference import predict as label
    from shared.tasks import task_of

    job = load_job(run)
    reading = _asked(text=column, delimiter=delimiter, encoding=encoding, quoting=quoting)
    given = _given(texts, file, reading)
    members = [Member(run=run, job=job), *(Member(run=other, job=load_job(other)) for other in others or [])]
    if others:
        predictions = Ensemble(members, ComputeConfig()).predict(given.texts)
    else:
        predictions = label(load_tuned(run, job, ComputeConfig()), given.texts)
    for row, prediction in zip(given.rows, predictions, strict=True):
        if as_json:
            print_json({"row": row, **prediction})
        else:
            typer.echo(task_of(job).shown(prediction))
    _tell_left_out(given.left_out)


def _asked(**options: str | None) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _given(texts: list[str] | None, file: Path | None, reading: dict[str, Any]) -> GivenTexts:
    """Return the texts of the arguments, of a file or of standard input.

    Raises:
        ConfigError, DataError: as their texts say.
    """
    from shared.data.text_stream import TextFormat, file_texts, given_texts
    from shared.errors import ConfigError

    if file is not None:
        if texts:
            raise ConfigError("--file and texts were both given; give one of them.")
        return file_texts(file, TextFormat(**reading))
    if reading:
        raise ConfigError(f"--{next(iter(reading))} says how --file is read, but no --file was given.")
    return given_texts(texts, sys.stdin.buffer.read)


def _tell_left_out(skipped: Skipped) -> None:
    """Say on standard error which lines have no answer."""
    from shared.data.text_stream import left_out

    for line in left_out(skipped):
        typer.echo(line, err=True)


@app.command()
def ensemble(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, at least two.")],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Public evaluation records; by default those submitted with the first run."),
    ] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--column", metavar="ROLE=NAME", help="Column of --data, such as text=review.")
    ] = None,
    scenario: Annotated[
        Path | None,
        typer.Option("--scenario", help="The evaluation records of a scenario file, for runs of a simulation."),
    ] = None,
    delimiter: DelimiterOption = None,
    encoding: EncodingOption = None,
    quoting: QuotingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the average of several runs' outputs beside each of them, on public records.

    Predict with it by `silotune predict RUN --with RUN`. Records that several runs trained on are protected with the
    composition of the runs, which is printed.
    """
    from server.reports.ensembles import measure_ensemble
    from shared.errors import ConfigError

    records = None
    reading = _asked(delimiter=delimiter, encoding=encoding, quoting=quoting)
    if reading and data is None:
        raise ConfigError(f"--{next(iter(reading))} says how --data is read, but no --data was given.")
    if scenario is not None:
        from simulations.scenario import load_scenario

        if data is not None or columns:
            raise ConfigError("--scenario and --data both name evaluation records; give one of them.")
        records = load_scenario(scenario).load_data()[1]
    measure_ensemble(runs, records=records, data=data, columns=columns or [], reading=reading, as_json=as_json)


@app.command()
def generate(
    run: RunArgument,
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts to continue, or prompts; standard input, one a line, if none is given."),
    ] = None,
    num_sequences: Annotated[int, typer.Option("--num", help="Number of continuations.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 40,
    temperature: Annotated[float, typer.Option(help="0 is greedy; higher is more varied.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest tokens; 0 is all.")] = 50,
    top_p: Annotated[float, typer.Option(help="And among the likeliest with this probability together.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes the choice repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per continuation.")] = False,
) -> None:
    """Continue texts, or answer prompts, with the GPT-2 adapter of a run; of several the share of different words is told."""
    from server.runs.folder import load_job
    from shared.data.text_stream import given_texts
    from shared.job.compute import ComputeConfig
    from shared.runtime.inference import Decoding, distinct, generate_all, load_tuned
    from shared.tasks import task_of

    job = load_job(run)
    decoding = Decoding(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        num_sequences=num_sequences,
        seed=seed,
    )
    given = given_texts(texts, sys.stdin.buffer.read)
    found = generate_all(load_tuned(run, job, ComputeConfig()), given.texts, decoding)
    for row, text, continuations in zip(given.rows, given.texts, found, strict=True):
        for continuation in continuations:
            prediction = {"text": text, "continuation": continuation}
            if as_json:
                print_json({"row": row, **prediction})
            else:
                typer.echo(task_of(job).shown(prediction))
    every = [continuation for continuations in found for continuation in continuations]
    if len(every) > 1:
        shares = ", ".join(f"distinct-{n} {distinct(every, n):.3f}" for n in (1, 2))
        typer.echo(f"{len(every)} continuations: {shares}", err=True)
    _tell_left_out(given.left_out)


def write_report(
    run: RunArgument,
    report_format: Annotated[
        str | None,
        typer.Option("--format", help="html or pdf: the compliance report; without it, report.html of the run anew."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File; by default RUN/compliance-report.FORMAT.")] = None,
    ledgers: Annotated[
        list[Path] | None, typer.Option("--ledger", help="Export of a site's ledger; may be repeated.")
    ] = None,
    sign: Annotated[
        Path | None, typer.Option("--sign", help="Who signs: a coordinator's or a site's folder, or a key file.")
    ] = None,
) -> None:
    """Write the compliance report of a run (--format), or its report.html anew. The word "write" can be left out."""
    from shared.errors import ConfigError

    if report_format is None:
        if out or ledgers or sign:
            raise ConfigError(
                "--out, --ledger and --sign are for the compliance report; add --format html or --format pdf."
            )
        from server.reports.run import write_report as write_run_report

        typer.echo(write_run_report(run))
        return
    if report_format not in ("html", "pdf"):
        raise ConfigError(f"--format is {report_format!r}; expected html or pdf.")
    from server.reports.compliance import load_account, write_compliance_report

    accounts = [load_account(path) for path in ledgers or []]
    if any(run.glob("sites/*/home/site.toml")):
        from simulations.running.accounts import simulated_accounts

        accounts += simulated_accounts(run, without={account.export.site for account in accounts})
    signer = _signer(sign) if sign is not None else None
    chosen: Literal["html", "pdf"] = "pdf" if report_format == "pdf" else "html"
    written = write_compliance_report(run, chosen, out=out, accounts=accounts, signer=signer)
    typer.echo(written)
    if signer is not None:
        typer.echo(f"signed with {signer.verify_key.text}: {written}.sig.json", err=True)


def sign_report(
    file: Annotated[Path, typer.Argument(help="The report.")],
    signer: Annotated[Path, typer.Argument(help="Who signs: a coordinator's or a site's folder, or a key file.")],
) -> None:
    """Sign a report that was made elsewhere; a site's key never leaves the site, so the report goes there."""
    from shared.tools.report_commands import sign_report as sign

    typer.echo(sign(file, _signer(signer)))


def _signer(place: Path) -> Signer:
    """Return who signs: the owner of a folder, or whoever holds a key file."""
    from shared.errors import TrustError
    from shared.trust.keystore import passphrase_from_environment
    from shared.trust.signed_file import Signer
    from shared.trust.signing import load_signing_key

    passphrase = passphrase_from_environment()
    if not place.is_dir():
        return Signer(role="key holder", name=place.stem, key=load_signing_key(place, passphrase))
    if (place / "coordinator.toml").exists():
        from server.store.home import CoordinatorHome

        return CoordinatorHome(place).signer(passphrase)
    if (place / "site.toml").exists():
        from client.site.home import SiteHome

        return SiteHome(place).signer(passphrase)
    raise TrustError(f"{place} is no folder of a coordinator or a site; give one of these, or a key file.")


@app.command()
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
    as_json: JsonOption = False,
) -> None:
    """Put the claimed epsilon of a run to the test; the verdict is consistent, violated or inconclusive."""
    from simulations.audit.command import audit_run

    audit_run(
        run,
        tier=tier,
        canaries=canaries,
        num_canaries=num_canaries,
        trainings=trainings,
        shadows=shadows,
        alpha=alpha,
        seed=seed,
        as_json=as_json,
    )


@app.command()
def settings() -> None:
    """Print every key of a scenario file with its default and meaning, as Markdown (docs/settings.md)."""
    from simulations.running.settings import settings_table

    typer.echo(settings_table())


@app.command()
def version() -> None:
    """Print the version."""
    from shared.version import silotune_version

    typer.echo(silotune_version())


def _mount(module: str, name: str) -> None:
    """Mount a side's commands if this installation has that side: a site's image holds no `server`."""
    if importlib.util.find_spec(module.partition(".")[0]) is not None:
        app.add_typer(getattr(importlib.import_module(module), name))


@functools.cache
def command_line() -> typer.Typer:
    """Return the whole command line: `app` and the commands in modules of their own.

    All these modules are light; what needs PyTorch is imported by the command that needs it.
    """
    _mount("client.commands", "site_app")
    _mount("server.commands", "coordinator_app")
    _mount("simulations.data.commands", "data_app")
    _mount("shared.tools.pki_commands", "pki_app")
    _mount("shared.tools.audit_log_commands", "audit_log_app")
    report_app = importlib.import_module("shared.tools.report_commands").report_app
    report_app.command("write")(write_report)
    report_app.command("sign")(sign_report)
    app.add_typer(report_app)
    app.command("plan")(importlib.import_module("shared.tools.plan.commands").plan)
    app.command("monitor")(importlib.import_module("shared.tools.monitor.commands").monitor)
    app.command("explain")(importlib.import_module("shared.tools.explain.commands").explain)
    app.command("deidentify")(importlib.import_module("shared.tools.deidentify_command").deidentify)
    if importlib.util.find_spec("simulations") is not None:
        app.command("new")(importlib.import_module("simulations.new_commands").new)
    return app


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; a user's mistake ends with a message and a status, never with a traceback."""
    from shared.errors import SilotuneError
    from shared.stopping import Stopped, signal_of, terminable

    try:
        with terminable():
            _run(arguments)
    except KeyboardInterrupt as stop:
        stopped = Stopped("start the command again to do it from the beginning.", number=signal_of(stop))
        _say(str(stopped))
        raise SystemExit(stopped.exit_code) from None
    except SilotuneError as error:
        _say(str(error) if isinstance(error, Stopped) else f"error: {error}")
        raise SystemExit(error.exit_code) from None
    except (OSError, RuntimeError) as error:
        if (refused := _refused_path(error)) is None:
            raise
        logging.getLogger(__name__).info("where it happened:", exc_info=True)
        _say(f"error: {refused}. Check the path, this account's rights and the space on its disk.")
        raise SystemExit(1) from None
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("client", "server", "simulations"):
            raise
        _say(
            f"error: this command needs the part {error.name.partition('.')[0]!r} of Silotune, which this installation does not "
            "have: images of sites and coordinators hold only what they need. Run it from a full installation."
        )
        raise SystemExit(1) from None


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


def _run(arguments: list[str] | None) -> None:
    try:
        command_line()(args=arguments, standalone_mode=True)
    except SystemExit as end:
        # typer ends with a status of its own where it meets Ctrl-C; the interruption itself is what `main` explains.
        cause = end.__context__.__cause__ if end.__context__ is not None else None
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(text)


def _quiet_libraries() -> None:
    """Silence progress bars and warnings of libraries that say nothing a user could act on."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.simplefilter("ignore")


if __name__ == "__main__":
    main()
