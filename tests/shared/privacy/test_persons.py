"""Persons as the unit of privacy: one person moves a step by at most C, and nobody else's records are touched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from shared.errors import DataError, PrivacyError
from shared.models.batches import micro_batches_of_groups
from shared.privacy.mechanism import CLIP_MARGIN, ClippedSum
from shared.privacy.persons import LONGEST_RECORD, Persons, PersonSum
from shared.privacy.randomness import KeyStream, SiteRandomness

SHAPES = [torch.Size([2]), torch.Size([1, 1])]
NASTY = [0.0, 1.0, -1.0, 1e-45, 1e-20, 1e19, -1e20, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan")]
VALUES = st.one_of(st.sampled_from(NASTY), st.floats(width=32))
POOL = st.lists(st.lists(VALUES, min_size=3, max_size=3), min_size=1, max_size=6)
"""Gradients of which records have one each, so that those of a person often add up or cancel."""
PERSONS = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=20), min_size=1, max_size=5
)
NAN, HUGE, ONE = [float("nan"), 1.0, 1.0], [3.4e38, 0.0, 0.0], [1.0, 0.0, 0.0]


def stream(name: str) -> KeyStream:
    return SiteRandomness.injected(name).stream("records", round_number=1, step=0)


def parts_of(rows: Tensor) -> list[Tensor]:
    """Cut gradient vectors [n, 3] into one tensor for each of SHAPES."""
    return [rows[:, :2], rows[:, 2:].reshape(-1, 1, 1)]


def cut(rows: Sequence[int], edges: Iterable[int]) -> list[list[int]]:
    places = sorted({0, len(rows), *[edge % (len(rows) + 1) for edge in edges]})
    return [list(rows[start:stop]) for start, stop in pairwise(places)]


def person_sum(
    gradients: Tensor, groups: Sequence[Sequence[int]], micro_batches: Iterable[Sequence[int]], bound: float = 1.0
) -> tuple[Tensor, ClippedSum]:
    total = ClippedSum(SHAPES, bound)
    by_person = PersonSum(total, groups)
    for rows in micro_batches:
        by_person.add(parts_of(gradients[list(rows)]), rows)
    by_person.close()
    return torch.cat([part.flatten() for part in total.sums]), total


# --- sensitivity ---


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    pool=POOL,
    owned=PERSONS,
    most=st.integers(1, 20),
    bound=st.sampled_from([1e-3, 1.0, 1e4]),
    removed=st.integers(0, 4),
    cuts=st.lists(st.integers(0, 100), max_size=6),
    other_cuts=st.lists(st.integers(0, 100), max_size=6),
    order=st.randoms(use_true_random=False),
)
@example(
    pool=[HUGE, ONE], owned=[[(0, False)], [(0, True), (0, False), (1, True)]], most=20, bound=1.0, removed=0, cuts=[1, 2],
    other_cuts=[2], order=None,
)  # fmt: skip
@example(
    pool=[NAN, ONE], owned=[[(0, True)] * 20, [(1, True)] * 20], most=20, bound=1.0, removed=0, cuts=[7], other_cuts=[],
    order=None,
)  # fmt: skip
def test_removing_one_person_moves_the_sum_by_at_most_the_bound(
    pool: list[list[float]],
    owned: list[list[tuple[int, bool]]],
    most: int,
    bound: float,
    removed: int,
    cuts: list[int],
    other_cuts: list[int],
    order: object,
) -> None:
    """1 to 20 records a person, any gradients, any micro-batches on both sides, each in any order of its records."""
    signs = [(pool[which % len(pool)], 1.0 if plus else -1.0) for records in owned for which, plus in records]
    gradients = torch.tensor([row for row, _ in signs]) * torch.tensor([[sign] for _, sign in signs])
    persons = Persons(np.repeat(np.arange(len(owned)), [len(records) for records in owned]))
    groups = persons.choose(range(persons.count), most, stream("sensitivity"))
    removed %= len(groups)
    rest = [group for person, group in enumerate(groups) if person != removed]
    rows, other_rows = list(chain(*groups)), list(chain(*rest))
    if order is not None:
        order.shuffle(rows)  # type: ignore[attr-defined]
        order.shuffle(other_rows)  # type: ignore[attr-defined]
    with_person, total = person_sum(gradients, groups, cut(rows, cuts), bound)
    without, _ = person_sum(gradients, rest, cut(other_rows, other_cuts), bound)
    assert torch.isfinite(with_person).all()
    assert float((with_person - without).norm()) <= bound
    assert total.num_examples == len(groups)
    assert total.num_non_finite == int((~gradients[rows].isfinite().all(dim=1)).sum())


def test_the_bound_is_reached_and_by_records_it_would_be_crossed() -> None:
    """The property above is not empty: a person counts with C, and clipping each record would give 20 C."""
    gradients = torch.tensor([[3.0, 0.0, 4.0]]).repeat(20, 1)
    summed, total = person_sum(gradients, [list(range(20))], cut(range(20), [3, 11]))
    assert float(summed.norm()) == pytest.approx(CLIP_MARGIN)
    assert (total.num_examples, total.num_clipped) == (1, 1)
    by_record = ClippedSum(SHAPES, 1.0)
    by_record.add(parts_of(gradients))
    assert float(torch.cat([part.flatten() for part in by_record.sums]).norm()) == pytest.approx(20 * CLIP_MARGIN)


def test_a_person_counts_the_same_to_the_last_bit_in_any_company() -> None:
    """Records of very different length, in any cut and order: the others' part of the sum does not move at all."""
    generator = torch.Generator().manual_seed(0)
    gradients = (
        torch.randn(40, 3, generator=generator)
        * torch.logspace(-6, 6, 40)[torch.randperm(40, generator=generator)][:, None]
    )
    groups = [list(range(begin, 40, 4)) for begin in range(4)]
    everyone, _ = person_sum(gradients, groups, cut(range(40), [3, 11, 30]))
    for person, group in enumerate(groups):
        rest = groups[:person] + groups[person + 1 :]
        without, _ = person_sum(gradients, rest, cut([*chain(*rest)][::-1], [1, 2, 20]))
        alone, _ = person_sum(gradients, [group], [group])
        assert torch.equal(everyone - without, alone)


