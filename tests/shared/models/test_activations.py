"""A number's activation is the same to the last bit wherever it stands, at any number of threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import (
    GELUActivation,
    GELUTanh,
    MishActivation,
    NewGELUActivation,
    QuickGELUActivation,
    SiLUActivation,
)

from shared.models.activations import SteadySiLU, SteadyTanhGELU, activations_of, rounds_one_way, steady
from shared.models.backbones import load_backbone
from shared.models.families import ARCHITECTURES
from tests.tiny_families import make_backbone

PAIRS = [(SiLUActivation(), SteadySiLU()), (QuickGELUActivation(), SteadySiLU(1.702)), (GELUTanh(), SteadyTanhGELU())]
CPU = torch.device("cpu")
by_vectors = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this processor's vectors are not used"
)


def there_and_back(function: nn.Module, values: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
    entering = values.clone().requires_grad_()
    out = function(entering)
    (gradient,) = torch.autograd.grad(out, entering, grown)
    return out.detach(), gradient


def rows_that_moved(function: nn.Module, width: int, threads: int) -> int:
    """Return for how many sizes of a pass its first 64 rows are others than in a pass of 64."""
    generator = torch.Generator().manual_seed(0)
    values, grown = (torch.randn(1, 400, width, generator=generator) for _ in range(2))
    torch.set_num_threads(threads)
    alone = there_and_back(function, values[:, :64], grown[:, :64])
    beside = (there_and_back(function, values[:, :rows], grown[:, :rows]) for rows in range(80, 401, 16))
    return sum(not all(torch.equal(a, b[:, :64]) for a, b in zip(alone, found, strict=True)) for found in beside)


@pytest.mark.parametrize("width", [640, 904, 1536])
@pytest.mark.parametrize("threads", [1, 2, 3, 4, 5, 8])
def test_no_row_moves_with_the_size_of_the_pass(width: int, threads: int) -> None:
    for _, ours in PAIRS:
        assert rows_that_moved(ours, width, threads) == 0


@by_vectors
def test_fault_the_fused_function_is_seen_to_move() -> None:
    """What the functions stand in for: with a head that sharpens, a last bit was a gradient of its full length."""
    assert sum(rows_that_moved(SiLUActivation(), width, threads) for width in (640, 904) for threads in (3, 5, 8)) > 0


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_family_s_functions_get_numbers_without_gaps(
    kind: str, tiny_bert: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    made = make_backbone(tmp_path / kind, kind, tiny_gpt2 if ARCHITECTURES[kind].causal else tiny_bert)
    for function in activations_of(load_backbone(made)[0]):
        seen: list[Tensor] = []
        function.register_forward_hook(lambda _module, entering, _out, seen=seen: seen.append(entering[0]))
        function(torch.randn(2, 6, 8).chunk(2, dim=-1)[0])
        assert seen[0].is_contiguous()


@pytest.mark.parametrize("threads", [1, 3, 5, 6, 8, 16])
def test_half_of_a_row_is_computed_as_a_whole_one(threads: int) -> None:
    """As ModernBERT does it: half of what a layer makes goes through the function, and is multiplied by the other half."""
    generator = torch.Generator().manual_seed(0)
    values, grown = torch.randn(1, 400, 2304, generator=generator), torch.randn(1, 400, 1152, generator=generator)
    layer = nn.Sequential(GELUActivation())
    steady(layer)

    def gated(rows: int) -> tuple[Tensor, Tensor]:
        entering = values[:, :rows].clone().requires_grad_()
        half, gate = entering.chunk(2, dim=-1)
        out = layer(half) * gate
        return out.detach(), torch.autograd.grad(out, entering, grown[:, :rows].clone())[0]

    torch.set_num_threads(threads)
    alone = gated(64)
    for rows in range(80, 401, 16):
        assert all(torch.equal(a, b[:, :64]) for a, b in zip(alone, gated(rows), strict=True)), rows


@pytest.mark.parametrize(("theirs", "ours"), PAIRS, ids=["silu", "quick-gelu", "tanh-gelu"])
def test_it_is_the_same_function(theirs: nn.Module, ours: nn.Module) -> None:
    values = torch.cat([torch.linspace(-120, 120, 20_001), torch.tensor([0.0, -1e4, 1e4, -1e30, 1e30])])
    found, expected = (there_and_back(function, values, torch.ones_like(values)) for function in (ours, theirs))
    near = values.abs() < 1e5  # beyond it the cube of GELU by tanh has no float32, nor in theirs
    for a, b in zip(found, expected, strict=True):
        assert torch.isfinite(a[near]).all()
        torch.testing.assert_close(a[near], b[near], rtol=1e-6, atol=2e-6)
    half = values[near].bfloat16()
    torch.testing.assert_close(ours(half), theirs(half.float()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_put_in_place_rounds_one_way(dtype: torch.dtype) -> None:
    for _, ours in PAIRS:
        assert rounds_one_way(ours, CPU, dtype)
    assert rounds_one_way(NewGELUActivation(), CPU, dtype)


@by_vectors
def test_functions_that_round_two_ways_are_found() -> None:
    for function in (SiLUActivation(), QuickGELUActivation(), GELUTanh(), MishActivation(), nn.Sigmoid()):
        assert not rounds_one_way(function, CPU, torch.float32), function


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_family_s_functions_round_one_way(kind: str, tiny_bert: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    made = make_backbone(tmp_path / kind, kind, tiny_gpt2 if ARCHITECTURES[kind].causal else tiny_bert)
    found = activations_of(load_backbone(made)[0])
    assert found, "a family whose functions are no modules is not tried out"
    assert all(rounds_one_way(function, CPU, torch.float32) for function in found)


def test_only_such_functions_are_replaced() -> None:
    model = nn.Sequential(nn.SiLU(), nn.GELU(), nn.Sequential(QuickGELUActivation(), nn.Tanh()))
    steady(model)
    kinds: list[Callable[..., nn.Module]] = [type(module) for module in activations_of(model)]
    assert kinds == [SteadySiLU, nn.GELU, SteadySiLU, nn.Tanh]
