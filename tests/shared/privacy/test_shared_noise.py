"""What a statement says where sites share the noise: the two promises in words, and epsilon by the number of sites."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from shared.privacy.accountant.several_sites import MOST_SITES
from shared.privacy.accounting import GaussianSteps, epsilon_at_sites, noise_of_sum
from shared.privacy.shared_noise import SharedNoise, largest_at

SHARED = SharedNoise(honest=4, colluding=2)
SHARES = (
    GaussianSteps(noise_multiplier=1.0, sample_rate=0.25, steps=5),
    GaussianSteps(noise_multiplier=1.5, sample_rate=0.5, steps=2),
)
APART = (GaussianSteps(noise_multiplier=20.0, sample_rate=1.0, steps=1),)


def test_steps_of_a_share_are_summed_with_the_noise_of_all_honest_sites() -> None:
    assert SHARED.summed(SHARES) == (
        GaussianSteps(noise_multiplier=noise_of_sum(1.0, 4), sample_rate=0.25, steps=5),
        GaussianSteps(noise_multiplier=noise_of_sum(1.5, 4), sample_rate=0.5, steps=2),
    )


@pytest.mark.parametrize(
    ("most", "counts"),
    [
        (1, [1]),
        (2, [1, 2]),
        (5, [1, 2, 3, 4, 5]),
        (6, [1, 2, 3, 4, 5, 6]),
        (16, [1, 2, 3, 4, 5, 8, 16]),
        (31, [1, 2, 3, 4, 5, 8, 16, 31]),
        (MOST_SITES, [1, 2, 3, 4, 5, 8, 16, 32]),
        (MOST_SITES + 1, [1, 2, 3, 4, 5, 8, 16, 32]),
        (1000, [1, 2, 3, 4, 5, 8, 16, 32]),
    ],
)
def test_epsilon_is_stated_for_these_numbers_of_sites(
    most: int, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(
        events: Sequence[GaussianSteps], sites: int, delta: float, *, apart: Sequence[GaussianSteps]
    ) -> tuple[object, ...]:
        return events, sites, delta, apart

    monkeypatch.setattr("shared.privacy.shared_noise.epsilon_at_sites", told)
    found = SHARED.epsilon_at_sites(SHARES, most, 1e-5, apart=APART)
    assert found == {count: (SHARED.summed(SHARES), count, 1e-5, APART) for count in counts}
    assert SHARED.epsilon_at_sites(SHARES, 1, 1e-6) == {1: (SHARED.summed(SHARES), 1, 1e-6, ())}


def test_it_is_the_accountants_epsilon() -> None:
    found = SHARED.epsilon_at_sites(SHARES, 2, 1e-5, apart=APART)
    summed = SHARED.summed(SHARES)
    assert found == {count: epsilon_at_sites(summed, count, 1e-5, apart=APART) for count in (1, 2)}
    assert found[1] < found[2]


@pytest.mark.parametrize(
    ("colluding", "words"),
    [
        (0, "the coordinator"),
        (1, "the coordinator and up to 1 site that works with it"),
        (2, "the coordinator and up to 2 sites that work with it"),
    ],
)
def test_against_whom_the_first_promise_holds(colluding: int, words: str) -> None:
    assert SharedNoise(honest=3, colluding=colluding).against == words


def test_both_promises_in_words() -> None:
    told = SHARED.promises(
        epsilon=1.001, executed=0.5, alone=7.301, delta=1e-5, relation="add or remove one record", planned=17
    )
    assert told == (
        "First promise, against the coordinator and up to 2 sites that work with it: what they learn is (1.001, 1e-05)-"
        "differentially private under add or remove one record, by PLD accounting; at least 4 honest sites share the noise of "
        "every sum. Second promise, against everybody else together, if secure aggregation fails completely: (7.302, 1e-05). "
        "Both are of all 17 planned attempts; of those that were made the first is 0.500."
    )


def test_of_sites_that_differ_the_most_that_was_made_is_called_so() -> None:
    told = SHARED.promises(epsilon=1.0, executed=0.5, alone=7.0, delta=1e-5, relation="r", planned=17, at_most=True)
    assert told.endswith("Both are of all 17 planned attempts; of those that were made the first is at most 0.500.")


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        ([("b", 1.0, 7.0), ("a", 1.0, 7.0)], "both promises are the same at every site"),
        # Rounded up they are the same.
        ([("b", 1.0002, 7.0), ("a", 1.0003, 7.0)], "both promises are the same at every site"),
        ([("a", 1.0, 7.0), ("b", 1.1, 7.1)], "both promises are the largest of a site, b"),
        ([("a", 1.0, 7.1), ("b", 1.0, 7.2)], "both promises are the largest of a site, b"),
        (
            [("a", 1.2, 7.0), ("b", 1.0, 7.2)],
            "the first promise is the largest of a site, a, and the second that of a site, b",
        ),
        (
            [("site-10", 1.2, 7.2), ("site-2", 1.2, 7.2), ("a", 1.0, 7.0)],
            "both promises are the largest of a site, site-2",
        ),
    ],
)
def test_of_which_site_the_promises_are(sites: list[tuple[str, float, float]], words: str) -> None:
    assert largest_at(sites) == words
    assert largest_at(sites[::-1]) == words, "the order of sites decides nothing"
