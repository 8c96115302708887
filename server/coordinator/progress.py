"""What the sites do in the round at hand, told in the coordinator's status twice a second: names of states, nothing else.

Guarantee (tests: tests/server/coordinator/test_progress.py): of what a site says, nothing but the code of its refusal stands
here, and only one that this version knows. Under central DP nothing does: who takes part in a round is drawn in secret there.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Literal

from shared import errors
from shared.job.job import Job

SiteState = Literal["training", "ready", "sent", "dropped", "refused"]
UNKNOWN_CODE = "other"
_LINK_CODES = ("Malformed", "Withheld")
CODES = frozenset(
    {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.SilotuneError)}
    | {*_LINK_CODES}
)
"""Of refusals, as sites of this version write them."""


def code_of(problem: str) -> str:
    """Return the code with which a refusal begins; `UNKNOWN_CODE` of one that no site of this version writes."""
    code = problem.partition(":")[0]
    return code if code in CODES else UNKNOWN_CODE


class Progress:
    """Of one attempt at a job: written in its thread, read in the supervisor's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told = True
        self._round: int | None = None
        self._sites: dict[str, SiteState] = {}
        self._codes: dict[str, str] = {}

    def of(self, job: Job) -> None:
        """Say which job it is."""
        self._told = not job.privacy.central

    def asked(self, round_number: int, sites: Sequence[str], state: SiteState = "training") -> None:
        """Note that sites were asked; what others did in the same round stays."""
        with self._lock:
            if round_number != self._round:
                self._round, self._sites, self._codes = round_number, {}, {}
            self._sites |= dict.fromkeys(sites, state)

    def answered(self, site: str, state: SiteState) -> None:
        """Note that what a site sent counts."""
        with self._lock:
            self._sites[site] = state
            self._codes.pop(site, None)

    def failed(self, site: str, problem: str, *, replied: bool) -> None:
        """Note that it does not; `replied`: there was an answer, which was no refusal."""
        code = code_of(problem)
        refused = replied or code != UNKNOWN_CODE
        with self._lock:
            self._sites[site] = "refused" if refused else "dropped"
            if refused:
                self._codes[site] = code

    def told(self) -> dict[str, Any] | None:
        """Return what the status tells; None before the first round, and under central DP."""
        with self._lock:
            if self._round is None or not self._told:
                return None
            return {"round": self._round, "sites": dict(self._sites), "codes": dict(self._codes)}
