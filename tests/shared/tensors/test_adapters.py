"""Adapter bytes from an untrusted sender: exactly the expected tensors, or an error."""

from __future__ import annotations

import hashlib
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from shared.errors import AdapterError
from shared.tensors import adapters
from shared.tensors.adapters import MAGIC, check, check_length, decode, encode, shapes_of

TENSORS = {"b": torch.arange(6, dtype=torch.float32).reshape(2, 3), "a": torch.tensor([1.5])}
SHAPES = shapes_of(TENSORS)


def wrapped(payload: bytes) -> bytes:
    """Bytes with a right hash, as a malicious site would make them."""
    return MAGIC + hashlib.sha256(payload).digest() + payload


def crafted(**changes: torch.Tensor) -> bytes:
    return wrapped(save({**TENSORS, **changes}))


def test_round_trip_is_exact_and_float32() -> None:
    back = decode(encode(TENSORS), SHAPES)
    assert back.keys() == TENSORS.keys()
    assert all(torch.equal(back[name], TENSORS[name]) and back[name].dtype == torch.float32 for name in TENSORS)
    half = decode(encode({n: t.to(torch.bfloat16) for n, t in TENSORS.items()}), SHAPES)
    assert all(torch.equal(half[name], TENSORS[name]) for name in TENSORS)


def test_layout_order_and_gradients_do_not_matter() -> None:
    other = dict(reversed(TENSORS.items())) | {"b": TENSORS["b"].T.contiguous().T.requires_grad_()}
    assert encode(other) == encode(TENSORS)


def test_the_salt_makes_equal_updates_differ_on_the_wire_only() -> None:
    one, two = encode(TENSORS, salt="one"), encode(TENSORS, salt="two")
    assert one != two
    assert torch.equal(decode(one, SHAPES)["b"], decode(two, SHAPES)["b"])


class Huge(bytes):
    """Claims ten gigabytes without having them; to look inside would be a fault."""

    def __len__(self) -> int:
        return 10 * 2**30

    def startswith(self, *_: object) -> bool:  # type: ignore[override]
        raise AssertionError("parsed before the length was checked")

    def __getitem__(self, *_: object) -> bytes:  # type: ignore[override]
        raise AssertionError("parsed before the length was checked")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "do not start like an adapter"),
        (pickle.dumps(TENSORS), "do not start like an adapter"),
        (MAGIC, "SHA-256 does not match"),
        (encode(TENSORS)[:-1], "SHA-256 does not match"),
        (encode(TENSORS) + b"x", "SHA-256 does not match"),
        (wrapped(b""), "not a valid safetensors file"),
        (wrapped(b"\xff" * 200), "not a valid safetensors file"),
        (wrapped(save(TENSORS) + b"tail"), "not a valid safetensors file"),
        (wrapped(save({"a": TENSORS["a"]})), "lacks 1 tensors, first 'b'"),
        (crafted(c=torch.zeros(1)), "1 unknown tensors, first 'c'"),
        (crafted(b=torch.zeros(3, 2)), r"shape \(3, 2\), expected \(2, 3\)"),
        (crafted(b=torch.zeros(2, 3, dtype=torch.float64)), "dtype torch.float64, expected torch.float32"),
        (crafted(b=torch.zeros(2, 3, dtype=torch.int32)), "dtype torch.int32"),
        (crafted(a=torch.tensor([float("nan")])), "NaN or infinity"),
        (crafted(a=torch.tensor([float("inf")])), "NaN or infinity"),
        (crafted(b=torch.zeros(100, 100)), "more than the .* that this job's adapter can have"),
        (Huge(), "10,737,418,240 bytes, more than"),
    ],
)
def test_anything_else_is_refused_with_what_was_found(data: bytes, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        decode(data, SHAPES)


@given(st.binary(max_size=400))
def test_random_bytes_never_pass_nor_crash(data: bytes) -> None:
    for candidate in (data, MAGIC + data, wrapped(data)):
        with pytest.raises(AdapterError):
            decode(candidate, SHAPES)


@given(st.data())
def test_every_changed_byte_is_found(data: st.DataObject) -> None:
    original = encode(TENSORS)
    place = data.draw(st.integers(0, len(original) - 1))
    flip = data.draw(st.integers(1, 255))
    with pytest.raises(AdapterError):
        decode(original[:place] + bytes([original[place] ^ flip]) + original[place + 1 :], SHAPES)


def test_the_bound_leaves_room_for_every_honest_adapter() -> None:
    many = {f"{'layer.' * 20}{i}": torch.zeros(1) for i in range(200)}
    assert len(decode(encode(many, salt="f" * 32), shapes_of(many))) == 200
    check_length(len(encode(many)), shapes_of(many))


def test_check_accepts_only_the_exact_set() -> None:
    check(TENSORS, SHAPES)
    with pytest.raises(AdapterError, match="another job"):
        check({}, SHAPES)
    with pytest.raises(AdapterError, match="another job"):
        check(TENSORS, {})
    assert adapters.shapes_of(TENSORS) == {"b": (2, 3), "a": (1,)}
