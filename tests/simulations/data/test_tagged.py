"""Files of tagged words: nothing of a line is lost without a word about it, and a line's number is the file's."""

from __future__ import annotations

import pytest

from shared.errors import DataError
from simulations.data.tagged import tagged_sentences


def test_sentences_end_at_blank_lines_and_between_documents() -> None:
    assert list(tagged_sentences("a\tO\nb\tB-x\n\n \n\nc\tO\n-DOCSTART- -X- O O\nd\tO")) == [
        {"tokens": ["a", "b"], "tags": ["O", "B-x"]},
        {"tokens": ["c"], "tags": ["O"]},
        {"tokens": ["d"], "tags": ["O"]},
    ]


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("New York\tB-LOC\nis\tO", "New York"),
        ("New\xa0York\tB-LOC\nis\tO", "New\xa0York"),
        ("New\xa0York B-LOC\nis O", "New\xa0York"),
        ("New York\tNNP\tB-LOC\r\nis\tVBZ\tO\r\n", "New York"),
        ("Paris  NNP B-LOC \n is VBZ O", "Paris"),
        ("a\u2028b\tB-LOC\t\nis\tO\t", "a\u2028b"),
    ],
)
def test_a_word_stays_whole(text: str, token: str) -> None:
    assert list(tagged_sentences(text)) == [{"tokens": [token, text.split("\n")[1].split()[0]], "tags": ["B-LOC", "O"]}]


@pytest.mark.parametrize(
    "text",
    [
        "is O\n\nsecret York B-LOC",
        "is\tO\n\nsecret\tNNP\tB-LOC",
        "is\tVBZ\tO\n\nsecret\tB-LOC",
        "is\tO\n\nsecret B-LOC",
        "is\tO\n\nsecret",
        "is\tO\n\n\tB-secret",
        "is\tO\n\n\xa0\tB-secret",
        "is\tVBZ\tO\n\nsecret\tNNP\t",
    ],
)
def test_a_line_unlike_the_others_is_named_and_not_shown(text: str) -> None:
    with pytest.raises(DataError, match=r"^line 3\b") as caught:
        list(tagged_sentences(text))
    assert "secret" not in str(caught.value)
