"""Per-example gradients of everything that is trained, through Opacus' hooks; linear layers, convolutions and GroupNorm have
samplers of ours.

Guarantees (tests: tests/client/training/test_trainer.py, tests/client/training/test_many_sites.py,
tests/client/training/test_image_training.py)
    * The gradients equal those of a loop over single examples (test_per_example_gradients_equal_those_of_single_examples),
      as do those of Opacus' own samplers, to which every other module is left.
    * With several sites in a batch, an example meets the values of its own site and of no other
      (test_a_site_trained_with_others_is_trained_as_if_alone).

What is trained of a language model, LoRA factors and head, is linear. There, the gradients of all examples come from one
batched product of what went in and what came back: [B, out, T] x [B, T, in]. That product takes the place of the one that plain
training does for the sum, so privacy adds almost no arithmetic. They are kept until they are clipped: for LoRA they are smaller
than the inputs from which norms could be formed without them (B r out against B T out numbers, r below the T tokens of a text),
so ghost norms (Li et al. 2022) and book-keeping (Bu et al. 2023) would cost more here than they save.

A convolution of images is the same product, over patches instead of tokens. What GroupNorm trains is a factor and a term for each
channel, of values that an example normalises by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from torch import Tensor, nn

from shared.errors import PrivacyError
from shared.models.packing import Packing, whole_rows
from shared.privacy.mechanism import ClippedSum
from shared.privacy.persons import PersonSum

Keep = Callable[..., None]

_MOST_HELD_BYTES = 32 * 2**20  # gradients held back to be put in order of their sites

_MOST_PASS_BYTES = 64 * 2**20
"""Gradients of all examples of a pass. While they are clipped, about five times as much memory is in use. A head of 5,000 labels
on a narrow backbone has 8 MB for each example; LoRA seldom has more than 1 MB, which leaves passes as long as they were."""


class PerExampleHooks(GradSampleHooks):  # type: ignore[misc]
    """Leave the gradient of every example on each trained parameter, as `grad_sample` [B, *shape], where Opacus does.

    Attach after the model reached its device: hooks that outlive a move watch the old parameters.

    Attributes:
        owners: which site each example of the next batch belongs to, int [B]; None if there is one site.
    """

    def __init__(self, model: nn.Module, stacks: Mapping[Tensor, Tensor] | None = None) -> None:
        """Attach to `model`.

        Args:
            model: losses are summed over its first dimension.
            stacks: values of each trained parameter at several sites, [sites, *shape]; None if the model's own are meant.

        Raises:
            ValueError: if several sites are to train what only Opacus has a sampler for.
        """
        self.owners: Tensor | None = None
        self._stacks = stacks
        self._own = [module for module in model.modules() if _is_trained(module) and _is_ours(module)]
        super().__init__(model, loss_reduction="sum")
        if stacks is not None and self.autograd_grad_sample_hooks:
            raise ValueError(
                "several sites can be trained at once only if everything trained is a linear layer, a convolution without "
                "groups or a GroupNorm"
            )

    def iterate_submodules(self, module: nn.Module) -> Iterable[nn.Module]:
        """Return the modules that are left to Opacus."""
        return (found for found in super().iterate_submodules(module) if not _is_ours(found))

    def add_hooks(self, **options: Any) -> None:
        """See Opacus."""
        super().add_hooks(**options)
        for module in self._own:
            forward = self._forward_of[type(module)]
            module.forward = partial(forward, self, module)

    def remove_hooks(self) -> None:
        """See Opacus; the model is as before, also after an error between forward and backward."""
        for module in self._own:
            vars(module).pop("forward", None)
        super().remove_hooks()
        for owner in (*self._module.modules(), *self._module.parameters()):
            for name in ("activations", "max_batch_len", "grad_sample", "_current_grad_sample", "_forward_counter"):
                vars(owner).pop(name, None)

    def _linear(self, module: nn.Linear, inputs: Tensor) -> Tensor:
        return self._product(module, inputs, self._value(module.weight), getattr(self._module, "packing", None))

    def _conv2d(self, module: nn.Conv2d, inputs: Tensor) -> Tensor:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = nn.functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
        patches = nn.functional.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)
        weight = self._value(module.weight)
        flat = weight.flatten(weight.ndim - 3)  # [out, patch], or [B, out, patch]
        outputs = self._product(module, patches.transpose(1, 2), flat, None).transpose(1, 2)
        sizes = zip(padded.shape[2:], module.kernel_size, module.dilation, module.stride, strict=True)
        grid = [(size - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, dilation, stride in sizes]
        # In memory as any convolution's: Opacus' sampler of a convolution that follows silently assumes it.
        return outputs.reshape(len(inputs), module.out_channels, *grid).contiguous()

    def _product(
        self, module: nn.Linear | nn.Conv2d, inputs: Tensor, weight: Tensor, packing: Packing | None
    ) -> Tensor:
        bias = None if module.bias is None else self._value(module.bias)
        if not torch.is_grad_enabled():
            return _linear(inputs, weight, bias, packing)
        outputs: Tensor = _PerExampleLinear.apply(inputs, weight, bias, packing, partial(_keep, module))  # type: ignore[no-untyped-call]
        return outputs

    def _group_norm(self, module: nn.GroupNorm, inputs: Tensor) -> Tensor:
        normalised = nn.functional.group_norm(inputs, module.num_groups, eps=module.eps)
        weight, bias = self._value(module.weight), self._value(module.bias)
        if not torch.is_grad_enabled():
            return _scaled(normalised, weight, bias)
        outputs: Tensor = _PerExampleScale.apply(normalised, weight, bias, partial(_keep_scale, module))  # type: ignore[no-untyped-call]
        return outputs

    _forward_of: ClassVar[Mapping[type[nn.Module], Callable[..., Tensor]]] = {
        nn.Linear: _linear,
        nn.Conv2d: _conv2d,
        nn.GroupNorm: _group_norm,
    }

    def _value(self, parameter: Tensor) -> Tensor:
        """Return what the next batch is to meet: [*shape], or [B, *shape] if its examples belong to several sites."""
        if self._stacks is None or self.owners is None:
            return parameter
        return self._stacks[parameter].detach()[self.owners].requires_grad_()


class _PerExampleLinear(torch.autograd.Function):
    """A linear layer whose backward pass hands over its input and what came back, instead of a gradient of the weight."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, packing: Packing | None, keep: Keep
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.packing, ctx.keep = packing, keep
        return _linear(inputs, weight, bias, packing)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        inputs, weight = ctx.saved_tensors
        (gradient,) = gradients
        ctx.keep(inputs.to(gradient.dtype), gradient, ctx.packing)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        # Of a transposed matrix with an odd number of columns MKL adds up by the place of the row.
        turned = weight.to(gradient.dtype).transpose(-1, -2).contiguous()
        back = _linear(gradient, turned, None, ctx.packing)
        return back.to(inputs.dtype), None, None, None, None


