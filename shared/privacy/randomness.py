"""Randomness of one site: sampling masks and noise, from a cryptographic generator.

Formal guarantees
    * In production the key comes from the operating system and never leaves the process; no seed of a job
      reaches it (test: tests/shared/privacy/test_randomness.py::test_job_seed_does_not_reach_noise).
    * Every (purpose, round, step) has its own ChaCha20 stream under a key derived by HMAC-SHA256, so no two
      releases share noise (test: tests/shared/privacy/test_randomness.py::test_streams_are_independent).
    * A source gives each of its streams once. Whoever asks again is refused, so that the bits of a coin, of noise or of the
      salt on the wire never serve twice (test: tests/shared/privacy/test_randomness.py::test_a_stream_is_given_once).
    * A source with an injected key says so (`origin == "injected"`); everything it produced is marked and no
      epsilon is printed for it (test: tests/shared/privacy/test_statement.py::test_injected_randomness_prints_no_epsilon).

Normal variates are drawn in float64 by the Box-Muller transform from 53-bit uniforms and rounded to float32 only
after they were added to the clipped sum, which removes the low-order bits that attacks on floating-point noise
read (Mironov 2012); the statement lists what may be left as a limit. Shares of the noise of a sum over sites are whole numbers
of an exact law instead (`shared.privacy.discrete_gaussian`).
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from shared.errors import PrivacyError

Origin = Literal["os", "injected"]


class KeyStream:
    """Uniform and normal variates from one ChaCha20 stream (RFC 8439 block function, 32-byte key)."""

    def __init__(self, key: bytes) -> None:
        # A key is used for one stream only, so a constant nonce is safe.
        self._encryptor = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

    def uint64(self, count: int) -> NDArray[np.uint64]:
        """Return `count` independent uniform 64-bit integers, shape [count]."""
        return np.frombuffer(self._encryptor.update(bytes(8 * count)), dtype="<u8")

    def bernoulli(self, count: int, probability: float) -> NDArray[np.bool_]:
        """Return `count` independent draws that are True with `probability` (rounded down to 2**-64), shape [count]."""
        if probability >= 1:
            return np.ones(count, dtype=np.bool_)
        return self.uint64(count) < np.uint64(int(probability * 2.0**64))

    def normal(self, count: int) -> NDArray[np.float64]:
        """Return `count` independent standard normal variates in float64, shape [count] (Box and Muller 1958)."""
        half = (count + 1) // 2
        bits = self.uint64(2 * half) >> np.uint64(11)
        radius = np.sqrt(-2.0 * np.log((bits[:half] + np.uint64(1)) * 2.0**-53))  # u in (0, 1]: the log is finite
        angle = (2.0 * np.pi * 2.0**-53) * bits[half:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


class SiteRandomness:
    """Root of all private randomness of one site during one round.

    Attributes:
        origin: "os" if the key came from the operating system, "injected" if a test supplied it.
    """

    def __init__(self, key: bytes, origin: Origin) -> None:
        if len(key) != 32:
            raise ValueError(f"a randomness key has 32 bytes, not {len(key)}")
        self._key = key
        self._given: set[bytes] = set()
        self.origin: Origin = origin

    @classmethod
    def from_os(cls) -> SiteRandomness:
        """Return a source under a fresh key from the operating system; call it once per round."""
        return cls(os.urandom(32), "os")

    @classmethod
    def injected(cls, seed: str) -> SiteRandomness:
        """Return a reproducible source for tests; whatever it touches is marked as not private."""
        return cls(hashlib.sha256(seed.encode()).digest(), "injected")

    def stream(
        self, purpose: Literal["sampling", "records", "noise", "salt"], *, round_number: int, step: int
    ) -> KeyStream:
        """Return the stream of one purpose in one step; streams of different arguments are independent.

        Raises:
            PrivacyError: if it was given before: equal bits in two places would tell the one from the other.
        """
        label = f"silotune/{purpose}/{round_number}/{step}".encode()
        if label in self._given:
            raise PrivacyError(
                f"the random stream {label.decode()!r} was used before; a second use would not be private."
            )
        self._given.add(label)
        return KeyStream(hmac.digest(self._key, label, "sha256"))
