"""The files of a run that a compliance report recomputes from, parsed; keys of later versions are kept or passed over.

Of a site's `privacy.json` only what was executed is taken; the epsilons in it are read to be compared, never to be repeated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import PrivacyError, RunError
from shared.privacy.accounting import GaussianSteps
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


class PrivacyRecord(BaseModel):
    """`sites/NAME/privacy.json`.

    Attributes:
        metrics: Gaussian releases beside the training; they are composed with `events`.
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
    metrics: tuple[dict[str, Any], ...] = ()
    rounds: tuple[int, ...]
    update_sha256: tuple[str, ...]
    rounds_unanswered: tuple[int, ...] = ()

    @property
    def recorded(self) -> float | None:
        """The epsilon that the run had written down."""
        return self.epsilon_spent if self.epsilon_bound is None else self.epsilon_bound

    @property
    def mechanisms(self) -> tuple[GaussianSteps, ...]:
        """Everything that was executed, metrics included.

        Raises:
            PrivacyError: if a released metric cannot be accounted for; an epsilon without it would be too small.
        """
        found = [event.mechanism for event in self.events]
        for metric in self.metrics:
            try:
                found.append(ExecutedSteps.model_validate(metric).mechanism)
            except ValidationError:
                raise PrivacyError(
                    "a released metric names no noise that this version can account for; use the version that wrote it"
                ) from None
        return tuple(found)


class CentralRecord(BaseModel):
    """`privacy.json` of the run itself: what a trusted coordinator published, the unit being one site."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    unit: str
    delta: float
    num_sites_declared: int
    randomness: Origin
    epsilon_spent: float | None = None
    epsilon_budget: float | None = None
    events: tuple[ExecutedSteps, ...]
    rounds: tuple[int, ...]
    statement: str


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
