"""Merged weights: a folder that transformers loads by itself, without PEFT and without code that comes with a model.

`AutoModelForCausalLM` reads a decoder as it is. Our heads are not those of transformers: they pool tokens by their mean or by the
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
4. The pooler multiplies by a small number, where tanh(x) is x up to x² / 3, and the classifier divides by it. Where ReLU
   (DistilBERT) or GELU (ELECTRA) stands in its place, the pooler adds a number that makes all values large, where both are x, and
   the classifier's bias takes it off.

Guarantee (tests: tests/shared/runtime/export/test_exports.py): logits are those of the run's model in float32 to 1e-4.
In float16 the scaled numbers vanish; bfloat16 has float32's range and holds them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shared.errors import ConfigError, ModelError
from shared.files.json_files import read_object
from shared.job.kinds import TaskKind
from shared.models.backbones import output_weight
from shared.models.families import architecture_of
from shared.models.tokenizers import load_tokenizer
from shared.runtime.export.folder import ModelFolder
from shared.runtime.export.parts import HEAD_EPSILON, Parts, tensor

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


@dataclass(frozen=True, kw_only=True)
class _Classifier:
    """What transformers puts behind the first token's vector.

    Attributes:
        dense, out: names of its two linear layers.
        grows: whether what is between them is x for large x, and not for small ones.
        inside: whether `dense` is a part of the backbone.
    """

    dense: str
    out: str
    grows: bool = False
    inside: bool = False


_ROBERTA = _Classifier(dense="classifier.dense", out="classifier.out_proj")
_CLASSIFIERS: Mapping[str, _Classifier] = {
    "bert": _Classifier(dense="pooler.dense", out="classifier", inside=True),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), _ROBERTA),
    "electra": replace(_ROBERTA, grows=True),
    "distilbert": _Classifier(dense="pre_classifier", out="classifier", grows=True),
}
_BERT_LAYER = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
"""What DistilBERT calls the parts of a layer of BERT."""


def check_mergeable(kind: TaskKind, family: str | None = None) -> None:
    """Raise `ConfigError` if transformers has no class that could hold such a model; without a `family`, whatever that is."""
    if kind not in CLASSES:
        raise ConfigError(
            f"a model of {kind} is no transformer, so transformers cannot load it; export it with --to onnx."
        )
    if family is None or CLASSES[kind] == "AutoModelForCausalLM":
        return
    if (row := architecture_of(family)).merges_labels:
        return
    why = "pool other tokens than ours" if row.causal else "have a head that no weights turn into ours"
    instead = (
        "export it with --to onnx" if row.has_graph else "its adapter stands in the run, for Silotune and for PEFT"
    )
    raise ConfigError(
        f"transformers' classifiers on {row.name} {why}, so a {kind} model on {row.name} cannot be merged without code of its "
        f"own; {instead}."
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
    prefix = parts.architecture.prefix
    weights = {prefix + name: value for name, value in parts.weights.items()}
    if parts.head is not None:
        weights |= _head_weights(parts, prefix, temperature)
    if parts.output is not None:
        weights["lm_head.weight"] = parts.output
    loaded = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if parts.head is None and config.tie_word_embeddings else set()
    if missing := sorted({*loaded.missing_keys, *loaded.unexpected_keys} - tied):
        raise AssertionError(f"transformers has other weights than expected, first {missing[0]}")
    model.eval().save_pretrained(folder)
    save_tokenizer(folder, parts)


def read_merged(folder: ModelFolder) -> Parts:
    """Return the parts of what `write_merged` wrote: without the extra layer, and with the head as the run had it.

    Raises:
        ModelError: if the weights cannot be read or are others.
    """
    job, config = folder.job, read_object(folder.path / "config.json")
    try:
        stored = load_file(folder.path / WEIGHTS_FILE)
        row = architecture_of(config["model_type"])
        weights = {
            name.removeprefix(row.prefix): value.float()
            for name, value in stored.items()
            if name.startswith(row.prefix)
        }
        tokenizer = load_tokenizer(folder.path)
        if job.task.kind in ("causal_lm", "replies"):
            output = None if config.get("tie_word_embeddings", True) else output_weight(folder.path)
            return Parts(job, config, weights, None, tokenizer, output)
        config[row.num_layers] -= 1
        plain = Parts(job, config, weights, None, tokenizer)
        outer = f"{row.layers}.{plain.num_layers}."
        for name in [f"{_last_norm(plain)}.{kind}" for kind in ("weight", "bias")]:
            weights[name] = tensor(weights[name].double() / _scales(plain)[1])
        head = plain.own_head(*_stored_head(plain, stored), folder.record.temperature)
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
        parts.architecture.num_layers: parts.num_layers + 1,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        **problem,
    }


def _head_weights(parts: Parts, prefix: str, temperature: float) -> dict[str, Tensor]:
    """Return the weights of the extra layer and of the classifier, and those of the layer before, scaled."""
    weight, bias = parts.answering(temperature)
    size, width = weight.shape[1], len(parts.weights[f"{_layer(parts, 0)}.{_named(parts, 'intermediate.dense')}.bias"])
    pools, before = _scales(parts)
    norm = _last_norm(parts)
    found = {f"{norm}.{name}": parts.weights[f"{norm}.{name}"].double() * before for name in ("weight", "bias")}
    layer = _extra_layer(size, width, _epsilon(parts), _OUTWEIGHS if pools else 0.0)
    for name, value in layer.items():
        module, _, kind = name.rpartition(".")
        found[f"{_layer(parts, parts.num_layers)}.{_named(parts, module)}.{kind}"] = value
    weights = {prefix + name: value for name, value in found.items()}
    if parts.by_token:
        weights |= {"classifier.weight": weight, "classifier.bias": bias}
    else:
        names = _CLASSIFIERS[parts.family]
        dense = prefix + names.dense if names.inside else names.dense
        factor, shift = _between(names, size)
        weights |= {f"{dense}.weight": torch.eye(size) * factor, f"{dense}.bias": torch.full((size,), shift)}
        weights |= {
            f"{names.out}.weight": weight / factor,
            f"{names.out}.bias": bias - weight.sum(dim=1) * shift / factor,
        }
    return {name: tensor(value) for name, value in weights.items()}


def _stored_head(parts: Parts, stored: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the answering head out of what `_head_weights` wrote."""
    names = _CLASSIFIERS[parts.family]
    if parts.by_token:
        return stored["classifier.weight"].double(), stored["classifier.bias"].double()
    weight = stored[f"{names.out}.weight"].double()
    factor, shift = _between(names, weight.shape[1])
    return weight * factor, stored[f"{names.out}.bias"].double() + weight.sum(dim=1) * shift


