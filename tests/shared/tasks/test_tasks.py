"""What single kinds of task do beside the contract of all: alignment, ranges, rankings, and what a response's loss reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from shared.errors import ConfigError, DataError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.model import ModelConfig, TaskConfig
from shared.models.batches import IGNORED, Batch, collate
from shared.models.heads import PooledClassifier
from shared.runtime.inference import Decoding, choose_tokens, generate, predict
from shared.runtime.runtime import Runtime, load_runtime
from shared.tasks.pair_matching import ranking_metrics
from shared.tasks.regression import Regression
from shared.tasks.replies import prompt_tokens
from shared.tasks.token_classification import TokenClassification, entities, word_places

CPU = ComputeConfig(device="cpu", precision="float32")
TAGS = ("O", "B-film", "I-film", "B-cast", "I-cast")


@pytest.fixture
def tagger(task_job: Callable[..., Job]) -> Runtime:
    return load_runtime(task_job({"kind": "token_classification", "labels": list(TAGS)}), CPU)


@pytest.fixture
def replier(task_job: Callable[..., Job]) -> Runtime:
    return load_runtime(task_job({"kind": "replies"}), CPU)


# --- labels ---


@pytest.mark.parametrize("kind", ["sequence_classification", "token_classification", "pair_matching"])
def test_smoothing_spreads_the_target_and_spares_the_evaluation(kind: str, task_job: Callable[..., Job]) -> None:
    labels = ["O", "B-film"] if kind == "token_classification" else ["bad", "good"]
    records: dict[str, list[dict[str, Any]]] = {
        "sequence_classification": [{"text": "a film", "label": "good"}],
        "token_classification": [{"tokens": ["film"], "tags": ["B-film"]}],
        "pair_matching": [{"text": "a film", "pair": "a cast", "label": "good"}],
    }
    plain, smooth = (
        load_runtime(task_job({"kind": kind, "labels": labels, "label_smoothing": share}), CPU) for share in (0.0, 0.2)
    )
    batch = collate(plain.encode(records[kind]))
    place = (0, 1) if kind == "token_classification" else (0,)
    with torch.no_grad():
        outputs = plain.model(batch)
        negative = -outputs[place].log_softmax(dim=-1)
        assert float(plain.task.per_example_loss(outputs, batch)) == pytest.approx(float(negative[1]), rel=1e-5)
        smoothed = 0.9 * float(negative[1]) + 0.1 * float(negative[0])
        assert float(smooth.task.per_example_loss(outputs, batch)) == pytest.approx(smoothed, rel=1e-5)
        assert smooth.task.evaluate([(outputs, batch)]).metrics["loss"] == pytest.approx(float(negative[1]), rel=1e-5)
    with pytest.raises(ConfigError, match="label_smoothing is for kinds with labels"):
        task_job({"kind": "causal_lm", "label_smoothing": 0.1})


@pytest.mark.parametrize("kind", ["sequence_classification", "token_classification", "pair_matching"])
def test_a_class_weight_is_a_factor_on_its_own_records_alone(kind: str, task_job: Callable[..., Job]) -> None:
    """Whatever stands beside it; PyTorch's own `weight` with a mean would divide by the weights of the batch."""
    labels = ["O", "B-film"] if kind == "token_classification" else ["bad", "good"]
    first, second = labels
    records: dict[str, list[dict[str, Any]]] = {
        "sequence_classification": [{"text": "a film", "label": label} for label in labels],
        "token_classification": [
            {"tokens": ["a", "film"], "tags": [first, second]},
            {"tokens": ["film"], "tags": [first]},
        ],
        "pair_matching": [{"text": "a film", "pair": "a cast", "label": label} for label in labels],
    }
    plain, weighted = (
        load_runtime(task_job({"kind": kind, "labels": labels, **more}), CPU)
        for more in ({}, {"class_weights": [0.25, 1.0]})
    )
    examples = plain.encode(records[kind])
    batch = collate(examples)
    with torch.no_grad():
        outputs = plain.model(batch)
        losses = plain.task.per_example_loss(outputs, batch)
        found = weighted.task.per_example_loss(outputs, batch)
        if kind == "token_classification":
            words = -outputs[0].log_softmax(dim=-1)
            assert float(found[0]) == pytest.approx(float(0.25 * words[1, 0] + words[2, 1]) / 2, rel=1e-5)
            assert float(found[1]) == pytest.approx(0.25 * float(losses[1]), rel=1e-6)
        else:
            assert found.tolist() == pytest.approx([0.25 * float(losses[0]), float(losses[1])], rel=1e-6)
        for row, example in enumerate(examples):
            alone = weighted.task.per_example_loss(outputs[row : row + 1, : example.length], collate([example]))
            assert float(alone) == float(found[row]), "no loss depends on its neighbours"
        assert weighted.task.evaluate([(outputs, batch)]).metrics == plain.task.evaluate([(outputs, batch)]).metrics


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_weights": [1.0]}, "class_weights has 1 numbers, and there are 2 labels"),
        ({"class_weights": [0.5, 0.25]}, r"the largest of class_weights is 0\.5; divide all by it"),
        ({"class_weights": [1.0, 0.0]}, "greater than 0"),
        ({"class_weights": [1.0, 2.0]}, "less than or equal to 1"),
        ({"class_weights": [1.0, float("nan")]}, "class_weights"),
        ({"kind": "causal_lm", "labels": [], "class_weights": [1.0]}, "class_weights is for kinds with labels"),
    ],
)
def test_class_weights_that_will_not_do(settings: dict[str, Any], message: str, task_job: Callable[..., Job]) -> None:
    task = {"kind": "sequence_classification", "labels": ["bad", "good"]} | settings
    with pytest.raises(ConfigError, match=message):
        task_job({key: value for key, value in task.items() if value != []})


