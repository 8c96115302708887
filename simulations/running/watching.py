"""Who watches a simulation besides its terminal: trackers, and the meter of its energy.

Guarantee (tests: tests/simulations/running/test_watching.py): figures that follow from private records without noise are told
nobody: those on evaluation records that count as private, those of trainings without noise on records that count as private,
and reports that show either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from server.energy import EnergyObserver
from server.rounds.observer import Observer, Observers
from server.tracking import Told, Tracking, Watched
from server.tracking.run_told import Scalar, flat
from simulations.running.engine import Arm
from simulations.scenario import Scenario


class Watching:
    """Those who watch the runs of one command; as a context it ends with everything sent, or said what was not.

    Args:
        root: the folder of the command, which names its runs.
        warn: tells people what did not work.
        experiment: groups runs; by default the scenario.
    """

    def __init__(
        self, watched: Watched, root: Path, warn: Callable[[str], None], *, experiment: str | None = None
    ) -> None:
        self._watched, self._root, self._warn, self._experiment = watched, root.resolve(), warn, experiment
        self._meters: list[EnergyObserver] = []
        self.tracking = Tracking(watched.targets, warn, weights=watched.weights)

    def __enter__(self) -> Watching:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for meter in self._meters:
            meter.close()
        self.tracking.__exit__(kind, error, traceback)

    def observer(self, scenario: Scenario, arm: Arm, settings: Mapping[str, Scalar] | None = None) -> Observer:
        """Return who watches one arm.

        Args:
            settings: what else distinguishes the run for trackers.
        """
        observers = [self._teller(scenario, arm, settings or {})] if self._watched.targets else []
        if self._watched.energy is not None and not arm.job.privacy.central:
            gpu = scenario.compute.device != "cpu"
            self._meters.append(EnergyObserver(arm.folder, self._watched.energy, gpu=gpu))
            observers.append(self._meters[-1])
        return Observers(*observers)

    def _teller(self, scenario: Scenario, arm: Arm, settings: Mapping[str, Scalar]) -> Observer:
        private = scenario.data.declared_kind == "private"
        if arm.job.privacy.central or (private and arm.job.privacy.mechanism == "none"):
            if not arm.job.privacy.central:
                self._warn(
                    f"{arm.name} is not tracked: it trains without noise on records that count as private, so no epsilon covers "
                    'its figures. If the records are public or synthetic, say so: data.kind = "public".'
                )
            return Observer()
        metrics = scenario.data.evaluation_kind != "private"
        if not metrics:
            key = "data.kind" if scenario.data.test is None else "data.test_kind"
            self._warn(
                "trackers get settings and epsilons only: the evaluation records count as private, so no epsilon covers figures "
                f'on them. If they are public or synthetic, say so: {key} = "public".'
            )
        unprotected = private and any("non-private" in name for name in scenario.baselines.arms)
        partition = flat(scenario.partition.model_dump(mode="json", exclude_none=True), "partition.")
        told = Told(
            experiment=self._experiment or scenario.name,
            name=arm.folder.resolve().relative_to(self._root.parent).as_posix(),
            job=arm.job,
            folder=arm.folder,
            metrics=metrics,
            report=metrics and not unprotected,
            settings={"arm": arm.name, **partition, **settings},
        )
        return self.tracking.observer(told)
