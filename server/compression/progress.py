"""How far a compression is, and how long it will take."""

from __future__ import annotations

from types import TracebackType

import rich.progress as bars
from rich.console import Console

from server.compression.distillation import Progress


class Bar:
    """A live bar in a terminal; elsewhere one line for each pass over the texts."""

    def __init__(self, console: Console) -> None:
        self._console, self._said = console, ""
        self._progress = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._bar = self._progress.add_task("learning", total=None)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, progress: Progress) -> None:
        """Show how far it is."""
        said = f"held out: {progress.agreement}"
        self._progress.update(self._bar, description=said, total=progress.total, completed=progress.steps)
        if said != self._said and not self._console.is_terminal:
            self._console.print(f"step {progress.steps:,} of {progress.total:,}; {said}")
        self._said = said
