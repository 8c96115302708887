"""Compressed updates: error bounds, what is lost comes later, and bytes from an untrusted sender."""

from __future__ import annotations

import contextlib
import hashlib
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.errors import AdapterError
from shared.job.federation import UpdateDtype
from shared.tensors import adapters
from shared.tensors.adapters import shapes_of
from shared.wire.updates import decode_update, encode_update

COMPRESSED: list[UpdateDtype] = ["bfloat16", "int8"]
SHAPES = {"b": torch.Size([2, 3]), "a": torch.Size([4]), "c": torch.Size([])}
SIZE = 11


def update_of(numbers: list[float]) -> dict[str, Tensor]:
    parts = torch.split(torch.tensor(numbers, dtype=torch.float32), [shape.numel() for shape in SHAPES.values()])
    return {name: part.view(shape) for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}


def quantum(tensor: Tensor, dtype: UpdateDtype) -> Tensor:
    """Return the most that rounding may lose of each value."""
    if dtype == "int8":
        step = max(float(tensor.abs().max()) / 127, 2.0**-126)
        return torch.full_like(tensor, step / 2 * (1 + 1e-4))
    return tensor.abs() * 2.0**-8 + 2.0**-134  # half a step of bfloat16, also where it is subnormal


numbers = st.floats(-4096, 4096, width=32) | st.sampled_from([0.0, 1e-45, -1e-40, 1e-38, 4096.0])
vectors = st.lists(numbers, min_size=SIZE, max_size=SIZE)
dtypes = st.sampled_from(COMPRESSED)


@given(vector=vectors, dtype=dtypes)
def test_a_round_trip_keeps_the_error_bound_and_the_residual_is_the_error(
    vector: list[float], dtype: UpdateDtype
) -> None:
    update = update_of(vector)
    encoded = encode_update(update, dtype)
    back = decode_update(encoded.data, SHAPES, dtype)
    assert back.keys() == update.keys() == encoded.residual.keys()
    for name, tensor in update.items():
        assert back[name].dtype == torch.float32
        assert back[name].shape == tensor.shape
        assert bool((torch.sub(back[name], tensor).abs() <= quantum(tensor, dtype)).all())
        assert torch.equal(encoded.residual[name], tensor - back[name])
        assert float(back[name].abs().max()) <= float(tensor.abs().max()) * (1 + 2.0**-7) + 2.0**-126
    # Encoding draws nothing.
    assert encode_update(update, dtype).data == encoded.data
    # What can be said exactly is said exactly.
    again = encode_update(back, "bfloat16") if dtype == "bfloat16" else encode_update(back, "int8")
    assert all(float(part.abs().max()) <= 1e-6 * float(back[name].abs().max()) for name, part in again.residual.items())


@given(rounds=st.lists(vectors, min_size=1, max_size=12), dtype=dtypes)
@settings(deadline=None)
def test_what_is_lost_comes_with_the_next_rounds(rounds: list[list[float]], dtype: UpdateDtype) -> None:
    """The sum of what was decoded differs from the sum of the deltas by the last residual, half a step, and no more."""
    wanted = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    sent = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    residual: dict[str, Tensor] = {}
    for vector in rounds:
        delta = update_of(vector)
        encoded = encode_update(delta, dtype, residual=residual)
        last = {name: delta[name] + residual.get(name, torch.zeros(())) for name in delta}
        residual = encoded.residual
        for name, tensor in decode_update(encoded.data, SHAPES, dtype).items():
            wanted[name] += delta[name].double()
            sent[name] += tensor.double()
    for name in SHAPES:
        float32 = len(rounds) * 2.0**-23 * 4200
        assert bool(((wanted[name] - sent[name]).abs() <= quantum(last[name], dtype) + float32).all())


