"""What tasks with a target for every token have in common."""

from __future__ import annotations

from torch import Tensor, nn

from shared.batches import IGNORED


def token_losses(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return (negative log-likelihood, whether it counts), both [B, T]; zero where it does not.

    Args:
        logits: [B, T, classes].
        targets: class of every token, int64 [B, T]; `IGNORED` where a token has none.
        label_smoothing: share of each target that is spread over all classes.
    """
    nll = nn.functional.cross_entropy(
        logits.float().flatten(0, 1),
        targets.flatten(),
        reduction="none",
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
    )
    return nll.view(targets.shape), targets != IGNORED


def mean_over_own_tokens(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return each example's mean loss over its own tokens, [B]; see `token_losses`.

    A mean over all tokens of the batch would let a long record shrink the gradient of a short one.
    """
    nll, counts = token_losses(logits, targets, label_smoothing=label_smoothing)
    return nll.sum(dim=1) / counts.sum(dim=1)
