"""Where sites send gradients and not updates: the coordinator takes the optimiser step that `[training]` describes.

Guarantee (tests: tests/server/aggregation/test_gradient.py): with one site, a step here is the one that `client.training.trainer`
takes on the same noised gradient, to the last bit; moments and schedule go on over rounds and over a resumed run.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from shared.job.training import TrainingConfig
from shared.tensors.optimizers import build_optimizer, dump_optimizer, restore_optimizer, set_learning_rate

HEAD = "head."
"""With which the names of the head's tensors begin."""


def gradient_step(
    current: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    *,
    training: TrainingConfig,
    step: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (next global adapter, next state of the optimiser) after one step.

    Args:
        current: the global adapter at which the gradient was taken.
        gradient: noised mean gradient, same names and shapes.
        state: of the optimiser, "name|key"; empty before the first step.
        training: optimiser, learning rate, schedule.
        step: number of the step over the whole run, 0-based; positions the schedule.
    """
    stacks = {name: nn.Parameter(value.detach().clone().unsqueeze(0)) for name, value in current.items()}
    head = {name for name in stacks if name.startswith(HEAD)}
    optimizer = build_optimizer(stacks, head, training)
    restore_optimizer(optimizer, stacks, [state])
    for name, stack in stacks.items():
        stack.grad = gradient[name].to(stack.dtype).unsqueeze(0)
    set_learning_rate(optimizer, training, step)
    optimizer.step()
    return {name: stack.detach()[0].clone() for name, stack in stacks.items()}, dump_optimizer(optimizer, stacks, 0)
