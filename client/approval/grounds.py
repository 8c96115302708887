"""What an approval rests on: what its person was shown, and whether that still holds when it is noted.

While another job runs, the ledger has another head after each of its rounds; an approval that named it could not be given. So it
names what is judged: the job, the rules and settings, and the figures of the budget.

Formal guarantees (tests: tests/client/approval/test_grounds.py)
    * It holds only while job, rules, settings and comparison are the ones that were shown, and no cap would be overrun that was
      not (test_what_is_no_figure_has_to_be_the_same, test_a_figure_may_move_below_its_cap, test_a_verdict_that_turned_is_told).
    * What moved since is kept beside what was shown (test_what_moved_is_told_with_what_was_shown).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from client.approval.facts import BudgetLine
from client.ledger.account import Promise
from shared.epsilons import rounded_up

Part = Literal["request", "validity", "policy", "settings", "compared"]
"""Beside figures: which request, whether its dates hold, rules, settings, and what the job is compared with."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Something that is not any more as it was shown.

    Attributes:
        what: a `Part`, or "budget".
        promise: of the budget, which cap.
        before, now: of the budget, what would be spent once the job has run; "" where that cannot be told.
    """

    what: Part | Literal["budget"]
    promise: Promise | None = None
    before: str = ""
    now: str = ""


@dataclass(frozen=True, kw_only=True)
class Grounds:
    """What a person was shown, as far as it is judged.

    Attributes:
        parts: another text once a part is another.
        budget: both caps, before the job and after all of it.
    """

    parts: Mapping[Part, str]
    budget: tuple[BudgetLine, ...]

    def against(self, now: Grounds) -> list[Difference]:
        """Return why an approval that rests on these does not hold on those of now; nothing if it does."""
        found = [Difference(what=part) for part in self.parts if self.parts[part] != now.parts.get(part)]
        shown = {line.promise: line for line in self.budget}
        for line in now.budget:
            before = shown.pop(line.promise, None)
            if before is None or not _holds(before, line):
                found.append(_difference(before, line))
        found += [_difference(before, None) for before in shown.values()]
        untold = [one for one in found if one.what == "budget" and not (one.before and one.now)]
        return [one for one in found if one not in untold[1:]]  # of one cap it is said for both

    def moved(self, now: Grounds) -> dict[str, Any]:
        """Return the figures that are others now, beside those that were shown, for the audit log; {} if none is."""
        shown = {line.promise: line for line in self.budget}
        return {
            line.promise: {"shown": _figures(shown[line.promise]), "now": _figures(line)}
            for line in now.budget
            if line.promise in shown and _figures(shown[line.promise]) != _figures(line)
        }


def told_against(differences: Sequence[Difference]) -> str:
    """Return in words, for a terminal, what is not as it was shown."""
    words = {
        "request": "it is another request",
        "validity": "the time of the signed job is over",
        "policy": "policy.toml was changed",
        "settings": "site.toml or the declared size was changed",
        "compared": "another job of this signer was approved last",
    }
    return "; ".join(
        f"this job would bring the spend to {one.now or 'what cannot be told'}, not {one.before or 'what was shown'}"
        if one.what == "budget"
        else words[one.what]
        for one in differences
    )


def moved_told(moved: Mapping[str, Any]) -> list[str]:
    """Return in words, for a terminal, what `Grounds.moved` found."""
    names = {"together": "", "alone": ", with each masked input by itself"}
    figures = [(names[promise], _rounded(both["shown"]), _rounded(both["now"])) for promise, both in moved.items()]
    return [
        f"a round was charged meanwhile{name}: once this job has run, {now} is spent, not {shown}"
        for name, shown, now in figures
        if shown != now
    ]


def _rounded(figures: Mapping[str, float | None]) -> str:
    after = figures["after"]
    return rounded_up(math.inf if after is None else after, 4)


def _holds(shown: BudgetLine, now: BudgetLine) -> bool:
    """Return whether a cap is no worse off: it is not overrun, or by no more than was shown; of what is no number, it is."""
    return now.cap == shown.cap and (now.fits or now.after <= shown.after)


def _difference(before: BudgetLine | None, now: BudgetLine | None) -> Difference:
    line = before or now
    return Difference(
        what="budget",
        promise=None if line is None else line.promise,
        before="" if before is None else rounded_up(before.after, 4),
        now="" if now is None else rounded_up(now.after, 4),
    )


def _figures(line: BudgetLine) -> dict[str, float | None]:
    return {
        name: value if math.isfinite(value) else None for name, value in (("spent", line.spent), ("after", line.after))
    }