# --- entities ---


def test_a_tag_stands_on_the_first_piece_of_its_word(tagger: Runtime) -> None:
    words = ["the", "filmscript", "bores"]
    (example,) = tagger.encode([{"tokens": words, "tags": ["O", "B-film", "I-film"]}])
    pieces = tagger.tokenizer.convert_ids_to_tokens(example.input_ids.tolist())
    targets = torch.as_tensor(example.target)
    assert len(pieces) > 5  # at least one word has several pieces
    firsts = [i for i, piece in enumerate(pieces) if not piece.startswith("##") and not piece.startswith("[")]
    assert [pieces[i][0] for i in firsts] == ["t", "f", "b"]
    assert [TAGS[targets[i]] for i in firsts] == ["O", "B-film", "I-film"]
    assert all(targets[i] == IGNORED for i in range(len(pieces)) if i not in firsts)


def test_text_with_spaces_is_a_list_of_words(tagger: Runtime) -> None:
    (as_text,) = tagger.encode([{"tokens": "the film bores", "tags": "O B-film O"}])
    (as_list,) = tagger.encode([{"tokens": ["the", "film", "bores"], "tags": ["O", "B-film", "O"]}])
    assert torch.equal(as_text.input_ids, as_list.input_ids)
    assert torch.equal(torch.as_tensor(as_text.target), torch.as_tensor(as_list.target))


def test_words_beyond_the_length_are_cut_with_their_tags(tagger: Runtime) -> None:
    (example,) = tagger.encode([{"tokens": ["film"] * 100, "tags": ["B-film"] * 100}])
    assert example.length == tagger.max_length
    assert int((torch.as_tensor(example.target) != IGNORED).sum()) < 100


