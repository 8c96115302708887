"""Smaller networks out of a large one: fewer layers, and narrower feed-forward parts.

What transformers' configurations can say is what can be cut: the number of layers and one width of the feed-forward parts for all
of them. Attention heads cannot be: their width is the hidden size over their number, so fewer of them would be wider ones.

Sources: layers that are spread evenly as in DistilBERT (Sanh et al. 2019) and in PKD (Sun et al. 2019); what a neuron is worth as
in Michel, Levy and Neubig 2019 and Molchanov et al. 2019 (Taylor expansion of the loss, squared), with answers that are drawn
from the model itself, for there are no labels (Fisher information, Theis et al. 2018).

Guarantee (tests: tests/server/compression/test_cutting.py): kept layers and neurons have the weights that they had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from server.compression.network import Network
from shared.models.batches import IGNORED, Batch
from shared.runtime.export.parts import Parts
from shared.tasks import task_of
from shared.tasks.causal_lm import CausalLanguageModelling


@dataclass(frozen=True, kw_only=True)
class _Names:
    """What a family calls what is cut.

    Attributes:
        width: key of the configuration for the width of the feed-forward part.
        inner, outer: of a layer, into and out of the feed-forward part.
        transposed: weights are [in, out].
    """

    width: str
    inner: str
    outer: str
    transposed: bool = False


_BERT = _Names(width="intermediate_size", inner="intermediate.dense", outer="output.dense")
_GPT2 = _Names(width="n_inner", inner="mlp.c_fc", outer="mlp.c_proj", transposed=True)


def _names(parts: Parts) -> _Names:
    return _GPT2 if parts.family == "gpt2" else _BERT


def width_of(parts: Parts) -> int:
    """Return the width of the feed-forward parts."""
    return len(parts.weights[f"{parts.architecture.layers}.0.{_names(parts).inner}.bias"])


def spread(total: int, count: int) -> tuple[int, ...]:
    """Return which `count` of `total` layers are kept: the first, the last, and others evenly between them.

    The last one is what the run has tuned, and what the head reads; a single layer is that one.
    """
    if count == 1:
        return (total - 1,)
    return tuple(part * (total - 1) // (count - 1) for part in range(count))


def with_layers(parts: Parts, kept: Sequence[int]) -> Parts:
    """Return the model with these layers only, in this order, numbered from 0."""
    begin, found = f"{parts.architecture.layers}.", {}
    for name, value in parts.weights.items():
        if not name.startswith(begin):
            found[name] = value
            continue
        number, _, rest = name.removeprefix(begin).partition(".")
        if int(number) in kept:
            found[f"{begin}{list(kept).index(int(number))}.{rest}"] = value
    config = {**parts.config, parts.architecture.num_layers: len(kept)}
    return replace(parts, config=config, weights=found)


def with_width(parts: Parts, kept: Sequence[Tensor]) -> Parts:
    """Return the model with these neurons of each layer's feed-forward part only.

    Args:
        kept: numbers of the neurons of each layer, int64, as many of each.
    """
    names, weights = _names(parts), dict(parts.weights)
    for layer, rows in enumerate(kept):
        begin = f"{parts.architecture.layers}.{layer}"
        for name, axis in ((f"{names.inner}.weight", 0), (f"{names.inner}.bias", 0), (f"{names.outer}.weight", 1)):
            axis = 1 - axis if names.transposed and name.endswith("weight") else axis
            weights[f"{begin}.{name}"] = weights[f"{begin}.{name}"].index_select(axis, rows).contiguous()
    return replace(parts, config={**parts.config, names.width: len(kept[0])}, weights=weights)


def most_important(importance: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return the numbers of the `count` most important neurons of each layer, in their order."""
    return [values.topk(count).indices.sort().values for values in importance]


def importance(network: Network, batches: Iterable[Batch], *, seed: int) -> list[Tensor]:
    """Return what each neuron of each layer's feed-forward part is worth, float64 [width] each.

    It is the mean over texts of (a · dL/da)², summed over the text's tokens first: about how much the loss would change
    without the neuron.

    Args:
        seed: of the answers that are drawn from the model.
    """
    parts, generator, seen = network.built_from, torch.Generator().manual_seed(seed), list[Tensor]()
    outer = [layer.get_submodule(_names(parts).outer) for layer in network.layers]
    hooks = [module.register_forward_pre_hook(_keeper(seen)) for module in outer]
    found = [torch.zeros(width_of(parts), dtype=torch.float64) for _ in outer]
    try:
        for batch in batches:
            seen.clear()
            loss = _own_loss(network(batch)[1], batch, parts, generator)
            for total, values, gradient in zip(found, seen, torch.autograd.grad(loss, seen), strict=True):
                by_text = (values.detach() * gradient * batch.attention_mask.unsqueeze(-1)).sum(dim=1)
                total += by_text.double().square().sum(dim=0).cpu()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _keeper(seen: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    return keep


def _own_loss(outputs: Tensor, batch: Batch, parts: Parts, generator: torch.Generator) -> Tensor:
    """Return the summed loss against answers that are drawn from what the model says."""
    if parts.job.task.target_range is not None:
        drawn = outputs.detach() + torch.randn(outputs.shape, generator=generator).to(outputs.device)
        return (outputs - drawn).square().sum() / 2
    places = answering_places(parts, batch)
    rows = (outputs if places is None else outputs[places]).float()
    drawn = torch.multinomial(rows.detach().softmax(dim=-1).cpu(), 1, generator=generator)[:, 0]
    return nn.functional.cross_entropy(rows, drawn.to(rows.device), reduction="sum")


def answering_places(parts: Parts, batch: Batch) -> Tensor | None:
    """Return at which tokens the model answers, bool [B, T]; None if it answers for a text as a whole."""
    task = task_of(parts.job)
    if isinstance(task, CausalLanguageModelling):
        places = torch.zeros_like(batch.attention_mask)
        places[:, :-1] = task.targets(batch)[:, 1:] != IGNORED  # after each token, what follows it
        return places
    return batch.targets != IGNORED if parts.by_token else None
