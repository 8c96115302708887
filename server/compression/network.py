"""A tuned language model as one network of which every layer can be trained: it says what it thinks after each layer.

Guarantee (tests: tests/server/compression/test_network.py): outputs are those of the run's model to 1e-5, and `parts` takes back
what `Network` was made of, bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shared.models.batches import Batch
from shared.models.heads import PooledClassifier, TiedLanguageHead, TokenClassifier, TokenHead
from shared.runtime.export.parts import Parts


class Network(nn.Module):
    """Backbone and head; without dropout, and with embeddings that are not trained.

    Words that the public texts lack would keep an embedding that the layers above no longer expect, so all keep theirs.

    Attributes:
        built_from: the model as it was.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.for_model(**parts.config)
        options: dict[str, Any] = {} if parts.family == "gpt2" else {"add_pooling_layer": False}
        self.backbone = AutoModel.from_config(config, **options).eval()
        self.backbone.load_state_dict(parts.weights)
        self.built_from = parts
        self.head = _head(parts, self.backbone.get_submodule(parts.architecture.embedding))
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(
                name.startswith((f"{parts.architecture.layers}.", *(f"{path}." for path in parts.architecture.end)))
            )

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers."""
        found: nn.ModuleList = self.backbone.get_submodule(self.built_from.architecture.layers)
        return found

    def forward(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """Return what leaves each layer, float [B, T, H] each, the last one normalised where the family does; and the outputs."""
        found = self.backbone(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), output_hidden_states=True
        )
        hidden = found.last_hidden_state
        return [*found.hidden_states[1:-1], hidden], self.answer(hidden, batch)

    def answer(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the outputs for what leaves the last layer."""
        found: Tensor = (
            self.head(hidden) if isinstance(self.head, TokenHead) else self.head(hidden, batch.attention_mask)
        )
        return found

    def parts(self) -> Parts:
        """Return the network taken apart, as it is now."""
        weights = {name: value.detach().cpu().clone() for name, value in self.backbone.named_parameters()}
        head = self.built_from.head
        if isinstance(self.head, PooledClassifier | TokenClassifier):
            head = (self.head.linear.weight.detach().cpu().clone(), self.head.linear.bias.detach().cpu().clone())
        return replace(self.built_from, weights=weights, head=head)


def _head(parts: Parts, embedding: nn.Module) -> nn.Module:
    if parts.head is None:
        assert isinstance(embedding, nn.Embedding)  # noqa: S101 (of every family it is one)
        return TiedLanguageHead(embedding)
    weight, bias = parts.head
    head: TokenClassifier | PooledClassifier
    if parts.by_token:
        head = TokenClassifier(weight.shape[1], len(bias))
    else:
        head = PooledClassifier(weight.shape[1], len(bias), parts.job.model.pooling)
    with torch.no_grad():
        head.linear.weight.copy_(weight)
        head.linear.bias.copy_(bias)
    return head