def test_entities_are_counted_whole() -> None:
    """Two of three entities found, one of four guesses too many: hand-computed precision and recall."""
    task = TokenClassification(TaskConfig(kind="token_classification", labels=TAGS), ModelConfig())
    true = [["B-film", "I-film", "O", "B-cast"], ["O", "B-film", "O", "O"]]
    guessed = [["B-film", "I-film", "O", "O"], ["B-cast", "B-film", "I-film", "B-cast"]]
    targets = torch.tensor([[TAGS.index(tag) for tag in row] for row in true])
    logits = 9.0 * torch.nn.functional.one_hot(torch.tensor([[TAGS.index(t) for t in row] for row in guessed]), 5)
    batch = Batch(torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool), targets)
    metrics = task.evaluate([(logits, batch)]).metrics
    assert metrics["precision"] == pytest.approx(1 / 4)
    assert metrics["recall"] == pytest.approx(1 / 3)
    assert metrics["f1"] == pytest.approx(2 / 7)
    assert metrics["recall film"] == pytest.approx(1 / 2)
    assert metrics["f1 cast"] == 0.0
    assert metrics["accuracy"] == pytest.approx(4 / 8)


@pytest.mark.parametrize("guess", ["O", "B-film"])
def test_without_an_entity_their_measures_are_undefined_and_not_zero(guess: str) -> None:
    task = TokenClassification(TaskConfig(kind="token_classification", labels=TAGS), ModelConfig())
    targets = torch.full((2, 4), TAGS.index("O"))
    logits = 9.0 * torch.nn.functional.one_hot(torch.full((2, 4), TAGS.index(guess)), 5)
    batch = Batch(torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool), targets)
    found = task.evaluate([(logits, batch)])
    assert {name: found.metrics[name] for name in ("precision", "recall", "f1")} == dict.fromkeys(
        ("precision", "recall", "f1")
    )
    assert found.metrics["accuracy"] == float(guess == "O")
    assert found.note is not None
    assert "no entity, so precision, recall and F1 are not defined" in found.note


def test_a_kind_that_is_only_guessed_has_no_measures_of_its_own() -> None:
    task = TokenClassification(TaskConfig(kind="token_classification", labels=TAGS), ModelConfig())
    targets = torch.tensor([[TAGS.index(tag) for tag in ("B-film", "O")]])
    logits = 9.0 * torch.nn.functional.one_hot(torch.tensor([[TAGS.index(tag) for tag in ("B-film", "B-cast")]]), 5)
    batch = Batch(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool), targets)
    metrics = task.evaluate([(logits, batch)]).metrics
    assert (metrics["precision"], metrics["f1 film"], metrics["f1 cast"]) == (0.5, 1.0, None)


def test_text_is_cut_into_words_and_chinese_into_characters() -> None:
    def words(text: str) -> list[str]:
        return [text[a:b] for a, b in word_places(text)]

    assert words("Parkinson's disease, 20mg.") == ["Parkinson", "'", "s", "disease", ",", "20mg", "."]
    assert words("江泽民在 Beijing") == ["江", "泽", "民", "在", "Beijing"]
    assert words(" ") == []


def test_tags_become_entities() -> None:
    tags = ["B-a", "I-a", "I-b", "O", "I-a", "B-a", "B-a", "I-a"]
    assert entities(tags) == [("a", 0, 1), ("b", 2, 2), ("a", 4, 4), ("a", 5, 5), ("a", 6, 7)]


def test_entities_of_a_text_keep_their_places(tagger: Runtime, task_job: Callable[..., Job]) -> None:
    task_job({"kind": "token_classification", "labels": list(TAGS)})
    with torch.no_grad():  # a model that calls every word the begin of a film
        tagger.load(tagger.initial)
        head = tagger.model.trainable()["head.linear.bias"]
        head.copy_(torch.tensor([0.0, 50.0, 0.0, 0.0, 0.0]))
    short, other = predict(tagger, ["a dull plot", "what a bright and funny cast"])
    assert [entity["text"] for entity in short["entities"]] == ["a", "dull", "plot"]
    assert short["entities"][1] == {"kind": "film", "text": "dull", "start": 2, "end": 6}
    assert len(other["entities"]) == 6
    assert tagger.task.shown(short) == "[a | film] [dull | film] [plot | film]"
    (dropped,) = predict(tagger, ["a \u200bdull cafe\u0301"])  # the tokenizer makes nothing of two of these five words
    assert [entity["text"] for entity in dropped["entities"]] == ["a", "dull", "cafe"]
    with pytest.raises(DataError, match="record 1 has no word that the tokenizer knows"):
        predict(tagger, ["\u200b"])
    with pytest.raises(DataError, match="text 2 has no words"):
        predict(tagger, ["fine", " "])


