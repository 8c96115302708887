"""An unexpected error is told by kind and place: its text may quote a record. What is told steers no terminal."""

from __future__ import annotations

from shared.errors import place_of, printable


def test_kind_and_place_are_told_and_no_text() -> None:
    def inner() -> None:
        float("PRIVATE")

    try:
        try:
            inner()
        except ValueError as error:
            raise KeyError("PRIVATE") from error
    except KeyError as error:
        told = place_of(error)
    assert "PRIVATE" not in told
    assert told.startswith("KeyError\n")
    assert "\nled to by ValueError\n" in told
    assert "test_errors.py, line " in told
    assert told.endswith("in inner")


def test_control_characters_are_not_printed() -> None:
    assert printable("a\x1b[2J\u202eb\nc") == "a\ufffd[2J\ufffdb\ufffdc"
    assert printable("a\x1bb\nc", "?", lines=True) == "a?b\nc"
