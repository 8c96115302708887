"""Who watches a job besides the coordinator itself; of jobs that keep their times secret, or protect nobody, no one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from server.energy import EnergyObserver
from server.link.grid import Halted
from server.rounds.observer import Observer, Observers
from server.tracking import Told, Tracking, Watched
from shared.job.compute import ComputeConfig
from shared.job.job import Job


@contextlib.contextmanager
def watching(
    watched: Watched, job: Job, folder: Path, compute: ComputeConfig, warn: Callable[[str], None]
) -> Iterator[Observer]:
    """Give the observer of one job; at the end everything is sent, or it is said what was not.

    Args:
        folder: its run folder, in the folder that names it.
        warn: tells whoever runs the coordinator what did not work.
    """
    private = job.privacy.mechanism not in ("none", "central")
    if watched.targets and not private:
        warn(f"the job is not tracked: {_WHY[job.privacy.mechanism]}")
    with Tracking(watched.targets if private else (), warn, weights=watched.weights) as tracking:
        observers: list[Observer] = []
        if tracking.active:
            observers.append(
                tracking.observer(Told(experiment=job.name, name=folder.parent.name, job=job, folder=folder))
            )
        meter = None
        if watched.energy is not None and not job.privacy.central:
            meter = EnergyObserver(folder, watched.energy, gpu=compute.device != "cpu")
            observers.append(meter)
        try:
            yield Observers(*observers)
        except Halted:
            tracking.finish(folder, "stopped")  # it goes on later
            raise
        finally:
            if meter is not None:
                meter.close()


_WHY = {
    "central": "under central DP the times of rounds are secret, for they tell how many sites were drawn",
    "none": "it adds no noise, so no epsilon covers its figures",
}
