"""Ensembles: the mean of the members' outputs against an independent computation, for every kind of task that has one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.errors import AdapterError, ConfigError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.runtime.ensembles import Ensemble, Member, can_be_averaged, check_members
from shared.runtime.export.peft import save_peft_folder
from shared.runtime.inference import load_tuned, predict
from shared.runtime.runtime import load_runtime
from tests.conftest import LINES

CPU = ComputeConfig(device="cpu", precision="float32")

TASKS: dict[str, dict[str, Any]] = {
    "sequence_classification": {"labels": ["bad", "fair", "good"]},
    "pair_matching": {"labels": ["other", "match"]},
    "token_classification": {"labels": ["O", "B-x", "I-x"]},
    "regression": {"target_range": [1, 5]},
}

MakeMember = Callable[..., Member]


@pytest.fixture
def member(task_job: Callable[..., Job], tmp_path: Path) -> MakeMember:
    """Return a maker of run folders whose adapters are far from the start, and different for each number."""

    def make(number: int, kind: str = "sequence_classification", **sections: Any) -> Member:
        task = {"kind": kind, **TASKS[kind], **sections.pop("task", {})}
        job = task_job(task, seed=number, name=f"run-{number}", **sections)
        runtime = load_runtime(job, CPU)
        generator = torch.Generator().manual_seed(number)
        state = {name: torch.randn(t.shape, generator=generator) for name, t in sorted(runtime.initial.items())}
        folder = tmp_path / f"run-{number}"
        save_peft_folder(folder / "adapter", runtime, job, state)
        runtime.load(runtime.initial)
        (folder / "job.json").write_text(job.canonical_json())
        return Member(run=folder, job=job)

    return make


def logits_of(member: Member, texts: list[str]) -> torch.Tensor:
    """One text at a time, through the model itself."""
    runtime = load_tuned(member.run, member.job, CPU)
    rows = []
    for text in texts:
        (example,) = runtime.encode([{"text": text}])
        ((output, _),) = runtime.outputs([example])
        rows.append(output[0])
    return torch.stack(rows).double()


def test_labels_follow_the_mean_of_the_logits(member: MakeMember) -> None:
    members = [member(1), member(2, lora={"rank": 2}), member(3, privacy={"mechanism": "none"})]
    found = Ensemble(members, CPU).predict(LINES)
    mean = torch.stack([logits_of(one, LINES) for one in members]).mean(dim=0)
    expected = mean.softmax(dim=-1)
    for row, prediction, text in zip(expected, found, LINES, strict=True):
        assert prediction["text"] == text
        assert list(prediction["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert prediction["label"] == ["bad", "fair", "good"][int(row.argmax())]
    # Not one of the members, and not the mean of the probabilities.
    for one in members:
        assert found != predict(load_tuned(one.run, one.job, CPU), LINES)
    arithmetic = torch.stack([logits_of(one, LINES).softmax(dim=-1) for one in members]).mean(dim=0)
    assert (arithmetic - expected).abs().max() > 1e-3


def test_scores_and_pairs_and_entities(member: MakeMember) -> None:
    scored = [member(1, "regression"), member(2, "regression")]
    raw = torch.stack([logits_of(one, LINES) for one in scored]).mean(dim=0)[:, 0].clamp(-1, 1)
    found = [prediction["score"] for prediction in Ensemble(scored, CPU).predict(LINES)]
    assert found == pytest.approx((1 + (raw + 1) * 2).tolist(), abs=1e-5)
    assert len(set(found)) > 1
    paired = Ensemble([member(3, "pair_matching"), member(4, "pair_matching")], CPU)
    (pair,) = paired.predict([f"{LINES[0]}\t{LINES[1]}"])
    assert pair["pair"] == LINES[1]
    assert sum(pair["probabilities"].values()) == pytest.approx(1)
    tagged = [member(5, "token_classification"), member(6, "token_classification")]
    entities = Ensemble(tagged, CPU).predict(LINES)
    assert [prediction["text"] for prediction in entities] == LINES
    assert any(prediction["entities"] for prediction in entities)


def test_the_same_adapter_twice_is_that_adapter(member: MakeMember, tmp_path: Path) -> None:
    """Copies in two folders: their mean is what each of them says."""
    one = member(1, "token_classification")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "adapter").symlink_to(one.run / "adapter")
    copy = Member(run=tmp_path / "copy", job=one.job)
    assert Ensemble([one, copy], CPU).predict(LINES) == predict(load_tuned(one.run, one.job, CPU), LINES)


@pytest.mark.parametrize("kind", list(TASKS))
def test_metrics_are_those_of_the_mean_output(member: MakeMember, kind: str) -> None:
    texts = [" ".join(LINES[(i + k) % 6] for k in range(1 + i % 3)) for i in range(40)]
    records: list[dict[str, Any]] = []
    for index, text in enumerate(texts):
        record: dict[str, Any] = {"text": text, "pair": LINES[index % 5], "score": 1 + index % 5}
        if kind in ("sequence_classification", "pair_matching"):
            labels = TASKS[kind]["labels"]
            record["label"] = labels[index % len(labels)]
        if kind == "token_classification":
            words = text.split()
            record |= {"tokens": words, "tags": [["O", "B-x", "I-x"][n % 3] for n in range(len(words))]}
        records.append(record)
    members = [member(1, kind), member(2, kind), member(3, kind)]
    together, single = Ensemble(
        members, ComputeConfig(device="cpu", precision="float32", micro_batch_tokens=64)
    ).evaluate(records)
    for one, evaluation in zip(members, single, strict=True):
        runtime = load_tuned(one.run, one.job, CPU)
        assert evaluation.metrics == pytest.approx(runtime.evaluate(runtime.encode(records)).metrics, abs=1e-5)
    assert all(together.metrics != evaluation.metrics for evaluation in single)
    if kind == "sequence_classification":
        mean = torch.stack([logits_of(one, texts) for one in members]).mean(dim=0)
        truth = torch.tensor([index % 3 for index in range(40)])
        assert together.metrics["accuracy"] == pytest.approx(float((mean.argmax(dim=-1) == truth).double().mean()))
        assert together.metrics["loss"] == pytest.approx(
            float(torch.nn.functional.cross_entropy(mean, truth)), abs=1e-5
        )
        # The loss is convex in the logits: the mean is never worse than the members on average.
        assert together.metrics["loss"] <= np.mean([evaluation.metrics["loss"] for evaluation in single]) + 1e-6
    if kind == "regression":
        raw = torch.stack([logits_of(one, texts) for one in members]).mean(dim=0)[:, 0]
        truth = torch.tensor([index % 5 / 2 - 1 for index in range(40)])
        assert together.metrics["loss"] == pytest.approx(float((raw - truth).square().mean()), rel=1e-5)
        assert together.metrics["mae"] == pytest.approx(float(2 * (raw.clamp(-1, 1) - truth).abs().mean()), abs=1e-5)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"kind": "pair_matching", "task": {"labels": ["bad", "good"]}}, "task.kind is 'pair_matching' in the one"),
        ({"task": {"labels": ["bad", "good"]}}, "task.labels is bad, good in the one and bad, fair, good in the other"),
        ({"task": {"labels": ["good", "fair", "bad"]}}, "task.labels is good, fair, bad in the one"),
        ({"model": {"max_length": 16}}, "model.max_length is 16 in the one and 24"),
    ],
)
def test_what_does_not_fit_together_is_refused(member: MakeMember, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"run-2 and .*run-1 do not fit together") as caught:
        Ensemble([member(1), member(2, **sections)], CPU)
    assert message in str(caught.value)


def test_another_backbone_is_refused(member: MakeMember) -> None:
    one, two = member(1), member(2)
    model = two.job.model.model_copy(update={"backbone": "/another"})
    with pytest.raises(ConfigError, match=r"model\.backbone is '/another' in the one"):
        check_members([one, Member(run=two.run, job=two.job.model_copy(update={"model": model}))])


def test_one_run_and_one_run_twice_and_language_models_are_refused(
    member: MakeMember, language_job: Callable[..., Job], tmp_path: Path
) -> None:
    one = member(1)
    with pytest.raises(ConfigError, match="at least two runs"):
        check_members([one])
    with pytest.raises(ConfigError, match="named twice"):
        check_members([one, Member(run=one.run / ".." / one.run.name, job=one.job)])
    job = language_job()
    assert not can_be_averaged(job)
    with pytest.raises(ConfigError, match="which continues texts"):
        check_members([Member(run=tmp_path / name, job=job) for name in "ab"])


def test_the_command_predicts_with_all_of_them(member: MakeMember, silotune: Callable[..., Any]) -> None:
    members = [member(1), member(2)]
    done = silotune("predict", members[0].run, LINES[0], LINES[1], "--with", members[1].run, "--json")
    assert done.status == 0, done.err
    found = [json.loads(line) for line in done.out.splitlines()]
    for prediction, expected in zip(found, Ensemble(members, ComputeConfig()).predict(LINES[:2]), strict=True):
        assert prediction["label"] == expected["label"]
        assert prediction["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)
    refused = silotune("predict", members[0].run, LINES[0], "--with", members[0].run)
    assert (refused.status, "named twice" in refused.err) == (ConfigError("").exit_code, True)


def test_a_member_without_an_adapter_is_named(member: MakeMember, tmp_path: Path) -> None:
    one = member(1)
    with pytest.raises(AdapterError, match="gone"):
        Ensemble([one, Member(run=tmp_path / "gone", job=one.job)], CPU).predict(LINES)
