"""Which other sites this site enters a sum with: `[peers]` of policy.toml.

Whoever runs the CA could make up sites with certificates of their own, each of which counts as a colluder. Those that stand here
are known by another way: their fingerprints were told by telephone.

Guarantees (tests: tests/client/policy/test_peers.py)
    * With `[peers]`, no sum is entered in which fewer than `federation.min_sites` are named, this site included: as many as the
      plan's noise counts on, and those who may collude.
    * A job for whose sums too few are named is refused before anything is loaded for it.
    * A refusal speaks of names that all sites of the sum see, or says how many are named, so it may be sent to the coordinator.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from shared.errors import PolicyError, excerpt
from shared.job.job import Job


def pinned(peers: Mapping[str, str]) -> dict[str, str]:
    """Return fingerprints as 64 hexadecimal digits, by name, however they were written down.

    Raises:
        ValueError: one is no fingerprint, or two sites have the same.
    """
    names: dict[str, str] = {}
    for name, text in peers.items():
        digits = "".join(text.split()).lower()
        if not re.fullmatch("[0-9a-f]{64}", digits):
            raise ValueError(
                f"{name!r} has the fingerprint {excerpt(text)}; expected the SHA-256 of its key, 64 hexadecimal digits. Ask that "
                "site for it by telephone; `silotune site check` shows it there"
            )
        if digits in names:
            raise ValueError(
                f"{name!r} and {names[digits]!r} have the same key, so they are one site; remove one of them"
            )
        names[digits] = name
    return {name: digits for digits, name in names.items()}


def num_known(peers: Collection[str], site: str) -> int:
    """Return how many sites are known where `peers` are named: these and the site itself, which may be among them."""
    return len({*peers, site})


def knows_enough(peers: Collection[str], job: Job, *, site: str) -> bool:
    """Return whether there may be a sum of this job in which enough sites are known; without any `peers`, always."""
    return not (peers and job.privacy.shares_noise) or num_known(peers, site) >= job.federation.min_sites


def check_peers(peers: Mapping[str, str], job: Job, names: Collection[str], *, site: str) -> None:
    """Refuse a sum in which too few sites are known; without any `peers` it refuses none.

    Args:
        peers: fingerprints by name, see `pinned`; that those in the sum have these keys is checked where their certificates are.
        names: of all sites in the sum.
        site: name of this site.

    Raises:
        PolicyError: naming those that are known.
    """
    if not peers:
        return
    known = sorted(name for name in names if name in peers or name == site)
    if len(known) < (least := job.federation.min_sites):
        raise PolicyError(
            f"of the {len(names)} sites in this sum, site {site} knows {len(known)}, itself included ({', '.join(known)}); the "
            f"job needs {least}. Its engineer names those that are known under [peers] in policy.toml."
        )