def test_a_person_counts_with_the_mean_of_their_records() -> None:
    gradients = torch.tensor([[0.3, 0.0, 0.0], [0.1, 0.4, 0.0], [0.0, 0.0, 0.5], [float("inf"), 0.0, 0.0]])
    summed, total = person_sum(gradients, [[0, 1], [2, 3]], [[0, 2], [3, 1]])
    assert summed.tolist() == pytest.approx([0.2, 0.2, 0.25])
    assert (total.num_examples, total.num_clipped, total.num_non_finite) == (2, 0, 1)


def test_the_mean_is_exact_to_the_grid_however_its_records_come() -> None:
    gradients = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)) / 10
    expected = gradients.double().mean(dim=0)
    for cuts in ([], [1, 2, 3, 4, 5, 6], [3]):
        summed, _ = person_sum(gradients, [list(range(7))], cut(range(7), cuts))
        torch.testing.assert_close(summed, expected, rtol=0, atol=2e-9)  # steps of the grid are 2**-30


@pytest.mark.parametrize("bound", [1.0, 0.25, 4.0])
def test_a_record_far_beyond_the_bound_is_shortened_before_the_mean(bound: float) -> None:
    """It keeps its direction; without that, what is left of cancelling giants would depend on the order of addition."""
    gradients = bound * torch.tensor([[2 * LONGEST_RECORD, 0.0, 0.0], [-LONGEST_RECORD, 0.5, 0.0]])
    summed, _ = person_sum(gradients, [[0, 1]], [[0], [1]], bound)
    assert (summed / bound).tolist() == pytest.approx([0.0, 0.25, 0.0], abs=1e-3)


def test_what_would_break_the_bound_is_refused() -> None:
    gradients = torch.ones(3, 3)
    with pytest.raises(PrivacyError, match="stands in a step twice"):
        person_sum(gradients, [[0, 1], [1]], [])
    with pytest.raises(PrivacyError, match="came twice or does not belong"):
        person_sum(gradients, [[0, 1]], [[0, 1], [0]])
    with pytest.raises(PrivacyError, match="came twice or does not belong"):
        person_sum(gradients, [[0, 1]], [[0, 2]])
    with pytest.raises(PrivacyError, match="1 records of this step never came"):
        person_sum(gradients, [[0, 1]], [[0]])
    total = ClippedSum(SHAPES, 1.0)
    with pytest.raises(PrivacyError, match="cannot be told apart"):
        PersonSum(total, [[0, 1]]).add(parts_of(gradients), [0, 1])
    for short in (0, 1):  # also of one parameter alone
        parts = [part[: 1 if place == short else 2] for place, part in enumerate(parts_of(gradients))]
        with pytest.raises(PrivacyError, match="cannot be told apart"):
            PersonSum(total, [[0, 1]]).add(parts, [0, 1])
    assert total.num_examples == 0


