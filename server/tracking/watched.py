"""What the options of a command ask for beside the run itself: trackers, and the meter of its energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.energy import EnergySettings
from server.tracking.target import Target, read_targets
from shared.errors import ConfigError
from shared.job.job import Job


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Who watches the runs of a command.

    Attributes:
        targets: trackers.
        weights: whether they get the tuned adapter, too.
        energy: how energy is counted; None: it is not.
    """

    targets: Sequence[Target] = ()
    weights: bool = False
    energy: EnergySettings | None = None

    @classmethod
    def of(cls, track: Sequence[str], *, weights: bool = False, energy: EnergySettings | None = None) -> Watched:
        """Return what is asked for.

        Raises:
            ConfigError: a tracker is none, or weights are for nobody.
        """
        if weights and not track:
            raise ConfigError("--track-weights says what trackers get, but no --track was given.")
        return cls(targets=read_targets(track), weights=weights, energy=energy)

    def require_times_told(self, job: Job) -> None:
        """Raise if `job` keeps secret what watching it tells.

        Raises:
            ConfigError: under central DP.
        """
        asked = "--track" if self.targets else "--energy" if self.energy is not None else None
        if asked is not None and job.privacy.central:
            raise ConfigError(
                f"{asked} is not for privacy.mechanism 'central': there the times of rounds are secret, for they tell how many "
                f"sites were drawn. Leave {asked} out."
            )
