"""How far a sweep is and how long it will take: one line a trial, and a live bar in a terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from shared.epsilons import rounded_up
from simulations.sweep.journal import TrialResult
from simulations.sweep.spec import Setting, describe

# Trials take minutes; a speed measured over less than many of them would jump.
_SPEED_SECONDS = 6 * 3600.0


class SweepProgress:
    """Counts trials; those that an earlier process finished take no part in the speed."""

    def __init__(self, console: Console, *, total: int, done: int) -> None:
        self._console, self._total, self._done = console, total, done
        self._seconds: list[float] = []
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=_SPEED_SECONDS,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("trials", total=total, completed=done)

    def __enter__(self) -> SweepProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def started(self, setting: Setting, seed: int) -> None:
        """A trial begins."""
        self._progress.update(self._bar, description=f"{describe(setting)}, seed {seed}")

    def round_done(self, done: int, total: int) -> None:
        """A round of the current trial is done."""
        self._progress.update(self._bar, completed=self._done + 0.999 * done / total)

    def finished(self, result: TrialResult) -> None:
        """A trial has ended."""
        self._done += 1
        self._seconds.append(result.seconds)
        self._progress.update(self._bar, completed=self._done)
        left = (self._total - self._done) * sum(self._seconds) / len(self._seconds)
        self._console.print(
            f"trial {self._done}/{self._total}: {describe(result.setting)}, seed {result.seed}: {outcome(result)}; "
            f"{result.seconds:.0f} s, about {left / 60:.0f} min left",
            markup=False,
            soft_wrap=True,
        )

    def repeated(self) -> None:
        """The search asked for a trial that this process has counted already."""
        self._total -= 1
        self._progress.update(self._bar, total=self._total)


def outcome(result: TrialResult) -> str:
    """Return what a trial came to, in words."""
    if not result.completed:
        return f"failed: {result.reason}"
    epsilon = "inf" if result.epsilon is None else rounded_up(result.epsilon)
    return f"{result.metric} {result.value():.4f}, epsilon {epsilon}"
