"""What happens in a run, told as it happens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from server.store.checkpoint import Checkpoint
from shared.trust.receipts import Receipt
from shared.wire.messages import MetricsReply, SiteDescription, TrainReply


class Observer:
    """Told what happens; this one is silent. A live view or an audit log overrides what it wants to hear."""

    def resumed(self, checkpoint: Checkpoint) -> None:
        """The run goes on from a checkpoint that an earlier process made durable."""

    def preparing(self, done: int, of: int) -> None:
        """Before anything is trained, what is frozen of the model is computed once for each text; `done` texts are ready."""

    def roster(self, sites: Sequence[SiteDescription]) -> None:
        """The sites that take part, at the start and whenever they change."""

    def site_refused(self, site: str, reason: str) -> None:
        """A site does not take part in this job."""

    def site_awaits(self, site: str) -> None:
        """At a site the job waits for approval; it is asked again by itself."""

    def waiting(self, reason: str) -> None:
        """The run cannot go on now; it will by itself."""

    def round_started(self, round_number: int, sites: Sequence[str], adapter: bytes) -> None:
        """The round's adapter goes out to `sites`; under secure aggregation `adapter` is the roster of those who are ready."""

    def ready_asked(self, round_number: int, sites: Sequence[str], adapter: bytes) -> None:
        """Under secure aggregation: the round's adapter goes out to `sites`, which compute; nothing is released yet."""

    def site_ready(self, round_number: int, site: str, problem: str | None) -> None:
        """A site has computed and is ready (`problem` is None), or will not be on the roster."""

    def site_done(self, round_number: int, site: str) -> None:
        """A site's reply arrived."""

    def update_judged(self, round_number: int, site: str, reply: TrainReply | None, problem: str | None) -> None:
        """A site's update was taken (`problem` is None) or not; `reply` is None if there was none to read."""

    def receipt(self, receipt: Receipt) -> None:
        """A release came with a receipt that holds; told before it is judged."""

    def update_doubted(self, round_number: int, site: str, doubt: str) -> None:
        """A site's update counts, but is suspicious; told before `update_judged`."""

    def stopped_early(self, checkpoint: Checkpoint) -> None:
        """The run ends before its planned rounds, by the job's own rule; told again if it is resumed after that."""

    def metrics_asked(self, number: int, sites: Sequence[str], adapter: bytes) -> None:
        """After the last round `sites` are asked for their metrics; `number` is that of a round after the last one."""

    def metrics_judged(self, site: str, reply: MetricsReply | None, problem: str | None) -> None:
        """A site's metrics were taken (`problem` is None) or not."""

    def metrics_done(self, checkpoint: Checkpoint) -> None:
        """Everyone who was asked for metrics answered or did not; what they spent is in `checkpoint`."""

    def round_done(self, checkpoint: Checkpoint) -> None:
        """A round is complete and durable."""

    def ended(self, checkpoint: Checkpoint, *, complete: bool) -> None:
        """The run folder holds what the run came to, but for its report; not `complete`: the run was left for later."""


class Observers(Observer):
    """Tells several observers everything, each in its turn."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers


def _told_to_all(name: str) -> Callable[..., None]:
    def tell(self: Observers, *arguments: object, **named: object) -> None:
        for observer in self._observers:
            getattr(observer, name)(*arguments, **named)

    return tell


for _name in [name for name in vars(Observer) if not name.startswith("_")]:
    setattr(Observers, _name, _told_to_all(_name))
