"""Releases as a console keeps them: a site with years behind it has tens of thousands, and as objects each takes half a kilobyte.

Guarantee (tests: tests/client/console/test_releases.py): what is read is what was kept, whatever stands in it
(test_what_is_kept_is_read_as_it_was).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_ROW = struct.Struct("<q32s32sqqq32sdB")
"""Number of the entry, both times, number of the job, round, bytes, SHA-256, epsilon, and which of it there is."""
_SENT, _ROUND, _BYTES, _EPSILON, _REPEATED, _DECLINED = (1 << place for place in range(6))


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """An update or metrics that left the site, or is about to.

    Attributes:
        sequence: number of the entry that tells of it.
        time: when it was stored, UTC, ISO 8601.
        sent: when it left; None if no entry tells that it did.
        job, name: hash and name of the job; the name is what the coordinator calls it.
        round: of the job.
        bytes, sha256: of the release.
        epsilon: what the account had spent then; None for a job without privacy.
        repeated: it was made before and left again for the same request; it costs nothing.
        declined: the coordinator did not take it: it had it already, or wanted it no more.
    """

    sequence: int
    time: str
    sent: str | None
    job: str
    name: str
    round: int | None
    bytes: int | None
    sha256: str
    epsilon: float | None
    repeated: bool
    declined: bool = False


class PackedReleases:
    """Releases by number, from 0 on; those that no node writes like this are kept as they are."""

    def __init__(self) -> None:
        self._rows, self._others = bytearray(), dict[int, Release]()
        self._jobs, self._names = dict[tuple[str, str], int](), list[tuple[str, str]]()

    def __len__(self) -> int:
        return len(self._rows) // _ROW.size

    def __getitem__(self, number: int) -> Release:
        """Return one; `IndexError` if there is none."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._others.get(number) or self._unpacked(number)

    def append(self, one: Release) -> None:
        """Keep the next one."""
        self._rows += bytes(_ROW.size)
        self[len(self) - 1] = one

    def __setitem__(self, number: int, one: Release) -> None:
        """Keep another one in the place of one."""
        self._others.pop(number, None)
        try:
            _ROW.pack_into(self._rows, number * _ROW.size, *self._packed(one))
            found = self._unpacked(number)
        except (ValueError, OverflowError, struct.error):
            found = None
        if found != one:
            self._others[number] = one

    def _packed(self, one: Release) -> tuple[object, ...]:
        job = self._jobs.setdefault((one.job, one.name), len(self._names))
        if job == len(self._names):
            self._names.append((one.job, one.name))
        told = (
            (_SENT, one.sent is not None),
            (_ROUND, one.round is not None),
            (_BYTES, one.bytes is not None),
            (_EPSILON, one.epsilon is not None),
            (_REPEATED, one.repeated),
            (_DECLINED, one.declined),
        )
        return (
            one.sequence,
            one.time.encode(),
            (one.sent or "").encode(),
            job,
            one.round or 0,
            one.bytes or 0,
            bytes.fromhex(one.sha256),
            one.epsilon or 0.0,
            sum(flag for flag, is_set in told if is_set),
        )

    def _unpacked(self, number: int) -> Release:
        sequence, time, sent, job, round_number, size, sha256, epsilon, told = _ROW.unpack_from(
            self._rows, number * _ROW.size
        )
        of, name = self._names[job]
        return Release(
            sequence=sequence,
            time=_text(time),
            sent=_text(sent) if told & _SENT else None,
            job=of,
            name=name,
            round=round_number if told & _ROUND else None,
            bytes=size if told & _BYTES else None,
            sha256=sha256.hex(),
            epsilon=epsilon if told & _EPSILON else None,
            repeated=bool(told & _REPEATED),
            declined=bool(told & _DECLINED),
        )


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode()
