"""What a job can train: a frozen backbone with PEFT LoRA adapters and a head, or a small network as a whole.

`TrainedModel` is all that runtime, trainer, proof and rounds know of either; networks for images stand in
`shared.models.images`.

Guarantees of `TunableModel`, each checked when the model is built (tests: tests/shared/models/test_tunable.py)
    * Exactly the LoRA factors and the head are trainable; every other weight is frozen.
    * No BatchNorm, no dropout, no remote code, no pickle: one record cannot change what another one computes, and
      loading a backbone cannot run code.
    * `forward` from what was cached (`frozen`) equals `forward` from tokens, because everything below the first adapted
      layer is frozen and deterministic.

LoRA: Hu et al. 2021. FFA-LoRA (A fixed): Sun et al. 2024.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared.errors import ModelError
from shared.job.model import LoraConfig
from shared.job.parsing import nearest
from shared.models.batches import Batch
from shared.models.eight_bits import Linear8
from shared.models.families import Architecture, part
from shared.models.heads import PooledClassifier, TokenHead
from shared.models.packing import Packing
from shared.models.seeds import derived_seed

# Suffix of the name under which a global adapter keeps what averaged factors cannot hold; see `set_residuals`.
RESIDUAL = ".residual"


class TrainedModel(nn.Module):
    """A model of which a job trains all weights or some, and no more than what `trainable` names leaves a site.

    Attributes:
        first_adapted: number of layers at the bottom that are frozen, so that what they compute can be cached.
    """

    first_adapted: int = 0

    @property
    def device(self) -> torch.device:
        """Where the trainable parameters are."""
        return next(self.parameters()).device

    def train_mode(self) -> None:
        """Keep everything frozen in evaluation mode; only what is trained is in training mode, as Opacus asks."""
        self.eval()
        for module in self.modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                module.train()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by stable name, sorted; those of the head are called `head.*`."""
        return dict(sorted((name, p) for name, p in self.named_parameters() if p.requires_grad))

    def head_parameters(self) -> set[str]:
        """Return the names in `trainable()` that belong to the head."""
        return {name for name in self.trainable() if name.startswith("head.")}

    def lora_factors(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Return (A [r, in], B [out, r]) of every adapted module, by the module's stable name."""
        return {}

    def frozen_sha256(self) -> str:
        """Return a SHA-256 over every frozen weight: equal before and after training."""
        digest = hashlib.sha256()
        for name, parameter in sorted(self.named_parameters()):
            if not parameter.requires_grad:
                digest.update(name.encode())
                digest.update(parameter.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def set_residuals(self, residuals: Mapping[str, Tensor]) -> None:
        """Put back what averaged factors cannot hold; a model without factors has none.

        Raises:
            ModelError: if there are residuals of something that the model does not adapt.
        """
        if unknown := sorted(residuals.keys() - self.lora_factors().keys()):
            raise ModelError(f"the model adapts no layer {unknown[0]!r}; the adapter was made for another job.")


class TunableModel(TrainedModel):
    """Backbone, adapters and head, split at the first adapted layer.

    Attributes:
        architecture: where the backbone keeps its parts.
        first_adapted: index of the lowest layer with an adapter; all below is frozen and cacheable.
        scaling: alpha / rank.
        packing: while something runs on packed tokens, where they belong; None at other times.
        recompute: whether trained layers keep only what enters them and compute the rest once more in the backward pass
            (Chen et al. 2016); the numbers are the same to the last bit.
    """

    def __init__(
        self,
        peft_model: Any,
        architecture: Architecture,
        lora: LoraConfig,
        first_adapted: int,
        head: nn.Module,
    ):
        super().__init__()
        self.peft_model = peft_model
        self.head = head
        self.architecture = architecture
        self.first_adapted = first_adapted
        self.scaling = lora.alpha / lora.rank
        self._backbone_name = "base_model.model"
        self.packing: Packing | None = None
        self._frozen_targets: dict[str, Tensor] = {}
        self._even_rows = False
        self.recompute = False
        self.train_mode()

    @property
    def backbone(self) -> nn.Module:
        """The transformer itself, below PEFT's wrappers."""
        return self.peft_model.get_submodule(self._backbone_name)  # type: ignore[no-any-return]

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by stable name, sorted: LoRA factors as PEFT stores them, then `head.*`."""
        found = {_stable_name(n): p for n, p in self.named_parameters() if p.requires_grad}
        return dict(sorted(found.items()))

    def lora_factors(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Return (A [r, in], B [out, r]) of every adapted module, by the module's stable name."""
        return {name: (m.lora_A["default"].weight, m.lora_B["default"].weight) for name, m in self._adapted()}

    def layers(self) -> nn.ModuleList:
        """Return the backbone's transformer layers."""
        return self.backbone.get_submodule(self.architecture.layers)  # type: ignore[return-value]

    def embed_frozen(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the activations that enter the first adapted layer, float [B, T, H]; no gradient is recorded."""
        packing = self._packing_of(attention_mask)
        return packing.pad(self._embed_frozen(input_ids, packing))

    @property
    def pools_frozen(self) -> bool:
        """True if all that is trained is a linear layer on one vector of each text: then that vector is what can be cached."""
        return isinstance(self.head, PooledClassifier) and self.first_adapted == len(self.layers())

    def frozen(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return what can be cached of each text, without gradients: see `embed_frozen`, or one vector [B, 1, H]."""
        if not self.pools_frozen:
            return self.embed_frozen(input_ids, attention_mask)
        with torch.no_grad():
            return self.pooled(input_ids, attention_mask).unsqueeze(1)

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return what the trained layer of a `PooledClassifier` sees of each text, float32 [B, H]."""
        packing = self._packing_of(attention_mask)
        hidden = self._run_rest(self._embed_frozen(input_ids, packing), packing, self.first_adapted)
        return self.head.pool(packing.pad(hidden), attention_mask)  # type: ignore[operator, no-any-return]

    def forward(self, batch: Batch) -> Tensor:
        """Return the head's output for every example: logits [B, classes] or [B, T, vocabulary]."""
        if batch.hidden is not None and self.pools_frozen:
            return self.head.classify(batch.hidden[0])  # type: ignore[operator, no-any-return]
        packing = self._packing_of(batch.attention_mask)
        hidden = self._embed_frozen(batch.input_ids, packing) if batch.hidden is None else packing.fit(batch.hidden)
        return self._finish(hidden, packing, batch.attention_mask, self.first_adapted)

    def entering(self, batch: Batch) -> Tensor:
        """Return what enters the trained part of every text, as `Batch.hidden` holds it; no gradient is recorded."""
        if batch.hidden is not None:
            return batch.hidden
        if self.pools_frozen:
            return self.frozen(batch.input_ids, batch.attention_mask).transpose(0, 1)
        packing = self._packing_of(batch.attention_mask)
        return self._embed_frozen(batch.input_ids, packing)[:, : packing.count]

    def embeddings(self, input_ids: Tensor) -> Tensor:
        """Return what enters the first layer for tokens [B, T], float [B, T, H]; no gradient is recorded."""
        with torch.no_grad():
            return self.architecture.embed(self.backbone, input_ids)

    def from_embeddings(self, embeddings: Tensor, attention_mask: Tensor) -> Tensor:
        """Return what `forward` does, from `embeddings` [B, T, H] and with gradients through every layer down to them."""
        packing = self._packing_of(attention_mask)
        return self._finish(packing.pack(embeddings), packing, attention_mask, 0)

    def set_residuals(self, residuals: Mapping[str, Tensor]) -> None:
        """Add `residuals` (float [out, in] by adapted module) to the frozen weights, replacing earlier ones.

        The exact average of B·A over sites leaves a part that the averaged factors cannot hold; the coordinator
        keeps it here (FedEx-LoRA, Singhal et al. 2024).
        """
        for name, module in self._adapted():
            residual = residuals.get(name)
            if isinstance(base := module.get_base_layer(), Linear8):
                base.residual = None if residual is None else residual.to(base.scale)
                continue
            weight = base.weight
            if name not in self._frozen_targets:
                if residual is None:
                    continue
                self._frozen_targets[name] = weight.detach().clone()
            original = self._frozen_targets[name]
            with torch.no_grad():
                weight.copy_(original)
                if residual is not None:
                    weight.add_(_like_weight(module, residual).to(weight))

    def prepare_autocast(self, dtype: torch.dtype) -> None:
        """Hold what is frozen in the type that autocast would cast it to in every forward pass; results stay what they are.

        From then on forward passes run under autocast only.

        Adapted layers keep everything in float32: `set_residuals` adds to their weights, and factors are released.
        """
        # Products in bfloat16 are oneDNN's on a processor.
        self._even_rows = self.device.type == "cpu"
        adapted = [module for _, module in self._adapted()]
        for module in adapted:
            # PEFT would cast what enters A to float32, for autocast to cast it back.
            module.cast_input_dtype_enabled = False
        keeps = {part for module in adapted for part in module.modules()}
        for module in self.layers().modules():
            if _is_linear(module) and not isinstance(module, Linear8) and module not in keeps:
                for parameter in module.parameters(recurse=False):
                    if not parameter.requires_grad:
                        parameter.data = parameter.data.to(dtype)

    def _adapted(self) -> Iterable[tuple[str, Any]]:
        for name, module in self.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                yield _stable_name(name), module

    def _embed_frozen(self, input_ids: Tensor, packing: Packing) -> Tensor:
        with torch.no_grad():
            hidden = packing.pack(self.architecture.embed(self.backbone, input_ids))
            return self._run_layers(hidden, packing, 0, self.first_adapted)

    def _finish(self, hidden: Tensor, packing: Packing, attention_mask: Tensor, start: int) -> Tensor:
        """Run the layers from `start` on packed tokens [1, N, H], then the head."""
        hidden = self._run_rest(hidden, packing, start)
        if isinstance(self.head, TokenHead):
            with self._packed(packing):
                return packing.pad(self.head(hidden))
        return self.head(packing.pad(hidden), attention_mask)  # type: ignore[no-any-return]

    def _run_rest(self, hidden: Tensor, packing: Packing, start: int) -> Tensor:
        """Run the layers from `start` to the backbone's end on packed tokens [1, N, H]."""
        hidden = self._run_layers(hidden, packing, start, len(self.layers()))
        for path in self.architecture.end:
            if (module := part(self.backbone, path)) is not None:
                hidden = module(hidden)
        return hidden

    def _run_layers(self, hidden: Tensor, packing: Packing, start: int, stop: int) -> Tensor:
        """Run layers on packed tokens [1, N, H]."""
        for layer in self.layers()[start:stop]:
            if self.recompute and torch.is_grad_enabled():
                hidden = checkpoint(
                    self._run_layer, layer, hidden, packing, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden = self._run_layer(layer, hidden, packing)
        return hidden

    def _run_layer(self, layer: nn.Module, hidden: Tensor, packing: Packing) -> Tensor:
        rotary = self._rotary_of(layer, hidden, packing)
        with self._packed(packing):
            output = layer(hidden, packing=packing, causal=self.architecture.causal, **rotary)
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]

    def _rotary_of(self, layer: nn.Module, hidden: Tensor, packing: Packing) -> dict[str, tuple[Tensor, Tensor]]:
        """Return what a layer with rotary positions is given: cosine and sine of each place of the row."""
        if self.architecture.rotary is None:
            return {}
        # ModernBERT turns by other angles in layers that see a window.
        kind = getattr(layer, "attention_type", None)
        rotary = self.backbone.get_submodule(self.architecture.rotary)
        return {"position_embeddings": rotary(hidden, packing.positions, *([] if kind is None else [kind]))}

    def _packing_of(self, attention_mask: Tensor) -> Packing:
        return Packing(attention_mask, even=self._even_rows)

    @contextmanager
    def _packed(self, packing: Packing) -> Iterator[None]:
        self.packing = packing
        try:
            yield
        finally:
            self.packing = None


def attach_adapters(backbone: nn.Module, architecture: Architecture, lora: LoraConfig, *, seed: int) -> tuple[Any, int]:
    """Wrap `backbone` with PEFT LoRA and return (PEFT model, index of the first adapted layer).

    A is drawn orthonormal from the public `seed`, B is zero. With `lora.train == "b"` A is frozen, with "none" both are, and the
    index is the number of layers.

    Raises:
        ModelError: if a target matches no linear layer, or more layers are asked for than there are.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    num_layers = len(backbone.get_submodule(architecture.layers))  # type: ignore[arg-type]
    last = num_layers if lora.last_layers is None else lora.last_layers
    if last > num_layers:
        raise ModelError(
            f"lora.last_layers is {last}, but the backbone has {num_layers} layers; use at most that many."
        )
    indices = list(range(num_layers - last, num_layers))
    _check_targets(backbone, architecture, lora, indices)
    eight_bits = any(isinstance(module, Linear8) for module in backbone.modules())  # they are [out, in] in every family
    peft_config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.target_modules),
        layers_to_transform=indices,
        layers_pattern=architecture.layers_pattern,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=architecture.transposed and not eight_bits,
        task_type="FEATURE_EXTRACTION",
    )
    model = get_peft_model(backbone, peft_config)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            factor_a, factor_b = module.lora_A["default"].weight, module.lora_B["default"].weight
            generator = torch.Generator().manual_seed(derived_seed(seed, _stable_name(name)))
            with torch.no_grad():
                factor_a.copy_(_orthonormal(factor_a.shape, generator))
                factor_b.zero_()
            factor_a.requires_grad_(lora.train == "both")
            factor_b.requires_grad_(lora.train != "none")
    # Factors that nothing trains change nothing: B stays zero.
    return model, num_layers if lora.train == "none" else indices[0]


_PROBE_LENGTHS = (24, 5)
_WINDOWED_LENGTH = 192  # beyond the windows of ModernBERT
_MOST_DEVIATION = 1e-4  # of the norm; float32 gives about 1e-7


def check_forward(model: TunableModel, max_length: int) -> None:
    """Compare hidden states with those of transformers' own forward pass, on public tokens of two texts.

    A row of the table of families that forgets an offset of positions, a window or a normalisation, or a configuration with
    something that no row knows of, would train on other numbers than the model's.

    Raises:
        ModelError: if they are not the same, up to rounding.
    """
    backbone, config = model.backbone, model.backbone.config
    windowed = getattr(config, "sliding_window", None) is not None
    longest = min(max_length, _WINDOWED_LENGTH if windowed else _PROBE_LENGTHS[0])
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(config.vocab_size)  # type: ignore[union-attr, arg-type]
    lengths = torch.tensor([longest, min(longest, _PROBE_LENGTHS[1])])
    mask = (torch.arange(longest) < lengths[:, None]).to(model.device)
    input_ids = torch.randint(0, vocabulary, mask.shape, generator=generator).to(model.device)
    with torch.no_grad():
        packing = model._packing_of(mask)
        ours = packing.pad(model._run_rest(model._embed_frozen(input_ids, packing), packing, model.first_adapted))[mask]
        theirs = backbone(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state[mask]
    if not (ours - theirs).norm() <= _MOST_DEVIATION * theirs.norm():
        raise ModelError(
            f"computed text by text, this {model.architecture.name} gives other hidden states than in transformers; its "
            "configuration has something that Silotune does not know. Use one with the settings of its family, or report it."
        )


def _check_targets(backbone: nn.Module, architecture: Architecture, lora: LoraConfig, indices: list[int]) -> None:
    """Raise `ModelError` if a target matches no linear module in one of the layers: it would be adapted there less than asked."""
    found = {
        index: [
            name
            for name, module in backbone.get_submodule(f"{architecture.layers}.{index}").named_modules()
            if _is_linear(module)
        ]
        for index in indices
    }
    for target in lora.target_modules:
        lacking = [
            i
            for i, names in found.items()
            if not any(f".{architecture.layers}.{i}.{name}".endswith(f".{target}") for name in names)
        ]
        if lacking:
            known = sorted({name for index in lacking for name in found[index]})
            where = "the adapted layers" if len(lacking) == len(indices) else f"layer {lacking[0]}"
            raise ModelError(
                f"lora.target_modules names {target!r}, which matches no linear layer of {where}; "
                f"{nearest(target, sorted({name.rsplit('.', 1)[-1] for name in known}))} (all: {', '.join(known)}). For "
                f"{architecture.name} take {list(architecture.targets)}."
            )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _like_weight(module: Any, matrix: Tensor) -> Tensor:
    """Turn a matrix [out, in] into the layout of the base layer's weight (Conv1D of GPT-2 stores [in, out])."""
    return matrix if isinstance(module.get_base_layer(), nn.Linear) else matrix.T


def _stable_name(name: str) -> str:
    """Drop wrapper names that are not part of PEFT's saved keys."""
    return name.removeprefix("peft_model.").replace(".default", "")


def _orthonormal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return a [r, in] matrix with orthonormal rows, float32."""
    gaussian = torch.randn(shape[1], shape[0], generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    rows: Tensor = (q * r.diagonal().sign()).T
    return rows.float()
