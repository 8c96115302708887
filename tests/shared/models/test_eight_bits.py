"""A frozen backbone in 8 bits: how far it is off, what it takes, and that gradients are those of a loop over this function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from client.training.independence import settle_company
from client.training.proof import prove_trainer
from shared.errors import ConfigError
from shared.job.model import LoraConfig, ModelConfig
from shared.models import eight_bits
from shared.models.backbones import backbone_folder, load_backbone
from shared.models.batches import Example, collate
from shared.models.eight_bits import Embedding8, Linear8, in_eight_bits, rounded
from shared.models.families import ARCHITECTURES
from shared.models.tunable import RESIDUAL, TunableModel, attach_adapters
from shared.runtime.export.parts import parts_of_runtime
from shared.runtime.export.peft import save_peft_folder
from shared.runtime.runtime import Runtime, load_own_runtime
from tests.shared.models.test_families import (
    CPU,
    TASKS,
    away_from_zero,
    check_loop,
    gradients_of,
    job_of,
    losses_of,
    made,
)

__all__ = ["made"]
EIGHT = {"model": {"backbone_bits": 8}}


def eight(folder: Path, kind: str, task: str = "sequence_classification", **sections: dict[str, object]) -> Runtime:
    return load_own_runtime(job_of(folder, kind, task, **EIGHT | sections), CPU)


def held(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def test_weights_are_off_by_half_a_scale_at_most() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 33, generator=generator) * torch.logspace(-6, 6, 7)[:, None]
    weight[3] = 0
    whole, scale = rounded(weight)
    assert whole.dtype == torch.int8
    assert int(whole.min()) >= -127
    off = (whole * scale - weight).abs()
    assert bool((off <= weight.abs().amax(dim=1, keepdim=True) / 254 * (1 + 1e-5)).all())
    assert not bool(whole[3].any())


@pytest.mark.parametrize("kind", ["bert", "gpt2", "modernbert", "llama"])
@pytest.mark.parametrize("train", ["b", "both"])
def test_gradients_are_those_of_a_loop(kind: str, train: str, made: Callable[..., Path]) -> None:
    """Over the rounded function itself, whose forward pass owes nothing to the company; the site's own proof passes."""
    task = "causal_lm" if ARCHITECTURES[kind].causal else "token_classification"
    runtime = eight(made(kind), kind, task, lora={"train": train})
    examples = runtime.encode(TASKS[task][1])[:5]
    runtime.load(away_from_zero(runtime))
    check_loop(runtime, examples)
    prove_trainer(runtime)
    if train == "both":
        settle_company(runtime)
        assert runtime.compute.micro_batch_tokens == CPU.micro_batch_tokens