def _between(names: _Classifier, size: int) -> tuple[float, float]:
    """Return by what the classifier's first layer multiplies and what it adds; see step 4 of the module.

    A normalised vector of `size` values has none above sqrt(size), and GELU(x) is x from 6 on.
    """
    return (1.0, math.ceil(math.sqrt(size)) + 6.0) if names.grows else (_SMALL, 0.0)


def _layer(parts: Parts, number: int) -> str:
    return f"{parts.architecture.layers}.{number}"


def _named(parts: Parts, name: str) -> str:
    """Return what the family calls a part of a layer of BERT."""
    return _BERT_LAYER[name] if parts.family == "distilbert" else name


def _last_norm(parts: Parts) -> str:
    """Return the name of the normalisation that ends the encoder's last layer."""
    return f"{_layer(parts, parts.num_layers - 1)}.{_named(parts, 'output.LayerNorm')}"


def _epsilon(parts: Parts) -> float:
    """Return what transformers adds to variances; of DistilBERT it is no setting."""
    return float(parts.config.get("layer_norm_eps", 1e-12))


def _scales(parts: Parts) -> tuple[bool, float]:
    """Return whether the extra layer pools, and by what the vectors that enter it are scaled."""
    pools = not parts.by_token and parts.job.model.pooling == "mean"
    scale = math.sqrt(_epsilon(parts) / HEAD_EPSILON)
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
