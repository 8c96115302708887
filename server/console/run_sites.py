"""What each site does in a run, from what the coordinator says now and what it noted of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from server.console.runs import Run
from server.console.said import Told

SiteState = Literal[
    "lost",
    "approval",
    "undecided",
    "refused",
    "training",
    "ready",
    "sent",
    "dropped",
    "waiting",
    "connected",
    "away",
    "part",
]


@dataclass(frozen=True, kw_only=True)
class SiteOfRun:
    """One site in one run.

    Attributes:
        name: in its certificate.
        state: "lost": it took part and is not connected now; "approval": the job waits for its people; "undecided":
            it waited for them until the run was over; "waiting": it takes
            part, and was asked nothing yet; "connected" and "away": it may take part and does not, or not yet; "part": it took
            part, and the run is not at hand.
        code: of a refusal; "" else.
        last_seen: when it was connected last, UTC, ISO 8601.
        counted: updates that counted; None where that is secret.
    """

    name: str
    state: SiteState
    code: str = ""
    last_seen: str | None = None
    counted: int | None = None


def sites_of(run: Run, told: Told, counted: Mapping[str, int]) -> list[SiteOfRun]:
    """Return every site that has to do with a run, by name; with all that may connect while it is at hand."""
    central, at_hand = run.plan.mechanism == "central", run.is_open and told.job == run.id
    doing = told.doing if at_hand and not central else {}
    names = {*run.sites, *run.awaiting, *run.refused, *doing, *counted} | ({*told.online} if at_hand else set())
    found = []
    for name in sorted(names):
        state, code = _state(name, run, told, doing, at_hand=at_hand)
        found.append(
            SiteOfRun(
                name=name,
                state=state,
                code=code,
                last_seen=told.last_seen.get(name),
                counted=None if central else counted.get(name, 0),
            )
        )
    return found


def _state(name: str, run: Run, told: Told, doing: Mapping[str, str], *, at_hand: bool) -> tuple[SiteState, str]:
    if at_hand and not told.online.get(name, False):
        return ("lost" if name in run.sites or name in doing else "away"), ""
    if name in run.awaiting and (run.is_open or name not in run.sites):
        return ("approval" if run.is_open else "undecided"), ""
    if name in run.refused:
        return "refused", run.refused[name]
    if name in doing:
        state: SiteState = doing[name]  # type: ignore[assignment]  # one of these, see `Said`
        return state, told.codes.get(name, "")
    if not at_hand:
        return "part", ""
    return ("waiting" if name in run.sites else "connected"), ""
