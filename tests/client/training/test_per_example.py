"""Parts of the per-example gradients by themselves: precision, what is left on a model, and what is held back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import client.training.per_example as module
from client.training.per_example import GradientsBySite, PerExampleHooks, most_examples
from client.training.trainer import per_example_hooks
from shared.models.packing import Packing
from shared.privacy.mechanism import per_example_gradients


def bfloats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def test_a_pass_leaves_64_megabytes_of_gradients() -> None:
    for numbers, most in ((1, 1 << 24), (1 << 22, 4), ((1 << 22) + 1, 3), (1 << 25, 1)):
        parameters = [torch.empty(numbers - numbers // 2, device="meta"), torch.empty(numbers // 2, device="meta")]
        assert most_examples(parameters) == most


# --- precision ---


def test_products_are_taken_in_float32_whatever_the_precision_of_the_round() -> None:
    first, second = bfloats(3, 4, 50), bfloats(3, 50, 2)
    exact = torch.bmm(first.double(), second.double())
    for one, other in ((first, second), (first.float(), second), (first, second.float())):
        with torch.autocast("cpu", torch.bfloat16):
            found = module._bmm(one, other)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("lengths", [None, [40, 7, 9]], ids=["rows", "packed"])
def test_gradients_of_bfloat16_are_added_up_in_float32(lengths: list[int] | None) -> None:
    layer = nn.Linear(5, 2)
    inputs, gradient = bfloats(3, 40, 5), bfloats(3, 40, 2)
    packing = None
    if lengths:
        mask = torch.arange(40) < torch.tensor(lengths)[:, None]
        packing = Packing(mask)
        inputs, gradient = inputs * mask[..., None], gradient * mask[..., None]
    rows = [inputs, gradient] if packing is None else [packing.pack(inputs), packing.pack(gradient)]
    for uses in (1, 2):
        module._keep(layer, *rows, packing)
        for parameter, exact in (
            (layer.weight, gradient.double().transpose(1, 2) @ inputs.double()),
            (layer.bias, gradient.double().sum(dim=1)),
        ):
            found = parameter.grad_sample  # type: ignore[attr-defined]
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), uses * exact, rtol=1e-6, atol=1e-4)


# --- hooks ---


class Interrupted(torch.autograd.Function):
    """What it is given; the way back ends here."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise MemoryError


class Twice(nn.Module):
    """Layers of Opacus and of ours, each used on both sides of an interruption."""

    def __init__(self) -> None:
        super().__init__()
        self.opacus, self.ours = nn.Conv1d(2, 2, 1), nn.Linear(4, 4)
        self.interrupted = True

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.ours(self.opacus(inputs))
        if self.interrupted:
            hidden = Interrupted.apply(hidden)  # type: ignore[no-untyped-call]
        return self.ours(self.opacus(hidden)).square().sum(dim=(1, 2))


def test_an_error_in_the_middle_of_the_way_back_leaves_nothing_on_the_model() -> None:
    torch.manual_seed(0)
    model, inputs = Twice(), torch.randn(3, 2, 4)
    owners = [*model.modules(), *model.parameters()]
    before = [set(vars(owner)) for owner in owners]
    with pytest.raises(MemoryError), per_example_hooks(model):
        model(inputs).sum().backward()
    assert [set(vars(owner)) for owner in owners] == before
    model.interrupted = False
    parameters = list(model.parameters())
    with per_example_hooks(model):
        model(inputs).sum().backward()
        found = per_example_gradients(parameters, 3)
    for row in range(3):
        for many, one in zip(found, torch.autograd.grad(model(inputs[row : row + 1])[0], parameters), strict=True):
            torch.testing.assert_close(many[row], one, rtol=1e-4, atol=1e-5)
    assert [set(vars(owner)) for owner in owners] == before


