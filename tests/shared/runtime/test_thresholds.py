"""Thresholds raise macro F1 on the records that decide; those that are reported choose nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import f1_score

from server.app import _Evaluator, _judged
from shared.errors import ConfigError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.kinds import RULES
from shared.runtime.calibration import FEWEST
from shared.runtime.runtime import Runtime, load_own_runtime
from shared.runtime.thresholds import (
    FEWEST_OF_A_LABEL,
    _macro_f1,
    choose_offsets,
    fit_offsets,
    with_offsets,
)
from tests.test_task_contract import CASES

CPU = ComputeConfig(device="cpu", precision="float32")
Drawn = tuple[NDArray[np.float64], NDArray[np.int64]]


def drawn(shares: tuple[float, ...], *, count: int = 300, seed: int = 0) -> Drawn:
    """Labels with these shares, and logits that are unsure and know the shares, so that they seldom name what is rare."""
    random = np.random.default_rng(seed)
    targets = random.choice(len(shares), size=count, p=shares)
    return random.normal(size=(count, len(shares))) + 1.5 * np.eye(len(shares))[targets] + np.log(shares), targets


def f1(logits: NDArray[np.float64], targets: NDArray[np.int64]) -> float:
    return float(f1_score(targets, logits.argmax(axis=1), average="macro", zero_division=0.0))


def places(logits: NDArray[np.float64], label: int) -> NDArray[np.float64]:
    """What can be added to a label's logit, but for numbers that change no answer."""
    others = np.delete(logits, label, axis=1).max(axis=1) - logits[:, label]
    return (np.sort(others)[1:] + np.sort(others)[:-1]) / 2


def test_of_two_labels_it_is_the_best_threshold_there_is() -> None:
    logits, targets = drawn((0.9, 0.1))
    best = max(f1(logits + added * np.array([0, 1]), targets) for added in places(logits, 1))
    assert f1(logits + fit_offsets(logits, targets), targets) == pytest.approx(best, abs=1e-9)
    assert best > f1(logits, targets) + 0.05


def test_of_several_labels_no_other_number_for_one_of_them_is_better() -> None:
    logits, targets = drawn((0.6, 0.25, 0.1, 0.05))
    moved = logits + fit_offsets(logits, targets)
    found = f1(moved, targets)
    assert found > f1(logits, targets) + 0.03
    for label in range(4):
        for added in places(moved, label):
            assert f1(moved + added * (np.arange(4) == label), targets) <= found + 1e-8
    # On records that decided nothing, too.
    others, truth = drawn((0.6, 0.25, 0.1, 0.05), seed=1, count=3000)
    assert f1(others + fit_offsets(logits, targets), truth) > f1(others, truth)


def test_scores_are_those_of_scikit_learn() -> None:
    logits, targets = drawn((0.5, 0.4, 0.09, 0.01), count=60)
    logits[:, 2] -= 9  # never answered, and at times never a label
    for rows in (slice(None), targets != 3, targets == 0):
        answers, truth = logits[rows].argmax(axis=1), targets[rows]
        counted = (np.bincount(some, minlength=4) for some in (answers[answers == truth], answers, truth))
        assert float(_macro_f1(*counted)) == pytest.approx(f1(logits[rows], truth))


def test_what_is_too_rare_or_right_already_keeps_its_logit() -> None:
    logits, targets = drawn((0.8, 0.1, 0.1), count=400)
    kept = np.concatenate([np.flatnonzero(targets != 2), np.flatnonzero(targets == 2)[: FEWEST_OF_A_LABEL - 1]])
    assert fit_offsets(logits[kept], targets[kept])[2] == 0
    assert fit_offsets(logits[kept], targets[kept])[1] != 0
    # Where one label alone has enough records, nothing is moved for the few of another.
    rare = np.concatenate([np.flatnonzero(targets == 0), np.flatnonzero(targets == 1)[: FEWEST_OF_A_LABEL - 1]])
    assert not fit_offsets(logits[rare][:, :2], targets[rare]).any()
    perfect = 5.0 * np.eye(3)[targets]
    assert not fit_offsets(perfect, targets).any()
    alike = np.zeros((60, 2))
    assert not fit_offsets(alike, np.arange(60) % 2).any()


def test_what_a_few_records_gain_moves_nothing() -> None:
    """A model that is right and sure but for two records that only a large number would answer rightly."""
    targets = np.arange(100) % 2
    logits = 30.0 * np.eye(2)[targets]
    logits[np.flatnonzero(targets)[:2]] = [30.0, 20.0]
    assert f1(logits + np.array([0.0, 10.5]), targets) == 1.0
    assert not fit_offsets(logits, targets).any()
    logits[np.flatnonzero(targets)[:6]] = [30.0, 20.0]
    assert f1(logits + fit_offsets(logits, targets), targets) == 1.0


# --- in a run ---


@pytest.fixture(scope="module")
def runtime(classification_job: Callable[..., Job]) -> Runtime:
    job = classification_job(task={"labels": ["bad", "good"], "thresholds": "public"})
    return load_own_runtime(job, CPU)


def evaluators(
    runtime: Runtime, records: list[dict[str, Any]], *, flipped: bool = False
) -> tuple[_Evaluator, _Evaluator]:
    """Of 40 reported and 60 deciding records, of which few are good."""
    other = {"good": "bad", "bad": "good"}
    texts = [record["text"] for record in records]
    deciding = [{"text": text, "label": "good" if number % 6 == 4 else "bad"} for number, text in enumerate(texts)]
    reported = [{"text": f"a {text}", "label": deciding[n]["label"]} for n, text in enumerate(texts[:40])]
    if flipped:
        reported = [{**record, "label": other[record["label"]]} for record in reported]
    return tuple(_Evaluator(runtime, runtime.encode(some), classes=True) for some in (reported, deciding))  # type: ignore[return-value]


