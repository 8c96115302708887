"""`silotune.plan`: what a run costs and what a budget buys, before anything is trained; the answers of `silotune plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from shared.errors import ConfigError
from shared.job.job import Job
from shared.privacy.ledger_export import LedgerExport, load_export
from shared.tools.plan.answering import Answer, plan_job, plan_numbers
from shared.tools.plan.planning import Question, Setting
from shared.tools.plan.sharing import Sharing
from silotune.arguments import instance_of, path_of
from silotune.showing import Figure, Shown, quietly

if TYPE_CHECKING:
    from rich.console import Console

    from shared.tools.plan.affordability import SiteAnswer
    from simulations.scenario import Scenario


class Plan(Shown):
    """A plan: `print` shows it as `silotune plan` does, with its warnings and what its numbers mean.

    Attributes:
        settings: the plan, or one for each value of a sweep: noise_multiplier, sample_rate, steps, epsilon (an upper bound for
            exactly these), delta.
        sites: of each ledger what is spent, what is left, and whether the run fits.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.settings: tuple[Setting, ...] = tuple(answer.planned.settings)
        self.sites: tuple[SiteAnswer, ...] = tuple(found for _, found in answer.planned.sites)

    @property
    def epsilon(self) -> float:
        """Epsilon of the plan, of a sweep the largest; of shared noise that against the coordinator and those who collude."""
        shares = self._answer.planned.shares
        return max(found.epsilon for found in self.settings) if shares is None else shares.together.epsilon

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers and warnings, as `silotune plan --json` prints them (docs/planning.md)."""
        return self._answer.document()

    def _show(self, console: Console) -> None:
        self._answer.print(console)

    def figure(self) -> Figure:
        """Return the plan's curves as a PNG: epsilon against epochs, noise against epsilon."""
        with quietly():
            return Figure(self._answer.figure(), "image/png")


def plan(
    scenario: Scenario | Job | None = None,
    *,
    records: int | None = None,
    unit: Literal["record", "patient", "customer"] | None = None,
    batch_size: int | None = None,
    sample_rate: float | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    noise_multiplier: float | None = None,
    epsilon: float | None = None,
    delta: float | None = None,
    parameters: int | None = None,
    sites: int | None = None,
    colluding: int | None = None,
    epsilon_alone: float | None = None,
    spare_attempts: int | None = None,
    sweep: str | None = None,
    ledgers: Sequence[LedgerExport | str | PathLike[str]] = (),
    site_sizes: Mapping[str, int] | None = None,
) -> Plan:
    """Plan the privacy of a scenario, or of numbers: give all but one of batch, epochs, noise and epsilon, and it is found.

    Args:
        scenario: a scenario, or its job; beside it only `records`, `parameters`, `ledgers` and `site_sizes` may be given.
        records: number of records, or of persons if `unit` says so; public.
        unit: what is protected, of numbers; a job says it itself.
        batch_size, sample_rate: expected records in a step, or their share.
        epochs, steps: expected passes over the records, or noisy steps.
        noise_multiplier: in units of the clipping norm.
        epsilon, delta: the most that may be spent.
        parameters: trainable ones, to judge the noise.
        sites, colluding, epsilon_alone, spare_attempts: of sites that share the noise.
        sweep: vary one number, such as "epsilon=0.5,1,3,8" or "epochs=1:20".
        ledgers: exports of sites' ledgers (`Run.ledgers`, or files of `silotune site ledger HOME --export`): can they afford it?
        site_sizes: declared records of each site by name: who brings the noise?

    Raises:
        ConfigError: if a number is out of range, too few or too many are given, or nothing fits.
        LedgerError: if a file is no export.
    """
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
    sharing = Sharing.asked(sites, colluding, epsilon_alone, spare_attempts)
    if scenario is None:
        if ledgers or site_sizes:
            raise ConfigError("ledgers and site_sizes speak of a job; give a scenario before them.")
        planned = plan_numbers(question, sweep, sharing)
        return Plan(Answer(planned=planned, unit=unit or "record", sweep=sweep))
    if not isinstance(scenario, Job):
        from simulations.scenario import Scenario

        how = "Scenario.load(path) reads a scenario file; a plan of numbers names them, such as epsilon=3"
        scenario = instance_of(scenario, Scenario, "scenario", how).job
    job = scenario
    if sharing is not None or sweep is not None or unit is not None:
        raise ConfigError("sites, sweep and unit are for a plan of numbers; of a scenario change the settings.")
    exports = {}
    for number, ledger in enumerate(ledgers, start=1):
        found = ledger if isinstance(ledger, LedgerExport) else load_export(path_of(ledger, f"ledger {number}"))
        exports[f"ledger {number} ({found.site})" if isinstance(ledger, LedgerExport) else str(ledger)] = found
    with quietly():
        planned = plan_job(job, question, exports)
    return Plan(Answer(planned=planned, unit=job.privacy.unit, job=job, site_sizes=site_sizes))
