"""What a message may be made of, and that little of it is looked at."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from shared.link.bounds import MOST_PARTS, check_parts
from shared.link.envelope import open_envelope
from shared.link.frames import Array, Envelope, LinkError, Record, bytes_of


def envelope(*records: Record) -> bytes:
    return bytes_of(Envelope(1, "train", "1", 0.0, 1.0, list(records), []))


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"\x32\x00" * 2**21, f"more than {MOST_PARTS:,} parts"),  # records
        (b"\x3a\x00" * 2**21, f"more than {MOST_PARTS:,} parts"),  # failures
        (b"\x32\x80\x80\x80\x02" + b"\x22\x00" * 2**21, f"more than {MOST_PARTS:,} parts"),  # arrays of one record
        (b"\x92\x03\x00" * 2**20, f"more than {MOST_PARTS:,} parts"),  # fields that nobody knows
        (
            envelope(Record("a", "array", b"", [Array("w", "float32", [1] * 100, "x", b"")])),
            "a list of numbers came of 100",
        ),
        (b"\x33", "cannot be read"),  # a group, which proto3 does not have
        (b"\xff" * 11, "cut off or cannot be read"),
        (b"\x32", "cut off or cannot be read"),
    ],
)
def test_too_much_is_refused_before_anything_is_made_of_it(payload: bytes, why: str) -> None:
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(LinkError, match=why):
        open_envelope(payload)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert time.process_time() - began < 5  # a fifth of a second


def test_an_update_of_many_matrices_passes_and_its_bytes_are_not_looked_at() -> None:
    arrays = [Array(f"layer.{n}", "int8", [8, 4096, 3], "numpy.ndarray", bytes(2**14)) for n in range(2_000)]
    payload = envelope(Record("update", "array", b"", arrays), Record("facts", "config", b"12", []))
    check_parts(Envelope, payload)
    assert len(open_envelope(payload).records[0].arrays) == 2_000
