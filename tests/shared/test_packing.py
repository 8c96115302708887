"""Packed texts: the row holds every token once, and attention keeps texts apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shared.packing as packing_module
from shared.packing import Packing, packed_attention

LENGTHS = (3, 1, 7, 4)
MASK = torch.arange(7) < torch.tensor(LENGTHS)[:, None]


class Attention(nn.Module):
    """What transformers' function asks of the layer."""

    is_causal = False


def row_of(padded: Tensor) -> Tensor:
    return torch.cat([padded[text, :length] for text, length in enumerate(LENGTHS)]).unsqueeze(0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_pack_keeps_the_tokens_and_pad_puts_them_back() -> None:
    packing, padded = Packing(MASK), random(4, 7, 5)
    row = packing.pack(padded)
    assert torch.equal(row, row_of(padded))
    assert torch.equal(packing.pad(row), padded * MASK[:, :, None])
    heads = random(4, 7, 2, 3)
    assert torch.equal(packing.pad(packing.pack(heads)), heads * MASK[:, :, None, None])


def test_texts_of_one_length_are_not_copied() -> None:
    packing, padded = Packing(torch.ones(2, 3, dtype=torch.bool)), random(2, 3, 5)
    row = packing.pack(padded)
    assert row.shape == (1, 6, 5)
    assert row.data_ptr() == padded.data_ptr() == packing.pad(row).data_ptr()


def test_gradients_are_those_of_indexing() -> None:
    packing = Packing(MASK)
    padded = random(4, 7, 5).double().requires_grad_()
    row = random(1, sum(LENGTHS), 5).double().requires_grad_()
    assert torch.autograd.gradcheck(packing.pack, (padded,))
    assert torch.autograd.gradcheck(packing.pad, (row,))

    def attended(row: Tensor) -> Tensor:
        # As attention does, whatever stands in the padding is masked.
        parts = packing.for_attention(row)
        kept = [p if g.mask is None else p * g.mask[:, :, None] for p, g in zip(parts, packing.groups, strict=True)]
        return packing.from_attention([part.cumsum(dim=1) for part in kept])

    assert torch.autograd.gradcheck(attended, (row,))


@pytest.mark.parametrize("places_per_call", [0, 3, 1000])
@pytest.mark.parametrize("causal", [False, True])
def test_a_token_meets_only_its_own_text(monkeypatch: pytest.MonkeyPatch, causal: bool, places_per_call: int) -> None:
    monkeypatch.setattr(packing_module, "_PLACES_PER_CALL", places_per_call)
    packing = Packing(MASK)
    assert len(packing.groups) == {0: 4, 3: 2, 1000: 1}[places_per_call]
    query, key, value = (random(4, 7, 2, 3, seed=seed) for seed in range(3))

    def attended(*padded: Tensor) -> Tensor:
        rows = (packing.pack(t).transpose(1, 2) for t in padded)
        output, _ = packed_attention(Attention(), *rows, None, packing=packing, causal=causal)
        return output

    found = attended(query, key, value)
    assert found.shape == (1, sum(LENGTHS), 2, 3)
    begin = 0
    for text, length in enumerate(LENGTHS):
        alone = [t[text : text + 1, :length].transpose(1, 2) for t in (query, key, value)]
        expected = nn.functional.scaled_dot_product_attention(*alone, is_causal=causal).transpose(1, 2)
        torch.testing.assert_close(found[:, begin : begin + length], expected)
        begin += length
    # Another text, even if it is not finite, and what stands in the padding change nothing of the first, to the last bit.
    for other in (1.0, torch.nan):
        changed = attended(*(torch.cat([t[:1], t[1:] + other]) for t in (query, key, value)))
        assert torch.equal(changed[:, :3], found[:, :3])
        assert not torch.equal(changed[:, 3:], found[:, 3:])
