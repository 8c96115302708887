"""Real sites and a real coordinator for one attempt, their certified keys in a dict as in a simulation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from numpy.typing import NDArray

from shared.errors import TrustError
from shared.secure_sum.coordinator import SecureCoordinator
from shared.secure_sum.messages import Masked, Ready, Roster
from shared.secure_sum.site import SecureSite

JOB, ADAPTER = "0" * 64, "1" * 64
SAME: dict[str, Any] = {"job_sha256": JOB, "round_number": 3, "attempt": 1, "adapter_sha256": ADAPTER}
RNG = np.random.default_rng(16)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def site(name: str, key: ec.EllipticCurvePrivateKey, **changes: Any) -> SecureSite:
    """Return a site in the attempt."""
    return SecureSite(**{**SAME, "site": name, "declared_records": 64, "key": key, "certificate": b"", **changes})


def words(count: int) -> NDArray[np.uint64]:
    """Return an input, any words."""
    return RNG.integers(0, 2**64, count, dtype=np.uint64)


@dataclass
class Attempt:
    """Some sites by name; the coordinator, if one is wanted, is honest."""

    names: tuple[str, ...]
    num_words: int = 5
    min_sites: int = 2
    keys: dict[str, ec.EllipticCurvePrivateKey] = field(default_factory=dict)
    sites: dict[str, SecureSite] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.names:
            self.keys[name] = new_key()
            self.sites[name] = site(name, self.keys[name])

    def key_of(self, entry: Ready) -> ec.EllipticCurvePublicKey:
        if entry.site not in self.keys:
            raise TrustError(f"{entry.site} is not admitted.")
        return self.keys[entry.site].public_key()

    def coordinator(self, **changes: Any) -> SecureCoordinator:
        return SecureCoordinator(
            **{**SAME, "num_words": self.num_words, "min_sites": self.min_sites, "key_of": self.key_of, **changes}
        )

    def roster(self, names: Iterable[str] | None = None) -> Roster:
        return tuple(self.sites[name].ready() for name in sorted(self.names if names is None else names))

    def accept(self, name: str, roster: Roster) -> bytes:
        return self.sites[name].accept(roster, min_sites=self.min_sites, key_of=self.key_of)

    def masked(self, inputs: Mapping[str, NDArray[np.uint64]]) -> dict[str, Masked]:
        """Return every site's masked input under the full roster."""
        roster = self.roster()
        return {name: self.sites[name].masked(inputs[name], self.accept(name, roster)) for name in self.names}

    def inputs(self) -> dict[str, NDArray[np.uint64]]:
        return {name: words(self.num_words) for name in self.names}


def attempt(count: int, **settings: Any) -> Attempt:
    """Return an attempt of `count` sites."""
    return Attempt(tuple(f"site-{index:03}" for index in range(count)), **settings)


def plain_sum(inputs: Iterable[NDArray[np.uint64]]) -> NDArray[np.int64]:
    """Return what the sum must be, by numbers of any size."""
    rows = [[int(value) for value in row] for row in inputs]
    total = [sum(column) % 2**64 for column in zip(*rows, strict=True)]
    return np.array([value - 2**64 if value >= 2**63 else value for value in total], np.int64)


Change = Callable[[Roster], Roster]
