"""From a micro-batch to the gradient of every example: one backward pass, or two where an example's loss has an adversarial part.

Adversarial training of texts (Miyato, Dai and Goodfellow 2017, section 3): the loss L of an example, at what enters the trained
part, e, and at the point near it where the loss grows fastest, mixed as Goodfellow et al. (2015, section 5) do:

    (1 - weight) L(e) + weight L(e + r),    r = radius |e| g / |g|,    g = dL/de,    |.| over the example's own tokens

r counts as a constant, as there. e is what enters the lowest adapted layer: embeddings (with positions, normalised where the
family does so) if all layers are adapted. Frozen layers below would cost a backward pass through the whole backbone and leave
nothing to cache; moved here, an example costs two passes through what is trained.

Guarantees (tests: tests/client/training/test_adversarial.py)
    * The gradient of an example is that of the formula, by plain autograd, alone (test_gradients_equal_those_of_a_loop): one
      vector of each record is clipped, once, so sensitivity, sampling and epsilon are those without adversarial training.
    * r follows from the example and the current values alone, to the last bit (test_company_does_not_show).
    * Where g is zero, or is no number, r is zero.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from client.training.per_example import PerExampleHooks
from shared.errors import PrivacyError
from shared.models.batches import Batch
from shared.models.tunable import TunableModel
from shared.runtime.runtime import Runtime


def backward(runtime: Runtime, batch: Batch, hooks: PerExampleHooks) -> Tensor:
    """Leave the gradient of every example's loss on the trained parameters, as `grad_sample`, and return the clean losses [B].

    Args:
        hooks: attached to the runtime's model.

    Raises:
        PrivacyError: if there is to be an adversarial part and the model cannot have one.
    """
    adversarial, model = runtime.adversarial, runtime.model
    if adversarial is None:
        losses = _losses(runtime, batch)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        return losses
    if not isinstance(model, TunableModel) or hooks.autograd_grad_sample_hooks:
        raise PrivacyError(
            "training.adversarial adds up the gradients of two passes, which only language models of which all that is trained "
            "is linear can do: samplers of Opacus keep one pass. Remove training.adversarial."
        )
    with runtime.autocast():
        entering = model.entering(batch).detach().requires_grad_()
    # Autocast casts a leaf once for all its uses, so what comes back would be added up in bfloat16; but only where the row is
    # full, which depends on company.
    losses = _losses(runtime, replace(batch, hidden=entering.view_as(entering)))
    ((1 - adversarial.weight) * losses).sum().backward()  # type: ignore[no-untyped-call]
    assert entering.grad is not None  # noqa: S101 (every output follows from it)
    lengths = [1] * len(losses) if model.pools_frozen else batch.attention_mask.sum(dim=1).tolist()
    moved = entering.detach() + steepest(entering.detach(), entering.grad, lengths, adversarial.radius)
    # The hooks add what a second pass brings to the first.
    (adversarial.weight * _losses(runtime, replace(batch, hidden=moved))).sum().backward()  # type: ignore[no-untyped-call]
    return losses


def steepest(entering: Tensor, gradient: Tensor, lengths: list[int], radius: float) -> Tensor:
    """Return r of every example, as long as `radius` times what it is added to; 0 where there is no direction.

    Args:
        entering, gradient: e and g, of the tokens alone, text after text [1, N, H].
        lengths: tokens of every example, together N.
    """
    norms, slopes = (_norms(values, lengths) for values in (entering, gradient))
    scale = radius * norms / slopes
    usable = scale.isfinite() & slopes.isfinite() & (slopes > 0)
    counts = torch.tensor(lengths, device=scale.device)
    by_token = [values.repeat_interleave(counts)[:, None] for values in (scale, usable)]
    return torch.where(by_token[1], gradient.double() * by_token[0], 0.0).to(entering.dtype)


def _norms(values: Tensor, lengths: list[int]) -> Tensor:
    """Return the norm of every example, float64 [B]: one by one, for a sum's order follows from the shape of the whole."""
    parts = torch.split(values[0], lengths)
    return torch.stack([torch.linalg.vector_norm(part.double()) for part in parts])


def _losses(runtime: Runtime, batch: Batch) -> Tensor:
    with runtime.autocast():
        return runtime.task.per_example_loss(runtime.model(batch), batch)
