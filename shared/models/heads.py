"""Heads: from token vectors to a task's outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shared.models.eight_bits import Embedding8, Linear8
from shared.models.seeds import derived_seed


def sum_in_order(values: Tensor) -> Tensor:
    """Return values [B, T, ...] added up over T, one after the other from the first: zeros behind an example change no bit.

    `sum` adds in an order that depends on T, and so on the longest example of the batch.
    """
    return values.cumsum(dim=1)[:, -1]


class PooledClassifier(nn.Module):
    """Token vectors -> one vector -> logits.

    The pooled vector is normalised per example to mean 0 and variance 1 without trained weights: a linear head under
    clipping learns several times faster from it, and no other record takes part in the normalisation.

    Attributes:
        centre: public vector [H] that is taken off what the linear layer sees, if the job says so; else None. What all texts have
            in common then takes no share of a clipped gradient; or, the other way round, a bias takes more of it.
    """

    centre: Tensor | None

    def __init__(self, hidden_size: int, num_labels: int, pooling: str) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, num_labels)
        self.pooling = pooling
        self.register_buffer("centre", None, persistent=False)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits [B, labels] from hidden [B, T, H]."""
        return self.classify(self.pool(hidden, attention_mask))

    def classify(self, pooled: Tensor) -> Tensor:
        """Return logits [B, labels] from what `pool` returns, [B, H]."""
        return self.linear(pooled if self.centre is None else pooled - self.centre)  # type: ignore[no-any-return]

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return weight [labels, H] and bias [labels] of the linear layer that does all of `classify` by itself, on the CPU."""
        weight, bias = self.linear.weight.detach().cpu(), self.linear.bias.detach().cpu()
        if self.centre is None:
            return weight, bias
        return weight, (bias.double() - weight.double() @ self.centre.cpu().double()).float()

    def pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Return what the trained layer sees of each text, float32 [B, H]; nothing here is trained."""
        if self.pooling == "first":
            pooled = hidden[:, 0]
        else:
            weights = attention_mask.float().unsqueeze(-1)
            pooled = sum_in_order(hidden.float() * weights) / weights.sum(dim=1)
        return nn.functional.layer_norm(pooled.float(), pooled.shape[-1:])


class TokenHead(nn.Module):
    """A head that treats each token by itself, so that it can run on packed texts: [..., H] -> [..., outputs]."""


class TokenClassifier(TokenHead):
    """Token vectors -> logits for each token, normalised as in `PooledClassifier` and for the same reason."""

    def __init__(self, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, num_labels)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [..., labels] from hidden [..., H]."""
        return self.linear(nn.functional.layer_norm(hidden.float(), hidden.shape[-1:]))  # type: ignore[no-any-return]


class TiedLanguageHead(TokenHead):
    """Token vectors -> logits over the vocabulary through the frozen token embedding; nothing here is trained."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._embedding = [embedding]  # in a list: not a sub-module, so its weight is counted once

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [..., vocabulary] from hidden [..., H]."""
        (embedding,) = self._embedding
        if isinstance(embedding, Embedding8):
            return embedding.as_output(hidden)
        return nn.functional.linear(hidden, embedding.weight)


class OwnLanguageHead(TokenHead):
    """Token vectors -> logits over the vocabulary through a frozen matrix of the backbone's own; nothing here is trained."""

    def __init__(self, weight: Tensor, *, bits: int = 32) -> None:
        """Take the matrix [vocabulary, H]; with 8 bits, round it."""
        super().__init__()
        if bits == 8:
            self.output: nn.Linear = Linear8(weight, None)
            return
        self.output = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.output.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [..., vocabulary] from hidden [..., H]."""
        return self.output(hidden)  # type: ignore[no-any-return]


def init_linear(linear: nn.Linear, *, seed: int, name: str) -> None:
    """Draw the weights of a head from the public seed: N(0, 0.02^2), bias 0."""
    generator = torch.Generator().manual_seed(derived_seed(seed, name))
    with torch.no_grad():
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * 0.02)
        linear.bias.zero_()
