"""A site's update as bytes: float32, or compressed, with what compression loses carried into the site's next round.

Guarantees (tests: tests/shared/wire/test_updates.py)
    * `decode_update` returns exactly the expected names and shapes, finite, of exactly the encoding that the job names, or
      raises. The length of a compressed update follows from the job alone and is checked before anything is read; there is no
      header to parse.
    * Encoding reads the given numbers only and draws none, so it is post-processing: of a noised update it costs nothing.
    * Error feedback: over any number of rounds, the decoded updates add up to the deltas but for the last residual, which is
      at most half a step of the encoding (test_what_is_lost_comes_with_the_next_rounds).

Encodings: `float32`, see `shared.tensors.adapters`; `bfloat16`, rounded to the nearest, relative error up to 2**-8; `int8`, one
step for each tensor, a 127th of its largest value. One step for each row would cost more bytes than it gains: a row of a LoRA
factor is as short as the rank.

Layout of the compressed ones: magic (8 bytes, names the encoding), SHA-256 of the rest (32), salt (16), fingerprint of names and
shapes (16), the steps in float32 (`int8` only), the values; tensors in the order of their names, little endian.

Sources: 1-bit SGD with error feedback, Seide et al. 2014; why it converges, Karimireddy et al. 2019 (arXiv:1901.09847).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import AdapterError
from shared.files.json_files import canonical_json
from shared.job.federation import UpdateDtype
from shared.tensors import adapters
from shared.tensors.adapters import Shapes

_MAGIC: dict[UpdateDtype, bytes] = {"bfloat16": b"SILOTUB1", "int8": b"SILOTUI1"}
_DIGEST = hashlib.sha256().digest_size
_SALT = _FINGERPRINT = 16
_BYTES = {"bfloat16": 2, "int8": 1}
_BYTES_PER_STEP = 4
_LARGEST_INT8 = 127
_SMALLEST_STEP = float(np.finfo(np.float32).tiny)  # below it float32 loses its precision, and at last the step
_LARGEST_STEP = float(np.finfo(np.float32).max) / (_LARGEST_INT8 + 1)


@dataclass(frozen=True, kw_only=True)
class EncodedUpdate:
    """What leaves the site, and what it lacks.

    Attributes:
        data: the bytes.
        residual: given delta and residual minus what `data` says, by name; to be kept as the moments of the optimiser are.
    """

    data: bytes
    residual: dict[str, Tensor] = field(default_factory=dict)


def encode_update(
    delta: Mapping[str, Tensor], dtype: UpdateDtype, *, residual: Mapping[str, Tensor] | None = None, salt: str = ""
) -> EncodedUpdate:
    """Return `delta` plus `residual` as bytes.

    Args:
        delta: trained values minus start values. NaN and infinity are sent as such, for the coordinator to refuse.
        dtype: the encoding that the job names.
        residual: what earlier rounds lacked, or None.
        salt: random text that makes equal updates differ on the wire.
    """
    if dtype == "float32":
        return EncodedUpdate(data=adapters.encode(delta, salt=salt))
    steps: list[np.float32] = []
    parts: list[bytes] = []
    lost: dict[str, Tensor] = {}
    for name, tensor in sorted(delta.items()):
        wanted = tensor.detach().to("cpu", torch.float32).contiguous()
        if residual:
            wanted = wanted + residual[name]
        if dtype == "bfloat16":
            rounded = wanted.to(torch.bfloat16)
            parts.append(rounded.view(torch.int16).numpy().astype("<i2", copy=False).tobytes())
            sent = rounded.float()
        else:
            values = wanted.numpy().reshape(-1)
            step = _step(values)
            steps.append(step)
            whole = np.zeros(values.shape, np.int8)
            if np.isfinite(step):
                whole = np.rint(values / step).clip(-_LARGEST_INT8, _LARGEST_INT8).astype(np.int8)
            parts.append(whole.tobytes())
            sent = torch.from_numpy(whole * step).view(wanted.shape)
        # What cannot be sent at all is not carried on: the update is refused, and the next one starts afresh.
        lost[name] = (wanted - sent).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    payload = b"".join(
        (
            hashlib.sha256(salt.encode()).digest()[:_SALT],
            _fingerprint(adapters.shapes_of(delta)),
            np.array(steps, "<f4").tobytes(),
            *parts,
        )
    )
    return EncodedUpdate(data=b"".join((_MAGIC[dtype], hashlib.sha256(payload).digest(), payload)), residual=lost)


def decode_update(data: bytes, expected: Shapes, dtype: UpdateDtype) -> dict[str, Tensor]:
    """Return the tensors in `data`, float32 on the CPU.

    Args:
        data: bytes from an untrusted sender.
        expected: names and shapes; nothing more and nothing less is accepted.
        dtype: the encoding that the job names; no other is accepted.

    Raises:
        AdapterError: saying what was found and what was expected.
    """
    if dtype == "float32":
        return adapters.decode(data, expected)
    size = sum(shape.numel() for shape in expected.values())
    num_steps = len(expected) if dtype == "int8" else 0
    begin = len(_MAGIC[dtype]) + _DIGEST
    steps_at = begin + _SALT + _FINGERPRINT
    values_at = steps_at + num_steps * _BYTES_PER_STEP
    length = values_at + size * _BYTES[dtype]
    if len(data) != length:
        raise AdapterError(
            f"the update has {len(data):,} bytes, expected exactly {length:,} in {dtype}; was it made for another job?"
        )
    if not data.startswith(_MAGIC[dtype]):
        raise AdapterError(f"the bytes do not start like an update in {dtype}, which federation.update_dtype names.")
    if hashlib.sha256(memoryview(data)[begin:]).digest() != data[len(_MAGIC[dtype]) : begin]:
        raise AdapterError("the update's SHA-256 does not match its content; it was cut or changed on the way.")
    if data[begin + _SALT : steps_at] != _fingerprint(expected):
        raise AdapterError("the update is of other tensors than this job's; was it made for another job?")
    steps = np.frombuffer(data, np.dtype("<f4"), num_steps, steps_at)
    flat: NDArray[np.float32]
    if dtype == "int8":
        coded = np.frombuffer(data, np.int8, size, values_at)
        _check_int8(steps, coded)
        flat = coded.astype(np.float32)
    else:
        # The upper half of a float32.
        flat = (np.frombuffer(data, np.dtype("<u2"), size, values_at).astype(np.uint32) << 16).view(np.float32)
    tensors, place = {}, 0
    for index, name in enumerate(sorted(expected)):
        part = flat[place : place + expected[name].numel()]
        if num_steps:
            part *= steps[index]
        tensors[name] = torch.from_numpy(part).view(expected[name])
        place += len(part)
    if not np.isfinite(flat).all():
        raise AdapterError("the update holds NaN or infinity; it is refused.")
    return tensors


def _step(values: NDArray[np.float32]) -> np.float32:
    """Return the step of one tensor, NaN if a value is not finite."""
    largest = np.abs(values).max(initial=0.0)
    return np.float32(max(largest / _LARGEST_INT8, _SMALLEST_STEP) if np.isfinite(largest) else np.nan)


def _check_int8(steps: NDArray[np.float32], coded: NDArray[np.int8]) -> None:
    if not np.isfinite(steps).all():
        raise AdapterError("the update's scales hold NaN or infinity; it is refused.")
    if steps.size and not _SMALLEST_STEP <= float(steps.min()) <= float(steps.max()) <= _LARGEST_STEP:
        raise AdapterError(
            f"the update's scales go from {float(steps.min()):g} to {float(steps.max()):g}, expected positive, normal ones."
        )
    if coded.size and int(coded.min()) < -_LARGEST_INT8:
        raise AdapterError(f"the update holds the value -128, expected from -{_LARGEST_INT8} to {_LARGEST_INT8}.")


def _fingerprint(shapes: Shapes) -> bytes:
    text = canonical_json([[name, list(shape)] for name, shape in sorted(shapes.items())])
    return hashlib.sha256(text.encode()).digest()[:_FINGERPRINT]
