"""Views of a record follow from the record alone, and keep what the format needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.runtime.runtime import load_runtime
from shared.tasks.views import views_of

CPU = ComputeConfig(device="cpu", precision="float32")
IMAGES = {"kind": "image_classification", "labels": ["a", "b"], "image_shape": [2, 4, 5], "pixel_range": [0, 16]}


@pytest.fixture
def pairs(task_job: Callable[..., Job]) -> Job:
    task = {"kind": "pair_matching", "labels": ["other", "match"]}
    return task_job(task, training={"augmentation": {"views": 6, "token_dropout": 0.4}})


def test_a_text_loses_words_and_keeps_its_marks(pairs: Job) -> None:
    runtime = load_runtime(pairs, CPU)
    records = [
        {"text": "a film with a cast", "pair": "the plot is dull", "label": label} for label in ("other", "match")
    ]
    examples = runtime.encode([*records, {"text": "film", "pair": "plot", "label": "other"}])
    views = views_of(examples, pairs, runtime.tokenizer)
    assert len(views) == 5 * len(examples)
    special = set(runtime.tokenizer.all_special_ids)
    for place, view in enumerate(views):
        whole = examples[place // 5]
        assert view.target is whole.target
        tokens, kept = whole.input_ids.tolist(), iter(whole.input_ids.tolist())
        assert all(token in kept for token in view.input_ids.tolist()), "in their order"
        marks = [token for token in tokens if token in special]
        assert [token for token in view.input_ids.tolist() if token in special] == marks
        assert view.length > len(marks), "a word is left"
    assert len({view.key for view in views[:5]}) > 2
    assert sum(view.length for view in views[:10]) < 0.9 * 5 * sum(example.length for example in examples[:2])


def test_views_follow_from_the_record_and_the_seed_alone(pairs: Job) -> None:
    runtime = load_runtime(pairs, CPU)
    examples = runtime.encode(
        [{"text": f"a film {word}", "pair": "the plot is dull and long", "label": "match"} for word in ("a", "b", "c")]
    )
    views = [view.key for view in views_of(examples, pairs, runtime.tokenizer)]
    assert [view.key for view in views_of(examples[2:], pairs, runtime.tokenizer)] == views[10:]
    other = pairs.model_copy(update={"seed": pairs.seed + 1})
    assert [view.key for view in views_of(examples, other, runtime.tokenizer)] != views
    assert (
        views_of(
            examples,
            pairs.model_copy(update={"training": pairs.training.model_copy(update={"augmentation": None})}),
            runtime.tokenizer,
        )
        == []
    )


def test_an_image_is_moved_as_a_whole(task_job: Callable[..., Job]) -> None:
    job = task_job(IMAGES, training={"augmentation": {"views": 40, "shift": 1}})
    pixels = torch.arange(40) % 17
    (example,) = load_runtime(job, CPU).encode([{"pixels": pixels.tolist(), "label": "b"}])
    whole = torch.nn.functional.pad(example.input_ids.view(1, 2, 4, 5).double(), (1, 1, 1, 1), mode="replicate")[
        0
    ].long()
    possible = {whole[:, y : y + 4, x : x + 5].flatten().numpy().tobytes() for y in range(3) for x in range(3)}
    found: list[Any] = [view.key for view in views_of([example], job, None)]
    assert set(found) == possible, "all nine, with 39 draws"
