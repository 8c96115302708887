"""A text in a group has the logits that it has alone, by cached keys and values and by reading it anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.registry.references import Resolved
from server.serving.growing import Growing
from server.serving.models import Model, Plan, load
from shared.runtime.inference import next_logits

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20], [30, 31, 32]]


@pytest.fixture(scope="module", params=["onnx", "torch"])
def model(request: pytest.FixtureRequest, writer_run: Path) -> Model:
    return load(Resolved(writer_run, None, ""), Plan(request.param))


def alone(model: Model, *rows: list[int]) -> Tensor:
    return torch.cat([next_logits(model.runtime, [row]) for row in rows])


def close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and float((found - expected).abs().max()) < 1e-4


def test_rows_join_grow_and_leave(model: Model) -> None:
    group: Growing = model.growing()
    first, second, third = (list(prompt) for prompt in PROMPTS)
    assert close(group.join([first, second]), alone(model, first, second))
    first, second = [*first, 40], [*second, 41]
    assert close(group.step([40, 41]), alone(model, first, second))
    assert close(group.join([third]), alone(model, third))
    first, second, third = [*first, 50], [*second, 51], [*third, 52]
    assert close(group.step([50, 51, 52]), alone(model, first, second, third))
    group.keep([2, 1])  # the longest leaves, and the others change places
    second, third = [*second, 60], [*third, 61]
    assert close(group.step([61, 60]), alone(model, third, second))
    group.keep([])
    assert close(group.join([first]), alone(model, first))
