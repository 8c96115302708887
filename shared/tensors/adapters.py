"""Adapters as bytes: bounded, hashed, typed; never pickle.

Guarantee: `decode` returns exactly the expected names, shapes and dtype with finite values, or raises
(test: tests/shared/tensors/test_adapters.py). The length is checked before anything is parsed.

Layout: magic (8 bytes), SHA-256 of the rest (32 bytes), then a safetensors file. Uploads carry a random salt, because
a coordinator that stores equal messages once would otherwise reveal that two sites sent the same update.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from shared.errors import AdapterError

MAGIC = b"SILOTUN1"
_DIGEST = hashlib.sha256().digest_size
_HEADER_BYTES_PER_TENSOR = 512
_HEADER_BYTES = 4096

Shapes = Mapping[str, torch.Size]


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shape of every tensor by name."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def encode(tensors: Mapping[str, Tensor], *, salt: str = "") -> bytes:
    """Return `tensors` as bytes, in float32.

    Args:
        tensors: finite tensors by name, any device and floating dtype.
        salt: random text that makes equal adapters differ on the wire.
    """
    plain = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in sorted(tensors.items())}
    payload = save(plain, metadata={"salt": salt})
    return b"".join((MAGIC, hashlib.sha256(payload).digest(), payload))


def decode(data: bytes, expected: Shapes) -> dict[str, Tensor]:
    """Return the tensors in `data`, float32 on the CPU.

    Args:
        data: bytes from an untrusted sender.
        expected: names and shapes; nothing more and nothing less is accepted.

    Raises:
        AdapterError: saying what was found and what was expected.
    """
    check_length(len(data), expected)
    if not data.startswith(MAGIC):
        raise AdapterError("the bytes do not start like an adapter; was something else sent?")
    digest, payload = data[len(MAGIC) : len(MAGIC) + _DIGEST], data[len(MAGIC) + _DIGEST :]
    if hashlib.sha256(payload).digest() != digest:
        raise AdapterError("the adapter's SHA-256 does not match its content; it was cut or changed on the way.")
    try:
        tensors: dict[str, Tensor] = load(payload)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"the adapter is not a valid safetensors file: {error}") from None
    check(tensors, expected)
    return tensors


def check_length(num_bytes: int, expected: Shapes) -> None:
    """Raise `AdapterError` if no adapter of these shapes can have so many bytes; read nothing before this passed."""
    limit = (
        len(MAGIC) + _DIGEST + _HEADER_BYTES + sum(4 * s.numel() + _HEADER_BYTES_PER_TENSOR for s in expected.values())
    )
    if num_bytes > limit:
        raise AdapterError(
            f"the adapter has {num_bytes:,} bytes, more than the {limit:,} that this job's adapter can have; was it made "
            "for another job?"
        )


def check(tensors: Mapping[str, Tensor], expected: Shapes) -> None:
    """Raise `AdapterError` unless names, shapes, dtype (float32) and finiteness are as expected."""
    if missing := sorted(expected.keys() - tensors.keys()):
        raise AdapterError(
            f"the adapter lacks {len(missing)} tensors, first {missing[0]!r}; was it made for another job?"
        )
    if extra := sorted(tensors.keys() - expected.keys()):
        raise AdapterError(
            f"the adapter has {len(extra)} unknown tensors, first {extra[0]!r}; was it made for another job?"
        )
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise AdapterError(f"tensor {name!r} has dtype {tensor.dtype}, expected torch.float32.")
        if tensor.shape != expected[name]:
            raise AdapterError(f"tensor {name!r} has shape {tuple(tensor.shape)}, expected {tuple(expected[name])}.")
        # NumPy's, for it starts no threads for so little; they would wait for each other on a busy machine.
        if not np.isfinite(tensor.numpy()).all():
            raise AdapterError(f"tensor {name!r} holds NaN or infinity; the update is refused.")
