"""A tiny random model of every family, made from its configuration and saved with a tiny tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

_ENCODER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
_DECODER = {**_ENCODER, "num_key_value_heads": 1, "max_position_embeddings": 64}
_LEARNED = {**_ENCODER, "max_position_embeddings": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": _LEARNED,
    "roberta": {**_LEARNED, "pad_token_id": 1},
    "xlm-roberta": {**_LEARNED, "pad_token_id": 1},
    "camembert": {**_LEARNED, "pad_token_id": 1},
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64},
    "electra": {**_LEARNED, "embedding_size": 24},
    "modernbert": {
        **_ENCODER,
        "max_position_embeddings": 64,
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        **dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"), 0),
    },
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64},
    "opt": {**_LEARNED, "ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 1},
    "gpt_neox": {**_LEARNED, "use_parallel_residual": True},
    "llama": {**_DECODER, "tie_word_embeddings": False},
    "qwen2": {
        **_DECODER,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3": {**_DECODER, "head_dim": 24, "tie_word_embeddings": True},
}
"""Settings that make each family small, with what is particular about it in them: windows, grouped heads, narrow embeddings."""


def make_backbone(folder: Path, kind: str, tokenizer: Path, **changes: Any) -> Path:
    """Write a random model of `kind` and the tokenizer of the backbone in `tokenizer` into `folder`, which is new.

    Args:
        changes: of the family's settings in `CONFIGS`.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from shared.models.families import ARCHITECTURES

    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0} if ARCHITECTURES[kind].causal else {}
    config = AutoConfig.for_model(kind, **{"vocab_size": vocabulary, **ends, **CONFIGS[kind], **changes})
    (AutoModelForCausalLM if ARCHITECTURES[kind].causal else AutoModel).from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
    # By its own class AutoTokenizer would read another family's files.
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder
