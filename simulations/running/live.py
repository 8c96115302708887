"""One live view of a simulation: rounds, loss on public data, epsilon of every site, time left."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from server.rounds.observer import Observer
from server.store.checkpoint import Checkpoint
from shared.epsilons import as_set, rounded_up
from shared.privacy.statement import SiteRelease
from shared.site_weights import noise_warnings
from shared.tasks import task_of
from shared.wire.messages import SiteDescription
from simulations.running.engine import Arm

_ROWS = 12
_SECONDS_BETWEEN_LINES = 15.0  # of what passes by itself


class LiveView:
    """A terminal view that is shared by all arms of a scenario; prints plain lines where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._releases: dict[str, SiteRelease] = {}
        self._warned: set[str] = set()
        self._live = Live(self._render(), console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.update(self._render(), refresh=True)
            self._live.stop()

    def observer(self, arm: Arm) -> ArmObserver:
        """Return the observer of one arm, with a progress bar of its own."""
        return ArmObserver(self, arm)

    def say(self, text: str) -> None:
        """Print a line where there is no live display."""
        if not self._console.is_terminal:
            self._console.print(text, highlight=False)

    def warn(self, text: str) -> None:
        """Print what is to be minded, once; above the live display where there is one."""
        if text not in self._warned:
            self._warned.add(text)
            self._console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def show(self, releases: dict[str, SiteRelease]) -> None:
        """Replace the table of sites."""
        self._releases = releases or self._releases
        if self._console.is_terminal:
            self._live.update(self._render())

    def progress(self) -> Progress:
        """Return the progress bars."""
        return self._progress

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [self._progress]
        if self._releases:
            parts.append(_spend_table(self._releases))
        return Panel(Group(*parts), title="silotune", border_style="cyan")


class ArmObserver(Observer):
    """Observer of one arm; see `server.rounds.observer.Observer`."""

    def __init__(self, view: LiveView, arm: Arm) -> None:
        self._view, self._arm = view, arm
        self._metric = task_of(arm.job).primary_metric
        self._bar = view.progress().add_task(arm.name, total=arm.job.training.rounds * len(arm.sites))
        self._said = time.monotonic()

    def preparing(self, done: int, of: int) -> None:
        """Show that texts pass through the frozen layers, which takes minutes on a slow processor."""
        # In per cent: how many texts private sites hold is no figure to print.
        text = f"frozen layers: {100 * done // of} % of the texts"
        self._view.progress().update(
            self._bar, description=self._arm.name if done == of else f"{self._arm.name:<11} {text}"
        )
        if time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self._view.say(f"{self._arm.name}: {text}")

    def roster(self, sites: Sequence[SiteDescription]) -> None:
        """Note how many sites a round can ask."""
        if self._arm.job.privacy.mechanism == "dp-sgd":
            for text in noise_warnings({site.site: site.declared_records for site in sites}, self._arm.job.aggregation):
                self._view.warn(text)
        per_round = self._arm.job.federation.sites_per_round or len(sites)
        self._per_round = min(per_round, len(sites))
        self._view.progress().update(self._bar, total=self._arm.job.training.rounds * self._per_round)

    def site_done(self, round_number: int, site: str) -> None:
        """Advance the bar by one site."""
        self._view.progress().advance(self._bar)

    def stopped_early(self, checkpoint: Checkpoint) -> None:
        """End the bar where the run ends."""
        done = checkpoint.round_number * getattr(self, "_per_round", len(self._arm.sites))
        self._view.progress().update(self._bar, completed=done, total=done)
        self._view.say(f"{self._arm.name}: stopped early after round {checkpoint.round_number}")

    def metrics_done(self, checkpoint: Checkpoint) -> None:
        """Show the spend with the site metrics."""
        self._view.show({name: r for name, r in checkpoint.releases.items() if r.protected})

    def round_done(self, checkpoint: Checkpoint) -> None:
        """Show metrics and spend after a round."""
        record = checkpoint.history[-1]
        done = checkpoint.round_number * getattr(self, "_per_round", len(self._arm.sites))
        figures = [f"round {record.round}/{self._arm.job.training.rounds}"]
        if record.metrics:
            figures.append(f"loss {_shown(record.metrics['loss'])}")
            figures.append(f"{self._metric} {_shown(record.metrics[self._metric])}")
        if record.epsilon_max is not None:
            unit = " (unit: site)" if self._arm.job.privacy.central else ""
            figures.append(f"epsilon {rounded_up(record.epsilon_max, 2)}{unit}")
        if record.failed:
            figures.append(f"{len(record.failed)} sites failed")
        if record.doubted:
            figures.append(f"{len(record.doubted)} updates shorter than their noise")
        text = " · ".join(figures)
        self._view.progress().update(self._bar, completed=done, description=f"{self._arm.name:<11} {text}")
        self._view.say(f"{self._arm.name}: {text}")
        self._view.show({name: r for name, r in checkpoint.releases.items() if r.protected})


def _spend_table(releases: dict[str, SiteRelease]) -> Table:
    table = Table(box=None, pad_edge=False, title="privacy spent", title_justify="left", title_style="bold")
    for heading in ("site", "epsilon", "of budget", ""):
        table.add_column(heading, justify="left" if heading in ("site", "") else "right")
    ordered = sorted(releases.values(), key=lambda release: (-release.epsilon, release.site))
    for release in ordered[:_ROWS]:
        share = release.epsilon / release.epsilon_budget if release.epsilon_budget else 0.0
        filled = min(round(20 * share), 20)
        colour = "green" if share < 0.75 else "yellow" if share <= 1 else "red"
        bar = Text("━" * filled, style=colour) + Text("━" * (20 - filled), style="bright_black")
        table.add_row(release.site, rounded_up(release.epsilon, 2), as_set(release.epsilon_budget), bar)
    if len(ordered) > _ROWS:
        table.add_row(f"… and {len(ordered) - _ROWS} more", "", "", "")
    return table


def _shown(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"
