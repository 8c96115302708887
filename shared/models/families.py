"""Families of transformers: where each keeps its parts, what LoRA adapts in it, and why others are refused.

The one table of all that differs by family, but for what single exports know of one; docs/backbones.md shows it.

Guarantees (tests: tests/shared/models/test_families.py)
    * Every row passes the contract of a backbone on a tiny random model: hidden states are those of transformers' own forward
      pass, per-example gradients are those of a loop, a private round trains.
    * That holds of the model at hand too: `shared.models.tunable.check_forward` compares the two whenever one is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shared.errors import ModelError
from shared.models.packing import in_whole_rows


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Where a family of transformers keeps its parts.

    Attributes:
        name: of the family, for people.
        layers: path of the module list of transformer layers.
        embed: function (backbone, input_ids [B, T]) -> what enters the first layer, [B, T, H].
        end: paths of what follows the last layer, in order; a model may lack one.
        causal: True if a token sees only tokens to its left.
        embedding: path of the token embedding, which a language model may share with its output.
        linear: last name components of all linear modules of a layer: what `lora.target_modules` may name.
        targets: those of them that `silotune new` adapts.
        rotary: path of the module that turns queries and keys by their position (Su et al. 2021), or None.
        transposed: True if linear weights are stored [in, out] (Conv1D of GPT-2).
        width: key of the configuration for the length of the vectors that leave `end`.
        num_layers: key of the configuration for the number of layers.
        prefix: what transformers' classes with a head put before the backbone's names.
        merges_labels: whether `silotune export --to merged` can hold a head for labels in a class of transformers.
        has_graph: whether ONNX graphs and `silotune compress` know the family.
        notes: what is particular about it.
    """

    name: str
    layers: str
    embed: Callable[[nn.Module, Tensor], Tensor]
    end: tuple[str, ...] = ()
    causal: bool
    embedding: str
    linear: tuple[str, ...]
    targets: tuple[str, ...]
    rotary: str | None = None
    transposed: bool = False
    width: str = "hidden_size"
    num_layers: str = "num_hidden_layers"
    prefix: str = "model."
    merges_labels: bool = False
    has_graph: bool = False
    notes: str

    @property
    def layers_pattern(self) -> str:
        """The last name component of `layers`, as PEFT wants it."""
        return self.layers.rpartition(".")[2]


def places_of(input_ids: Tensor) -> Tensor:
    """Return the number of each place, int64 [B, T].

    One row per example: a broadcast [1, T] would hide the batch dimension from per-example gradients.
    """
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)


def _embed_bert(backbone: nn.Module, input_ids: Tensor) -> Tensor:
    return backbone.get_submodule("embeddings")(input_ids=input_ids)  # type: ignore[no-any-return]


def _embed_electra(backbone: nn.Module, input_ids: Tensor) -> Tensor:
    embedded = _embed_bert(backbone, input_ids)
    project = part(backbone, "embeddings_project")  # where embeddings are narrower than layers
    return embedded if project is None else in_whole_rows(project, embedded)


def _embed_gpt2(backbone: nn.Module, input_ids: Tensor) -> Tensor:
    tokens = backbone.get_submodule("wte")(input_ids)
    return tokens + backbone.get_submodule("wpe")(places_of(input_ids))  # type: ignore[no-any-return]


def _embed_opt(backbone: nn.Module, input_ids: Tensor) -> Tensor:
    tokens = backbone.get_submodule("decoder.embed_tokens")(input_ids)
    project = part(backbone, "decoder.project_in")
    # The table itself adds the two by which OPT's positions are offset.
    positions = backbone.get_submodule("decoder.embed_positions")(None, position_ids=places_of(input_ids))
    return (tokens if project is None else in_whole_rows(project, tokens)) + positions  # type: ignore[no-any-return]


