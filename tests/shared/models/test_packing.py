"""Packed texts: the row holds every token once, and attention keeps texts apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shared.models.packing as packing_module
from shared.models.packing import Packing, packed_attention, padded_length

LENGTHS = (3, 1, 7, 4)
MASK = torch.arange(7) < torch.tensor(LENGTHS)[:, None]


class Attention(nn.Module):
    """What transformers' function asks of the layer."""

    is_causal = False


def row_of(padded: Tensor) -> Tensor:
    return torch.cat([padded[text, :length] for text, length in enumerate(LENGTHS)]).unsqueeze(0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[16, 64], ids=["few places behind", "many places behind"])
def packing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Packing:
    """A row of 15 tokens, with 1 and with 49 places behind them."""
    monkeypatch.setattr(packing_module, "FEWEST_ROWS", request.param)
    packing = Packing(MASK)
    assert (packing.count, packing.room) == (sum(LENGTHS), request.param)
    return packing


def test_pack_keeps_the_tokens_and_pad_puts_them_back(packing: Packing) -> None:
    padded = random(4, 7, 5)
    row = packing.pack(padded)
    assert torch.equal(row[:, : packing.count], row_of(padded))
    assert not row[:, packing.count :].any()
    assert torch.equal(packing.fit(row_of(padded)), row)
    assert torch.equal(packing.pad(row), padded * MASK[:, :, None])
    heads = random(4, 7, 2, 3)
    assert torch.equal(packing.pad(packing.pack(heads)), heads * MASK[:, :, None, None])


def test_texts_of_one_length_are_not_copied() -> None:
    packing, padded = Packing(torch.ones(8, 8, dtype=torch.bool)), random(8, 8, 5)
    row = packing.pack(padded)
    assert row.shape == (1, 64, 5)
    assert row.data_ptr() == packing.for_attention(row)[0].data_ptr() == packing.by_text(row)[0].data_ptr()
    assert row.data_ptr() == padded.data_ptr() == packing.pad(row).data_ptr() == packing.fit(row).data_ptr()


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33, 500, 1025, 2047, 4096, 100_003])
def test_even_rows_have_few_lengths_and_little_room(tokens: int) -> None:
    """At most a sixteenth or 15 places more, from 64 on; 16 lengths between one power of two and the next."""
    room = Packing(torch.ones(1, tokens, dtype=torch.bool), even=True).room
    assert tokens <= room <= max(tokens * 17 / 16, tokens + 15, 64)
    assert room % max(16, 2 ** (tokens.bit_length() - 1) // 16) == 0
    assert Packing(torch.ones(1, tokens, dtype=torch.bool)).room == max(64, -(-tokens // 16) * 16)


@pytest.mark.parametrize(
    ("length", "places"),
    [(1, 8), (8, 8), (9, 16), (17, 24), (25, 32), (33, 48), (49, 64), (65, 96), (97, 128), (385, 512)],
)
def test_the_places_of_a_text_follow_from_its_own_length(length: int, places: int) -> None:
    assert padded_length(length) == places
    alone = Packing(torch.ones(1, length, dtype=torch.bool)).groups
    mask = torch.arange(512) < torch.tensor([length, 3, length, 512])[:, None]
    beside = [group for group in Packing(mask).groups if 0 in group.texts.tolist()]
    assert [group.length for group in (*alone, *beside)] == [places, places]
    # A mask also where nothing is padded.
    assert [int(group.mask[0].sum()) for group in (*alone, *beside)] == [length, length]


def test_rows_that_are_even_by_chance_are_rows_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many places as the padded batch, but not its places."""
    monkeypatch.setattr(packing_module, "FEWEST_ROWS", 8)
    monkeypatch.setattr(packing_module, "ROWS", 8)
    mask = torch.arange(4) < torch.tensor([3, 4])[:, None]
    packing, padded = Packing(mask), random(2, 4, 5)
    assert packing.room == mask.numel()
    assert torch.equal(packing.pad(packing.pack(padded)), padded * mask[:, :, None])
    assert [len(part) for part in packing.for_attention(packing.pack(padded))] == [2]


def test_by_text_holds_every_token_once_and_zeros(packing: Packing) -> None:
    padded = random(4, 7, 5)
    (group,), (part,) = packing.groups, packing.by_text(packing.pack(padded))
    assert group.texts.tolist() == [0, 1, 2, 3]
    assert torch.equal(part[:, :7], padded * MASK[:, :, None])
    assert not part[:, 7:].any()


def test_gradients_are_those_of_indexing(packing: Packing) -> None:
    padded = random(4, 7, 5).double().requires_grad_()
    row = random(1, packing.room, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(packing.pack, (padded,))
    assert torch.autograd.gradcheck(packing.pad, (row,))

    def attended(row: Tensor) -> Tensor:
        # As attention does, whatever stands in the padding is masked.
        parts = packing.for_attention(row)
        kept = [part * group.mask[:, :, None] for part, group in zip(parts, packing.groups, strict=True)]
        return packing.from_attention([part.cumsum(dim=1) for part in kept])

    assert torch.autograd.gradcheck(attended, (row,))
    packing.pad(row).sum().backward()
    assert row.grad is not None
    assert not row.grad[:, packing.count :].any()


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_a_token_meets_only_its_own_text(
    monkeypatch: pytest.MonkeyPatch, packing: Packing, causal: bool, groups: int
) -> None:
    monkeypatch.setattr(packing_module, "padded_length", lambda length: 8 if groups == 1 else length)
    assert len(packing.groups) == groups
    query, key, value = (random(4, 7, 2, 3, seed=seed) for seed in range(3))

    def attended(*padded: Tensor) -> Tensor:
        rows = (packing.pack(t).transpose(1, 2) for t in padded)
        output, _ = packed_attention(Attention(), *rows, None, packing=packing, causal=causal)
        return output

    found = attended(query, key, value)
    assert found.shape == (1, packing.room, 2, 3)
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


def test_attention_in_bfloat16_is_computed_in_float32() -> None:
    """On a processor, also under autocast: what comes out is what float32 gives, rounded once; gradients as well."""
    packing = Packing(MASK)

    def attended(inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, _ = packed_attention(Attention(), *leaves, None, packing=packing)
        output.float().pow(2).sum().backward()
        return output, [leaf.grad for leaf in leaves if leaf.grad is not None]

    half = [random(1, 2, sum(LENGTHS), 3, seed=seed).bfloat16() for seed in range(3)]
    output, gradients = attended(half)
    with torch.autocast("cpu", enabled=False):
        leaves = [tensor.float().requires_grad_() for tensor in half]
        exact, _ = packed_attention(Attention(), *leaves, None, packing=packing)
        exact.bfloat16().float().pow(2).sum().backward()
    assert torch.equal(output, exact.bfloat16())
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] * 3
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert leaf.grad is not None
        assert torch.equal(gradient, leaf.grad.bfloat16())
