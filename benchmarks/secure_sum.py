"""A round of secure aggregation, all sites and the coordinator in one process, beside the plain sum of the same inputs.

Whole rounds over bytes: every site makes its keys and says ready, reads the roster and checks every signature, agrees with every
other site, masks and signs; the coordinator reads, checks and adds. Certified keys come from a dict, as in a simulation: chains
of certificates are not in it. Sites work in two threads; signatures, streams and sums do so at once, X25519 and HKDF in turns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from numpy.typing import NDArray

from benchmarks.harness import Findings, PeakMemory, Tell, in_own_process
from shared.secure_sum.coordinator import SecureCoordinator
from shared.secure_sum.messages import Masked, Ready, pack_roster, unpack_roster
from shared.secure_sum.site import SecureSite

SITES = (3, 8, 20, 100)
WORDS = (7_000, 37_000, 300_000)
"""Adapter and head: of the demo in its last layer, of a larger task, of all layers."""
HEADLINE = (100, 37_000)
_SAME: dict[str, Any] = {"job_sha256": "0" * 64, "round_number": 1, "attempt": 1, "adapter_sha256": "1" * 64}


def run(tell: Tell, *, runs: int = 5, sites: tuple[int, ...] = SITES, words: tuple[int, ...] = WORDS) -> Findings:
    """Measure every number of sites with every number of words `runs` times, each case in a process of its own."""
    findings = Findings()
    for num_sites in sites:
        for num_words in words:
            tell(f"{num_sites} sites, {num_words:,} words")
            found = in_own_process(measure, num_sites=num_sites, num_words=num_words, runs=runs)
            findings.details[f"{num_sites} sites, {num_words:,} words"] = found
            if (num_sites, num_words) == HEADLINE:
                findings.headlines["secure_sum_100_seconds"] = found["two threads, seconds"]
    return findings


def measure(num_sites: int, num_words: int, runs: int) -> dict[str, Any]:
    """Return seconds of rounds and their steps, bytes, and memory of the coordinator."""
    federation = Federation(num_sites, num_words)
    found: dict[str, list[float]] = {}

    def note(key: str, value: float) -> None:
        found.setdefault(key, []).append(value)

    for _ in range(runs):
        for threads, name in ((2, "two threads"), (1, "one thread")):
            processor = time.process_time()
            steps = federation.round(threads)
            note(f"{name}, seconds", sum(steps.values()))
            # What a machine that is shared takes away shows in the difference.
            note(f"{name}, seconds of processor time", time.process_time() - processor)
            if threads == 1:
                for step, value in steps.items():
                    note(f"{name}, seconds of: {step}", value)
        started = time.perf_counter()
        federation.plain_sum()
        note("plain sum, seconds", time.perf_counter() - started)
        note("peak MB of the coordinator", federation.coordinator_megabytes())
    return {
        **found,
        "bytes up, a site": federation.bytes_up,
        "bytes down, a site": federation.bytes_down,
        "bytes up of the plain sum, a site": 8 * num_words,
    }


class Federation:
    """Sites with certified keys and inputs; rounds of it are independent."""

    def __init__(self, num_sites: int, num_words: int) -> None:
        rng = np.random.default_rng(0)
        self._num_words = num_words
        self._keys = {f"site-{index:03}": ec.generate_private_key(ec.SECP256R1()) for index in range(num_sites)}
        self._public = {name: key.public_key() for name, key in self._keys.items()}
        # Near zero, as clipped gradients on a grid with noise are.
        self._inputs: dict[str, NDArray[np.uint64]] = {
            name: rng.integers(-(2**30), 2**30, num_words).view(np.uint64) for name in self._keys
        }
        self._attempt = 0
        self.bytes_up = self.bytes_down = 0

    def round(self, threads: int) -> dict[str, float]:
        """Carry out one round over bytes and return the seconds of its steps.

        Raises:
            RuntimeError: if the sum is not the plain sum.
        """
        self._attempt += 1
        steps: dict[str, float] = {}
        coordinator = self._coordinator()
        with ThreadPoolExecutor(threads) as pool:
            with _timed(steps, "ready"):
                sites = dict(pool.map(self._site, self._keys))
                readies = [site.ready().to_bytes() for site in sites.values()]
            with _timed(steps, "roster"):
                for data in readies:
                    coordinator.take_ready(Ready.from_bytes(data))
                roster = pack_roster(coordinator.close())

            def accept(name: str) -> bytes:
                return sites[name].accept(unpack_roster(roster), min_sites=2, key_of=self._key_of)

            with _timed(steps, "accept"):
                contexts = dict(zip(sites, pool.map(accept, sites), strict=True))

            def masked(name: str) -> bytes:
                return sites[name].masked(self._inputs[name], contexts[name]).to_bytes()

            with _timed(steps, "mask and add"):
                for data in pool.map(masked, sites):
                    coordinator.take_masked(Masked.from_bytes(data))
                opened = coordinator.open()
        self.bytes_up, self.bytes_down = len(readies[0]) + len(data), len(roster)
        if not (opened.view(np.uint64) == self.plain_sum()).all():
            raise RuntimeError("the sum that opened is not the sum of the inputs")
        return steps

    def plain_sum(self) -> NDArray[np.uint64]:
        """Return the sum as a coordinator that sees every input makes it."""
        total = np.zeros(self._num_words, np.uint64)
        for values in self._inputs.values():
            np.add(total, values, out=total)
        return total

    def coordinator_megabytes(self) -> float:
        """Return the peak memory of a coordinator, above what holds the sites, while inputs come one by one."""
        self._attempt += 1
        sites = dict(map(self._site, self._keys))
        readies = {name: site.ready() for name, site in sites.items()}
        words = self._inputs[next(iter(self._inputs))].tobytes()
        with PeakMemory() as memory:
            coordinator = self._coordinator()
            for ready in readies.values():
                coordinator.take_ready(Ready.from_bytes(ready.to_bytes()))
            coordinator.close()
            for name, ready in readies.items():
                # What the words are makes no difference to its memory.
                sent = Masked(site=name, context=coordinator.context, words=words).signed_by(self._keys[name], ready)
                coordinator.take_masked(Masked.from_bytes(sent.to_bytes()))
            coordinator.open()
        return memory.megabytes

    def _site(self, name: str) -> tuple[str, SecureSite]:
        site = SecureSite(
            **(_SAME | {"attempt": self._attempt}),
            site=name,
            declared_records=64,
            key=self._keys[name],
            certificate=b"",
        )
        return name, site

    def _coordinator(self) -> SecureCoordinator:
        return SecureCoordinator(
            **(_SAME | {"attempt": self._attempt}), num_words=self._num_words, min_sites=2, key_of=self._key_of
        )

    def _key_of(self, entry: Ready) -> ec.EllipticCurvePublicKey:
        return self._public[entry.site]


@contextmanager
def _timed(steps: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    steps[name] = time.perf_counter() - started
