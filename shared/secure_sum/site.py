"""A site's side of one attempt at a secure sum: ready, look the roster over, send one masked input, forget the key.

No network, no clock, no file: the caller sends, charges and stores. It charges the ledger and stores the masked input before it
leaves; after a restart there is no key any more, and the site has dropped out of the attempt.

Formal guarantees (tests: tests/shared/secure_sum/test_site.py)
    * Masks are for one context: `accept` binds the first roster that passes, and refuses another
      (test_of_two_rosters_for_one_key_the_second_is_refused).
    * One input leaves: `masked` gives the same bytes again for the same words, and nothing for others
      (test_masked_twice_is_the_same_bytes_or_refused).
    * It is in one place: it cannot be copied, pickled or restored (test_a_site_in_an_attempt_cannot_be_copied).
    * The private X25519 key is dropped once a roster is accepted, the mask keys once they are used
      (test_after_masking_no_secret_is_left).
    * `accept` reads public messages only, before and after masking, and so do its errors: a refusal says nothing about the input
      (test_refusals_do_not_depend_on_the_input).

Not guaranteed: that memory which Python gave back holds no trace of a key; that the others on the roster are who they say, beyond
what `key_of` checks; that their inputs are what they should be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NoReturn

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from shared.errors import PrivacyError, TrustError
from shared.secure_sum.masks import WORD, add_masks, agree, mask_key
from shared.secure_sum.messages import MOST_SITES, MOST_WORDS, Masked, Ready, Roster, check_equal, context
from shared.trust.certificates import spki

KeyOf = Callable[[Ready], ec.EllipticCurvePublicKey]
"""Returns the key of an entry's certificate, or raises TrustError: by chain, revocation, time and pinned fingerprints; that the
certificate names the entry's site is its business as well."""


