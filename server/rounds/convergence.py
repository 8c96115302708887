"""Whether a training diverged: what is called a result must not hide that nothing was learned.

A loss that is no number, or above where it began, is no yardstick. Noise makes a model too sure of itself before it makes it
useless (its loss is above that of guessing while most of its answers are right), so a training with noise has
`LEEWAY` times the loss that it began with; what such a model lacks is a temperature (`shared.runtime.calibration`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

LEEWAY = 2.0


def why_diverged(
    *, started: float | None, final: float | None, losses: Sequence[float], kept_round: int, private: bool
) -> str | None:
    """Return why a training counts as diverged, or None.

    Args:
        started: loss on public records before training, or that of the best constant answer if it is known and larger.
        final: of the adapter that is handed out.
        losses: of all evaluations after training began.
        kept_round: the round of the adapter that is handed out; 0 is before training.
        private: whether noise was added.
    """
    if final is None or started is None:
        return None
    if not math.isfinite(final):
        return "its loss is not a finite number"
    limit = started * (LEEWAY if private else 1.0)
    if final > limit:
        return f"its loss, {final:.3g}, is above the {started:.3g} from before training"
    if kept_round == 0 and losses and not min(losses, default=math.inf) < started:
        return f"its loss never fell below the {started:.3g} from before training"
    return None


def constant_loss(label_counts: Sequence[int]) -> float | None:
    """Return the cross-entropy of the best constant answer, given how often each label occurs; None without labels."""
    total = sum(label_counts)
    if not total:
        return None
    return -sum(count / total * math.log(count / total) for count in label_counts if count)
