"""The production path of shared noise on canaries whose gradients are known: what the mechanism audit runs for both promises.

Every step is one round: each site's sample, clipped sum and share by `client.training.gradient`, masked and opened by the two
sides of `shared.secure_sum`. The audited site holds the canaries, the others hold nothing. With several sites the opened sum is
audited against the plan of the sum; with one its words are, against the plan of a share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from numpy.typing import NDArray

from client.training.gradient import noisy_sums
from client.training.trainer import LocalWork
from shared.models.batches import Example
from shared.privacy.accounting import noise_of_share
from shared.privacy.persons import Persons
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.privacy.shares import gradient_of
from shared.secure_sum.coordinator import SecureCoordinator
from shared.secure_sum.keys import shown_key
from shared.secure_sum.site import SecureSite
from shared.trust.certificates import spki
from simulations.audit.mechanism_release import DECLARED_RECORDS, MICRO_BATCH, canary_runtime

_SHA256 = "0" * 64


class SharesRelease:
    """A `simulations.audit.mechanism.Release` through shares of the noise.

    Attributes:
        sites: H, honest sites in the sum; 1 audits what one site adds.
    """

    def __init__(
        self,
        new_randomness: Callable[[], SiteRandomness] = SiteRandomness.from_os,
        *,
        dimension: int,
        sites: int,
    ) -> None:
        self.sites, self.new_randomness = sites, new_randomness
        self.runtime = canary_runtime(dimension, MICRO_BATCH)
        self._keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(sites)]

    def __call__(self, plan: PrivacyPlan, gradients: NDArray[np.float64]) -> NDArray[np.float64]:
        """Run the plan's rounds on units of privacy with these gradients [units, dimension]; return the noisy sums.

        Args:
            plan: of the sum of all sites' shares.
            gradients: of the audited site.
        """
        share = replace(plan, noise_multiplier=noise_of_share(plan.noise_multiplier, self.sites), honest=self.sites)
        copies = 1 if plan.records_per_person is None else plan.records_per_person + 1
        owners = np.tile(np.arange(len(gradients)), copies)
        cast(Any, self.runtime.model).records = torch.from_numpy(gradients[owners]).float()
        examples = [Example(torch.tensor([row])) for row in range(len(owners))]
        shapes = [parameter.shape for parameter in self.runtime.model.trainable().values()]
        return np.stack(
            [self._step(share, examples, owners, shapes, number) for number in range(1, plan.planned_steps + 1)]
        )

    def _step(
        self,
        share: PrivacyPlan,
        examples: list[Example],
        owners: NDArray[np.intp],
        shapes: list[torch.Size],
        number: int,
    ) -> NDArray[np.float64]:
        by_person = share.records_per_person is not None
        works = [
            LocalWork(
                examples=examples if place == 0 else [],
                declared_records=DECLARED_RECORDS,
                randomness=self.new_randomness(),
                persons=Persons(owners if place == 0 else owners[:0]) if by_person else None,
            )
            for place in range(self.sites)
        ]
        sums = noisy_sums(self.runtime, works, self.runtime.initial, plan=share, round_number=number, attempt=1)
        words = [found.words for found in sums]
        total = words[0].view(np.int64) if len(words) == 1 else self._opened(words, number)
        expected = share.expected_batch_size(DECLARED_RECORDS)
        mean = gradient_of(total, shapes, max_grad_norm=share.max_grad_norm, expected_batch_size=expected)
        found: NDArray[np.float64] = torch.cat([part.flatten() for part in mean]).double().numpy() * expected
        return found

    def _opened(self, words: list[NDArray[np.uint64]], number: int) -> NDArray[np.int64]:
        """Return the sum of the sites' words as a coordinator opens it."""
        same: dict[str, Any] = {
            "job_sha256": _SHA256,
            "round_number": number,
            "attempt": 1,
            "adapter_sha256": _SHA256,
        }
        machines = [
            SecureSite(
                site=f"site-{place}",
                declared_records=DECLARED_RECORDS,
                key=key,
                certificate=spki(key.public_key()),
                **same,
            )
            for place, key in enumerate(self._keys)
        ]
        coordinator = SecureCoordinator(num_words=len(words[0]), min_sites=self.sites, key_of=shown_key, **same)
        for machine in machines:
            coordinator.take_ready(machine.ready())
        roster = coordinator.close()
        for machine, added in zip(machines, words, strict=True):
            context = machine.accept(roster, min_sites=self.sites, key_of=shown_key)
            coordinator.take_masked(machine.masked(added, context))
        return coordinator.open()