class SecureSite:
    """One site in one attempt; not for use by two threads at once.

    Args:
        site, job_sha256, round_number, attempt, adapter_sha256, declared_records, certificate: see `Ready`.
        key: of the certificate.

    Raises:
        TrustError: if one of them is out of its bounds.
    """

    def __init__(
        self,
        *,
        site: str,
        job_sha256: str,
        round_number: int,
        attempt: int,
        adapter_sha256: str,
        declared_records: int,
        key: ec.EllipticCurvePrivateKey,
        certificate: bytes,
    ) -> None:
        self._key = key
        self._secret: X25519PrivateKey | None = X25519PrivateKey.generate()
        self._ready = Ready(
            site=site,
            job_sha256=job_sha256,
            round_number=round_number,
            attempt=attempt,
            adapter_sha256=adapter_sha256,
            declared_records=declared_records,
            public_key=self._secret.public_key().public_bytes_raw(),
            certificate=certificate,
        ).signed_by(key)
        self._context: bytes | None = None
        self._mask_keys: tuple[list[bytes], list[bytes]] | None = None  # added, subtracted
        self._made: tuple[bytes, Masked] | None = None  # SHA-256 of the input, and what was sent

    def __reduce__(self) -> NoReturn:
        raise TypeError("a site in an attempt is in one place; a copy would mask a second input with the same keys")

    def ready(self) -> Ready:
        """Return the message that this site is ready; always the same."""
        return self._ready

    def accept(self, roster: Roster, *, min_sites: int, key_of: KeyOf) -> bytes:
        """Check a roster, bind this attempt to it and return its context, 32 bytes; the same roster may come again.

        Args:
            roster: as the coordinator shows it.
            min_sites: fewer are refused; two or more.
            key_of: called for every entry but this site's own.

        Raises:
            TrustError: if anything is not as it should be; nothing is bound then. The text speaks of the roster only.
            PrivacyError: if `min_sites` is below two.
        """
        self._check(roster, min_sites)
        self._check_signatures(roster, key_of)
        found = context(roster)
        if self._secret is not None:
            self._bind(roster, found, self._secret)
        elif self._context != found:
            raise TrustError(
                f"{self._ready.site} has accepted another roster in attempt {self._ready.attempt}; its key is for that one only. "
                "Another roster needs another attempt."
            )
        return found

    def masked(self, words: NDArray[np.uint64], context: bytes) -> Masked:
        """Return the input under its masks; the mask keys are dropped.

        Args:
            words: [d] uint64; not changed.
            context: of the roster that `accept` returned.

        Raises:
            TrustError: if no roster of this context was accepted.
            PrivacyError: if other words were masked before: under the same masks, both inputs' difference would be open. Also if
                `words` are no words, or masking was broken off before.
        """
        if self._context is None or context != self._context:
            raise TrustError(
                f"{self._ready.site} has accepted no roster of the context {context.hex()[:16]}; nothing is sent under it."
            )
        if words.dtype != np.uint64 or words.ndim != 1 or not 1 <= len(words) <= MOST_WORDS:
            raise PrivacyError(
                f"an input of the secure sum is 1 to {MOST_WORDS:,} unsigned words of 64 bits in one row."
            )
        total = np.array(words, WORD)
        input_sha256 = hashlib.sha256(total.data).digest()
        if self._made is None:
            # Dropped first: whatever happens from here on, the masks are not used for a second input.
            keys, self._mask_keys = self._mask_keys, None
            if keys is None:
                raise PrivacyError("masking was broken off; this site has dropped out of the attempt.")
            add_masks(total, plus=keys[0], minus=keys[1])
            made = Masked(site=self._ready.site, context=context, words=total.tobytes())
            self._made = input_sha256, made.signed_by(self._key, self._ready)
        if self._made[0] != input_sha256:
            raise PrivacyError(
                "another input was masked in this attempt; the same masks on a second one would open the difference of both. "
                "A new input needs another attempt."
            )
        return self._made[1]

    def _check(self, roster: Roster, min_sites: int) -> None:
        """What can be seen without anybody's key."""
        # 1. Enough take part that a sum hides one.
        if min_sites < 2:
            raise PrivacyError(f"a sum of {min_sites} hides nothing; expected min_sites of two or more.")
        if not min_sites <= len(roster) <= MOST_SITES:
            raise TrustError(f"the roster has {len(roster)} sites, expected {min_sites} to {MOST_SITES}.")

        # 2. In the order of their names, so that a roster has one writing, and each name once.
        names = [entry.site for entry in roster]
        if names != sorted(set(names)):
            raise TrustError("the roster is not in the order of its names, or has one of them twice.")

        # 3. All answer the same: nobody was shown another adapter, nothing is from another attempt.
        own = self._ready
        same = {name: getattr(own, name) for name in ("job_sha256", "round_number", "attempt", "adapter_sha256")}
        for entry in roster:
            check_equal(same, entry)

        # 4. This site is in it, as it said so itself.
        if own not in roster:
            raise TrustError(f"the roster does not have {own.site} as {own.site} signed it.")

        # 5. As many keys as names.
        if len({entry.public_key for entry in roster}) != len(roster):
            raise TrustError("two sites of the roster have the same X25519 key; one of them copied it.")

    def _check_signatures(self, roster: Roster, key_of: KeyOf) -> None:
        """Each entry is signed by the site that it names, and no two by one holder."""
        holders = {spki(self._key.public_key())}
        for entry in roster:
            if entry.site == self._ready.site:
                continue
            key = key_of(entry)
            entry.verify(key)
            holders.add(spki(key))
        if len(holders) != len(roster):
            raise TrustError("two sites of the roster have certificates of the same key; together they count as one.")

    def _bind(self, roster: Roster, found: bytes, private: X25519PrivateKey) -> None:
        """Agree with every other site on a mask key for this context, and drop the key that could do it for another."""
        own = (self._ready.site, self._ready.public_key)
        plus: list[bytes] = []
        minus: list[bytes] = []
        for entry in roster:
            if entry.site != own[0]:
                secret = agree(private, entry.public_key, entry.site)
                key = mask_key(secret, found, own, (entry.site, entry.public_key))
                # The first of a pair by name adds, the second subtracts.
                (plus if own[0] < entry.site else minus).append(key)
        self._mask_keys, self._context, self._secret = (plus, minus), found, None
