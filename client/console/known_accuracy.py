"""What accuracy each epsilon bought elsewhere: a sweep's own result, which whoever starts the console gives it, read once.

It is another data set's, which its table says. Nothing of it was measured at this site, and nothing is guessed between points.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigError, RunError
from shared.files.json_files import Finite, Positive, Share, parse_record, read_record, read_text

FORMAT, SWEEP, TRIALS = "silotune-sweep/1", "sweep.json", "trials.jsonl"
"""As `simulations.sweep` has them, which no site has."""
_MOST_POINTS = 50
_NO_SLACK = 1 + 1e-9  # noise that is calibrated to an epsilon costs it up to rounding


@dataclass(frozen=True, kw_only=True)
class Bought:
    """What the best setting of one budget reached.

    Attributes:
        epsilon: that was executed; None without noise.
        mean, sd: of the metric over the seeds; sd is None of one seed.
    """

    epsilon: Positive | None
    mean: Finite
    sd: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class KnownAccuracy:
    """One sweep.

    Attributes:
        name: the sweep's.
        metric: what its values are of.
        delta: the largest at which an epsilon of it holds.
        points: by epsilon, without noise last.
    """

    name: str
    metric: str
    delta: float
    points: tuple[Bought, ...]

    def within(self, epsilon: float | None) -> Bought | None:
        """Return the point of the largest epsilon that is no larger than this one; None if all are."""
        found = [one for one in self.points if one.epsilon is not None and one.epsilon <= (epsilon or 0) * _NO_SLACK]
        return found[-1] if found else None


@dataclass(frozen=True, kw_only=True)
class _File:
    format: str
    name: str
    metric: str = ""
    frontier: tuple[Bought, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Trial:
    delta: Share


def known_accuracy(folder: Path) -> KnownAccuracy:
    """Return what the sweep in a folder found.

    Raises:
        ConfigError: there is none, it has no result yet, or it is damaged.
    """
    place = folder / SWEEP
    if not place.is_file():
        raise ConfigError(f"{folder} holds no sweep ({SWEEP} is missing); give the folder that silotune sweep wrote.")
    try:
        found = read_record(place, _File)
        trials = folder / TRIALS
        lines = read_text(trials).split("\n")[:-1]
        delta = max((parse_record(line, _Trial, trials).delta for line in lines), default=0.0)
    except RunError as error:
        raise ConfigError(str(error)) from None
    if found.format != FORMAT or not found.frontier or not delta or len(found.frontier) > _MOST_POINTS:
        raise ConfigError(
            f"the sweep in {folder} has no frontier that this version can show: it still runs, none of its trials has noise, or "
            "another version wrote it."
        )
    points = sorted(found.frontier, key=lambda one: (one.epsilon is None, one.epsilon or 0.0))
    return KnownAccuracy(name=found.name, metric=found.metric, delta=delta, points=tuple(points))