def _tokens_alone(name: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """Return the embedding of a family whose positions enter in the layers."""

    def embed(backbone: nn.Module, input_ids: Tensor) -> Tensor:
        return backbone.get_submodule(name)(input_ids)  # type: ignore[no-any-return]

    return embed


def part(backbone: nn.Module, path: str) -> nn.Module | None:
    """Return the module at `path`, or None where a model of the family has none."""
    try:
        return backbone.get_submodule(path)
    except AttributeError:
        return None


def _bert_like(name: str, notes: str, *, prefix: str, has_graph: bool = True) -> Architecture:
    return Architecture(
        name=name,
        prefix=prefix,
        layers="encoder.layer",
        embed=_embed_electra if name == "ELECTRA" else _embed_bert,
        causal=False,
        embedding="embeddings.word_embeddings",
        linear=("query", "key", "value", "dense"),
        targets=("query", "value"),
        merges_labels=True,
        has_graph=has_graph,
        notes=notes,
    )


def _llama_like(name: str, notes: str) -> Architecture:
    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return Architecture(
        name=name,
        layers="layers",
        embed=_tokens_alone("embed_tokens"),
        end=("norm",),
        causal=True,
        embedding="embed_tokens",
        linear=linear,
        targets=linear,
        rotary="rotary_emb",
        notes=notes,
    )


_AFTER_PADDING = "positions are counted from the padding token's number + 1, so two of the table's rows number no token"
ARCHITECTURES: Mapping[str, Architecture] = {
    "bert": _bert_like("BERT", "learned positions; every token is of the first type, in pairs too", prefix="bert."),
    "roberta": _bert_like("RoBERTa", _AFTER_PADDING, prefix="roberta."),
    "xlm-roberta": _bert_like("XLM-R", f"many languages; {_AFTER_PADDING}", prefix="roberta."),
    "camembert": _bert_like("CamemBERT", f"French; {_AFTER_PADDING}", prefix="roberta."),
    "distilbert": Architecture(
        name="DistilBERT",
        prefix="distilbert.",
        layers="transformer.layer",
        embed=_embed_bert,
        causal=False,
        embedding="embeddings.word_embeddings",
        linear=("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
        targets=("q_lin", "v_lin"),
        num_layers="n_layers",
        merges_labels=True,
        notes="learned positions; no token types",
    ),
    "electra": _bert_like(
        "ELECTRA",
        "the discriminator; learned positions; in the small one embeddings are narrower than layers and are projected",
        prefix="electra.",
        has_graph=False,
    ),
    "modernbert": Architecture(
        name="ModernBERT",
        layers="layers",
        embed=_embed_bert,
        end=("final_norm",),
        causal=False,
        embedding="embeddings.tok_embeddings",
        linear=("Wqkv", "Wo", "Wi"),
        targets=("Wqkv",),
        rotary="rotary_emb",
        notes="rotary positions; query, key and value in one matrix, `Wo` in attention and MLP; GeGLU; two layers of three see a "
        "window of tokens only",
    ),
    "gpt2": Architecture(
        name="GPT-2",
        prefix="transformer.",
        layers="h",
        embed=_embed_gpt2,
        end=("ln_f",),
        causal=True,
        embedding="wte",
        linear=("c_attn", "c_proj", "c_fc"),
        targets=("c_attn", "c_proj", "c_fc"),
        transposed=True,
        num_layers="n_layer",
        has_graph=True,
        notes="learned positions; query, key and value in one matrix, `c_proj` in attention and MLP; weights are stored "
        "[in, out]; output tied to the token embedding",
    ),
    "opt": Architecture(
        name="OPT",
        layers="decoder.layers",
        embed=_embed_opt,
        end=("decoder.final_layer_norm", "decoder.project_out"),
        causal=True,
        embedding="decoder.embed_tokens",
        linear=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        width="word_embed_proj_dim",
        notes="learned positions, offset by two; ReLU; in the one of 350M embeddings are narrower and projected on both ends, "
        "and there is no last normalisation; output tied",
    ),
    "gpt_neox": Architecture(
        name="GPT-NeoX (Pythia)",
        prefix="gpt_neox.",
        layers="layers",
        embed=_tokens_alone("embed_in"),
        end=("final_layer_norm",),
        causal=True,
        embedding="embed_in",
        linear=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        targets=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        rotary="rotary_emb",
        notes="rotary positions on a part of each head; query, key and value in one matrix; attention and MLP side by side; an "
        "output matrix of its own",
    ),
    "llama": _llama_like(
        "Llama", "rotary positions; grouped-query heads; SwiGLU; RMSNorm; large ones have an output matrix of their own"
    ),
    "qwen2": _llama_like(
        "Qwen2", "as Llama, with biases of query, key and value; upper layers may see a window of tokens only"
    ),
    "qwen3": _llama_like(
        "Qwen3", "as Llama, with RMSNorm of each head's query and key; heads may be wider than H / heads"
    ),
}

_ENCODER_DECODER = (
    "it has an encoder and a decoder, and a record here passes through one stack of layers",
    "an encoder (BERT, ModernBERT, XLM-R) to label texts, a decoder (GPT-2, Qwen, Llama) to write them",
)
_STATE = (
    "in some or all of its layers a state passes from token to token, without attention; the tokens of all texts of a pass "
    "lie in one row, so one record's state would run into the next record's",
    "a decoder with attention (Qwen, Llama, GPT-NeoX)",
)
_EXPERTS = (
    "its router sends tokens to experts: how many tokens of a pass meet an expert depends on the other records, so one record's "
    "result would depend on its company in the last bits, and where experts have a capacity in what is computed at all",
    "a dense decoder (Qwen2, Qwen3, Llama)",
)
_RELATIVE = (
    "its attention adds terms of its own for the distance of two tokens, which the attention of packed texts does not have",
    "BERT, RoBERTa, ModernBERT or XLM-R",
)
_ALIBI = (_RELATIVE[0], "a decoder with rotary or learned positions (Qwen, Llama, GPT-NeoX, OPT)")
_SHARED = (
    "all its layers are one and the same, so an adapter of the last layer would be one of every layer, and nothing below it "
    "would be frozen",
    "BERT or DistilBERT",
)
REFUSED: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("t5", "mt5", "umt5", "bart", "mbart", "marian", "pegasus", "led", "encoder-decoder"), _ENCODER_DECODER
    ),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "jamba", "bamba"), _STATE),
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "dbrx", "phimoe", "deepseek_v2", "deepseek_v3", "gpt_oss"),
        _EXPERTS,
    ),
    **dict.fromkeys(("deberta", "deberta-v2", "mpnet", "xlnet", "funnel"), _RELATIVE),
    **dict.fromkeys(("bloom", "mpt"), _ALIBI),
    "albert": _SHARED,
}
"""Why a family is refused, and what to take instead, by model_type."""
_BY_LENGTH = ("dynamic", "longrope")


