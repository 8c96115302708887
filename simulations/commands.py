"""`silotune demo`, `simulate`, `federation`, `sweep`, `settings` and `small-gpt2`; what they do is in the rooms below."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.errors import ConfigError, RunError
from shared.options import (
    EnergyOption,
    HourPriceOption,
    JsonAtEndOption,
    KwhPriceOption,
    OutOption,
    OverridesOption,
    TrackOption,
    TrackWeightsOption,
    WattsOption,
)

if TYPE_CHECKING:
    from simulations.scenario import Scenario
    from simulations.sweep.selection import NumTrials

ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]


def demo(
    out: OutOption = None,
    overrides: OverridesOption = None,
    resume: ResumeOption = False,
    as_json: JsonAtEndOption = False,
) -> None:
    """Eight sites tune a real BERT on movie reviews under differential privacy, with baselines and a report."""
    from simulations.scenario import builtin_scenario

    scenario = builtin_scenario("demo", overrides or [])
    _check_resume(resume, out, "run")
    from simulations.simulating import run_scenario  # slow to import, so mistakes are told before

    run_scenario(scenario, out or _new_folder("run", scenario.name), resume=resume, as_json=as_json)


def simulate(
    scenario: Annotated[Path, typer.Argument(help="Scenario file (TOML), or the name of one that ships: demo.")],
    out: OutOption = None,
    overrides: OverridesOption = None,
    resume: ResumeOption = False,
    stop_after: Annotated[
        int | None, typer.Option("--stop-after", min=1, help="Stop after this round; continue with --resume.")
    ] = None,
    folds: Annotated[
        int | None, typer.Option("--folds", metavar="K", help="k-fold cross-validation: simulation.folds=K.")
    ] = None,
    track: TrackOption = None,
    track_weights: TrackWeightsOption = False,
    energy: EnergyOption = False,
    price_per_kwh: KwhPriceOption = None,
    price_per_hour: HourPriceOption = None,
    cpu_watts: WattsOption = None,
    as_json: JsonAtEndOption = False,
) -> None:
    """Run a scenario: many sites on one machine, through the code that real sites run."""
    from simulations.scenario import load_scenario

    changes = [*(overrides or []), *([] if folds is None else [f"simulation.folds={folds}"])]
    loaded = load_scenario(scenario, changes)
    _check_resume(resume, out, "run")
    from server.energy import energy_settings
    from server.tracking import Watched
    from simulations.simulating import run_scenario  # slow to import, so mistakes are told before

    counted = energy_settings(energy, price_per_kwh=price_per_kwh, price_per_hour=price_per_hour, cpu_watts=cpu_watts)
    watched = Watched.of(track or [], weights=track_weights, energy=counted)
    watched.require_times_told(loaded.job)
    folder = out or _new_folder("run", loaded.name)
    run_scenario(loaded, folder, resume=resume, stop_after=stop_after, as_json=as_json, watched=watched)


def federation(
    scenario: Annotated[Path | None, typer.Argument(help="Scenario file; the demo by default.")] = None,
    out: OutOption = None,
    overrides: OverridesOption = None,
    as_json: JsonAtEndOption = False,
) -> None:
    """A coordinator and sites as separate processes on this machine, over gRPC and TLS with authentication.

    Three sites, unless they add shares of the noise: then as many as the scenario has, for the noise is planned for them.
    """
    from simulations.scenario import builtin_scenario, load_scenario

    def load(changes: list[str]) -> Scenario:
        return load_scenario(scenario, changes) if scenario else builtin_scenario("demo", changes)

    loaded = load(overrides or [])
    if not loaded.job.privacy.shares_noise:
        loaded = load(["partition.num_sites=3", "federation.min_sites=3", *(overrides or [])])
    from simulations.federation.run import run_federation  # slow to import, so mistakes are told before

    run_federation(loaded, out, as_json=as_json)


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
    overrides: OverridesOption = None,
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
    track: TrackOption = None,
    track_weights: TrackWeightsOption = False,
    as_json: JsonAtEndOption = False,
) -> None:
    """Run a scenario under many settings and draw what accuracy each privacy budget buys."""
    from simulations.sweep.spec import load_sweep

    _check_resume(resume, out, "sweep")
    loaded = load_sweep(file, axes=axes or [], seeds=seeds, search=search, trials=trials, overrides=overrides or [])
    if account_tuning and track:
        raise ConfigError(
            "--track is not for --account-tuning: its bound needs hidden how many trials there are, and what all but the best "
            "came to. Leave --track out."
        )
    if account_tuning:
        law = _law(mean_trials, trial_distribution)
    elif mean_trials is None and trial_distribution is None:
        law = None
    else:
        raise ConfigError("--mean-trials and --trial-distribution are for --account-tuning; add it or leave them out.")
    from server.tracking import Watched
    from simulations.sweep.run import run_sweep  # slow to import, so mistakes are told before

    watched = Watched.of(track or [], weights=track_weights)
    watched.require_times_told(loaded.scenario(loaded.first(), loaded.seeds[0]).job)
    folder = out or _new_folder("sweep", loaded.name)
    run_sweep(loaded, folder, law=law, resume=resume, as_json=as_json, watched=watched)


def settings() -> None:
    """Print every key of a scenario file with its default and meaning, as Markdown (docs/settings.md)."""
    from simulations.running.settings import settings_table

    typer.echo(settings_table())


def small_gpt2() -> None:
    """Train the small GPT-2 of the built-in scenarios on public text, once, and print its folder."""
    from simulations.data.small_gpt2 import small_gpt2 as train_once

    typer.echo(train_once())


def _check_resume(resume: bool, out: Path | None, kind: str) -> None:
    if resume and out is None:
        raise RunError(f"--resume needs --out, the folder of the {kind} to continue.")


def _new_folder(kind: str, name: str) -> Path:
    return Path(f"{kind}s") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _law(mean: float | None, distribution: str | None) -> NumTrials:
    from simulations.sweep.selection import DISTRIBUTIONS, NumTrials

    if mean is None:
        raise ConfigError("--account-tuning needs --mean-trials, the expected number of trials, for example 10.")
    for known in DISTRIBUTIONS:
        if known == (distribution or "geometric"):
            return NumTrials(distribution=known, mean=mean)
    raise ConfigError(f"--trial-distribution is {distribution!r}; expected one of {', '.join(DISTRIBUTIONS)}.")
