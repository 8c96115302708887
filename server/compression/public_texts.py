"""The public texts that a student learns from: read, made into examples, and compared with what must not be among them.

Formal guarantees (tests: tests/server/compression/test_public_texts.py)
    * Training texts of a simulation whose folder is still there are refused: what learns from them is private, and no statement
      covers it. So are its public evaluation records: figures on them would be worth nothing.
    * Which texts are used depends on the file alone, never on records of a site.
    * Held-out texts are no copies of those that are learned from, but for case and spaces.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.data.known_texts import KnownTexts
from shared.data.overlap import content_key
from shared.data.text_stream import TextFormat, file_texts, left_out
from shared.errors import DataError
from shared.models.batches import Example
from shared.runtime.export.parts import Parts
from shared.tasks import Record, task_of
from shared.tasks.predicting import Predicting
from shared.trust.signed_file import sha256_and_size

LEAST_TEXTS = 100
_MOST_KNOWN = 0.05  # short texts are equal by chance
_HELD_OUT, _MOST_HELD_OUT = 0.1, 500
WHAT = (
    "a few thousand public texts of the kind that the model will read, without labels, none of them a record of a site"
)


@dataclass(frozen=True, kw_only=True)
class PublicTexts:
    """Texts to learn from, and others to see what was learned.

    Attributes:
        sha256: of the file.
        remarks: what whoever reads the result should know.
    """

    training: Sequence[Example]
    held_out: Sequence[Example]
    sha256: str
    remarks: tuple[str, ...]

    @property
    def number(self) -> int:
        """How many different texts there are."""
        return len(self.training) + len(self.held_out)


def read_public_texts(path: Path, how: TextFormat, parts: Parts, run: Path, *, seed: int) -> PublicTexts:
    """Return the texts of a file as the model reads them.

    Args:
        how: its texts stand there; of pairs and replies both texts with a tab between them.
        run: the folder that the model comes from.
        seed: of the choice of those that are held out.

    Raises:
        DataError: if they cannot be read, are too few, or are training or evaluation records of the run.
    """
    given = file_texts(path, how)
    sha256 = sha256_and_size(path)[0]
    remarks = [*left_out(given.left_out), *_compared(given.texts, path, run)]
    different = {content_key({"text": text}): (text, row) for text, row in zip(given.texts, given.rows, strict=True)}
    examples, refused = list[Example](), list[DataError]()
    for text, row in different.values():
        try:
            examples += _examples(text, f"row {row} of {path.name}", parts)
        except DataError as error:  # such as an empty one of a pair
            refused.append(error)
    if refused:
        remarks.append(f"left out: {len(refused):,} texts that the model cannot read; the first: {refused[0]}")
    if len(examples) < LEAST_TEXTS:
        reason = f"; {refused[0]}" if refused else ""
        raise DataError(
            f"{path} has {len(examples):,} different texts that the model can read, expected at least {LEAST_TEXTS}{reason}. "
            f"Give {WHAT}."
        )
    random.Random(seed).shuffle(examples)
    count = min(_MOST_HELD_OUT, int(_HELD_OUT * len(examples)))
    return PublicTexts(training=examples[count:], held_out=examples[:count], sha256=sha256, remarks=tuple(remarks))


def _examples(text: str, name: str, parts: Parts) -> list[Example]:
    task, length = task_of(parts.job), parts.job.model.max_length
    record: Record
    if isinstance(task, Predicting):
        record = task.question(text, name, parts.tokenizer, length)
    elif "prompt" in task.roles:
        prompt, tab, response = text.partition("\t")
        if not tab:
            raise DataError(f"{name} is no prompt with a response; give both with a tab between them.")
        record = {"prompt": prompt, "response": response}
    else:
        record = {"text": text}
    return task.encode([record], parts.tokenizer, length)


def _compared(texts: Sequence[str], path: Path, run: Path) -> list[str]:
    """Compare the texts with those of the run, as far as these are there; return what is to be said of it."""
    known = KnownTexts(run)
    known.add(texts)
    if known.trained > _MOST_KNOWN * len(texts):
        raise DataError(
            f"{known.trained:,} of the {len(texts):,} texts in {path} are records that a site of this run trained on. A model "
            f"that learns from them anew is covered by no privacy statement; give {WHAT}."
        )
    if known.are_evaluation:
        raise DataError(
            f"{path} holds the public evaluation records of this run: figures of a model that learned from them would say "
            f"nothing. Give {WHAT}."
        )
    if not known.has_training:
        return ["sites' records are not here to compare with: that the texts are none of them is your word"]
    return [f"{known.trained:,} of the texts read like a record of a site, by chance or not"] if known.trained else []
