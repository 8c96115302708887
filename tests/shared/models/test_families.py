"""What every family of backbones must keep, in both LoRA modes, and that a row that is wrong is found."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client.training.independence import settle_company, settle_stacks
from client.training.proof import prove_trainer
from client.training.trainer import LocalWork, per_example_hooks, train_local_rounds
from server.rounds.observer import Observer
from shared.errors import ConfigError, ModelError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.model import LoraConfig
from shared.job.parsing import parse
from shared.models import families
from shared.models.backbones import load_backbone, output_weight
from shared.models.batches import Example, collate
from shared.models.families import ARCHITECTURES, REFUSED
from shared.models.heads import OwnLanguageHead, TiedLanguageHead
from shared.models.tunable import TunableModel, attach_adapters
from shared.privacy.mechanism import per_example_gradients
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime.runtime import Runtime, load_own_runtime, load_runtime
from shared.tasks.causal_lm import CausalLanguageModelling
from simulations.running.engine import run_scenario
from simulations.scenario import load_scenario
from tests.conftest import LINES
from tests.tiny_families import CONFIGS, make_backbone

CPU = ComputeConfig(device="cpu", precision="float32", cache_frozen_layers=False)
_TAGS = ["O", "B-film", "I-film"]
_TEXTS = [" ".join(LINES[i % 6].replace(",", "").split()[: 3 + 3 * (i % 4)]) for i in range(16)]
TASKS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "sequence_classification": (
        {"labels": ["bad", "good"]},
        [{"text": text, "label": ["bad", "good"][i % 2]} for i, text in enumerate(_TEXTS)],
    ),
    "token_classification": (
        {"labels": _TAGS},
        [{"tokens": text.split(), "tags": [_TAGS[i % 2] for _ in text.split()]} for i, text in enumerate(_TEXTS)],
    ),
    "causal_lm": ({}, [{"text": text} for text in _TEXTS]),
    "replies": ({}, [{"prompt": text, "response": text} for text in _TEXTS]),
}
NEW = [kind for kind in ARCHITECTURES if kind not in ("bert", "gpt2", "camembert")]
"""Families that no other test trains, but for CamemBERT, which is RoBERTa's class."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tiny_gpt2: Path) -> Callable[..., Path]:
    """Return a maker of tiny backbones; each is made once."""
    done: dict[str, Path] = {}

    def make(kind: str, **changes: Any) -> Path:
        key = f"{kind} {changes}"
        if key not in done:
            tokenizer = tiny_gpt2 if ARCHITECTURES[kind].causal else tiny_bert
            done[key] = make_backbone(tmp_path_factory.mktemp("family") / kind, kind, tokenizer, **changes)
        return done[key]

    return make


def job_of(backbone: Path, kind: str, task: str, **sections: dict[str, Any]) -> Job:
    raw: dict[str, dict[str, Any]] = {
        "model": {"backbone": str(backbone), "max_length": 24},
        "lora": {"rank": 4, "target_modules": list(ARCHITECTURES[kind].targets), "last_layers": 2, "train": "both"},
        "task": {"kind": task, **TASKS[task][0]},
        "training": {"rounds": 1, "local_steps": 1, "learning_rate": 0.05},
        "privacy": {"epsilon": 8.0, "delta": 1e-5, "sample_rate": 0.5},
    }
    return parse(Job, {"name": "t"} | {k: v | sections.get(k, {}) for k, v in raw.items()}, source="test job")


def away_from_zero(runtime: Runtime) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in sorted(runtime.initial.items())}


def losses_of(runtime: Runtime, examples: list[Example]) -> Tensor:
    batch = collate(examples)
    return runtime.task.per_example_loss(runtime.model(batch), batch)


def gradients_of(runtime: Runtime, examples: list[Example]) -> list[Tensor]:
    """Return per-example gradients, [examples, *shape] each."""
    trainable = list(runtime.model.trainable().values())
    with per_example_hooks(runtime.model):
        losses_of(runtime, examples).sum().backward()
        return [gradient.detach().clone() for gradient in per_example_gradients(trainable, len(examples))]