# --- scores ---


def test_scores_are_clipped_to_the_declared_range(task_job: Callable[..., Job]) -> None:
    runtime = load_runtime(task_job({"kind": "regression", "target_range": [1, 5]}), CPU)
    records = [{"text": "a film", "score": score} for score in (-1000, 1, 2, "3", 5, 1e9)]
    assert [example.target for example in runtime.encode(records)] == [-1, -1, -0.5, 0, 1, 1]


def test_an_untrained_head_answers_the_middle_of_the_range(task_job: Callable[..., Job]) -> None:
    runtime = load_runtime(task_job({"kind": "regression", "target_range": [1, 5]}), CPU)
    runtime.load(runtime.initial)
    assert [one["score"] for one in predict(runtime, ["a film", "a dull plot and a worse script"])] == [3.0, 3.0]


def test_an_offset_is_a_larger_bias(task_job: Callable[..., Job]) -> None:
    plain, wide = (
        load_runtime(task_job({"kind": "regression", "target_range": [1, 5], **more}), CPU).model.head
        for more in ({}, {"head_offset": 0.25})
    )
    assert isinstance(plain, PooledClassifier)
    assert isinstance(wide, PooledClassifier)
    size = plain.linear.in_features
    pooled = nn.functional.layer_norm(torch.randn(3, size, generator=torch.Generator().manual_seed(0)), (size,))
    for head in (plain, wide):
        nn.init.constant_(head.linear.weight, 0.5)
    assert torch.allclose(wide.classify(pooled), plain.classify(pooled) + 0.25 * 0.5 * size, atol=1e-4)


def test_metrics_are_in_the_job_s_own_unit() -> None:
    task = Regression(TaskConfig(kind="regression", target_range=(0, 10)), ModelConfig())
    batch = Batch(torch.zeros(3, 1), torch.ones(3, 1, dtype=torch.bool), torch.tensor([-1.0, 0.0, 1.0]))
    found = task.evaluate([(torch.tensor([[-0.8], [0.0], [3.0]]), batch)])
    assert found.pairs == [[0, pytest.approx(1)], [5, 5], [10, 10]]  # a guess beyond the range counts as its border
    assert found.metrics["mae"] == pytest.approx(1 / 3)
    assert found.metrics["mae_of_mean"] == pytest.approx(10 / 3)
    assert found.metrics["rmse"] == pytest.approx((1 / 3) ** 0.5)
    assert found.metrics["r2"] == pytest.approx(1 - 1 / 50)


def test_scores_are_predicted_in_order(task_job: Callable[..., Job]) -> None:
    job = task_job({"kind": "regression", "target_range": [1, 5]})
    runtime = load_runtime(job, CPU)
    drawn = torch.Generator().manual_seed(1)
    runtime.load({name: 0.1 * torch.randn(tensor.shape, generator=drawn) for name, tensor in runtime.initial.items()})
    texts = ["a dull plot and a worse script", "film", "what a bright cast"]
    together, alone = predict(runtime, texts), [predict(runtime, [text])[0] for text in texts]
    for found, expected in zip(together, alone, strict=True):
        assert found["text"] == expected["text"]
        assert found["score"] == pytest.approx(expected["score"], abs=1e-4)
        assert 1 <= found["score"] <= 5
    assert runtime.task.shown(together[0]).endswith("a dull plot and a worse script")


# --- pairs ---


