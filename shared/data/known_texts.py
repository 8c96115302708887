"""Whether a stream of texts is what a run was trained on or judged by: then its shares tell nothing of new texts.

Texts count as equal as in `shared.data.overlap`. The training texts are there only where a simulation left its sites' homes; of
the public evaluation records the run keeps one sum of hashes, of which no text can be read back. Memory does not grow with the
stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.data.overlap import content_key
from shared.errors import RunError
from shared.files.json_files import parse_object, read_object

SHARE = 0.5
"""Share of the texts from which on they count as the training data: short texts are equal by chance."""


class ContentSum:
    """How many texts there were, and the sum of their hashes: the same for the same texts in any order."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.count, self._sum = 0, 0
        for text in texts:
            self.add(_digest(text))

    def add(self, digest: bytes) -> None:
        """Count one more text, by its hash."""
        self.count += 1
        self._sum = (self._sum + int.from_bytes(digest, "big")) % 2**256

    def as_dict(self) -> dict[str, Any]:
        """Return what `run.json` keeps of the public evaluation records."""
        return {"records": self.count, "sum_of_sha256": f"{self._sum:064x}"}


class KnownTexts:
    """Compares a stream with the texts of a run, as it passes.

    Attributes:
        trained: how many texts so far are among those that it was trained on.
    """

    def __init__(self, run: Path) -> None:
        self._evaluation = _evaluation_of(run)
        self._training = {_short(_digest(text)) for text in _training_of(run)}
        self._all, self.trained = ContentSum(), 0

    @property
    def has_training(self) -> bool:
        """True if there are training texts to compare with."""
        return bool(self._training)

    @property
    def are_evaluation(self) -> bool:
        """True if all texts so far together are the run's public evaluation records."""
        return self._evaluation is not None and self._all.as_dict() == self._evaluation

    def add(self, texts: Iterable[str]) -> None:
        """Take the next texts of the stream."""
        for text in texts:
            digest = _digest(text)
            self._all.add(digest)
            self.trained += _short(digest) in self._training

    def warnings(self) -> list[str]:
        """Return what whoever reads the shares must know."""
        found = []
        if self._all.count and self.trained >= SHARE * self._all.count:
            found.append(
                f"{self.trained:,} of {self._all.count:,} texts are among those that this run was trained on. A model is surer, "
                "and more often right, on these than on new texts: give texts that came later."
            )
        if self.are_evaluation:
            found.append(
                "these texts are the public evaluation records of this run, by which its figures were measured and its "
                "temperature and thresholds may have been fitted: adjusted shares are right on them by construction. Give other "
                "texts."
            )
        return found


def _evaluation_of(run: Path) -> dict[str, Any] | None:
    try:
        found = read_object(run / "run.json").get("evaluation_texts")
    except RunError:
        return None  # a model can be used without it
    return found if isinstance(found, dict) else None


def _training_of(run: Path) -> Iterator[str]:
    """Yield the texts that simulated sites hold, as far as they can be read."""
    for path in sorted(run.glob("sites/*/home/data.jsonl")):
        try:
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    if text := _text_of(parse_object(line)):
                        yield text
        except (OSError, ValueError):
            continue


def _text_of(record: Mapping[str, Any]) -> str:
    """Return a record's text as users give one: both texts of a pair or a reply with a tab between them, words with spaces."""
    texts = [record[role] for role in ("text", "pair", "prompt", "response") if isinstance(record.get(role), str)]
    words = record.get("tokens")
    return "\t".join(texts) or (" ".join(map(str, words)) if isinstance(words, list) else "")


def _digest(text: str) -> bytes:
    return hashlib.sha256(content_key({"text": text}).encode("utf-8", errors="surrogatepass")).digest()


def _short(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")
