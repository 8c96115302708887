"""Persons as the unit of privacy: whose record is which, and one clipped vector for all records of a person.

Formal guarantees (relation: add or remove one person with all their records; tests: tests/shared/privacy/test_persons.py, planted
faults: tests/client/training/test_person_faults.py)
    * However many records a person has and however a step is cut into micro-batches, the sum behind `PersonSum` changes by
      at most `max_grad_norm` in L2 norm, over all parameters together, when the person is added or removed
      (test_removing_one_person_moves_the_sum_by_at_most_the_bound). A person's mean is the same to the last bit in every cut:
      its sum is taken on a grid (test_a_person_counts_the_same_to_the_last_bit_in_any_company).
    * Which records of a person enter a step depends on that person's records and the site's own randomness only
      (test_a_choice_is_uniform_and_independent_of_others). A step is then a mixture over such choices, and by joint
      convexity of the hockey-stick divergence no worse than its worst choice: the accountant's Poisson-subsampled Gaussian.

A person is what the id column calls one: two spellings of an id are two persons, each with the whole guarantee, so that who
stands under both has less. Only spaces around an id and the Unicode form of its letters are evened out; " 12" and the numbers
12 and 12.0 are one person, while "012" and "a12" are not "12" and "A12". Several persons under one id are protected together.

Source: user-level DP-SGD by clipping each user's mean gradient (Charles et al. 2024, arXiv:2407.07737, "ULS"; McMahan et al.
2018, arXiv:1710.06963, for sampling users).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import DataError, PrivacyError
from shared.privacy.mechanism import ClippedSum, norms_of_rows, vectors_of
from shared.privacy.randomness import KeyStream

LONGEST_RECORD = 1000.0
"""A record's gradient is shortened to this many times C before a person's mean is taken. Otherwise the rounding of huge
gradients that cancel, which depends on how a step was cut into micro-batches, could outgrow the margin of the clipping."""


@dataclass(frozen=True, eq=False)
class Persons:
    """Whose record each one is; the ids themselves are forgotten.

    Attributes:
        owners: number of the person of each record, 0 to `count` - 1, each at least once; shape [records].
    """

    owners: NDArray[np.intp]

    @classmethod
    def from_ids(cls, ids: Sequence[object]) -> Persons:
        """Number the persons by the ids of their records, text or whole numbers.

        Raises:
            DataError: with the number of records whose id is empty or of another kind; never with an id.
        """
        numbers: dict[str, int] = {}
        return cls(np.array([numbers.setdefault(key, len(numbers)) for key in cls.keys(ids)], dtype=np.intp))

    @staticmethod
    def keys(ids: Sequence[object]) -> list[str]:
        """Return one text for each person, whatever the spelling; raises as `from_ids`."""
        texts = [_text_of(value) for value in ids]
        if bad := sum(not text for text in texts):
            raise DataError(
                f"{bad:,} of {len(texts):,} records have no usable person id. Expected text or a whole number in every record; "
                "fill the id column or remove these records."
            )
        return [text for text in texts if text is not None]

    @cached_property
    def rows(self) -> list[NDArray[np.intp]]:
        """Records of every person, increasing."""
        if not len(self.owners):
            return []
        order = np.argsort(self.owners, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self.owners))[:-1])

    @property
    def count(self) -> int:
        """Number of persons."""
        return len(self.rows)

    @property
    def most_records(self) -> int:
        """Largest number of records that one person has."""
        return max(map(len, self.rows), default=0)

    def with_strangers(self, number: int) -> Persons:
        """Return these persons and `number` new ones, whose one record each comes after all others."""
        return Persons(np.concatenate([self.owners, self.count + np.arange(number)]))

    def choose(self, drawn: Iterable[int], most: int, stream: KeyStream) -> list[list[int]]:
        """Return the records with which every drawn person enters a step: a uniformly random `most` of them, or all.

        Args:
            drawn: numbers of the persons in this step.
            most: G, records of one person, >= 1.
            stream: private randomness of this step; each person takes bits of their own from it.
        """
        chosen = []
        for person in drawn:
            rows = self.rows[person]
            if len(rows) > most:
                rows = rows[np.argsort(stream.uint64(len(rows)), kind="stable")[:most]]
            chosen.append(rows.tolist())
        return chosen


class PersonSum:
    """Mean gradient of every person's records, given to a `ClippedSum` as one example once all of them are there.

    Records may come in any order and in any micro-batches; a record's gradient counts with at most `LONGEST_RECORD` C.
    Whoever's records are not all there yet is kept, one vector each: with `shared.models.batches.micro_batches_of_groups` that
    is at most one person between two micro-batches.
    """

    def __init__(self, total: ClippedSum, groups: Sequence[Sequence[int]]) -> None:
        """Start a logical step.

        Args:
            total: clips and adds what is complete.
            groups: the records of each person in this step; no record twice.
        """
        self._total = total
        self._sizes = [len(rows) for rows in groups]
        self._missing = list(self._sizes)
        self._owner = {row: person for person, rows in enumerate(groups) for row in rows}
        self._open: dict[int, Tensor] = {}
        if len(self._owner) != sum(self._sizes):
            raise PrivacyError("a record stands in a step twice; one person's influence would not be bounded.")

    def add(self, gradients: Sequence[Tensor], rows: Sequence[int]) -> None:
        """Take a micro-batch; a record whose gradient is not finite counts as zero.

        Args:
            gradients: one tensor [batch, *shape] per parameter.
            rows: the record of each of the `batch` gradients.

        Raises:
            PrivacyError: if a record is not of this step or came before, or rows and gradients do not match.
        """
        if any(len(gradient) != len(rows) for gradient in gradients):
            raise PrivacyError(
                f"{len(rows)} records came with {len(gradients[0])} gradients; they cannot be told apart."
            )
        owners = [self._owner.pop(row, None) for row in rows]
        vectors = vectors_of(gradients)
        norms = norms_of_rows(vectors)
        finite = norms.isfinite()
        if not bool(finite.all()):
            # 0 * NaN is NaN: such a record is removed before the product, not by it.
            vectors = torch.where(finite[:, None].to(vectors.device), vectors, 0.0)
            self._total.num_non_finite += int((~finite).sum())
        longest = LONGEST_RECORD * self._total.max_grad_norm
        weights = torch.where(finite, longest / norms.clamp(min=longest), 0.0)
        vectors = self._total.on_grid(vectors.mul_(weights.to(vectors.device)[:, None]))
        present = list(dict.fromkeys(owners))
        places = {owner: place for place, owner in enumerate(present)}
        whose = torch.zeros(len(present), len(rows), dtype=torch.float64)
        for column, owner in enumerate(owners):
            if owner is None:
                raise PrivacyError("a record came twice or does not belong to this step; it would not be clipped.")
            whose[places[owner], column] = 1.0
            self._missing[owner] -= 1
        shapes = [gradient.shape[1:] for gradient in gradients]
        self._pass_on([owner for owner in present if owner is not None], whose.to(vectors) @ vectors, shapes)

    def _pass_on(self, present: list[int], sums: Tensor, shapes: list[torch.Size]) -> None:
        done = []
        for place, person in enumerate(present):
            earlier = self._open.pop(person, None)
            if earlier is not None:
                sums[place] += earlier
            if self._missing[person]:
                self._open[person] = sums[place].clone()
            else:
                done.append(place)
        if done:
            sizes = torch.tensor([self._sizes[present[place]] for place in done]).to(sums)
            means = torch.split(sums[done] / sizes[:, None], [shape.numel() for shape in shapes], dim=1)
            self._total.add([mean.view(len(done), *shape) for mean, shape in zip(means, shapes, strict=True)])

    def close(self) -> None:
        """End the step.

        Raises:
            PrivacyError: if records of a person have not come.
        """
        if self._owner:
            raise PrivacyError(f"{len(self._owner)} records of this step never came to the sum.")


def _text_of(value: object) -> str | None:
    """Return an id as text, or None if it cannot be one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    return unicodedata.normalize("NFC", str(value).strip())
