"""Notes every message between coordinator and sites as Flower's own class makes it, whatever carries it.

The product's code moves, `flwr.app.Message` does not. Guarantee: a note names kind, sender,
receiver and group, and every value of the content: numbers and texts as they are, bytes by size
and SHA-256, an adapter's tensors each by name, type, shape and SHA-256.
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

from flwr.app import ArrayRecord, Message

_LONGEST_MARK = 128
"""Bytes that an adapter may have before what safetensors wrote."""


def note_messages(notes: list[dict[str, Any]]) -> None:
    """Add a note to `notes` for each message that is made in this process from now on."""
    made = Message.__init__

    @functools.wraps(made)
    def noted(self: Message, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        notes.append(described(self))

    Message.__init__ = noted  # type: ignore[method-assign]


def described(message: Message) -> dict[str, Any]:
    """Return all of `message` but its identifiers and times, which Flower gives."""
    facts = message.metadata
    note: dict[str, Any] = {
        "type": facts.message_type,
        "from": facts.src_node_id,
        "to": facts.dst_node_id,
        "group": facts.group_id,
    }
    if message.has_error():
        return note | {"error": {"code": message.error.code, "reason": message.error.reason}}
    content = {name: _record(record) for name, record in message.content.items()}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return note | {"sha256": digest, "content": content}


def _record(record: Any) -> dict[str, Any]:
    if isinstance(record, ArrayRecord):
        return {name: _array(array) for name, array in record.items()}
    return {key: _value(value) for key, value in record.items()}


def _array(array: Any) -> dict[str, Any]:
    sha256 = hashlib.sha256(array.data).hexdigest()
    return {"dtype": array.dtype, "shape": list(array.shape), "sha256": sha256}


def _value(value: Any) -> Any:
    """Return a value of a record for a person to read; a list of numbers stays one."""
    if isinstance(value, bytes):
        sha256 = hashlib.sha256(value).hexdigest()
        return {"bytes": len(value), "sha256": sha256, **safetensors_facts(value)}
    if isinstance(value, str) and value.startswith("{"):
        try:
            return {"json": json.loads(value), "sha256": hashlib.sha256(value.encode()).hexdigest()}
        except ValueError:
            return value
    return value


def safetensors_facts(data: bytes) -> dict[str, Any]:
    """Return metadata and tensors of bytes in the safetensors format, after a short mark or not; else nothing."""
    start = data[:_LONGEST_MARK].find(b'{"')
    if start < 8:
        return {}
    size = int.from_bytes(data[start - 8 : start], "little")
    try:
        header = json.loads(data[start : start + size])
        body = data[start + size :]
        tensors = {
            name: {
                "dtype": facts["dtype"],
                "shape": facts["shape"],
                "sha256": hashlib.sha256(body[slice(*facts["data_offsets"])]).hexdigest(),
            }
            for name, facts in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {"metadata": _readable(header.get("__metadata__", {})), "tensors": tensors}


def _readable(metadata: dict[str, str]) -> dict[str, Any]:
    return {key: _value(text) for key, text in metadata.items()}
