"""`[peers]`: a sum is entered only with sites that are known by another way than the CA."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from client.policy.peers import check_peers, pinned
from shared.errors import PolicyError
from shared.job.job import Job
from shared.job.parsing import parse
from shared.trust.certificates import fingerprint

KEYS = {name: ec.generate_private_key(ec.SECP256R1()).public_key() for name in ("north", "west", "east", "south")}


def a_job(min_sites: int) -> Job:
    raw: dict[str, Any] = {
        "name": "sum",
        "task": {"kind": "sequence_classification", "labels": ["x", "y"]},
        "training": {"rounds": 2, "local_steps": 1},
        "privacy": {"mechanism": "distributed", "max_colluding": 1, "epsilon_alone": 8.0},
        "federation": {"min_sites": min_sites},
    }
    return parse(Job, raw, source="job.toml")


def peers(*names: str) -> dict[str, str]:
    """Return them as their engineers read them over the telephone."""
    return pinned({name: fingerprint(KEYS[name]) for name in names})


def test_a_fingerprint_may_be_written_as_it_is_shown() -> None:
    shown = fingerprint(KEYS["west"])
    assert " " in shown
    digits = shown.replace(" ", "")
    assert (
        pinned({"west": shown})
        == pinned({"west": digits})
        == pinned({"west": f" {digits.upper()} "})
        == {"west": digits}
    )


@pytest.mark.parametrize("text", ["", "ab" * 31, "ab" * 33, "g" * 64, "ed25519:" + "a" * 56])
def test_what_is_no_fingerprint_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"'west' has the fingerprint .* 64 hexadecimal digits"):
        pinned({"west": text})


def test_without_peers_every_certified_site_counts() -> None:
    check_peers({}, a_job(3), [*KEYS, "stranger"], site="north")


def test_only_known_sites_count() -> None:
    """Those that a CA made up may be in a sum, and make it no safer."""
    known = peers("west", "east")
    check_peers(known, a_job(3), ["north", "west", "east"], site="north")
    check_peers(known, a_job(3), KEYS, site="north")
    with pytest.raises(
        PolicyError, match=r"of the 4 sites .*, site north knows 3.*\(east, north, west\); the job needs 4"
    ):
        check_peers(known, a_job(4), KEYS, site="north")
    made_up = ["north", "west", *(f"site-{number}" for number in range(50))]
    with pytest.raises(PolicyError, match=r"of the 52 sites in this sum, site north knows 2, itself included"):
        check_peers(known, a_job(3), made_up, site="north")
    # Whoever names itself has no advantage.
    with pytest.raises(PolicyError, match="knows 2"):
        check_peers(peers("north", "west"), a_job(3), KEYS, site="north")
