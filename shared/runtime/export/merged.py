"""Merged weights: a folder that transformers loads by itself, without PEFT and without code that comes with a model.

`AutoModelForCausalLM` reads a GPT-2 as it is. Our heads are not those of transformers: they pool tokens by their mean or by the
first one, normalise without weights, and apply a linear layer, while `BertForSequenceClassification` has a pooler, the
tanh of a linear layer on the first token. One more transformer layer does what is missing (`_extra_layer`):

1. Query and key are 0, so that attention is the same for all tokens that are not padding, and value is the identity: its
   output is their mean m. The layer before is scaled down to k·h, and attention's output up again, so that m outweighs what
   the residual adds: LayerNorm(s·m + k·h) is LayerNorm(s·m) up to float32's rounding. For `first` pooling and for tokens
   attention gives 0, and what is normalised is s·h.
2. transformers' LayerNorm adds its own e to the variance, not our 1e-5. With s = sqrt(e / 1e-5) that is the same number:
   s·m / sqrt(var(s·m) + e) = m / sqrt(var(m) + 1e-5).
3. The feed-forward part is 0. The LayerNorm behind it would undo step 2, so its input is small against sqrt(e): then e is nearly
   all of what it divides by, and it is linear up to `_LINEAR`² / 2 of the little by which step 2 changes a variance.
4. The pooler multiplies by a small number, where tanh(x) is x up to x² / 3, and the classifier divides by it.

Guarantee (tests: tests/shared/runtime/export/test_exports.py): logits are those of the run's model in float32 to 1e-4.
In float16 the scaled numbers vanish; bfloat16 has float32's range and holds them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shared.errors import ConfigError, ModelError
from shared.files.json_files import read_object
from shared.job.kinds import TaskKind
from shared.runtime.export.folder import ModelFolder
from shared.runtime.export.parts import HEAD_EPSILON, Parts, last_norm, tensor

WEIGHTS_FILE = "model.safetensors"
_OUTWEIGHS = 2.0**30  # s / k
_LINEAR = 2.0**-10
_SMALL = 2.0**-14
CLASSES: Mapping[TaskKind, str] = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "pair_matching": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "causal_lm": "AutoModelForCausalLM",
    "replies": "AutoModelForCausalLM",
}
"""What loads a merged model, by kind of task."""
_PREFIXES = {
    "bert": "bert.",
    "gpt2": "transformer.",
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), "roberta."),
}


def check_mergeable(kind: TaskKind, family: str | None = None) -> None:
    """Raise `ConfigError` if transformers has no class that could hold such a model; without a `family`, whatever that is."""
    if kind not in CLASSES:
        raise ConfigError(
            f"a model of {kind} is no transformer, so transformers cannot load it; export it with --to onnx."
        )
    if family == "gpt2" and CLASSES[kind] != "AutoModelForCausalLM":
        raise ConfigError(
            f"transformers' classifiers on GPT-2 pool other tokens than ours, so a {kind} model on GPT-2 cannot be merged "
            "without code of its own; export it with --to onnx."
        )


def write_merged(folder: Path, parts: Parts, temperature: float) -> None:
    """Write configuration, weights and tokenizer into `folder`.

    Args:
        temperature: of the calibration; it goes into the classifier's weights.

    Raises:
        ConfigError: see `check_mergeable`.
    """
    import transformers

    kind = parts.job.task.kind
    check_mergeable(kind, parts.family)
    settings = dict(parts.config) | ({} if parts.head is None else _settings(parts))
    config = transformers.AutoConfig.for_model(**settings)
    model = getattr(transformers, CLASSES[kind]).from_config(config)
    prefix = model.base_model_prefix + "."
    weights = {prefix + name: value for name, value in parts.weights.items()}
    if parts.head is not None:
        weights |= _head_weights(parts, prefix, temperature)
    loaded = model.load_state_dict(weights, strict=False)
    # The output of a GPT-2 is its token embedding.
    if missing := [name for name in [*loaded.missing_keys, *loaded.unexpected_keys] if name != "lm_head.weight"]:
        raise AssertionError(f"transformers has other weights than expected, first {missing[0]}")
    model.eval().save_pretrained(folder)
    save_tokenizer(folder, parts)


def read_merged(folder: ModelFolder) -> Parts:
    """Return the parts of what `write_merged` wrote: without the extra layer, and with the head as the run had it.

    Raises:
        ModelError: if the weights cannot be read or are others.
    """
    from transformers import AutoTokenizer

    job, config = folder.job, read_object(folder.path / "config.json")
    try:
        stored = load_file(folder.path / WEIGHTS_FILE)
        begin = _PREFIXES[config["model_type"]]
        weights = {name.removeprefix(begin): value.float() for name, value in stored.items() if name.startswith(begin)}
        tokenizer = AutoTokenizer.from_pretrained(
            folder.path, local_files_only=True, trust_remote_code=False, split_special_tokens=True
        )
        if job.task.kind in ("causal_lm", "replies"):
            return Parts(job, config, weights, None, tokenizer)
        config["num_hidden_layers"] -= 1
        plain = Parts(job, config, weights, None, tokenizer)
        outer = f"{plain.architecture.layers}.{config['num_hidden_layers']}."
        for name in [f"{last_norm(plain)}.{kind}" for kind in ("weight", "bias")]:
            weights[name] = tensor(weights[name].double() / _scales(plain)[1])
        out = "classifier" if "classifier.weight" in stored else "classifier.out_proj"
        weight = stored[f"{out}.weight"].double() * (1.0 if plain.by_token else _SMALL)
        head = plain.own_head(weight, stored[f"{out}.bias"].double(), folder.record.temperature)
    except (KeyError, OSError, SafetensorError) as error:
        raise ModelError(f"{folder.path} holds no merged weights of ours ({error}); export the run anew.") from None
    kept = {name: value for name, value in weights.items() if not name.startswith((outer, "pooler."))}
    return Parts(job, config, kept, head, tokenizer)


def save_tokenizer(folder: Path, parts: Parts) -> None:
    """Write the tokenizer, which cuts at the job's length; of pairs it makes no token types, as in training."""
    backend = parts.tokenizer.backend_tokenizer
    backend.no_truncation()  # what the last call set would be written
    backend.no_padding()
    parts.tokenizer.save_pretrained(folder)
    _amend_json(
        folder / "tokenizer_config.json",
        {
            "model_max_length": parts.job.model.max_length,
            "model_input_names": ["input_ids", "attention_mask"],
            "split_special_tokens": True,
        },
    )