def test_the_reported_records_do_not_choose(runtime: Runtime, records: list[dict[str, Any]]) -> None:
    evaluator, decider = evaluators(runtime, records)
    adapter, evaluation, calibration, thresholds = _judged(runtime, runtime.initial, evaluator, decider)
    assert thresholds is not None
    assert calibration is not None
    assert (thresholds.fitted_on, thresholds.reported_on) == (60, 40)
    assert evaluation.metrics["macro_f1"] == pytest.approx(thresholds.macro_f1_after)
    assert evaluation.metrics["accuracy"] == pytest.approx(thresholds.accuracy_after)
    assert evaluator(runtime.initial).metrics["macro_f1"] == pytest.approx(thresholds.macro_f1_before)
    # They are in the bias of what is handed out, and nowhere else.
    moved = {n: adapter[n] - v for n, v in runtime.initial.items() if not torch.equal(adapter[n], v)}
    assert moved.keys() == {"head.linear.bias"}
    assert moved["head.linear.bias"].tolist() == pytest.approx(thresholds.offsets, abs=1e-7)
    assert any(thresholds.offsets)
    flipped = _judged(runtime, runtime.initial, evaluators(runtime, records, flipped=True)[0], decider)
    assert flipped[3] is not None
    assert flipped[3].offsets == thresholds.offsets
    assert flipped[2] is not None
    assert flipped[2].temperature == calibration.temperature
    assert flipped[3].macro_f1_after != thresholds.macro_f1_after
    assert (thresholds.too_few, thresholds.warning) == ({}, None)
    # Planted: the parts exchanged.
    exchanged = _judged(runtime, runtime.initial, decider, evaluator)[3]
    assert exchanged is not None
    assert exchanged.offsets != thresholds.offsets


@pytest.mark.parametrize("kind", [kind for kind, rules in RULES.items() if rules.has_classes])
def test_offsets_in_the_bias_are_added_to_the_logits(task_job: Callable[..., Job], kind: str) -> None:
    case = CASES[kind]
    runtime = load_own_runtime(task_job({"kind": kind, **case.section}, **case.sections), CPU)
    examples = runtime.encode(case.records[:5])
    offsets = [0.5 * number - 0.7 for number in range(len(runtime.task.config.labels))]
    logits = []
    for state in (runtime.initial, with_offsets(runtime.initial, runtime.model.head_parameters(), offsets)):
        runtime.load(state)
        logits.append(torch.cat([outputs for outputs, _ in runtime.outputs(examples)]))
    assert torch.allclose(logits[0] + torch.tensor(offsets), logits[1], atol=1e-6)


def test_a_label_that_is_too_rare_for_a_threshold_is_told(
    runtime: Runtime, records: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    deciding = [{"text": record["text"], "label": "good" if n < 4 else "bad"} for n, record in enumerate(records[:60])]
    parts = [_Evaluator(runtime, runtime.encode(some), classes=True) for some in (records[:40], deciding)]
    found = _judged(runtime, runtime.initial, parts[0], parts[1])[3]
    assert found is not None
    assert (found.too_few, found.offsets) == ({"good": 4}, (0.0, 0.0))
    assert "4 of the 60 records that decide have the label 'good'; it takes 10" in caplog.text


def test_too_few_deciding_records_or_no_wish_choose_nothing(
    runtime: Runtime, classification_job: Callable[..., Job], records: list[dict[str, Any]]
) -> None:
    evaluator, decider = evaluators(runtime, records)
    few = _Evaluator(runtime, runtime.encode(records[: FEWEST - 1]), classes=True)
    for some in (None, few):
        adapter, _, _, found = _judged(runtime, runtime.initial, evaluator, some)
        assert adapter is runtime.initial
        assert found is not None
        assert (found.fitted_on, found.offsets) == (0, (0.0, 0.0))
        assert found.macro_f1_before == found.macro_f1_after
        assert found.too_few == {}
        assert "no thresholds: fewer than" in str(found.warning)
    assert choose_offsets(runtime.task, few.parts(runtime.initial))[1] == (0, 0)
    plain = load_own_runtime(classification_job(), CPU)
    evaluator, decider = evaluators(plain, records)
    adapter, _, _, found = _judged(plain, plain.initial, evaluator, decider)
    assert adapter is plain.initial
    assert found is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "causal_lm", "labels": []}, "thresholds is for kinds whose records have one label each"),
        ({"kind": "token_classification", "labels": ["O", "B-film"]}, "one label each, not for token_classification"),
        ({"labels": [str(number) for number in range(101)]}, "there are 101 labels; it is for at most 100"),
        ({"thresholds": "private"}, "'none' or 'public'"),
    ],
)
def test_settings_that_will_not_do(settings: dict[str, Any], message: str, task_job: Callable[..., Job]) -> None:
    task = {"kind": "sequence_classification", "labels": ["bad", "good"], "thresholds": "public", **settings}
    with pytest.raises(ConfigError, match=message):
        task_job(task)


def test_jobs_without_them_keep_their_hash(classification_job: Callable[..., Job]) -> None:
    assert "thresholds" not in classification_job().canonical_json()