def test_without_feedback_small_steps_would_be_lost() -> None:
    """Beside one large value int8 rounds the others to zero, in every round; with the residual they arrive."""
    delta, residual = update_of([1.0] + [0.001] * (SIZE - 1)), dict[str, Tensor]()
    alone, fed = torch.zeros(2, 3), torch.zeros(2, 3)
    for _ in range(100):
        alone += decode_update(encode_update(delta, "int8").data, SHAPES, "int8")["b"]
        encoded = encode_update(delta, "int8", residual=residual)
        residual = encoded.residual
        fed += decode_update(encoded.data, SHAPES, "int8")["b"]
    assert float(alone.flatten()[1]) == 0.0
    assert float(fed.flatten()[1]) == pytest.approx(0.1, abs=1 / 127)


def test_zeros_stay_zeros() -> None:
    for dtype in COMPRESSED:
        back = decode_update(encode_update(update_of([0.0] * SIZE), dtype).data, SHAPES, dtype)
        assert all(not tensor.any() and tensor.isfinite().all() for tensor in back.values())


@pytest.mark.parametrize("dtype", COMPRESSED)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.4e38])
def test_what_cannot_be_sent_is_refused_and_not_carried_on(dtype: UpdateDtype, value: float) -> None:
    encoded = encode_update(update_of([1.0] * (SIZE - 1) + [value]), dtype)
    if not math.isfinite(value) or dtype == "bfloat16":
        with pytest.raises(AdapterError, match="NaN or infinity"):
            decode_update(encoded.data, SHAPES, dtype)
    assert all(bool(part.isfinite().all()) for part in encoded.residual.values())
    good = encode_update(update_of([1.0] * SIZE), dtype, residual=encoded.residual)
    assert all(bool(part.isfinite().all()) for part in decode_update(good.data, SHAPES, dtype).values())


def test_float32_is_the_plain_adapter() -> None:
    update = update_of([0.1 * i for i in range(SIZE)])
    encoded = encode_update(update, "float32", salt="s")
    assert encoded.data == adapters.encode(update, salt="s")
    assert encoded.residual == {}
    assert all(torch.equal(part, update[name]) for name, part in decode_update(encoded.data, SHAPES, "float32").items())


@pytest.mark.parametrize("dtype", COMPRESSED)
def test_the_salt_makes_equal_updates_differ_on_the_wire_only(dtype: UpdateDtype) -> None:
    update = update_of([0.5] * SIZE)
    one, two = (encode_update(update, dtype, salt=salt) for salt in ("one", "two"))
    assert one.data != two.data
    assert one.residual.keys() == two.residual.keys()
    assert torch.equal(decode_update(one.data, SHAPES, dtype)["a"], decode_update(two.data, SHAPES, dtype)["a"])


def test_the_bytes_are_a_fraction_of_both_factors_in_float32() -> None:
    """A rank-8 adapter on query and value of one layer with a head, as the demo trains it."""
    factors_b = {f"layer.5.{name}.lora_B.weight": torch.randn(384, 8) for name in ("query", "value")}
    factors_a = {f"layer.5.{name}.lora_A.weight": torch.randn(8, 384) for name in ("query", "value")}
    head = {"head.weight": torch.randn(2, 384), "head.bias": torch.randn(2)}
    peft = len(adapters.encode(factors_a | factors_b | head))
    trained = factors_b | head
    sizes = {dtype: len(encode_update(trained, dtype).data) / peft for dtype in COMPRESSED}
    assert sizes["bfloat16"] < 0.3
    assert sizes["int8"] < 0.15


# --- untrusted bytes ---


def sealed(data: bytes) -> bytes:
    """Bytes with a right hash, as a malicious site would make them."""
    return data[:8] + hashlib.sha256(data[40:]).digest() + data[40:]


def int8_bytes(*, steps: list[float] | None = None, first: int | None = None) -> bytes:
    data = bytearray(encode_update(update_of([1.0] * SIZE), "int8").data)
    if steps is not None:
        data[72 : 72 + 12] = np.array(steps, "<f4").tobytes()
    if first is not None:
        data[84:85] = first.to_bytes(1, "little", signed=True)
    return sealed(bytes(data))


GOOD = {dtype: encode_update(update_of([1.0] * SIZE), dtype).data for dtype in COMPRESSED}


