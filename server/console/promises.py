"""What a job promises, by the planner's accountant, without PyTorch: computed once a job, one job at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from shared.errors import PrivacyError
from shared.job.job import Job
from shared.privacy.planned import PlannedPrivacy
from shared.web.accounting import accounted
from shared.web.turns import Turn

MOST_STEPS = 1_000_000
"""Of a plan that is accounted for here: of billions it could take for ever."""
_MOST_KEPT = 256


@dataclass(frozen=True, kw_only=True)
class Promises:
    """What a job promises about one unit of a site's data, or about one site.

    Attributes:
        mechanism, unit: of the job.
        epsilon: of the whole plan at `delta`; of noise in shares the promise against the coordinator and `colluding` sites.
        alone: of what a site sends by itself; None where that is `epsilon`.
        noise_multiplier: that a site adds, or a trusted coordinator.
        sample_rate, steps: as planned.
        honest, colluding: of noise in shares, on how many sites it counts, and how many may work together; else None.
    """

    mechanism: str
    unit: str
    epsilon: float
    alone: float | None
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps: int
    honest: int | None
    colluding: int | None


class Planner:
    """Computes and keeps promises; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock, self._accounting = threading.Lock(), Turn()
        self._kept: OrderedDict[str, Promises | None] = OrderedDict()

    def of(self, job: Job) -> Promises | None:
        """Return what a job promises; None if it adds no noise.

        Raises:
            PrivacyError: no noise keeps to what the job says, or nothing can be stated for it.
            Busy: others wait for theirs.
        """
        with self._lock:
            if job.sha256 in self._kept:
                return self._kept[job.sha256]
        with self._accounting:
            with self._lock:
                if job.sha256 in self._kept:
                    return self._kept[job.sha256]
            found = accounted(lambda: promises_of(job))
            with self._lock:
                self._kept[job.sha256] = found
                while len(self._kept) > _MOST_KEPT:
                    self._kept.popitem(last=False)
            return found


def promises_of(job: Job) -> Promises | None:
    """Return what a job promises, see `Planner`."""
    privacy = job.privacy
    if privacy.mechanism == "none":
        return None
    if job.charged_steps > MOST_STEPS:
        raise PrivacyError(
            f"the job plans {job.charged_steps:,} steps; the console computes up to {MOST_STEPS:,}. Ask: silotune plan."
        )
    plan = PlannedPrivacy.of_coordinator(job) if privacy.central else PlannedPrivacy.from_job(job)
    return Promises(
        mechanism=privacy.mechanism,
        unit=plan.unit,
        epsilon=plan.of_sum.epsilon(),
        alone=None if plan.honest is None else plan.epsilon(),
        delta=plan.delta,
        noise_multiplier=plan.noise_multiplier,
        sample_rate=plan.sample_rate,
        steps=plan.planned_steps,
        honest=plan.honest,
        colluding=privacy.max_colluding,
    )
