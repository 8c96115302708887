"""Places in a text that are to be masked, and the placeholders that take their place.

Formal guarantees (tests: tests/shared/data/deidentify/test_spans.py)
    * Every character inside any span is gone from the masked text: overlapping spans are united, none is dropped.
    * Every character outside all spans stays as it is, in its order.
    * The result does not depend on the order in which spans were found.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

Kind = Literal["account", "id", "email", "url", "ip", "phone", "date", "age", "name", "number"]

KINDS: tuple[Kind, ...] = ("account", "id", "email", "url", "ip", "phone", "date", "age", "name", "number")
"""In the order of priority: of overlapping spans of equal length, the earlier kind names the placeholder."""

_PRIORITY = {kind: rank for rank, kind in enumerate(KINDS)}


class Span(NamedTuple):
    """The characters `start` up to, not including, `end`."""

    start: int
    end: int
    kind: Kind


def placeholder(kind: Kind) -> str:
    """Return what stands for a masked span, such as "[NAME]"."""
    return f"[{kind.upper()}]"


def united(spans: Iterable[Span]) -> list[Span]:
    """Return disjoint spans that cover the same characters, in order; the longest of overlapping ones gives the kind.

    Of equally long ones the kind with the higher priority wins. Spans that only touch stay apart.
    """
    found: list[Span] = []
    group: list[Span] = []
    end = -1
    for span in sorted(span for span in set(spans) if span.start < span.end):
        if group and span.start >= end:
            found.append(_union(group))
            group = []
        group.append(span)
        end = max(end, span.end) if len(group) > 1 else span.end
    if group:
        found.append(_union(group))
    return found


def masked(text: str, spans: Iterable[Span]) -> str:
    """Return `text` with a placeholder for each of the spans, which are disjoint and in order; see `united`."""
    parts, last = [], 0
    for span in spans:
        parts += [text[last : span.start], placeholder(span.kind)]
        last = span.end
    return "".join([*parts, text[last:]])


def _union(group: list[Span]) -> Span:
    winner = min(group, key=lambda span: (span.start - span.end, _PRIORITY[span.kind]))
    return Span(min(span.start for span in group), max(span.end for span in group), winner.kind)
