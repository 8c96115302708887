"""Flower's messages as the payload of a parcel, by Flower's public classes only; who sent it is never read from it.

Guarantee: `open_envelope` returns or raises `LinkError`, whatever a peer sent (tests: tests/shared/link/test_envelope.py).
Nothing is unpickled, and no array is made of an array's bytes.
"""

from __future__ import annotations

import math
import time
from typing import Any

from flwr.app import DEFAULT_TTL, Array, ArrayRecord, ConfigRecord, Error, Message, Metadata, MetricRecord, RecordDict

from shared.link import frames
from shared.link.bounds import check_parts
from shared.link.frames import Envelope, Failure, LinkError

COORDINATOR_NODE_ID = 1
"""Flower's number for whoever asks."""
EXPIRED, UNREADABLE, LOST, FAILED = 3, 4, 5, 100
"""Flower's numbers of errors: the last is the site's, the others are the link's."""

_SMALL_RECORDS: dict[str, Any] = {"config": ConfigRecord, "metric": MetricRecord}
_MOST_REASON = 1000


def message(content: RecordDict | Error, metadata: Metadata) -> Message:
    """Return a message with metadata of ours; Flower's own constructor asks for the identity of a process of Flower's."""
    return Message(content, metadata=metadata)  # type: ignore[call-overload,no-any-return,unused-ignore]


def request(
    content: RecordDict,
    *,
    run_id: int,
    message_id: str,
    message_type: str,
    node: int,
    group_id: str,
    ttl: float | None = None,
) -> Message:
    """Return a message of the coordinator to a node, as a Grid makes it."""
    return message(
        content,
        Metadata(
            run_id=run_id,
            message_id=message_id,
            src_node_id=COORDINATOR_NODE_ID,
            dst_node_id=node,
            reply_to_message_id="",
            group_id=group_id,
            created_at=time.time(),
            ttl=DEFAULT_TTL if ttl is None else ttl,
            message_type=message_type,
        ),
    )


def seal_envelope(sent: Message) -> bytes:
    """Return a message as bytes, without its addresses and ids."""
    facts = sent.metadata
    return frames.bytes_of(
        Envelope(
            run_id=facts.run_id,
            message_type=facts.message_type,
            group_id=facts.group_id,
            created_at=facts.created_at,
            ttl=facts.ttl,
            records=[] if sent.has_error() else [_record(name, sent.content[name]) for name in sent.content],
            failure=[Failure(sent.error.code, sent.error.reason or "")] if sent.has_error() else [],
        )
    )


def open_envelope(payload: bytes) -> Envelope:
    """Return what a payload holds.

    Raises:
        LinkError: if it is no envelope, or one of too many parts.
    """
    check_parts(Envelope, payload)
    return frames.message_of(Envelope, payload)


def content_of(envelope: Envelope) -> RecordDict | Error:
    """Return the content of a message.

    Raises:
        LinkError: if it cannot be read.
    """
    if envelope.failure:
        failed = envelope.failure[0]
        return Error(code=min(failed.code, 2**31 - 1), reason=failed.reason[:_MOST_REASON])
    try:
        return RecordDict({record.name: _open_record(record) for record in envelope.records})
    except Exception as error:  # Flower's decoders promise nothing about what they raise on bytes of a stranger
        raise LinkError(f"a record came that cannot be read ({type(error).__name__}).") from None


def request_of(payload: bytes, *, message_id: bytes, node: int) -> Message:
    """Return the request that a site received.

    Raises:
        LinkError: if it cannot be read.
    """
    envelope = open_envelope(payload)
    if not (math.isfinite(envelope.created_at) and math.isfinite(envelope.ttl)):
        raise LinkError("a message came without a readable time.")
    try:
        metadata = Metadata(
            run_id=envelope.run_id,
            message_id=message_id.hex(),
            src_node_id=COORDINATOR_NODE_ID,
            dst_node_id=node,
            reply_to_message_id="",
            group_id=envelope.group_id,
            created_at=envelope.created_at,
            ttl=envelope.ttl,
            message_type=envelope.message_type,
        )
    except ValueError:
        raise LinkError("a message came of a type that Flower does not know.") from None
    return message(content_of(envelope), metadata)


def _record(name: str, record: ArrayRecord | ConfigRecord | MetricRecord) -> frames.Record:
    if isinstance(record, ArrayRecord):
        arrays = [frames.Array(key, a.dtype, list(a.shape), a.stype, a.data) for key, a in record.items()]
        return frames.Record(name, "array", b"", arrays)
    kind = "config" if isinstance(record, ConfigRecord) else "metric"
    return frames.Record(name, kind, record.deflate(), [])


def _open_record(record: frames.Record) -> ArrayRecord | ConfigRecord | MetricRecord:
    if record.kind == "array":
        # The arrays stay bytes until somebody asks Flower for their numbers.
        return ArrayRecord(
            {a.name: Array(dtype=a.dtype, shape=tuple(a.shape), stype=a.stype, data=a.data) for a in record.arrays}
        )
    opened: ConfigRecord | MetricRecord = _SMALL_RECORDS[record.kind].inflate(record.body)
    return opened