def _settings(parts: Parts) -> dict[str, Any]:
    """Return what a classifier's configuration has beside the backbone's."""
    labels = parts.job.task.labels or ("score",)
    regression = parts.job.task.kind == "regression"
    problem = {} if parts.by_token else {"problem_type": "regression" if regression else "single_label_classification"}
    return {
        "num_hidden_layers": int(parts.config["num_hidden_layers"]) + 1,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        **problem,
    }


def _head_weights(parts: Parts, prefix: str, temperature: float) -> dict[str, Tensor]:
    """Return the weights of the extra layer and of the classifier, and those of the layer before, scaled."""
    size, epsilon = int(parts.config["hidden_size"]), float(parts.config["layer_norm_eps"])
    pools, before = _scales(parts)
    norm, last = last_norm(parts), int(parts.config["num_hidden_layers"])
    found = {f"{norm}.{name}": parts.weights[f"{norm}.{name}"].double() * before for name in ("weight", "bias")}
    layer = _extra_layer(size, int(parts.config["intermediate_size"]), epsilon, _OUTWEIGHS if pools else 0.0)
    found |= {f"{parts.architecture.layers}.{last}.{name}": value for name, value in layer.items()}
    weights = {prefix + name: value for name, value in found.items()}
    weight, bias = parts.answering(temperature)
    if parts.by_token:
        weights |= {"classifier.weight": weight, "classifier.bias": bias}
    else:
        dense, out = (
            (f"{prefix}pooler.dense", "classifier")
            if parts.family == "bert"
            else ("classifier.dense", "classifier.out_proj")
        )
        weights |= {f"{dense}.weight": torch.eye(size) * _SMALL, f"{dense}.bias": torch.zeros(size)}
        weights |= {f"{out}.weight": weight / _SMALL, f"{out}.bias": bias}
    return {name: tensor(value) for name, value in weights.items()}


def _scales(parts: Parts) -> tuple[bool, float]:
    """Return whether the extra layer pools, and by what the vectors that enter it are scaled."""
    pools = not parts.by_token and parts.job.model.pooling == "mean"
    scale = math.sqrt(float(parts.config["layer_norm_eps"]) / HEAD_EPSILON)
    return pools, scale / _OUTWEIGHS if pools else scale


def _extra_layer(size: int, intermediate: int, epsilon: float, gain: float) -> Mapping[str, Tensor]:
    """Return the weights of the layer that pools (`gain` 0: does not) and normalises; see the module.

    Args:
        size, intermediate: of the hidden vectors, and within the feed-forward part.
        epsilon: of transformers' LayerNorm.
    """
    identity, zero, one = torch.eye(size, dtype=torch.float64), torch.zeros(size), torch.ones(size, dtype=torch.float64)
    small = _LINEAR * math.sqrt(epsilon)
    return {
        "attention.self.query.weight": torch.zeros(size, size),
        "attention.self.query.bias": zero,
        "attention.self.key.weight": torch.zeros(size, size),
        "attention.self.key.bias": zero,
        "attention.self.value.weight": identity,
        "attention.self.value.bias": zero,
        "attention.output.dense.weight": identity * gain,
        "attention.output.dense.bias": zero,
        "attention.output.LayerNorm.weight": one * small,
        "attention.output.LayerNorm.bias": zero,
        "intermediate.dense.weight": torch.zeros(intermediate, size),
        "intermediate.dense.bias": torch.zeros(intermediate),
        "output.dense.weight": torch.zeros(size, intermediate),
        "output.dense.bias": zero,
        "output.LayerNorm.weight": one * math.sqrt(small**2 + epsilon) / small,
        "output.LayerNorm.bias": zero,
    }


def _amend_json(path: Path, changes: Mapping[str, Any]) -> None:
    import json

    found = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(found | dict(changes), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