def check_loop(runtime: Runtime, examples: list[Example]) -> list[Tensor]:
    """Assert that per-example gradients are those of a loop, at 1e-4 of each one's norm; return them."""
    trainable = list(runtime.model.trainable().values())
    found = gradients_of(runtime, examples)
    for row, example in enumerate(examples):
        alone = torch.autograd.grad(losses_of(runtime, [example])[0], trainable)
        for gradients, expected in zip(found, alone, strict=True):
            assert float((gradients[row] - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-9
    assert all(float(gradients.abs().max()) > 0 for gradients in found)
    return found


def test_every_family_has_a_tiny_model_and_none_is_refused_too() -> None:
    assert ARCHITECTURES.keys() == CONFIGS.keys()
    assert not ARCHITECTURES.keys() & REFUSED.keys()
    for architecture in ARCHITECTURES.values():
        assert {*architecture.targets} <= {*architecture.linear}


# --- the contract ---


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_hidden_states_are_those_of_transformers(kind: str, made: Callable[..., Path]) -> None:
    """Of its eager attention, on padded texts, some of which reach beyond every window."""
    from transformers import AutoModel

    runtime = load_runtime(job_of(made(kind), kind, "sequence_classification"), CPU)
    model = runtime.model
    assert isinstance(model, TunableModel)
    generator = torch.Generator().manual_seed(1)
    batch = collate([Example(torch.randint(5, 150, (n,), generator=generator)) for n in (9, 24, 1, 17)])
    reference = AutoModel.from_pretrained(made(kind), attn_implementation="eager").eval()
    real = batch.attention_mask
    with torch.no_grad():
        packing = model._packing_of(real)
        ours = packing.pad(model._run_rest(model._embed_frozen(batch.input_ids, packing), packing, model.first_adapted))
        theirs = reference(input_ids=batch.input_ids, attention_mask=real.long()).last_hidden_state
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_linear_modules_of_the_table_are_those_of_a_layer(kind: str, made: Callable[..., Path]) -> None:
    backbone, architecture, _ = load_backbone(made(kind))
    layers = backbone.get_submodule(architecture.layers)
    for layer in layers.children():
        found = {n.rpartition(".")[2] for n, m in layer.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
        assert found == {*architecture.linear}


@pytest.mark.parametrize("train", ["b", "both"])
@pytest.mark.parametrize("kind", NEW)
def test_a_family_keeps_the_contract(kind: str, train: str, made: Callable[..., Path]) -> None:
    """Gradients of a loop; the site's proof; no example owes a bit to its company, alone or beside another site's; a round."""
    other = "causal_lm" if ARCHITECTURES[kind].causal else "token_classification"
    task = "sequence_classification" if train == "both" else other
    job = job_of(made(kind), kind, task, lora={"train": train})
    runtime = load_own_runtime(job, CPU)
    examples = runtime.encode(TASKS[task][1])
    runtime.load(away_from_zero(runtime))
    check_loop(runtime, examples[:5])
    prove_trainer(runtime)
    settle_company(runtime)
    settle_stacks(runtime)
    assert runtime.compute.micro_batch_tokens == CPU.micro_batch_tokens, "examples had to be parted"

    def work(i: int) -> LocalWork:
        return LocalWork(examples=examples[i::2], declared_records=8, randomness=SiteRandomness.injected(f"{i}"))

    options: dict[str, Any] = {"training": job.training, "plan": PrivacyPlan.from_job(job), "round_number": 1}
    start = away_from_zero(runtime)
    together = train_local_rounds(runtime, [work(0), work(1)], start, **options)
    alone = train_local_rounds(runtime, [work(1)], start, **options)[0]
    for name, delta in alone.delta.items():
        assert float((together[1].delta[name] - delta).norm()) <= 2e-4 * float(delta.norm()) + 1e-9


@pytest.mark.parametrize("kind", NEW)
def test_a_family_trains_a_private_federated_round(
    kind: str, made: Callable[..., Path], scenario_file: Callable[..., Path], tmp_path: Path
) -> None:
    """With its own targets, in all layers, from two sites' rows to an aggregated adapter and a statement."""
    causal = ARCHITECTURES[kind].causal
    job = job_of(made(kind), kind, "causal_lm" if causal else "sequence_classification")
    columns = {"text": "review"} if causal else {"text": "review", "label": "verdict"}
    path = scenario_file(
        model={"backbone": job.model.backbone},
        lora={"target_modules": list(job.lora.target_modules), "last_layers": "none"},
        task={"kind": job.task.kind, "labels": list(job.task.labels)},
        training={"rounds": 1, "local_steps": 1},
        partition={"num_sites": 2},
        data={"train": {"path": "train.csv", "columns": columns}, "num_test": 12},
    )
    finished = run_scenario(load_scenario(path, ()), tmp_path / "run", observer=lambda arm: Observer(), report=False)
    assert finished.round_number == 1
    spent = [json.loads(p.read_text()) for p in sorted((tmp_path / "run").glob("sites/*/privacy.json"))]
    assert [one["steps_executed"] for one in spent] == [1, 1]
    assert (tmp_path / "run" / "statement.json").exists()


# --- what a model of a family may have ---


@pytest.mark.parametrize(
    ("kind", "changes", "head"),
    [
        ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}, TiedLanguageHead),
        ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}, TiedLanguageHead),
        ("gpt_neox", {"rotary_pct": 1.0}, OwnLanguageHead),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, OwnLanguageHead),
        ("gpt2", {"tie_word_embeddings": False}, OwnLanguageHead),
    ],
)
def test_variants_of_decoders_say_what_they_say_in_transformers(
    kind: str, changes: dict[str, Any], head: type[nn.Module], made: Callable[..., Path]
) -> None:
    """Logits are those of transformers' language model, whether the output is the embedding or a matrix of its own."""
    from transformers import AutoModelForCausalLM

    runtime = load_runtime(job_of(made(kind, **changes), kind, "causal_lm"), CPU)
    assert type(runtime.model.head) is head
    batch = collate(runtime.encode(TASKS["causal_lm"][1])[:3])
    reference = AutoModelForCausalLM.from_pretrained(made(kind, **changes)).eval()
    with torch.no_grad():
        theirs = reference(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
        torch.testing.assert_close(
            runtime.model(batch)[batch.attention_mask], theirs[batch.attention_mask], rtol=1e-4, atol=1e-5
        )


def test_an_output_that_is_not_there_is_no_embedding(made: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(made("llama")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"hold no output matrix.*can label texts, but not write them"):
        output_weight(tmp_path)


@pytest.mark.parametrize("adds", [True, False])
def test_texts_begin_as_the_tokenizer_of_the_decoder_begins_them(
    adds: bool, made: Callable[..., Path], tmp_path: Path
) -> None:
    """Llama and OPT were trained with a token before each text; it is read, and nothing predicts it."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    folder = shutil.copytree(made("llama"), tmp_path / "llama")
    if adds:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        name = "<|endoftext|>"
        backend.post_processor = TemplateProcessing(
            single=f"{name} $A", special_tokens=[(name, backend.token_to_id(name))]
        )
        backend.save(str(folder / "tokenizer.json"))
    for task, record, least in (("causal_lm", {"text": "a plot"}, 2), ("replies", {"prompt": "a", "response": "b"}, 2)):
        runtime = load_own_runtime(job_of(folder, "llama", task), CPU)
        (example,) = runtime.encode([record])
        begin = runtime.tokenizer.bos_token_id
        assert (int(example.input_ids[0]) == begin) == adds
        assert int(example.input_ids[-1]) == begin  # which ends texts, too, in this vocabulary
        assert example.length > least
        assert isinstance(runtime.task, CausalLanguageModelling)
        start = runtime.task.start("a plot", runtime.tokenizer, 24)
        assert (start[0] == begin) == adds
        assert begin not in start[1:]
        assert runtime.task.start("", runtime.tokenizer, 24)


# --- what is refused ---


@pytest.mark.parametrize(
    ("kind", "reason", "instead"),
    [
        ("t5", "an encoder and a decoder", "BERT"),
        ("mamba", "a state passes from token to token", "Qwen"),
        ("mixtral", "router sends tokens to experts", "dense decoder"),
        ("deberta-v2", "distance of two tokens", "ModernBERT"),
        ("albert", "all its layers are one", "DistilBERT"),
        ("gemma", "supported: bert", "test_families.py"),
    ],
)
def test_other_families_are_refused_with_the_reason(kind: str, reason: str, instead: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ModelError, match=f"model_type is '{kind}'.*{reason}.*{instead}"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_change_with_the_company_are_refused(kind: str, made: Callable[..., Path]) -> None:
    half = [1.0] * 8
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    if kind == "longrope":
        rope |= {"short_factor": half, "long_factor": half}
    folder = made("llama", rope_parameters=rope)
    with pytest.raises(ModelError, match=f"type '{kind}': they change with the longest text of a batch.*Use a llama"):
        load_backbone(folder)


def test_a_text_longer_than_the_positions_is_refused(made: Callable[..., Path]) -> None:
    for kind in ("opt", "llama", "distilbert"):
        with pytest.raises(ConfigError, match="max_length is 65, but the backbone has 64 positions"):
            load_runtime(job_of(made(kind), kind, "sequence_classification", model={"max_length": 65}), CPU)


# --- planted faults: a row that is wrong ---


def plant(monkeypatch: pytest.MonkeyPatch, kind: str, **changes: Any) -> None:
    row = dataclasses.replace(ARCHITECTURES[kind], **changes)
    monkeypatch.setattr(families, "ARCHITECTURES", {**ARCHITECTURES, kind: row})


def _without_offset(backbone: nn.Module, input_ids: Tensor) -> Tensor:
    tokens = backbone.get_submodule("decoder.embed_tokens")(input_ids)
    table: Any = backbone.get_submodule("decoder.embed_positions")
    return tokens + table.weight[families.places_of(input_ids)]  # type: ignore[no-any-return]


def _from_zero(backbone: nn.Module, input_ids: Tensor) -> Tensor:
    return backbone.get_submodule("embeddings")(  # type: ignore[no-any-return]
        input_ids=input_ids, position_ids=families.places_of(input_ids)
    )


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("opt", {"embed": _without_offset}),
        ("roberta", {"embed": _from_zero}),
        ("electra", {"causal": True}),
        ("llama", {"causal": False}),
        ("qwen2", {"end": ()}),
        ("modernbert", {"end": ()}),
        ("gpt2", {"end": ()}),
    ],
)
def test_fault_a_row_that_is_wrong(
    kind: str, changes: dict[str, Any], made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, kind, **changes)
    with pytest.raises(ModelError, match="gives other hidden states than in transformers"):
        load_own_runtime(job_of(made(kind), kind, "sequence_classification"), CPU)


@pytest.mark.parametrize("kind", ["modernbert", "qwen2"])
def test_fault_a_window_is_forgotten(kind: str, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from shared.models import packing

    of_group = packing._mask_of
    monkeypatch.setattr(packing, "_mask_of", lambda group, causal, window: of_group(group, causal))
    with pytest.raises(ModelError, match="gives other hidden states"):
        load_own_runtime(job_of(made(kind), kind, "sequence_classification"), CPU)


def test_fault_no_place_has_a_position(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from shared.models.packing import Packing

    monkeypatch.setattr(Packing, "positions", property(lambda self: torch.zeros(1, self.room, dtype=torch.int64)))
    with pytest.raises(ModelError, match="gives other hidden states"):
        load_own_runtime(job_of(made("llama"), "llama", "sequence_classification"), CPU)


def test_fault_a_target_that_misses_a_layer(made: Callable[..., Path]) -> None:
    """PEFT is content if a target matches somewhere; a layer without would be adapted less than the job says."""
    backbone, architecture, _ = load_backbone(made("llama"))
    layers: Any = backbone.get_submodule("layers")
    layers[2].self_attn.query = layers[2].self_attn.q_proj
    del layers[2].self_attn.q_proj
    lora = LoraConfig(target_modules=("q_proj",), last_layers=2)
    with pytest.raises(ModelError, match=r"'q_proj', which matches no linear layer of layer 2.*For Llama take"):
        attach_adapters(backbone, architecture, lora, seed=0)


def test_fault_a_projection_of_padded_embeddings(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a number of rows that follows from the company, an example's last bits do too; then each gets a pass of its own."""
    monkeypatch.setattr(families, "in_whole_rows", lambda module, values: module(values))
    runtime = load_own_runtime(job_of(made("electra"), "electra", "sequence_classification"), CPU)
    settle_company(runtime)
    assert runtime.compute.micro_batch_tokens == 1


# --- the guide ---


def table() -> str:
    """Return the table of docs/backbones.md: a row for each family, one below it for what is particular."""
    head = "| family | `model_type` | tasks | linear modules, in bold those of `silotune new` | merged | ONNX, `compress` |"
    rows = [head, "| --- | --- | --- | --- | --- | --- |"]
    for kind, row in ARCHITECTURES.items():
        modules = " ".join(f"**`{name}`**" if name in row.targets else f"`{name}`" for name in row.linear)
        tasks = "writes; labels" if row.causal else "labels, entities, pairs, ratings"
        merged = "writing" if row.causal else "yes" if row.merges_labels else "no"
        rows.append(f"| {row.name} | `{kind}` | {tasks} | {modules} | {merged} | {'yes' if row.has_graph else 'no'} |")
    return "\n".join(rows)


def particulars() -> str:
    """Return what is particular about each family, as docs/backbones.md has it."""
    return "\n".join(f"- {row.name}: {row.notes}." for row in ARCHITECTURES.values())


def refusals() -> str:
    """Return the refused families with reason and way out, those of one reason in one line."""
    together: dict[tuple[str, str], list[str]] = {}
    for kind, reason in REFUSED.items():
        together.setdefault(reason, []).append(f"`{kind}`")
    return "\n".join(f"- {', '.join(kinds)}: {why}. Use {instead}." for (why, instead), kinds in together.items())


@pytest.mark.parametrize("part", [table, particulars, refusals])
def test_the_guide_has_the_table(part: Callable[[], str]) -> None:
    """Rewritten by: python -m tests.shared.models.test_families."""
    assert part() in (Path(__file__).parents[3] / "docs" / "backbones.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.stdout.write("\n\n".join([table(), particulars(), refusals()]) + "\n")
