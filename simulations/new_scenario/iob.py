"""Files of tagged words, `word <tab> tag` a line and a blank line after each sentence: known by sight, copied to JSONL.

The copies wait in a folder of their own until the scenario is ready, so that a refusal leaves nothing behind and replaces
nothing.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from shared.data.datasets import write_jsonl
from shared.errors import ConfigError, DataError, RunError, SilotuneError
from simulations.data.tagged import tagged_sentences
from simulations.new_scenario.question import Question

_TAGGED = re.compile(r"[^\t ]+[\t ]+([^\t ]+[\t ]+)*(O|[BI]-\S+)")
_LINES_LOOKED_AT = 20
MOST_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Copies that wait beside the scenario.

    Attributes:
        places: where each is -> where it goes.
        folder: name of the folder that they wait in.
        remarks: what the scenario says of them.
        told: what the terminal says of them, with how many sentences there are.
    """

    places: Mapping[Path, Path] = field(default_factory=dict)
    folder: str = ""
    remarks: Sequence[str] = ()
    told: Sequence[str] = ()

    def settled(self, text: str) -> str:
        """Return a scenario's text with the copies where they go."""
        return text.replace(f"{self.folder}/", "") if self.folder else text

    def publish(self) -> None:
        """Put the copies where they go.

        Raises:
            RunError: if the disk does not take them.
        """
        for place, target in self.places.items():
            try:
                os.replace(place, target)
            except OSError as error:
                raise RunError(f"{target} cannot be written: {error.strerror}.") from None


@contextmanager
def copied_words(question: Question, *, force: bool) -> Iterator[tuple[Question, Copies]]:
    """Yield the question about JSONL copies, if its files are of tagged words and no column was named; else as it is.

    Errors name the file that was given, not its copy.

    Raises:
        ConfigError: if a copy would replace something and `force` is False.
        DataError, RunError: see `copy_as_jsonl`.
    """
    if question.columns or not looks_like_iob(question.data):
        yield question, Copies()
        return
    given = {part: path for part in ("data", "test") if (path := getattr(question, part)) is not None}
    targets = {part: question.out.with_name(f"{question.out.stem}.{part}.jsonl") for part in given}
    for target in targets.values():
        if target.exists() and not force:
            raise ConfigError(f"{target} is there already; --force replaces it, --out names another scenario.")
    try:
        waiting = tempfile.TemporaryDirectory(prefix=".silotune-new-", dir=question.out.parent)
    except OSError as error:
        raise RunError(f"nothing can be written into {question.out.parent}: {error.strerror}.") from None
    with waiting as folder:
        copies = {part: Path(folder) / target.name for part, target in targets.items()}
        try:
            counts = {part: copy_as_jsonl(path, copies[part]) for part, path in given.items()}
            columns = {"tokens": "tokens", "tags": "tags"}
            asked = dataclasses.replace(question, columns=columns, data=copies["data"], test=copies.get("test"))
            places = {copies[part]: target for part, target in targets.items()}
            yield (
                asked,
                Copies(
                    places=places,
                    folder=Path(folder).name,
                    remarks=[_said(targets[part], "all sentences", path) for part, path in given.items()],
                    told=[
                        _said(targets[part], f"all {counts[part]:,} sentences", path) for part, path in given.items()
                    ],
                ),
            )
        except SilotuneError as error:
            said = str(error)
            for part, path in given.items():
                said = said.replace(str(copies[part]), str(path))
            raise type(error)(said) from None


def _said(copy: Path, what: str, original: Path) -> str:
    return f"{copy.name}: a copy of {what} in the format that scenarios read; it is as private as {original.name}"


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
    """Write the sentences of `path` to `target`, one a line, and return how many there are; see `tagged_sentences`.

    Raises:
        DataError: if it is too large, not UTF-8, or a line is not like the others; messages name the line only.
        RunError: if the disk does not take it.
    """
    if path.stat().st_size > MOST_BYTES:
        raise DataError(f"{path} is larger than {MOST_BYTES:,} bytes; turn it into JSONL with tokens and tags.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8; save it as UTF-8.") from None
    try:
        records = list(tagged_sentences(text))
    except DataError as error:
        raise DataError(f"{path}, {error}") from None
    write_jsonl(target, records)
    return len(records)