@pytest.mark.parametrize("kind", ["distilbert", "gpt2", "llama"])
def test_what_is_computed_is_what_plain_weights_give(kind: str, made: Callable[..., Path]) -> None:
    """The same model in float32 with the weights as they were rounded: outputs, gradients, and the parts for an export."""
    causal = ARCHITECTURES[kind].causal
    task = "causal_lm" if causal else "sequence_classification"
    runtime = eight(made(kind), kind, task)
    job = job_of(made(kind), kind, task)
    plain = load_own_runtime(job, CPU)
    assert isinstance(plain.model, TunableModel)
    state = away_from_zero(runtime)
    runtime.load(runtime.initial)
    parts = parts_of_runtime(runtime, job)
    by_name = {name.replace(".base_layer", ""): p for name, p in plain.model.backbone.named_parameters()}
    largest = 0.0
    with torch.no_grad():
        for name, value in parts.weights.items():
            largest = max(largest, float((by_name[name] - value).abs().max()))
            by_name[name].copy_(value)
        if parts.output is not None:
            plain.model.head.output.weight.copy_(parts.output)
    assert 0 < largest < 0.01
    examples = runtime.encode(TASKS[task][1])[:4]
    for one in (runtime, plain):
        one.load(state)
    for mine, theirs in zip(gradients_of(runtime, examples), gradients_of(plain, examples), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_residuals_of_an_exact_aggregation_are_added(kind: str, made: Callable[..., Path]) -> None:
    runtime = eight(made(kind), kind)
    batch = collate(runtime.encode(TASKS["sequence_classification"][1])[:3])
    state = runtime.initial_global(exact=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        runtime.load(state)
        before = runtime.model(batch)
        drawn = {n: torch.randn(t.shape, generator=generator) * 0.1 for n, t in state.items() if n.endswith(RESIDUAL)}
        runtime.load(state | drawn)
        assert not torch.allclose(runtime.model(batch), before, atol=1e-3)
        runtime.load(state)
        assert torch.equal(runtime.model(batch), before)


def test_minilm_takes_less_than_half_and_says_the_same() -> None:
    """The embedded backbone, with every linear module adapted: at most 0.45 of float32."""
    backbone, row, _ = load_backbone(backbone_folder(ModelConfig()))
    ids = torch.randint(1000, 20000, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = backbone(input_ids=ids).last_hidden_state
    full = held(backbone)
    in_eight_bits(backbone, row.layers, row.embedding)
    assert held(backbone) <= 0.45 * full
    with torch.no_grad():
        found = backbone(input_ids=ids).last_hidden_state
    cosine = nn.functional.cosine_similarity(found, expected, dim=-1)
    assert float(cosine.mean()) > 0.999
    assert float(cosine.min()) > 0.99
    attach_adapters(backbone, row, LoraConfig(rank=1, target_modules=row.linear, last_layers=None), seed=0)
    adapters = sum(p.nbytes for name, p in backbone.named_parameters() if ".lora_" in name)
    assert held(backbone) - adapters <= 0.45 * full
    assert {type(m.base_layer) for m in backbone.modules() if hasattr(m, "base_layer")} == {Linear8}


def saved_shapes(runtime: Runtime, examples: list[Example]) -> set[tuple[int, ...]]:
    """Return the shapes of all that autograd keeps of a forward pass."""
    found: set[tuple[int, ...]] = set()

    def keep(tensor: Tensor) -> Tensor:
        found.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses_of(runtime, examples).sum().backward()
    return found


def test_nothing_keeps_float_weights_for_the_backward_pass(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What autograd saves holds no matrix of the shape of a frozen weight, and of a table of embeddings."""
    runtime = eight(made("llama"), "llama", "causal_lm", lora={"last_layers": None})
    runtime.load(away_from_zero(runtime))
    shapes = {tuple(m.weight.shape) for m in runtime.model.modules() if isinstance(m, Linear8 | Embedding8)}
    shapes |= {shape[::-1] for shape in shapes}
    examples = runtime.encode(TASKS["causal_lm"][1])[:8]  # more tokens than any weight has rows
    assert not saved_shapes(runtime, examples) & shapes

    # Planted fault: the usual product keeps them.
    def usual(inputs: Tensor, layer: Linear8 | Embedding8) -> Tensor:
        return nn.functional.linear(inputs, layer.plain())

    monkeypatch.setattr(eight_bits, "_product", usual)
    assert saved_shapes(runtime, examples) & shapes


def test_bits_are_of_the_job_and_old_jobs_keep_their_hash(made: Callable[..., Path]) -> None:
    plain, job = job_of(made("bert"), "bert", "causal_lm"), job_of(made("bert"), "bert", "causal_lm", **EIGHT)
    assert "backbone_bits" not in plain.canonical_json()
    assert job.sha256 != plain.sha256
    with pytest.raises(ConfigError, match="backbone_bits"):
        job_of(made("bert"), "bert", "causal_lm", model={"backbone_bits": 4})


# --- planted faults ---


def test_fault_the_backward_pass_takes_other_weights(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of the function as it was before rounding, as if a wrapper kept float weights for the backward pass."""
    runtime = eight(made("bert"), "bert", "token_classification", lora={"last_layers": None})
    runtime.load(away_from_zero(runtime))
    examples = runtime.encode(TASKS["token_classification"][1])[:3]
    honest = gradients_of(runtime, examples)

    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        layer = copy.copy(ctx.layer)  # type: ignore[attr-defined]
        noise = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
        return gradients[0] @ (layer.plain() + noise * layer.scale / 2), None

    monkeypatch.setattr(eight_bits._Product, "backward", staticmethod(backward))
    wrong = gradients_of(runtime, examples)
    difference = [float((a - b).norm() / a.norm()) for a, b in zip(honest, wrong, strict=True)]
    assert max(difference) > 1e-3


def test_the_adapter_says_that_weights_were_rounded(made: Callable[..., Path], tmp_path: Path) -> None:
    """What PEFT reads of a GPT-2 in 8 bits is what it reads of one in float32."""
    job = job_of(made("gpt2"), "gpt2", "causal_lm", **EIGHT)
    plain = job_of(made("gpt2"), "gpt2", "causal_lm")
    written = []
    for name, one in (("rounded", job), ("plain", plain)):
        runtime = load_own_runtime(one, CPU)
        save_peft_folder(tmp_path / name, runtime, one, runtime.initial_global(exact=False))
        written.append((tmp_path / name / "adapter_config.json").read_text())
        assert ("rounded to 8 bits" in (tmp_path / name / "README.md").read_text()) == (name == "rounded")
    assert written[0] == written[1]
    assert '"fan_in_fan_out": true' in written[0]