class Huge(bytes):
    """Claims ten gigabytes without having them; to look inside would be a fault."""

    def __len__(self) -> int:
        return 10 * 2**30

    def startswith(self, *_: object) -> bool:  # type: ignore[override]
        raise AssertionError("read before the length was checked")

    def __getitem__(self, *_: object) -> bytes:  # type: ignore[override]
        raise AssertionError("read before the length was checked")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has 0 bytes, expected exactly 95 in int8"),
        (Huge(), "10,737,418,240 bytes, expected exactly"),
        (pickle.dumps(update_of([1.0] * SIZE)), "expected exactly"),
        (adapters.encode(update_of([1.0] * SIZE)), "expected exactly"),
        (GOOD["bfloat16"], "expected exactly"),
        (GOOD["int8"] + b"x", "expected exactly"),
        (GOOD["int8"][:-1], "expected exactly"),
        (b"x" * len(GOOD["int8"]), "do not start like an update in int8"),
        (GOOD["int8"][:-1] + b"\x01", "SHA-256 does not match"),
        (sealed(GOOD["int8"][:60] + b"\0" + GOOD["int8"][61:]), "of other tensors"),
        (int8_bytes(first=-128), "value -128"),
        (int8_bytes(steps=[math.nan, 1.0, 1.0]), "scales hold NaN or infinity"),
        (int8_bytes(steps=[1.0, math.inf, 1.0]), "scales hold NaN or infinity"),
        (int8_bytes(steps=[1.0, 1.0, 0.0]), "scales go from 0 to 1"),
        (int8_bytes(steps=[1.0, -1.0, 1.0]), "scales go from -1 to 1"),
        (int8_bytes(steps=[1e-40, 1.0, 1.0]), "scales go from 9.99"),
        (int8_bytes(steps=[3e38, 1.0, 1.0]), "to 3e.38, expected positive, normal"),
    ],
)
def test_anything_else_is_refused_with_what_was_found(data: bytes, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        decode_update(data, SHAPES, "int8")


def test_the_crafted_bytes_would_pass_unchanged() -> None:
    assert int8_bytes() == GOOD["int8"]
    assert decode_update(int8_bytes(steps=[2.0, 1.0, 1.0], first=-127), SHAPES, "int8")["a"][0] == -254.0


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80, 0x7F81])
def test_no_bfloat16_that_is_not_finite_passes(bits: int) -> None:
    with pytest.raises(AdapterError, match="NaN or infinity"):
        decode_update(sealed(GOOD["bfloat16"][:-2] + bits.to_bytes(2, "little")), SHAPES, "bfloat16")


def test_no_encoding_passes_for_another() -> None:
    for found in ("float32", "bfloat16", "int8"):
        data = encode_update(update_of([1.0] * SIZE), found).data  # type: ignore[arg-type]
        for expected in ("float32", "bfloat16", "int8"):
            if found != expected:
                with pytest.raises(AdapterError):
                    decode_update(data, SHAPES, expected)  # type: ignore[arg-type]


@given(data=st.binary(max_size=200), dtype=dtypes)
def test_random_bytes_never_pass_nor_crash(data: bytes, dtype: UpdateDtype) -> None:
    body = data.ljust(len(GOOD[dtype]), b"\0")[: len(GOOD[dtype])]
    for candidate in (data, body, GOOD[dtype][:8] + body[8:]):
        with pytest.raises(AdapterError):
            decode_update(candidate, SHAPES, dtype)
    # With a right hash and fingerprint only numbers are left to choose; then it passes, finite, or is refused.
    crafted = sealed(GOOD[dtype][:72] + body[72:])
    with contextlib.suppress(AdapterError):
        assert all(bool(part.isfinite().all()) for part in decode_update(crafted, SHAPES, dtype).values())


@given(data=st.data(), dtype=dtypes)
def test_every_changed_byte_is_found(data: st.DataObject, dtype: UpdateDtype) -> None:
    place = data.draw(st.integers(0, len(GOOD[dtype]) - 1))
    flip = data.draw(st.integers(1, 255))
    changed = GOOD[dtype][:place] + bytes([GOOD[dtype][place] ^ flip]) + GOOD[dtype][place + 1 :]
    with pytest.raises(AdapterError):
        decode_update(changed, shapes_of(update_of([0.0] * SIZE)), dtype)
