"""The coordinator's side of one attempt at a secure sum: collect who is ready, close the roster, add what comes, open the sum.

No network, no clock, no file. Memory is one sum and the roster, not the inputs of all sites: O(n + d).

Formal guarantees (tests: tests/shared/secure_sum/test_coordinator.py)
    * `open` gives the sum of exactly one input of every site of the roster, or raises
      (test_the_sum_opens_only_when_all_came).
    * A message that is refused changes nothing: not the sum, not who is missing (test_a_refused_input_does_not_touch_the_sum).
    * The order of arrival changes no bit.

Not guaranteed: that a site's input is what it should be; nobody can tell. No site relies on this class: what protects a site is
what it checks itself (`shared.secure_sum.site`).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shared.errors import PrivacyError, RunError, TrustError
from shared.secure_sum.masks import WORD, check_order
from shared.secure_sum.messages import MOST_SITES, MOST_WORDS, Masked, Ready, Roster, check_equal, context
from shared.secure_sum.site import KeyOf
from shared.trust.certificates import spki


class SecureCoordinator:
    """One attempt; not for use by two threads at once.

    Args:
        job_sha256, round_number, attempt, adapter_sha256: that all sites must answer; see `Ready`.
        num_words: of every input.
        min_sites: for a roster; two or more.
        key_of: as for a site, called when a message of an entry's site comes.

    Raises:
        PrivacyError: if `min_sites` is below two, or no input is so long.
    """

    def __init__(
        self,
        *,
        job_sha256: str,
        round_number: int,
        attempt: int,
        adapter_sha256: str,
        num_words: int,
        min_sites: int,
        key_of: KeyOf,
    ) -> None:
        if min_sites < 2:
            raise PrivacyError(f"a sum of {min_sites} hides nothing; expected min_sites of two or more.")
        if not 1 <= num_words <= MOST_WORDS:
            raise PrivacyError(
                f"inputs of {num_words:,} words cannot be summed; expected 1 to {MOST_WORDS:,}. Lower lora.rank, or adapt fewer "
                "layers."
            )
        self._same = {
            "job_sha256": job_sha256,
            "round_number": round_number,
            "attempt": attempt,
            "adapter_sha256": adapter_sha256,
        }
        self._min_sites, self._key_of = min_sites, key_of
        self._ready: dict[str, Ready] = {}
        self._holders: set[bytes] = set()
        self._closed: tuple[Roster, bytes] | None = None  # and its context
        self._missing: set[str] = set()
        self._sum: NDArray[np.uint64] = np.zeros(num_words, WORD)
        self._end: Literal["opened", "voided"] | None = None

    def take_ready(self, ready: Ready) -> None:
        """Take in that a site is ready; the same message may come again.

        Raises:
            TrustError: if it cannot be on the roster, or the roster is closed.
        """
        if self._ready.get(ready.site) == ready:
            return
        if self._closed is not None or self._end is not None:
            why = "the roster was closed" if self._end is None else f"the attempt was {self._end}"
            raise TrustError(f"{ready.site} was ready after {why}; it can take part in the next attempt.")
        check_equal(self._same, ready)
        if ready.site in self._ready:
            raise TrustError(f"{ready.site} was ready before with another message; the first one counts.")
        if len(self._ready) == MOST_SITES:
            raise TrustError(f"{MOST_SITES} sites are ready already, the most of one roster.")
        # Every site would refuse a roster with such an entry, and nobody could say whose fault it is.
        if ready.public_key in {other.public_key for other in self._ready.values()}:
            raise TrustError(f"{ready.site} has the X25519 key of another site; one of them copied it.")
        check_order(ready.public_key, ready.site)
        key = self._key_of(ready)
        ready.verify(key)
        if (holder := spki(key)) in self._holders:
            raise TrustError(f"{ready.site} has the certified key of another site; together they count as one.")
        self._holders.add(holder)
        self._ready[ready.site] = ready

    def close(self) -> Roster:
        """Close the roster and return it, in the order of names; again, it is the same.

        Raises:
            RunError: if fewer than `min_sites` are ready; more may come then.
        """
        if self._closed is None:
            if len(self._ready) < self._min_sites:
                raise RunError(
                    f"{len(self._ready)} sites are ready, expected {self._min_sites} or more; wait, or end it."
                )
            roster = tuple(self._ready[name] for name in sorted(self._ready))
            self._closed, self._missing = (roster, context(roster)), set(self._ready)
        return self._closed[0]

    @property
    def context(self) -> bytes:
        """Of the roster, 32 bytes; raises `RunError` before it is closed."""
        return self._shown()[1]

    @property
    def missing(self) -> frozenset[str]:
        """Names on the roster whose masked input has not come; raises `RunError` before it is closed."""
        self._shown()
        return frozenset(self._missing)

    def take_masked(self, masked: Masked) -> None:
        """Add a masked input.

        Raises:
            TrustError: unless it is the first of a site of the roster, under its context, of the right length, signed, in time;
                nothing is added then.
            RunError: if the roster is not closed.
        """
        _, expected = self._shown()
        if self._end is not None:
            raise TrustError(f"a masked input of {masked.site} came after the attempt was {self._end}; it is not used.")
        if masked.context != expected:
            raise TrustError(f"the masked input of {masked.site} is for another roster; it cannot be added.")
        if masked.site not in self._ready:
            raise TrustError(f"{masked.site} sent a masked input and is not on the roster.")
        if masked.site not in self._missing:
            raise TrustError(f"{masked.site} sent a masked input twice; the first one counts.")
        if len(masked.words) != self._sum.nbytes:
            raise TrustError(
                f"the masked input of {masked.site} has {len(masked.words) // 8:,} words, expected {len(self._sum):,}."
            )
        entry = self._ready[masked.site]
        masked.verify(self._key_of(entry), entry)
        np.add(self._sum, np.frombuffer(masked.words, WORD), out=self._sum)
        self._missing.remove(masked.site)

    def void(self) -> None:
        """End the attempt without opening it; what comes later is refused."""
        self._end = "voided"
        self._sum = np.zeros(0, WORD)

    def open(self) -> NDArray[np.int64]:
        """Return the sum of all inputs, [d] int64 (two's complement), read-only; again, it is the same.

        Raises:
            RunError: if the attempt was voided, or somebody of the roster is missing: until then the sum is noise.
        """
        self._shown()
        if self._end == "voided":
            raise RunError("the attempt was voided; its sum does not open. Start another attempt.")
        if self._missing:
            names = ", ".join(sorted(self._missing)[:5])
            raise RunError(
                f"{len(self._missing)} of {len(self._ready)} masked inputs are missing ({names}); the sum opens with all of "
                "them only. Wait, or void the attempt."
            )
        self._end = "opened"
        self._sum.flags.writeable = False
        return self._sum.view(np.int64)

    def _shown(self) -> tuple[Roster, bytes]:
        """Return the roster and its context."""
        if self._closed is None:
            raise RunError("the roster is not closed; nobody has been shown it.")
        return self._closed