def architecture_of(kind: str) -> Architecture:
    """Return the row of a model_type.

    Raises:
        ModelError: why it is refused, and what to take instead.
    """
    if kind in ARCHITECTURES:
        return ARCHITECTURES[kind]
    if kind in REFUSED:
        reason, instead = REFUSED[kind]
        raise ModelError(f"the backbone's model_type is {kind!r}, which cannot be tuned here: {reason}. Use {instead}.")
    raise ModelError(
        f"the backbone's model_type is {kind!r}; supported: {', '.join(ARCHITECTURES)}. A new family is one row in "
        "shared.models.families.ARCHITECTURES, and has to pass tests/shared/models/test_families.py."
    )


def refuse_mixing(kind: str, config: object) -> None:
    """Raise `ModelError` if a configuration lets one record's values depend on those beside it."""
    rope = getattr(config, "rope_parameters", None) or {}
    for found in [rope, *(part for part in rope.values() if isinstance(part, Mapping))]:
        if (asked := found.get("rope_type")) in _BY_LENGTH:
            raise ModelError(
                f"the backbone's rotary positions are of type {asked!r}: they change with the longest text of a batch, so one "
                f"record would change another's values. Use a {kind} whose positions are 'default', 'linear', 'yarn' or 'llama3'."
            )
