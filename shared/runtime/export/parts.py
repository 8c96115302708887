"""A tuned language model taken apart: plain weights of its backbone, adapters merged into them, and its head.

Everything that leaves PEFT behind is made of these: merged weights, graphs, compressed models.

Guarantee (tests: tests/shared/runtime/export/test_exports.py): what is put together from the parts computes what the
run's model computes in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import ConfigError
from shared.job.job import Job
from shared.models.eight_bits import plain_weights
from shared.models.families import Architecture, architecture_of
from shared.models.heads import OwnLanguageHead, PooledClassifier, TokenClassifier
from shared.models.tunable import TunableModel
from shared.runtime.runtime import Runtime

HEAD_EPSILON = 1e-5
"""Of the normalisation before the head, as `torch.nn.functional.layer_norm` has it."""
_OF_THE_MACHINE = (
    "_name_or_path",
    "_attn_implementation",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "architectures",
)


@dataclass(frozen=True)
class Parts:
    """A tuned language model.

    Attributes:
        job: that it is of.
        config: of the backbone, by the names of transformers.
        weights: of the backbone, float32 on the CPU, by the names of transformers.
        head: (weight [outputs, H], bias [outputs]) behind pooling and normalisation; None of a language model, whose output is
            its token embedding or `output`.
        tokenizer: of the backbone, splitting control tokens that a person wrote.
        output: matrix [vocabulary, H] of a language model that shares none with its token embedding.
    """

    job: Job
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    head: tuple[Tensor, Tensor] | None
    tokenizer: Any
    output: Tensor | None = None

    @property
    def family(self) -> str:
        """The backbone's model_type, such as "bert"."""
        return str(self.config["model_type"])

    @property
    def architecture(self) -> Architecture:
        """Where the family keeps its parts."""
        return architecture_of(self.family)

    @property
    def num_layers(self) -> int:
        """How many layers the backbone has."""
        return int(self.config[self.architecture.num_layers])

    @property
    def by_token(self) -> bool:
        """True if the head answers for each token."""
        return self.job.task.kind == "token_classification"

    def answering(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the head as others want it: logits over the calibration's `temperature`, or a score in the job's own unit.

        A score is not put on the border of its range, as `silotune predict` does.
        """
        assert self.head is not None  # noqa: S101 (the caller's model has one)
        weight, bias = (tensor.double() / temperature for tensor in self.head)
        if self.job.task.target_range is not None:
            low, high = self.job.task.target_range
            weight, bias = weight * (high - low) / 2, low + (bias + 1) * (high - low) / 2
        return weight, bias

    def own_head(self, weight: Tensor, bias: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the head that `answering` makes `weight` and `bias` of: takes it back."""
        if self.job.task.target_range is not None:
            low, high = self.job.task.target_range
            weight, bias = weight * 2 / (high - low), (bias - low) * 2 / (high - low) - 1
        return tensor(weight * temperature), tensor(bias * temperature)


def parts_of_runtime(runtime: Runtime, job: Job) -> Parts:
    """Return the parts of what is loaded in `runtime`, with LoRA and residuals of an exact aggregation merged.

    Raises:
        ConfigError: if it is no language model.
    """
    model = runtime.model
    if not isinstance(model, TunableModel):
        raise ConfigError(
            f"the run trained {job.model.backbone}, a network for images, which has no backbone to merge into."
        )
    merged = {name: _merged(model, name, factors) for name, factors in model.lora_factors().items()}
    weights = {}
    for name, parameter in model.backbone.named_parameters():
        plain, own = name.replace(".base_layer", ""), "base_model.model." + name.replace(".base_layer.weight", "")
        if ".lora_" not in name and not name.startswith("pooler.") and not name.endswith(".scale"):
            weights[plain] = merged[own] if own in merged else _frozen(model, name, parameter)
    for name in [name for name in weights if name.endswith("token_type_embeddings.weight")]:
        # In training every token is of the first type; a tokenizer elsewhere may say that a pair's second text is of the second.
        weights[name] = weights[name][:1].expand_as(weights[name]).contiguous()
    config = {key: value for key, value in model.backbone.config.to_dict().items() if key not in _OF_THE_MACHINE}  # type: ignore[operator, union-attr]
    head = None
    if isinstance(model.head, PooledClassifier):
        head = model.head.folded()
    elif isinstance(model.head, TokenClassifier):
        head = (model.head.linear.weight.detach().cpu(), model.head.linear.bias.detach().cpu())
    if head is not None:
        head = (head[0].float().clone(), head[1].float().clone())
    output = None
    if isinstance(model.head, OwnLanguageHead):
        plain_output = plain_weights(model.head.output)
        output = (model.head.output.weight.detach() if plain_output is None else plain_output).cpu().clone()
    return Parts(job, config, weights, head, runtime.tokenizer, output)


def _merged(model: TunableModel, name: str, factors: tuple[nn.Parameter, nn.Parameter]) -> Tensor:
    """Return the weight of an adapted module with scaling · B · A added; residuals stand in it already."""
    factor_a, factor_b = (factor.detach().double().cpu() for factor in factors)
    base: Any = model.backbone.get_submodule(name.removeprefix("base_model.model.")).get_base_layer()  # type: ignore[operator]
    product = model.scaling * (factor_b @ factor_a)
    plain = plain_weights(base)
    weight = base.weight.detach() if plain is None else plain
    if model.architecture.transposed:  # Conv1D of GPT-2 stores [in, out]
        product = product.T
        weight = weight if plain is None else weight.T
    return (weight.double().cpu() + product).float()


def _frozen(model: TunableModel, name: str, parameter: nn.Parameter) -> Tensor:
    """Return the values of a frozen parameter, in transformers' layout; of weights in 8 bits those that are computed with."""
    module = model.backbone.get_submodule(name.rpartition(".")[0])
    plain = plain_weights(module) if name.endswith(".weight") else None
    if plain is None:
        return parameter.detach().float().cpu().clone()
    turned = model.architecture.transposed and isinstance(module, nn.Linear)
    return (plain.T if turned else plain).cpu().contiguous()


def tensor(values: Any) -> Tensor:
    """Return float32 values in one piece, as files of weights want them."""
    return torch.as_tensor(values).float().contiguous()
