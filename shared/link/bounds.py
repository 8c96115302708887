"""How much a message may be made of, told from its bytes before any object is made of them.

Two bytes are enough for an empty record or array, and each would become Python objects a hundred times as large.

Guarantee (tests: tests/shared/link/test_bounds.py): what `check_parts` lets pass has at most `MOST_PARTS` fields on all levels
together and no list of numbers longer than `MOST_PACKED_BYTES`; it takes time by the number of fields, not by the bytes.

Format: https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

import typing

from shared.link.frames import MESSAGES, LinkError

MOST_PARTS = 100_000
"""An adapter of 32 layers and 14 matrices each has about 2,500."""
MOST_PACKED_BYTES = 80
"""The shape of an array: eight numbers of ten bytes."""

_LISTS: dict[type[object], dict[int, type[object]]] = {
    message: {
        number: typing.get_args(kind)[0]
        for number, kind in enumerate(typing.get_type_hints(message).values(), start=1)
        if typing.get_origin(kind) is list
    }
    for message in MESSAGES
}
"""What the fields of a message are lists of, by their number."""

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5


def check_parts(kind: type[object], data: bytes) -> None:
    """Check that `data` may be read as a message of this `kind`, a dataclass of `shared.link.frames`.

    Raises:
        LinkError: if it has too many parts, or is no message at all.
    """
    _count(kind, memoryview(data), MOST_PARTS)


def _count(kind: type[object], data: memoryview, left: int) -> int:
    """Return how many more fields there may be after those of `data`."""
    lists, at = _LISTS[kind], 0
    while at < len(data):
        if left == 0:
            raise LinkError(f"a message came of more than {MOST_PARTS:,} parts.")
        left -= 1
        tag, at = _varint(data, at)
        if tag & 7 == _VARINT:
            _, at = _varint(data, at)
            continue
        if tag & 7 == _LENGTH:
            size, at = _varint(data, at)
            item = lists.get(tag >> 3)
            if item is int and size > MOST_PACKED_BYTES:
                raise LinkError(f"a list of numbers came of {size} bytes; expected {MOST_PACKED_BYTES} at most.")
            if item is not None and item is not int:
                left = _count(item, data[at : at + size], left)
        elif tag & 7 in (_EIGHT_BYTES, _FOUR_BYTES):
            size = 8 if tag & 7 == _EIGHT_BYTES else 4
        else:
            raise LinkError("a message came that cannot be read.")
        at += size
    return left


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for place in range(10):
        if at == len(data):
            break
        value |= (data[at] & 0x7F) << (7 * place)
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise LinkError("a message came that is cut off or cannot be read.")
