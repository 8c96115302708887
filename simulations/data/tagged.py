"""Words with a tag each, `word <tab> tag` a line and a blank line after each sentence: CoNLL files and their relatives."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from shared.errors import DataError

_BETWEEN_DOCUMENTS = "-DOCSTART-"


def tagged_sentences(text: str) -> Iterator[dict[str, Any]]:
    """Yield the sentences of lines whose first column is the word and whose last one is the tag.

    Columns lie between tabs if there is a tab anywhere, so that a word may hold spaces, else between spaces. Each line has as
    many: where one has not, part of a word would be taken for a column and lost.

    Raises:
        DataError: naming the line that is otherwise.
    """
    separator = re.compile("\t" if "\t" in text else " +")
    width, first = 0, 0
    tokens: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        cells = [cell.strip(" ") for cell in separator.split(line.strip(" ").rstrip("\t \r"))]
        if line.strip() and not line.lstrip().startswith(_BETWEEN_DOCUMENTS):
            width, first = width or len(cells), first or number
            if len(cells) < 2 or not cells[0].strip() or not cells[-1].strip():
                raise DataError(f"line {number}: a word without a tag, or a tag without a word.")
            if len(cells) != width:
                raise DataError(
                    f"line {number} has {len(cells)} columns, line {first} has {width}; expected a word, a tag and what is "
                    "between them in as many columns on every line, with tabs between where a word holds a space."
                )
            tokens.append(cells[0])
            tags.append(cells[-1])
        elif tokens:
            yield {"tokens": tokens, "tags": tags}
            tokens, tags = [], []
