"""The public data sets by name: complete, of the recorded content, and split so that evaluation tells nothing of training."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.errors import DataError
from shared.tasks.token_classification import entities
from simulations.data import builtin_data
from simulations.data.builtin_data import BUILTIN, BuiltinData, data_folders
from simulations.data.commands import LICENCES


@functools.cache
def load(name: str) -> BuiltinData:
    """Return a data set, read once; no test may change it."""
    try:
        return BUILTIN[name].load()
    except DataError as error:
        if any(reason in str(error) for reason in ("pip could not fetch", "pip needed", "is in none of")):
            pytest.skip(f"the data set cannot be had here: {error}")
        raise


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    yield
    load.cache_clear()


def test_banking77() -> None:
    data = load("banking77")
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (10_003, 3_080)
    assert len({record["label"] for record in data.train}) == 77
    assert {record["label"] for record in data.test} == {record["label"] for record in data.train}


def test_bc5cdr() -> None:
    data = load("bc5cdr")
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (4_560, 4_797)
    tags = {tag for record in data.train for tag in record["tags"]}
    assert tags == {"O", "B-Chemical", "I-Chemical", "B-Disease", "I-Disease"}
    assert all(len(record["tokens"]) == len(record["tags"]) for record in (*data.train, *data.test))


def test_chinese_reviews() -> None:
    data = load("chinese-reviews")
    labels = [record["label"] for record in data.train]
    assert labels.count("positive") == labels.count("negative") == builtin_data.NUM_CHINESE_REVIEWS // 2
    assert sum(any("\u4e00" <= c <= "\u9fff" for c in record["text"]) for record in data.train) > 11_900 / 12_000 * len(
        labels
    )


def test_people_daily_has_a_tag_on_every_character() -> None:
    data = load("people-daily")
    assert data.test is not None
    assert len(data.train) + len(data.test) == builtin_data.NUM_PEOPLE_DAILY
    assert {tag for r in data.train for tag in r["tags"]} == {
        "O", *(f"{mark}-{kind}" for mark in "BI" for kind in ("person", "place", "organisation"))
    }  # fmt: skip
    for record in (*data.train, *data.test):
        assert len(record["tokens"]) == len(record["tags"]) <= 80
        assert all(len(token) == 1 for token in record["tokens"])
        inside = [i for i, tag in enumerate(record["tags"]) if tag.startswith("I-")]
        assert all(record["tags"][i - 1][2:] == record["tags"][i][2:] for i in inside)
    assert not {"".join(r["tokens"]) for r in data.train} & {"".join(r["tokens"]) for r in data.test}


def test_a_name_of_two_words_is_one_person() -> None:
    line = "国家/n  主席/n  江/nr  泽民/nr  、/w  李/nr  鹏/nr  在/p  北京/ns  。/w"
    ((tokens, tags),) = builtin_data._character_sentences(line)
    assert [(kind, "".join(tokens[a : b + 1])) for kind, a, b in entities(tags)] == [
        ("person", "江泽民"),
        ("person", "李鹏"),
        ("place", "北京"),
    ]


def test_question_answers_have_one_match_or_more_and_nine_others() -> None:
    data = load("question-answers")
    assert data.test is not None
    for part in (data.train, data.test):
        by_question: dict[str, list[str]] = {}
        for record in part:
            by_question.setdefault(record["text"], []).append(record["label"])
        assert len(by_question) > 100
        assert all("match" in labels for labels in by_question.values())
        assert all(labels.count("other") >= builtin_data.OTHERS_PER_QUESTION - 1 for labels in by_question.values())
    assert not {r["text"].casefold() for r in data.train} & {r["text"].casefold() for r in data.test}
    pairs = [(record["text"], record["pair"]) for record in (*data.train, *data.test)]
    assert len(set(pairs)) == len(pairs)
    assert BUILTIN["question-answers"].load() == data


def test_replies_are_split_by_question() -> None:
    data = load("replies")
    assert data.test is not None
    assert len(data.train) > 4 * len(data.test) * 0.7
    assert not {r["prompt"].casefold() for r in data.train} & {r["prompt"].casefold() for r in data.test}


def test_digits_are_split_by_their_pixels_and_the_recorded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    data = BUILTIN["digits"].load()
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (1_442, 355)
    for part in (data.train, data.test):
        assert {record["label"] for record in part} == set("0123456789")
        assert all(len(record["pixels"]) == 64 and 0 <= min(record["pixels"]) <= 16 for record in part)
    images = [tuple(record["pixels"]) for record in (*data.train, *data.test)]
    assert len(set(images)) == len(images)
    assert max(map(max, images)) == 16
    monkeypatch.setattr(builtin_data, "DIGITS_SHA256", "0" * 64)
    with pytest.raises(DataError, match=r"expected 0000.*not read"):
        BUILTIN["digits"].load()


def test_movie_ratings() -> None:
    data = load("movie-ratings")
    assert len(data.train) == 10_605
    assert all(-4 <= record["score"] <= 4 for record in data.train)


def test_a_file_that_is_missing_or_another_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SILOTUNE_DATA", str(tmp_path))
    monkeypatch.setattr(builtin_data, "data_folders", lambda: [tmp_path])
    with pytest.raises(DataError, match=r"is in none of .*`silotune data fetch bc5cdr`.*CC-BY-4\.0.*put it, unchanged"):
        BUILTIN["bc5cdr"].load()
    (tmp_path / "bc5cdr_train.tsv").write_bytes(b"another")
    with pytest.raises(DataError, match=r"expected b731361c.*was not read"):
        BUILTIN["bc5cdr"].load()
    assert data_folders({"SILOTUNE_DATA": "/a", "SILOTUNE_CACHE": "/b"})[0] == Path("/a")
    assert data_folders({"SILOTUNE_CACHE": "/b"})[0] == Path("/b/data")


def test_the_table_tells_the_truth() -> None:
    for name, described in BUILTIN.items():
        data = load(name)
        assert described.num_records == len(data.train) + len(data.test or ()), name
        assert described.licence in LICENCES