def test_rankings_by_hand() -> None:
    scores = torch.tensor([3.0, 2.0, 1.0, 5.0, 5.0, 9.0, 7.0])
    queries = torch.tensor([0, 0, 0, 1, 1, 2, 3])
    matches = torch.tensor([False, True, True, True, False, True, False])
    found = ranking_metrics(scores, queries, matches)
    # First text 0: matches at ranks 2 and 3. 1: tied, so the match counts as second. 2 and 3 have nothing to compare.
    assert found["queries"] == 2
    assert found["mrr"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert found["recall@1"] == 0
    assert found["recall@3"] == 1
    assert ranking_metrics(scores[:1], queries[:1], matches[:1])["mrr"] is None


def test_pairs_are_predicted_from_lines_with_a_tab(task_job: Callable[..., Job]) -> None:
    job = task_job({"kind": "pair_matching", "labels": ["other", "match"]})
    runtime = load_runtime(job, CPU)
    (found,) = predict(runtime, ["a film\ta cast"])
    assert (found["text"], found["pair"]) == ("a film", "a cast")
    assert found["label"] in ("other", "match")
    assert runtime.task.shown(found).endswith("a film | a cast")
    with pytest.raises(DataError, match="text 2 is no pair"):
        predict(runtime, ["a\tb", "a secret"])


# --- replies ---


def test_the_loss_is_on_the_response_alone(replier: Runtime) -> None:
    """Another response changes the loss through its own tokens; the prompt's tokens have none."""
    (example,) = replier.encode([{"prompt": "a dull", "response": "plot"}])
    targets, end = torch.as_tensor(example.target), replier.tokenizer.eos_token_id
    prompt = prompt_tokens("a dull", replier.tokenizer, replier.max_length)
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert bool((targets[: len(prompt)] == IGNORED).all())
    assert replier.tokenizer.decode(targets[len(prompt) : -1]) == "plot"
    assert int(targets[-1]) == end
    batch = collate([example])
    with torch.no_grad():
        loss = float(replier.task.per_example_loss(replier.model(batch), batch)[0])
        log_p = replier.model(batch)[0].log_softmax(dim=-1)
    expected = [-float(log_p[i - 1, example.input_ids[i]]) for i in range(len(prompt), example.length)]
    assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_a_long_prompt_keeps_its_end_and_leaves_room(replier: Runtime) -> None:
    (example,) = replier.encode([{"prompt": "a dull plot " * 40 + "cast", "response": "warm " * 40}])
    targets = torch.as_tensor(example.target)
    assert example.length == replier.max_length
    assert int((targets != IGNORED).sum()) == replier.max_length - replier.max_length // 2
    assert "cast\n" in replier.tokenizer.decode(example.input_ids)


def test_a_reply_is_generated_after_the_line_end(
    replier: Runtime, task_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def endless(runtime: Runtime, sequences: list[list[int]]) -> torch.Tensor:
        seen.append(sequences[0])
        return torch.nn.functional.one_hot(torch.tensor([5]), 300).float().repeat(len(sequences), 1)

    monkeypatch.setattr("shared.runtime.inference.next_logits", endless)
    generate(replier, "a dull", Decoding(max_new_tokens=2, temperature=0))
    assert seen[0] == prompt_tokens("a dull", replier.tokenizer, replier.max_length)


def test_nucleus_sampling_keeps_the_likeliest() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(400, 1)
    generator = torch.Generator().manual_seed(0)

    def drawn(top_p: float) -> set[Any]:
        return {*choose_tokens(logits, Decoding(top_p=top_p, top_k=0), generator).tolist()}

    assert drawn(0.4) == {0}
    assert drawn(0.79) == {0, 1}
    assert drawn(0.9) == {0, 1, 2}
    assert drawn(1.0) == {0, 1, 2, 3}
    with pytest.raises(ConfigError, match="top_p is 0"):
        Decoding(top_p=0)