def test_a_layer_that_is_not_trained_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    with per_example_hooks(model):
        assert "forward" not in vars(model[0])
        model(torch.ones(4, 2)).sum().backward()
        found = [getattr(parameter, "grad_sample", None) is not None for parameter in model.parameters()]
        assert found == [False, False, True, False]


def test_layers_of_which_only_the_bias_is_trained_pass_gradients_on() -> None:
    torch.manual_seed(0)
    norm, middle = nn.GroupNorm(2, 4), nn.Linear(16, 3)
    model = nn.Sequential(nn.Conv2d(2, 4, 2), norm, nn.Tanh(), nn.Flatten(), middle, nn.Tanh(), nn.Linear(3, 1))
    norm.weight.requires_grad_(False)
    middle.weight.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inputs = torch.randn(4, 2, 3, 3)
    with per_example_hooks(model):
        model(inputs).sum().backward()
        found = per_example_gradients(parameters, 4)
    for row in range(4):
        for many, one in zip(found, torch.autograd.grad(model(inputs[row : row + 1])[0, 0], parameters), strict=True):
            torch.testing.assert_close(many[row], one, rtol=1e-4, atol=1e-6)


def test_without_gradients_layers_compute_what_they_always_do() -> None:
    """In both ways, since a round measures its adapter without: the values of each example's own site."""
    model = nn.Sequential(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4, eps=0.1), nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        stacks = {parameter: torch.stack([parameter + n for n in (0.0, 0.5)]) for parameter in model.parameters()}
        inputs, owners = torch.randn(5, 2, 3, 3), torch.tensor([0, 1, 1, 0, 1])
        by_site = []
        for site in range(2):
            copy = nn.Sequential(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4, eps=0.1), nn.Flatten(), nn.Linear(16, 3))
            for parameter, values in zip(copy.parameters(), stacks.values(), strict=True):
                parameter.copy_(values[site])
            by_site.append(copy(inputs))
        hooks = PerExampleHooks(model, stacks)
        torch.testing.assert_close(model(inputs), by_site[0])
        hooks.owners = owners
        found = model(inputs)
    hooks.remove_hooks()
    expected = torch.stack([by_site[site][row] for row, site in enumerate(owners.tolist())])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not found.requires_grad


# --- sites ---


class Noted:
    """A sum that notes what it is given."""

    def __init__(self) -> None:
        self.given: list[list[float]] = []

    def add(self, gradients: list[Tensor]) -> None:
        self.given.append(gradients[0].tolist())


def test_gradients_are_held_back_until_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here: more than 16 bytes, which are four numbers."""
    monkeypatch.setattr(module, "_MOST_HELD_BYTES", 16)
    sums = [Noted(), Noted(), Noted()]
    shares = GradientsBySite([0, 10, 20, 30], sums)  # type: ignore[arg-type]
    for begin in (0.0, 10.0):  # a second time as the first
        shares.add([torch.tensor([begin, begin + 1])], [0, 20], [0, 2])
        shares.add([torch.tensor([begin + 2, begin + 3])], [21, 1], [2, 0])
        assert [one.given for one in sums] == [[], [], []]
        shares.add([torch.tensor([begin + 4])], [2], [0])
        assert [one.given for one in sums] == [[[begin, begin + 3, begin + 4]], [], [[begin + 1, begin + 2]]]
        for one in sums:
            one.given.clear()
    shares.add([torch.tensor([7.0])], [11], [1])
    shares.flush()
    shares.flush()
    assert [one.given for one in sums] == [[], [[7.0]], []]


def test_all_gradients_of_a_single_site_are_handed_over_at_once() -> None:
    alone = Noted()
    shares = GradientsBySite([0, 10], [alone])  # type: ignore[list-item]
    shares.add([torch.tensor([1.0, 2.0])], [3], [0])  # one too many is for the sum to refuse
    assert alone.given == [[1.0, 2.0]]
    shares.flush()
    assert alone.given == [[1.0, 2.0]]
