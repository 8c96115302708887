"""What a model's description says of how it was made smaller: `ModelRecord.notes["compression"]`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from shared.errors import ModelError
from shared.files.json_files import Count, Finite, Share
from shared.runtime.export.folder import ModelRecord, Sha256

_TOPIC = "compression"


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How alike two models answer, on texts that neither was trained on.

    Attributes:
        divergence: mean Kullback-Leibler divergence of the answers, in nats; of scores the mean squared difference on the
            head's scale of -1 to 1.
        same_answers: share of equal answers (of texts, words or next tokens); None of scores.
    """

    divergence: Finite
    same_answers: Share | None

    def __str__(self) -> str:
        if self.same_answers is None:
            return f"mean squared difference {self.divergence:.4f}"
        return f"{100 * self.same_answers:.1f} % the same answers, divergence {self.divergence:.4f}"


@dataclass(frozen=True, kw_only=True)
class Compression:
    """How a model was made out of a larger one, its teacher.

    Attributes:
        teacher_sha256: of the teacher's weights or adapter.
        layers_kept, layers_before: numbers of the teacher's layers, from 0, and how many it has.
        intermediate, intermediate_before: width of the feed-forward parts.
        public_texts, public_texts_held_out, public_texts_sha256: how many different ones, how many of them were held out, and
            the hash of their file.
        steps: of training.
        recipe: how it was trained.
        agreement_before, agreement: with the teacher on the held-out texts, once cut and after training.
        earlier: how the teacher was made, if it was compressed itself.
    """

    teacher_sha256: Sha256
    layers_kept: tuple[Count, ...]
    layers_before: Count
    intermediate: Count
    intermediate_before: Count
    public_texts: Count
    public_texts_held_out: Count
    public_texts_sha256: Sha256
    steps: Count
    recipe: dict[str, Any]
    agreement_before: Agreement
    agreement: Agreement
    earlier: dict[str, Any] | None = None


def compression_of(record: ModelRecord) -> Compression | None:
    """Return how a model was compressed; None if it was not.

    Raises:
        ModelError: if that cannot be read.
    """
    if _TOPIC not in record.notes:
        return None
    try:
        return TypeAdapter(Compression).validate_python(record.notes[_TOPIC])
    except ValidationError as error:
        raise ModelError(
            f"model.json says in its notes what no compression is ({error.error_count()} faults, first in "
            f"{'.'.join(map(str, error.errors()[0]['loc']))}); make the model anew."
        ) from None


def noted(record: ModelRecord, compression: Compression) -> dict[str, Any]:
    """Return the notes of `record` with what is said of its compression."""
    return {**record.notes, _TOPIC: asdict(compression)}
