"""What every audit ends with: CLAIM, LOWER BOUND, CEILING and a verdict that is never "verified"."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from shared.epsilons import bound_rounded_down, delta_rounded_up, rounded_up
from shared.errors import PrivacyError

Verdict = Literal["consistent", "violated", "inconclusive"]

MAX_ALPHA = 1e-3


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """Result of one audit of any tier.

    Attributes:
        tier: 1 (mechanism), 2 (one run) or 3 (shadow models).
        audited: what was run and looked at, in words.
        claim: epsilon that is claimed, at `delta`.
        delta: failure probability of the claim.
        alpha: probability of calling a mechanism that keeps its claim "violated", at most.
        lower_bound: epsilon that the observations leave at least, with confidence 1 - alpha.
        ceiling: the largest lower bound that this audit could have given, had there been no protection at all.
        verdict: see `judge`.
        reasons: why the verdict is what it is, in sentences.
        details: further figures by name, ready for JSON.
    """

    tier: int
    audited: str
    claim: float
    delta: float
    alpha: float
    lower_bound: float
    ceiling: float
    verdict: Verdict
    reasons: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """Return the result in one line."""
        return (
            f"CLAIM epsilon {rounded_up(self.claim)} at delta {delta_rounded_up(self.delta)} / "
            f"LOWER BOUND {bound_rounded_down(self.lower_bound)} / "
            f"CEILING {bound_rounded_down(self.ceiling)} / {self.verdict} at alpha {self.alpha:g}"
        )


def judge(*, claim: float, lower_bound: float, ceiling: float, raised_by: str) -> tuple[Verdict, tuple[str, ...]]:
    """Return the verdict on a claim and the reason for it.

    "violated": the lower bound reaches the claim. "inconclusive": the claim is above the ceiling, so that this audit
    could not have refuted it. "consistent": it could have, and did not.

    Args:
        claim, lower_bound, ceiling: see `AuditResult`.
        raised_by: what raises the ceiling, in a sentence.
    """
    if lower_bound >= claim:
        return "violated", (
            f"epsilon is at least {bound_rounded_down(lower_bound)}, not below the claimed {rounded_up(claim)}.",
        )
    if claim > ceiling:
        return "inconclusive", (
            f"this audit cannot show more than epsilon {bound_rounded_down(ceiling)}, however bad the mechanism is, so "
            f"it cannot falsify the claimed {rounded_up(claim)}. "
            f"That speaks neither for the claim nor against it. {raised_by}",
        )
    return "consistent", ("the observations do not contradict the claim; that proves nothing.",)


def check_alpha(alpha: float) -> None:
    """Raise `PrivacyError` unless `alpha` is in (0, 1e-3]: at 0.05 one correct run in twenty would be accused."""
    if not (math.isfinite(alpha) and 0 < alpha <= MAX_ALPHA):
        raise PrivacyError(
            f"an audit needs alpha in (0, {MAX_ALPHA:g}], found {alpha:g}: at a larger one correct runs are accused by chance."
        )
