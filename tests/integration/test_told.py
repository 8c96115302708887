"""What the endurance test of secure aggregation looks for is found: each way to use something twice, and a charge too few."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.integration.told import Told, assert_masks_hide, assert_nothing_twice, masked_of, recounted

SITES = ("a", "b", "c")


def attempt(number: int, *, job: str = "j") -> list[Told]:
    """What three honest sites tell of one attempt."""
    found: list[Told] = []
    for site in SITES:
        name = f"{job}{number}{site}"
        pairs = {other: f"{job}{number}{min(site, other)}{max(site, other)}" for other in SITES if other != site}
        found += [
            {"what": "stream", "key": f"coins {name}"},
            {"what": "stream", "key": f"noise {name}"},
            {"what": "share", "sha256": f"share {name}"},
            {
                "what": "masked",
                "site": site,
                "job": job,
                "place": [1, number],
                "words": f"words {name}",
                "plus": [key for other, key in pairs.items() if site < other],
                "minus": [key for other, key in pairs.items() if site > other],
                "context": f"context {job}{number}",
                "public_key": f"key {name}",
            },
        ]
    return found


def masked(found: list[Told], site: str, number: int) -> Told:
    return next(one for one in found if one["what"] == "masked" and (one["site"], one["place"][1]) == (site, number))


def test_honest_attempts_pass() -> None:
    assert_nothing_twice([*attempt(1), *attempt(2), *attempt(1, job="k")])


FAULTS: dict[str, tuple[str, Callable[[list[Told]], Any]]] = {
    "the coins of an attempt again": ("stream", lambda found: found.append({"what": "stream", "key": "coins j1a"})),
    "the share of an attempt again": ("share", lambda found: found.append({"what": "share", "sha256": "share j1a"})),
    "the sum of an attempt again": ("input", lambda found: masked(found, "a", 2).update(words="words j1a")),
    "another site's draw": ("input", lambda found: masked(found, "b", 1).update(words="words j1a")),
    "the key of an attempt again": ("X25519", lambda found: masked(found, "a", 2).update(public_key="key j1a")),
    "an attempt masked twice": (
        "attempt",
        lambda found: found.append(masked(found, "a", 1) | {"words": "w", "public_key": "p"}),
    ),
    "a mask again": ("mask", lambda found: masked(found, "a", 2).update(plus=masked(found, "a", 1)["plus"])),
    "a mask of two attempts": ("mask", lambda found: masked(found, "a", 2).update(plus=["j2ab", "j1bc"])),
    "a mask twice in one input": ("mask", lambda found: masked(found, "a", 1).update(plus=["j1ab", "j1ab"])),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_used_twice_is_found(fault: str) -> None:
    message, plant = FAULTS[fault]
    found = copy.deepcopy([*attempt(1), *attempt(2)])
    plant(found)
    with pytest.raises(AssertionError, match=message):
        assert_nothing_twice(found)


def test_masks_that_serve_twice_show_in_what_came() -> None:
    random = np.random.default_rng(0)
    mask, other = random.integers(0, 1 << 64, (2, 64), dtype=np.uint64)

    def came(words: np.ndarray, number: int) -> Told:
        return {"site": "a", "sha256": str(number), "words": words.tobytes().hex()}

    sums = random.integers(0, 1 << 30, (2, 64), dtype=np.uint64)
    assert_masks_hide([came(sums[0] + mask, 1), came(sums[1] + other, 2), came(sums[0] + mask, 1)])
    with pytest.raises(AssertionError, match="under the same masks"):
        assert_masks_hide([came(sums[0] + mask, 1), came(sums[1] + mask, 2)])


def test_what_was_masked_is_told_by_site_and_job() -> None:
    assert masked_of([*attempt(1), *attempt(2), *attempt(3, job="k")], "a", "j") == {(1, 1), (1, 2)}


def test_a_recount_counts_every_attempt_and_of_the_account_the_whole_plan() -> None:
    def charge(job: str, round_number: int, attempt_number: int) -> dict[str, Any]:
        share = {"noise_multiplier": 3.0, "sample_rate": 0.25, "steps": 1}  # less of it takes longer to compose
        payload = {
            "job_id": job,
            "round": round_number,
            "attempt": attempt_number,
            "mechanism": share,
            "together": share | {"noise_multiplier": 4.5},
            "planned_steps": 4,
        }
        return {"kind": "reserve", "payload": payload}

    two, three = ([charge("j", 1, number) for number in range(1, count + 1)] for count in (2, 3))
    assert recounted(two, 1e-5, "j") < recounted(three, 1e-5, "j")
    assert recounted(two, 1e-5) == recounted(three, 1e-5) > recounted(three, 1e-5, "j")
    assert recounted([*two, charge("k", 1, 1)], 1e-5) > recounted(two, 1e-5)
    together, alone = recounted(two, 1e-5, "j")
    assert together < alone
