"""Padding and micro-batches: nothing is lost, doubled or mixed."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.models.batches import _CUTS_PER_BUDGET, Batch, Example, collate, micro_batches, micro_batches_of_groups


def example(*ids: int, target: int = 0) -> Example:
    return Example(torch.tensor(ids), target)


def test_collate_pads_on_the_right_and_marks_real_tokens() -> None:
    batch = collate([example(5, 6, 7, target=1), example(8)])
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.attention_mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.targets.tolist() == [1, 0]
    assert batch.hidden is None


def test_collate_puts_cached_activations_in_a_row() -> None:
    first, second = torch.ones(3, 4), torch.full((1, 4), 2.0)
    batch = collate([example(5, 6, 7), example(8)], [first, second])
    assert batch.hidden is not None
    assert torch.equal(batch.hidden, torch.cat([first, second]).unsqueeze(0))


def test_a_batch_moves_as_a_whole() -> None:
    batch: Batch = collate([example(1, 2)], [torch.ones(2, 4)]).to(torch.device("meta"))
    assert batch.hidden is not None
    assert {t.device.type for t in (batch.input_ids, batch.attention_mask, batch.targets, batch.hidden)} == {"meta"}


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    max_tokens=st.integers(1, 200),
    data=st.data(),
)
def test_micro_batches_cut_without_loss_and_within_the_bound(
    lengths: list[int], max_tokens: int, data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True))
    groups = list(micro_batches(lengths, chosen, max_tokens))
    assert sorted(index for group in groups for index in group) == sorted(chosen)
    for group in groups:
        assert group
        assert len(group) == 1 or max(lengths[i] for i in group) * len(group) <= max_tokens


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7), max_tokens=st.integers(9, 40))
def test_micro_batches_cost_no_more_than_any_other_cut(lengths: list[int], max_tokens: int) -> None:
    """Against every way to cut the sorted records where lengths change, with what is too large cut by the budget."""

    def cost(groups: list[list[int]]) -> float:
        padded = [max(lengths[i] for i in group) * len(group) for group in groups]
        return sum(tokens + max_tokens / _CUTS_PER_BUDGET * -(-tokens // max_tokens) for tokens in padded)

    ordered = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    changes = [p for p in range(1, len(ordered)) if lengths[ordered[p]] != lengths[ordered[p - 1]]]
    cuts = [c for n in range(len(changes) + 1) for c in itertools.combinations(changes, n)]
    best = min(cost([ordered[a:b] for a, b in itertools.pairwise([0, *cut, len(ordered)])]) for cut in cuts)
    found = list(micro_batches(lengths, range(len(lengths)), max_tokens))
    # The pieces of a part that exceeds the budget are padded to their own longest record, not to the part's.
    allowed = best + max_tokens / _CUTS_PER_BUDGET * len(found)
    assert cost(found) <= allowed
    assert sum(max(lengths[i] for i in g) * len(g) for g in found) <= best


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    max_tokens=st.integers(1, 200),
    most=st.integers(1, 9),
    size=st.integers(1, 5),
)
def test_micro_batches_hold_at_most_so_many_records(lengths: list[int], max_tokens: int, most: int, size: int) -> None:
    persons = [list(range(begin, min(begin + size, len(lengths)))) for begin in range(0, len(lengths), size)]
    found = list(micro_batches_of_groups(lengths, persons, max_tokens, most))
    assert sorted(index for group in found for index in group) == list(range(len(lengths)))
    assert max(map(len, found)) <= most


def test_the_bound_on_records_alone_makes_no_more_micro_batches_than_it_needs() -> None:
    assert [len(group) for group in micro_batches([7] * 20, range(20), 10_000, 8)] == [6, 7, 7]


def test_padding_stays_small_on_real_lengths() -> None:
    """64 sentences of a movie review's length: cut greedily, a third of the work would be padding."""
    lengths = [5 + (i * i * 7) % 56 for i in range(64)]
    padded = sum(max(lengths[i] for i in g) * len(g) for g in micro_batches(lengths, range(64), 2048))
    assert padded < 1.25 * sum(lengths)


def test_no_records_make_no_batches() -> None:
    assert list(micro_batches([3, 4], [], 100)) == []