class _PerExampleScale(torch.autograd.Function):
    """A factor and a term for each channel, with a backward pass that hands over its input and what came back."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, keep: Keep) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.keep = keep
        return _scaled(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        inputs, weight = ctx.saved_tensors
        (gradient,) = gradients
        ctx.keep(inputs.to(gradient.dtype), gradient)
        back = gradient * _per_channel(weight.to(gradient.dtype), gradient)
        return (back.to(inputs.dtype) if ctx.needs_input_grad[0] else None), None, None, None


def _scaled(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return inputs [B, channels, ...] times weight plus bias, each [channels] or [B, channels]."""
    return inputs * _per_channel(weight, inputs) + _per_channel(bias, inputs)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Return values [channels] or [B, channels] in a shape that spreads over `like` [B, channels, ...]."""
    rows = values if values.ndim == 2 else values.unsqueeze(0)
    return rows.view(*rows.shape, *([1] * (like.ndim - 2)))


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, packing: Packing | None) -> Tensor:
    """Return the layer's output; an example's is the same to the last bit in whatever company, see `shared.models.packing`.

    Args:
        inputs: [B, ..., in], or with a packing [1, N, in] or [N, in].
        weight: one [out, in], or one for each example [B, out, in].
        bias: [out], or [B, out], or None.
        packing: of the tokens of B examples, or None if each example has its own row.
    """
    if weight.ndim == 2:
        rows = inputs.reshape(-1, inputs.shape[-1])
        missing = whole_rows(len(rows)) - len(rows)
        filled = nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
        return nn.functional.linear(filled, weight, bias)[: len(rows)].view(*inputs.shape[:-1], -1)
    parts = _by_example(inputs, packing)
    dtype = inputs.dtype
    if torch.is_autocast_enabled(inputs.device.type):
        dtype = torch.get_autocast_dtype(inputs.device.type)
    outputs = [_bmm(part.to(dtype), weight[texts].to(dtype).transpose(1, 2)).to(dtype) for texts, part in parts]
    if bias is not None:
        outputs = [
            output + bias[texts].to(dtype).unsqueeze(1) for output, (texts, _) in zip(outputs, parts, strict=True)
        ]
    row = outputs[0] if packing is None else packing.from_attention(outputs)
    return row.view(*inputs.shape[:-1], -1)


def _by_example(values: Tensor, packing: Packing | None) -> list[tuple[Tensor | slice, Tensor]]:
    """Return (which examples, their [G, T, width]) for [B, ..., width] or packed values; T is an example's own affair.

    Places without a token hold zeros.
    """
    if packing is None:
        return [(slice(None), values.reshape(len(values), -1, values.shape[-1]))]
    row = values.reshape(1, -1, values.shape[-1])  # OPT drops the first dimension before its MLP
    return [(group.texts, part) for group, part in zip(packing.groups, packing.by_text(row), strict=True)]


def _keep(module: nn.Linear | nn.Conv2d, inputs: Tensor, gradient: Tensor, packing: Packing | None) -> None:
    """Add one use of the layer, see `_linear` for the shapes, to the per-example gradients on its parameters."""
    count = len(inputs) if packing is None else packing.size
    weights = gradient.new_empty(count, gradient.shape[-1], inputs.shape[-1], dtype=torch.float32)
    biases = gradient.new_empty(count, gradient.shape[-1], dtype=torch.float32)
    for (texts, part), (_, came) in zip(_by_example(gradient, packing), _by_example(inputs, packing), strict=True):
        weights[texts] = _bmm(part.transpose(1, 2), came)
        if module.bias is not None:
            biases[texts] = part.float().sum(dim=1)
    _add(module.weight, weights.view(-1, *module.weight.shape))
    if module.bias is not None:
        _add(module.bias, biases)


def _bmm(first: Tensor, second: Tensor) -> Tensor:
    """Return the products of two batches of matrices in float32.

    oneDNN's in bfloat16 depend in their last bit on how many there are; and a gradient should not be rounded twice.
    """
    with torch.autocast(first.device.type, enabled=False):
        return torch.bmm(first.float(), second.float())


def _keep_scale(module: nn.GroupNorm, inputs: Tensor, gradient: Tensor) -> None:
    """The same of a GroupNorm; normalised inputs and gradient are [B, channels, ...]."""
    _add(module.weight, (inputs * gradient).flatten(2).sum(dim=2))
    _add(module.bias, gradient.flatten(2).sum(dim=2))


def _add(parameter: Tensor, gradients: Tensor) -> None:
    if not parameter.requires_grad:
        return
    earlier: Tensor | None = getattr(parameter, "grad_sample", None)
    parameter.grad_sample = gradients if earlier is None else earlier + gradients  # type: ignore[attr-defined]


def _is_ours(module: nn.Module) -> bool:
    """True if per-example gradients of `module` are taken here, not by Opacus."""
    if type(module) is nn.Conv2d:
        return module.groups == 1
    if type(module) is nn.GroupNorm:
        return module.affine and module.bias is not None
    return type(module) is nn.Linear


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


class GradientsBySite:
    """Hands the per-example gradients of micro-batches to the sums of their sites.

    With several sites, a few micro-batches are held back and put in order of their sites: one call for each site instead of one
    for each site and micro-batch, most of them for a single example.
    """

    def __init__(self, first_row: Sequence[int], sums: Sequence[ClippedSum | PersonSum]) -> None:
        """Begin a step.

        Args:
            first_row: first row of each site in the pool of all records.
            sums: of each site.
        """
        self._first_row, self._sums = first_row, sums
        self._held: list[list[Tensor]] = []
        self._rows: list[int] = []
        self._owners: list[int] = []
        self._num_bytes = 0
        self._came: list[int] = []

    def add(self, gradients: list[Tensor], rows: list[int], owners: list[int]) -> None:
        """Take one micro-batch.

        Args:
            gradients: one tensor [batch, *shape] per parameter.
            rows: the record of each example in the pool.
            owners: the site of each example.
        """
        self._came += rows
        if len(self._sums) == 1:
            # All of them, whatever came: a gradient too many is for the sum to refuse.
            self._give(0, gradients, rows)
            return
        self._held.append(gradients)
        self._rows += rows
        self._owners += owners
        self._num_bytes += sum(gradient.nbytes for gradient in gradients)
        if self._num_bytes > _MOST_HELD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand over what is held back."""
        if not self._held:
            return
        order = sorted(range(len(self._owners)), key=self._owners.__getitem__)
        gradients = [torch.cat(parts)[order] for parts in zip(*self._held, strict=True)]
        rows = [self._rows[place] for place in order]
        for site, part in slices_by_owner([self._owners[place] for place in order]):
            self._give(site, [gradient[part] for gradient in gradients], rows[part])
        self._held, self._rows, self._owners, self._num_bytes = [], [], [], 0

    def check(self, drawn: Iterable[int]) -> None:
        """Check at the end of a step what came in it.

        Args:
            drawn: the rows of the pool that enter the step.

        Raises:
            PrivacyError: if other rows came than these, once each: a step that lacks a micro-batch, or has one twice, is not what
                is accounted for.
        """
        expected = sorted(drawn)
        if sorted(self._came) != expected:
            raise PrivacyError(
                f"for a step {len(expected):,} records were drawn, and {len(self._came):,} gradients came to its sum, not one of "
                "each; nothing was released."
            )

    def _give(self, site: int, gradients: list[Tensor], rows: list[int]) -> None:
        receiver = self._sums[site]
        if isinstance(receiver, PersonSum):
            receiver.add(gradients, [row - self._first_row[site] for row in rows])
        else:
            receiver.add(gradients)


def most_examples(parameters: Iterable[Tensor]) -> int:
    """Return how many examples, one at least, may share a pass that leaves a float32 gradient of each for every parameter."""
    return max(1, _MOST_PASS_BYTES // (4 * sum(parameter.numel() for parameter in parameters)))


def slices_by_owner(owners: list[int]) -> Iterator[tuple[int, slice]]:
    """Yield (site, its part of the batch) for a batch in which the examples of a site are neighbours."""
    begin = 0
    for place in range(1, len(owners) + 1):
        if place == len(owners) or owners[place] != owners[begin]:
            yield owners[begin], slice(begin, place)
            begin = place
