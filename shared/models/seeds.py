"""Public seeds: one job seed, one stream per name. They never reach sampling or noise."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, name: str) -> int:
    """Return a seed in [0, 2**63) for `name` under the job's public seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
