"""What was asked of the planner, and its answer: the work of `silotune plan`, which prints it, and of `silotune.plan`.

Every epsilon that is answered is an upper bound, by `shared.tools.plan.planning`. Expected utility is drawn from measurements
that the user gives, and never made up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from shared.epsilons import delta_rounded_up, noise_rounded_down, rate_rounded_up, rounded_up
from shared.errors import ConfigError, SilotuneError
from shared.files.atomic import write_bytes, write_json
from shared.files.json_files import finite_or_none
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.parsing import nearest
from shared.numbers import read_number
from shared.privacy.ledger_export import LedgerExport
from shared.privacy.statement import relation
from shared.site_weights import noise_warnings, site_shares
from shared.tools.plan.affordability import can_afford
from shared.tools.plan.figure import UtilityPoint, draw
from shared.tools.plan.planning import Question, Setting, check_delta_for, check_statable, solve
from shared.tools.plan.sharing import SharesPlan, Sharing, shares_of_job, solve_shares
from shared.tools.plan.tables import Planned, print_answers, print_shares

FORMAT = "silotune-plan/1"
MAX_POINTS = 100
_INTEGERS = frozenset({"records", "batch_size", "steps", "parameters"})


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A plan with what was asked.

    Attributes:
        unit: what is protected.
        job: whose plan it is; None of numbers.
        sweep: which quantity was varied, and how, as it was given.
        site_sizes: declared size of each site of the job, where it was given.
        utility: measured points beside the plan.
    """

    planned: Planned
    unit: str = "record"
    job: Job | None = None
    sweep: str | None = None
    site_sizes: Mapping[str, int] | None = None
    utility: Sequence[UtilityPoint] | None = None

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Declared size of every site, as given or from the exports; empty if fewer than two are known."""
        if self.planned.shares is not None:
            return {}
        if self.site_sizes is not None:
            return self.site_sizes
        found = {f"{export.site}, {export.dataset}": export.declared_records for export, _ in self.planned.sites}
        return found if len(found) > 1 else {}

    def print(self, console: Console) -> None:
        """Print tables, warnings and what the numbers mean."""
        swept = self.sweep.partition("=")[0] if self.sweep else None
        print_answers(console, self.planned, self.utility, swept=swept, unit=self.unit)
        if self.job is not None and self.sizes:
            print_shares(console, self.sizes, self.job.aggregation)

    def document(self) -> dict[str, Any]:
        """Return the content of plan.json and of the line of `--json`."""
        job, sizes = self.job, self.sizes
        return {
            "format": FORMAT,
            "relation": relation(self.unit),
            "unit": self.unit,
            "accountant": "PLD",
            "sampling": "poisson",
            "job": None if job is None else {"name": job.name, "sha256": job.sha256},
            "sweep": self.sweep,
            "points": [_point(setting, self.planned.warnings(setting)) for setting in self.planned.settings],
            "sharing": None if self.planned.shares is None else _of_shares(self.planned.shares),
            "sites": [
                asdict(answer)
                | {
                    "epsilon_now": finite_or_none(answer.epsilon_now),
                    "epsilon_after": [finite_or_none(epsilon) for epsilon in answer.epsilon_after],
                    "alone_now": finite_or_none(answer.alone_now),
                    "alone_after": [finite_or_none(epsilon) for epsilon in answer.alone_after],
                    "verdict": answer.verdict,
                    "advice": answer.advice,
                    "warnings": list(self.planned.site_warnings(export).values()),
                }
                for export, answer in self.planned.sites
            ],
            "shares": [asdict(share) for share in site_shares(sizes, job.aggregation)] if job and sizes else [],
            "share_warnings": noise_warnings(sizes, job.aggregation) if job and sizes else [],
            "utility": None if self.utility is None else [point.model_dump() for point in self.utility],
        }

    def write(self, out: Path) -> None:
        """Write `plan.json` and `plan.png` into a folder."""
        write_json(out / "plan.json", self.document())
        write_bytes(out / "plan.png", self.figure())

    def figure(self) -> bytes:
        """Return the plan's curves as a PNG."""
        return draw(self.planned.settings, self.utility, self.planned.shares)


def plan_job(job: Job, question: Question, exports: Mapping[str, LedgerExport]) -> Planned:
    """Return the one setting of `job`, and every site's answer.

    Args:
        question: beside the job only `records` and `parameters` may be given.
        exports: of the sites' ledgers, by what they are called in errors.

    Raises:
        ConfigError: if job and question contradict each other, or nothing can be stated.
    """
    from shared.privacy.plan import PrivacyPlan  # loads PyTorch, which a plan of numbers does without

    for name, value in asdict(question).items():
        if value is not None and name not in ("records", "parameters"):
            raise ConfigError(
                f"--{name.replace('_', '-')} is given and the job says it too; leave it out, or change the job with --set."
            )
    for name, export in exports.items():
        if export.unit != job.privacy.unit:
            raise ConfigError(
                f"{name} keeps the budget of each {export.unit}, but the job protects each {job.privacy.unit}; the two cannot "
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
        for export in exports.values()
    ]
    shares = shares_of_job(job, made, setting) if made.honest else None
    return Planned(settings=[setting], sites=list(zip(exports.values(), answers, strict=True)), shares=shares)


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


def plan_numbers(question: Question, sweep: str | None = None, sharing: Sharing | None = None) -> Planned:
    """Return the plan of numbers, of which one is found; with `sweep` one for each of its values.

    Raises:
        ConfigError: see `shared.tools.plan.planning.solve` and `parse_sweep`.
    """
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
