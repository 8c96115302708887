"""`silotune.simulate`, `silotune.load` and what they return: a run, with its report, its promise and its model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

import shared.link  # noqa: F401  (limits TLS to 1.3 before Flower imports grpc)
from server.records.privacy import AnyRecord
from server.records.results import AuditRecord, read_audits
from server.records.rounds import RoundRecord
from server.reports.run.comparison import comparison_row, title_of
from server.reports.run.formats import format_epsilon, metric_title
from server.reports.run.reading import read_arm, read_run
from server.reports.run.run_data import Arm, RunData, with_real_names
from shared import terminal
from shared.epsilons import rounded_up
from shared.errors import RunError
from shared.files.json_files import read_if_there
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.job_file import load_job
from shared.privacy.ledger_export import LedgerExport
from shared.privacy.statement import Statement
from shared.runtime.export.folder import MODEL_FILE, ModelFolder
from silotune.arguments import instance_of, path_of, path_or_none
from silotune.showing import Figure, Shown, quietly

if TYPE_CHECKING:
    from rich.console import Console

    from shared.runtime.export.exported import Exported
    from shared.runtime.runtime import Runtime
    from shared.tasks.base import Prediction
    from simulations.scenario import Scenario


class Run(Shown):
    """A run, finished or not, or a model that was exported from one.

    Made by `simulate` and `load`. `print` shows its trainings side by side, and so does a notebook. An exported model has no
    report, rounds, figures or baselines: those stay in the run's folder.

    Attributes:
        folder: where it is; docs/simulation.md says what lies in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def job(self) -> Job:
        """The settings that it was trained with."""
        return load_job(self.folder)

    @property
    def exported(self) -> bool:
        """Whether this is an exported model and no run."""
        return os.path.lexists(self.folder / MODEL_FILE)

    @property
    def finished(self) -> bool:
        """Whether training is over; one that was stopped goes on by `simulate(..., resume=True)`."""
        return self.exported or self._data.complete

    @property
    def report(self) -> Path:
        """The report, one HTML file that loads nothing; `RunError` if there is none (yet)."""
        path = self._of_a_run("report").folder / "report.html"
        if not path.exists():
            raise RunError(f"{path} is not there; expected it once the run is over. `silotune report` writes it anew.")
        return path

    @property
    def epsilon(self) -> float | None:
        """The largest epsilon that any site promises for the whole run, rounded up to four decimals.

        Composed from the executed steps, of a run that was stopped from those so far; a request that was never answered counts
        as executed. Under central DP that of the coordinator, of shared noise that against the coordinator and those who may
        collude. None if of one site none may be stated.
        """
        stated = [site.epsilon_stated for site in self._arm.sites]
        known = [epsilon for epsilon in stated if epsilon is not None]
        return float(rounded_up(max(known), 4)) if known and len(known) == len(stated) else None

    @property
    def delta(self) -> float | None:
        """The delta of `epsilon`."""
        return self._arm.delta

    @property
    def statement(self) -> str:
        """The privacy statement in words, with what it does not cover; of a run that promises nothing it says that."""
        found = read_if_there(self.folder / "statement.json", Statement)
        return "No privacy is stated for this run." if found is None else found.text

    @property
    def metrics(self) -> dict[str, float | None]:
        """The final model's metrics on the public evaluation records; empty before there is one, None where undefined."""
        return {} if self._arm.evaluation is None else dict(self._arm.evaluation.metrics)

    @property
    def baselines(self) -> dict[str, dict[str, float | None]]:
        """The same of each baseline, by its name, such as "central-dp"."""
        found = self._of_a_run("baselines")._data.baselines
        return {arm.name: dict(arm.evaluation.metrics) for arm in found if arm.evaluation is not None}

    @property
    def rounds(self) -> tuple[RoundRecord, ...]:
        """Every round so far: metrics on public records, epsilon_max, sites, bytes_up, bytes_down, seconds."""
        return self._of_a_run("rounds")._arm.rounds

    @property
    def sites(self) -> tuple[AnyRecord, ...]:
        """Who released under a guarantee, with all that is needed to recompute it: `privacy.json` of each site."""
        return self._arm.sites

    @property
    def audits(self) -> tuple[AuditRecord, ...]:
        """What audits found: claim, lower_bound, ceiling, verdict."""
        return read_audits(self.folder)

    def ledgers(self) -> tuple[LedgerExport, ...]:
        """Return the account of every simulated site, its chain verified, for `plan(..., ledgers=...)`.

        Raises:
            LedgerError: if the chain of one is broken.
        """
        from simulations.running.accounts import simulated_accounts

        return tuple(account.export for account in simulated_accounts(self._of_a_run("ledgers").folder))

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """Return what the model says of each text, in order: a dict with the keys of `silotune predict --json`.

        Args:
            texts: for pairs both texts with a tab between them, for images the pixel values with spaces between them.

        Raises:
            ConfigError: if the model continues texts; see `generate`.
            DataError: naming the text that is blank or does not fit the task.
        """
        from shared.runtime.inference import predict

        with quietly():
            return predict(self._model(), _given(texts))

    def generate(
        self,
        texts: Sequence[str],
        *,
        num_sequences: int = 1,
        max_new_tokens: int = 40,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> list[list[str]]:
        """Return `num_sequences` continuations of each text, or answers to it, as `silotune generate` does.

        Raises:
            ConfigError: if the model labels texts, see `predict`; or if a number is out of range.
        """
        from shared.runtime.inference import Decoding, generate_all

        decoding = Decoding(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            num_sequences=num_sequences,
            seed=seed,
        )
        with quietly():
            return generate_all(self._model(), _given(texts), decoding)

    def figures(self) -> dict[str, Figure]:
        """Return the figures of the report that have something to show, by name.

        "rounds" and "spent" are the metric against rounds and against epsilon, "sites" what each site spent; further ones follow
        from the task, such as "roc", "reliability", "pairs".
        """
        from server.reports.run.figures import figures

        data = with_real_names(self._of_a_run("figures")._data)
        found: dict[str, Figure] = {}
        with quietly():
            drawn = figures(data, [title_of(arm) for arm in data.arms])
        for name, figure in drawn.items():
            if isinstance(figure, list):
                found |= {
                    name if n == 1 else f"{name}-{n}": Figure.of_svg(str(one)) for n, one in enumerate(figure, start=1)
                }
            elif figure is not None:
                found[name] = Figure.of_svg(str(figure))
        return found

    def table(self) -> Table:
        """Return the trainings side by side, as a table of rich."""
        data = self._of_a_run("table")._data
        table = Table(box=box.SIMPLE_HEAD)
        for title in ("training", metric_title(data.primary_metric), "95 % interval", "gap", "epsilon", "rounds"):
            table.add_column(title, justify="left" if title == "training" else "right")
        for arm in data.arms:
            row = comparison_row(data, title_of(arm), arm)
            table.add_row(
                row["title"] + (" (diverged)" if row["diverged"] else ""),
                row["value"],
                row["interval"] or "",
                "" if row["is_run"] else f"{row['gap']} {row['verdict']}".strip(),
                format_epsilon(row["epsilon"]) if row["private"] and not row["void"] else "none",
                f"{row['rounds_done']} of {row['rounds_planned']}",
            )
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def _show(self, console: Console) -> None:
        if self.exported:
            console.print(f"{self.job.name}: a model for {self.job.task.kind}, exported from a run")
            return
        console.print(f"{self.job.name}: {'finished' if self.finished else self._data.run.status}")
        console.print(self.table())

    @cached_property
    def _arm(self) -> Arm:
        return read_arm(self.folder, name="federated")

    @cached_property
    def _data(self) -> RunData:
        return read_run(self.folder)

    def _model(self) -> Runtime | Exported:
        """Return the model, ready to use now: runs of one backbone share a runtime, so the adapter is put in anew each time."""
        from shared.runtime.inference import load_model

        return load_model(self.folder, ComputeConfig())

    def _of_a_run(self, what: str) -> Run:
        """Return this run; raise `RunError` if it is an exported model."""
        if self.exported:
            raise RunError(f"{self.folder} is an exported model, which has no {what}; load the run that it came from.")
        return self


def simulate(
    scenario: Scenario,
    out: str | PathLike[str],
    *,
    resume: bool = False,
    stop_after: int | None = None,
    progress: bool = True,
) -> Run:
    """Run a scenario with its baselines, audit and report, through the code that real sites run, as `silotune simulate` does.

    Args:
        out: the run folder, new or empty; with `resume` that of the run.
        resume: continue what is there, bit for bit.
        stop_after: the round after which the run is left for later.
        progress: print a line a round, in a terminal a live view.

    Returns:
        The run. Whatever stops it, an interrupt included, what was durable stays and can be resumed.

    Raises:
        RunError: if the folder holds something else, or a run already and `resume` is False.
        ConfigError, DataError, ModelError, PrivacyError: saying what will not do.
    """
    from simulations import scenario as scenario_files
    from simulations.simulating import simulate as run_scenario

    how = "Scenario.load(path) reads a scenario file, Scenario.from_csv(path, ...) makes one for records"
    scenario, folder = instance_of(scenario, scenario_files.Scenario, "scenario", how), path_of(out, "out")
    if stop_after is not None and stop_after < 1:
        raise RunError(f"stop_after is {stop_after}; expected the number of a round, 1 or more.")
    with quietly():
        run_scenario(scenario, folder, terminal.console(quiet=not progress), resume=resume, stop_after=stop_after)
    return Run(folder)


def load(
    reference: str | PathLike[str],
    *,
    registry: str | PathLike[str] | None = None,
    policy: str | PathLike[str] | None = None,
) -> Run:
    """Return a run or a model: the folder of a run, of an exported model, or NAME, NAME@ALIAS or NAME:N of a registry.

    Args:
        reference: a version of a registry is verified first.
        registry, policy: folder of the registry and its policy file; by default those of `silotune models`.

    Raises:
        RunError, ModelError: if the folder holds neither.
        ConfigError, RegistryError, TrustError: if a registry has no such version, it is retired, or does not verify.
    """
    from server.registry.references import verified_folder

    place, rules = path_or_none(registry, "registry"), path_or_none(policy, "policy")
    path_of(reference, "reference")
    folder = verified_folder(os.fspath(reference), place, rules)
    found = Run(folder)
    if found.exported:
        ModelFolder.read(folder)
    _ = found.job
    return found


def _given(texts: Sequence[str]) -> list[str]:
    """Return the texts, checked as those of a command line; a single one, which is a sequence of letters, is meant as one.

    Raises:
        DataError: if one is blank or no text.
    """
    from shared.data.text_stream import given_texts

    given = [texts] if isinstance(texts, str) else list(texts)
    return list(given_texts(given, lambda _: b"").texts) if given else []
