"""One frozen plan from which sampling, clipping, noise and accounting are all built, so that they cannot drift apart.

Formal guarantees
    * What `epsilon(steps)` accounts for is what `sample`, `new_sum` and `add_noise` execute: all read the same
      three numbers (test: tests/shared/privacy/test_plan.py; planted faults: tests/client/training/test_faults.py).
    * What of it is accounting holds without PyTorch; see `shared.privacy.planned` for its guarantees.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import PrivacyError
from shared.privacy.mechanism import ClippedSum, PlainSum, add_gaussian_noise, poisson_sample
from shared.privacy.persons import Persons
from shared.privacy.planned import PlannedPrivacy
from shared.privacy.randomness import KeyStream
from shared.privacy.shares import IntegerSum


class PrivacyPlan(PlannedPrivacy):
    """What one site will execute; its numbers are those of `PlannedPrivacy`."""

    def check_persons(self, persons: Persons | None) -> None:
        """Raise `PrivacyError` unless persons are known exactly if they are the unit: nothing else is accounted for."""
        if (self.records_per_person is None) != (persons is None):
            found = "no persons are known" if persons is None else "records come with persons"
            raise PrivacyError(f"the unit of privacy is the {self.unit}, but {found}; nothing was trained.")

    def sample(self, num_units: int, stream: KeyStream) -> NDArray[np.intp]:
        """Return the numbers of the records, or persons, that enter one step."""
        return poisson_sample(num_units, self.sample_rate, stream)

    def new_sum(self, shapes: Sequence[torch.Size]) -> ClippedSum:
        """Return the empty sum of one logical step; where noise is shared, one of whole steps of a grid."""
        if not self.private:
            return PlainSum(shapes)
        return ClippedSum(shapes, self.max_grad_norm) if self.honest is None else IntegerSum(shapes, self.max_grad_norm)

    def add_noise(self, sums: Sequence[Tensor], stream: KeyStream) -> list[Tensor]:
        """Return `sums` with the noise of one logical step.

        Raises:
            PrivacyError: if the plan's noise is a share, which is added to whole numbers that are masked afterwards.
        """
        if self.honest is not None:
            raise PrivacyError(
                "this plan's noise is one site's share of it; nothing but a sum over sites may be released."
            )
        if not self.private:
            return list(sums)
        return add_gaussian_noise(sums, self.noise_multiplier * self.max_grad_norm, stream)