def test_an_empty_step_is_an_empty_sum() -> None:
    summed, total = person_sum(torch.ones(1, 3), [], [])
    assert summed.tolist() == [0.0, 0.0, 0.0]
    assert total.num_examples == 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=20), max_size=8), max_tokens=st.integers(1, 200)
)
def test_at_most_one_person_waits_between_two_micro_batches(lengths: list[list[int]], max_tokens: int) -> None:
    """So memory is one vector, not one for each person in the step."""
    flat = list(chain(*lengths))
    starts = np.cumsum([0, *map(len, lengths)]).tolist()
    groups = [list(range(start, stop)) for start, stop in pairwise(starts)]
    total = ClippedSum(SHAPES, 1.0)
    by_person = PersonSum(total, groups)
    for rows in micro_batches_of_groups(flat, groups, max_tokens):
        assert len(rows) == 1 or max(flat[row] for row in rows) * len(rows) <= max_tokens
        by_person.add(parts_of(torch.ones(len(rows), 3)), rows)
        assert len(by_person._open) <= 1
    by_person.close()
    assert total.num_examples == len(groups)


# --- which records of a person ---


def test_a_choice_is_uniform_and_independent_of_others() -> None:
    """Every pair of a person's five records comes equally often, whoever else is there; others do not change the law."""
    persons = Persons(np.array([0] * 3 + [1] * 5 + [2] * 2))
    pairs: dict[tuple[int, ...], int] = {}
    both = np.zeros((3, 5))  # who of person 0 came (of 3, two are drawn: one is missing) against who of person 1
    source = stream("choice")
    for _ in range(6000):
        first, second, third = persons.choose([0, 1, 2], 2, source)
        assert third == [8, 9]
        assert len(set(second)) == 2
        assert set(second) <= set(range(3, 8))
        pairs[tuple(sorted(second))] = pairs.get(tuple(sorted(second)), 0) + 1
        (missing,) = {0, 1, 2} - set(first)
        both[missing, [row - 3 for row in second]] += 1
    assert len(pairs) == 10
    assert stats.chisquare(list(pairs.values())).pvalue > 1e-4
    assert stats.chi2_contingency(both).pvalue > 1e-4
    skewed = [count * (1.25 if number else 0.8) for number, count in enumerate(pairs.values())]
    assert stats.chisquare(np.array(skewed) * sum(pairs.values()) / sum(skewed)).pvalue < 1e-4  # the test can fail


def test_whoever_has_few_records_enters_with_all_of_them() -> None:
    persons = Persons(np.array([1, 0, 1, 1]))
    assert persons.choose([0, 1], 3, stream("all")) == [[1], [0, 2, 3]]
    assert persons.choose([], 3, stream("all")) == []
    assert persons.choose([1], 3, stream("all")) == [[0, 2, 3]]


# --- ids ---


def test_ids_become_numbers_and_are_forgotten() -> None:
    persons = Persons.from_ids(["b", "a", " b ", 7, 7.0, "7", "é", "e\u0301"])
    assert persons.owners.tolist() == [0, 1, 0, 2, 2, 2, 3, 3]
    assert (persons.count, persons.most_records) == (4, 3)
    assert [rows.tolist() for rows in persons.rows] == [[0, 2], [1], [3, 4, 5], [6, 7]]
    assert "b" not in repr(vars(persons))


def test_spellings_are_persons_of_their_own() -> None:
    """Documented: only spaces and the Unicode form are evened out."""
    assert Persons.from_ids(["12", "012", "a12", "A12", "12.0"]).count == 5


@pytest.mark.parametrize("bad", ["", "  ", None, 1.5, float("nan"), True, ["x"], b"x"])
def test_an_id_that_is_none_is_refused_without_showing_any(bad: object) -> None:
    with pytest.raises(DataError, match="1 of 3 records have no usable person id") as refused:
        Persons.from_ids(["zyxomma", bad, "zyxomma"])
    assert "zyxomma" not in str(refused.value)


def test_records_of_every_person_increase() -> None:
    owners = np.random.default_rng(0).integers(0, 3, size=3000)
    persons = Persons(owners)
    for person, rows in enumerate(persons.rows):
        assert rows.tolist() == np.flatnonzero(owners == person).tolist()


def test_nobody_and_strangers() -> None:
    nobody = Persons.from_ids([])
    assert nobody.owners.dtype == np.intp
    assert (nobody.count, nobody.most_records, nobody.rows) == (0, 0, [])
    assert Persons.from_ids(["a", "b", "a"]).with_strangers(2).owners.tolist() == [0, 1, 0, 2, 3]
    assert nobody.with_strangers(1).owners.tolist() == [0]
