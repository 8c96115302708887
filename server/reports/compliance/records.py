"""The files of a run that a compliance report recomputes from, parsed; keys of later versions are kept or passed over.

Of a site's `privacy.json` only what was executed is taken; the epsilons in it are read to be compared, never to be repeated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import PrivacyError, RunError
from shared.privacy.accounting import GaussianSteps
from shared.privacy.central_statement import CentralRelease
from shared.privacy.randomness import Origin

RecordT = TypeVar("RecordT", bound=BaseModel)


class ExecutedSteps(BaseModel):
    """One entry of `events`; a Gaussian release outside the training (of a metric) is one step on all records."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    noise_multiplier: Annotated[float, Field(gt=0)]
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    steps: Annotated[int, Field(ge=0)] = 1

    @property
    def mechanism(self) -> GaussianSteps:
        """As the accountant takes it."""
        return GaussianSteps(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=self.steps)


class MetricsRecord(ExecutedSteps):
    """`metrics`: the site metrics that were asked for; `sha256` is None if nobody here knows whether they were released."""

    names: tuple[str, ...]
    sha256: str | None


class PrivacyRecord(BaseModel):
    """`sites/NAME/privacy.json`.

    Attributes:
        events: everything that arrived; metrics that did are the last one.
        metrics: the release of metrics, None if there was none.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    site: str
    unit: str
    delta: float
    max_grad_norm: float
    declared_records: int
    randomness: Origin
    private: bool
    steps_planned: int
    epsilon_budget: float | None = None
    epsilon_spent: float | None = None
    epsilon_bound: float | None = None
    events: tuple[ExecutedSteps, ...]
    metrics: MetricsRecord | None = None
    rounds: tuple[int, ...]
    update_sha256: tuple[str, ...]
    rounds_unanswered: tuple[int, ...] = ()

    @property
    def recorded(self) -> float | None:
        """The epsilon that the run had written down."""
        return self.epsilon_spent if self.epsilon_bound is None else self.epsilon_bound

    @property
    def training(self) -> tuple[GaussianSteps, ...]:
        """The executed steps of training.

        Raises:
            PrivacyError: if metrics were released and do not stand among the events; an epsilon without them is too small.
        """
        found = tuple(event.mechanism for event in self.events)
        if self.metrics is None or self.metrics.sha256 is None:
            return found
        if found[-1:] != (self.metrics.mechanism,):
            raise PrivacyError("metrics were released, but the last of its events is not their release")
        return found[:-1]


class CentralRecord(BaseModel):
    """`privacy.json` of the run itself: what a trusted coordinator published, the unit being one site."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    unit: str
    delta: float
    num_sites_declared: int
    randomness: Origin
    epsilon_spent: float | None = None
    epsilon_budget: float | None = None
    clip_norm_first: Annotated[float, Field(gt=0)]
    update_noise_multiplier: Annotated[float, Field(gt=0)]
    count_noise: Annotated[float, Field(gt=0)] | None
    steps_planned: Annotated[int, Field(ge=0)]
    events: tuple[ExecutedSteps, ...]
    rounds: tuple[int, ...]

    @property
    def release(self) -> CentralRelease:
        """As the statement takes it."""
        return CentralRelease(
            num_sites=self.num_sites_declared,
            delta=self.delta,
            first_clip_norm=self.clip_norm_first,
            update_noise_multiplier=self.update_noise_multiplier,
            count_noise=self.count_noise,
            rounds_planned=self.steps_planned,
            rounds=self.rounds,
            events=tuple(event.mechanism for event in self.events),
            randomness=self.randomness,
            epsilon_planned=self.epsilon_budget or 0.0,
        )


class AuditRecord(BaseModel):
    """`audit/tierN.json`; `claim` is the epsilon that was put to the test."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    tier: int
    audited: str
    claim: float | None
    delta: float
    alpha: float
    lower_bound: float | None
    ceiling: float | None
    verdict: str
    reasons: tuple[str, ...] = ()
    date: str | None = None
    version: str | None = None
    job_sha256: str | None = None


def parse_record(kind: type[RecordT], path: Path) -> RecordT:
    """Read one JSON file.

    Raises:
        RunError: if it cannot be read or is not what is expected.
    """
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise RunError(
            f"{path} is malformed ({where}: {first['msg']}); restore it from the original run folder."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read ({type(error).__name__}); restore it.") from None
