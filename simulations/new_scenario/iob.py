"""Files of tagged words, `word <tab> tag` a line and a blank line after each sentence: known by sight, copied to JSONL."""

from __future__ import annotations

import re
from pathlib import Path

from shared.datasets import write_jsonl
from shared.errors import DataError
from simulations.builtin_data import tagged_sentences

_TAGGED = re.compile(r"\S+[\t ]+(\S+[\t ]+)*(O|[BI]-\S+)")
_LINES_LOOKED_AT = 20
MOST_BYTES = 2**30


def looks_like_iob(path: Path) -> bool:
    """Return True if the first lines of `path` that are not blank are words with an IOB tag each."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            lines = [file.readline(10_000).strip() for _ in range(_LINES_LOOKED_AT)]
    except OSError:
        return False
    words = [line for line in lines if line and not line.startswith("-DOCSTART-")]
    return len(words) > 1 and all(_TAGGED.fullmatch(line) for line in words)


def copy_as_jsonl(path: Path, target: Path) -> int:
    """Write the sentences of `path` to `target`, one a line, and return how many there are.

    The first column is the word, the last one the tag; columns between them are left out.

    Raises:
        DataError: if it is too large, not UTF-8, or a line has no tag; messages name the line only.
        RunError: if the disk does not take it.
    """
    if path.stat().st_size > MOST_BYTES:
        raise DataError(f"{path} is larger than {MOST_BYTES:,} bytes; turn it into JSONL with tokens and tags.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8; save it as UTF-8.") from None
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        cells = line.split()
        if cells and cells[0] == "-DOCSTART-":
            cells = []
        if len(cells) == 1:
            raise DataError(f"{path}, line {number}: a word without a tag, or a tag without a word.")
        lines.append(f"{cells[0]}\t{cells[-1]}" if cells else "")
    records = list(tagged_sentences("\n".join(lines)))
    write_jsonl(target, records)
    return len(records)
