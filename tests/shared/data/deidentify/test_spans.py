"""Overlapping spans become disjoint ones that cover the same characters."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.deidentify.spans import KINDS, Span, masked, placeholder, united

TEXT = "abcdefghijklmnopqrstuvwxyz"
SPANS = st.lists(
    st.builds(
        lambda start, length, kind: Span(start, min(start + length, len(TEXT)), kind),
        st.integers(0, len(TEXT)),
        st.integers(0, 8),
        st.sampled_from(KINDS),
    ),
    max_size=8,
)


@settings(max_examples=200, deadline=None)
@given(spans=SPANS, shuffle=st.randoms())
def test_the_same_characters_are_covered_whatever_the_order(spans: list[Span], shuffle: object) -> None:
    found = united(spans)
    covered = {i for span in spans for i in range(span.start, span.end)}
    assert [i for span in found for i in range(span.start, span.end)] == sorted(covered)  # disjoint, in order
    others = list(spans)
    shuffle.shuffle(others)  # type: ignore[attr-defined]
    assert united(others) == found
    kept = "".join(letter for i, letter in enumerate(TEXT) if i not in covered)
    left = masked(TEXT, found)
    for kind in KINDS:
        left = left.replace(placeholder(kind), "")
    assert left == kept


def test_the_longest_names_the_placeholder_then_the_priority() -> None:
    assert united([Span(0, 4, "number"), Span(3, 9, "name"), Span(8, 12, "date")]) == [Span(0, 12, "name")]
    assert united([Span(0, 4, "number"), Span(0, 4, "account")]) == [Span(0, 4, "account")]
    assert united([Span(0, 4, "date"), Span(4, 8, "date")]) == [Span(0, 4, "date"), Span(4, 8, "date")]


def test_placeholders() -> None:
    assert masked("Mr Smith, 5 May", [Span(3, 8, "name"), Span(10, 15, "date")]) == "Mr [NAME], [DATE]"
