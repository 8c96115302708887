"""The optimiser that moves trained values by noised gradients: a site's own in its local steps, the coordinator's where sites
send gradients. Everything here is post-processing: it reads noised gradients and public numbers only.

Values stand in stacks [sites, *shape], so that many simulated sites are moved side by side; one site is a stack of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import assert_never

import torch
from torch import Tensor, nn

from shared.job.training import TrainingConfig


def build_optimizer(
    trainable: Mapping[str, nn.Parameter], head: set[str], training: TrainingConfig
) -> torch.optim.Optimizer:
    """Return AdamW or SGD with one group for the adapter and one for the head."""
    groups = [
        {"params": [p for name, p in trainable.items() if (name in head) == is_head], "factor": factor}
        for is_head, factor in ((False, 1.0), (True, training.head_learning_rate_factor))
    ]
    groups = [group for group in groups if group["params"]]
    if training.optimizer == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=training.learning_rate,
            betas=(training.momentum, 0.999),
            weight_decay=training.weight_decay,
        )
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=training.learning_rate, momentum=training.momentum, weight_decay=training.weight_decay
        )
    assert_never(training.optimizer)


def set_learning_rate(optimizer: torch.optim.Optimizer, training: TrainingConfig, step: int) -> None:
    """Set the learning rate of the public schedule for global step `step` (0-based, over all planned steps)."""
    rate = training.learning_rate_at(step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def dump_optimizer(
    optimizer: torch.optim.Optimizer, stacks: Mapping[str, nn.Parameter], site: int
) -> dict[str, Tensor]:
    """Return one site's moments as CPU tensors by "parameter name|key"."""
    return {
        f"{name}|{key}": (value[site] if value.ndim else value).detach().cpu().clone()
        for name, stack in stacks.items()
        for key, value in optimizer.state.get(stack, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, stacks: Mapping[str, nn.Parameter], states: Sequence[Mapping[str, Tensor]]
) -> None:
    """Put back what `dump_optimizer` returned for each site.

    Raises:
        ValueError: if the sites have taken different numbers of steps: one optimiser counts one number.
    """
    if len({steps_taken(state) for state in states}) > 1:
        raise ValueError("only sites whose optimisers have taken equally many steps can be trained together")
    for full_name in states[0]:
        name, _, key = full_name.partition("|")
        stack, values = stacks[name], [state[full_name] for state in states]
        # Step counters are scalars that PyTorch keeps on the CPU.
        optimizer.state[stack][key] = torch.stack(values).to(stack.device) if values[0].ndim else values[0].clone()


def steps_taken(state: Mapping[str, Tensor]) -> tuple[float, bool]:
    """Return how far an optimiser has come: the steps that it counts, if it does, and whether it has any moments."""
    return max((float(value) for name, value in state.items() if name.endswith("|step")), default=0.0), bool(state)
