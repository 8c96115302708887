"""Quotes in CSV: where a quoted cell ends, and whether one that goes on over lines has swallowed rows."""

from __future__ import annotations

from collections.abc import Sequence

from shared.data.text_lines import Line

_MANY_ROWS, _MANY_LINES = 20, 20
"""Of a file with one column, where no separator tells a row: so many rows of one line, and then one of so many lines."""
_MOST_VALUES, _LONGEST_VALUE = 32, 40


def quote_is_open(line: str, delimiter: str, inside: bool) -> bool:
    """Return whether a quoted cell goes on after this line of CSV; `inside` says that one was open before it."""
    if '"' not in line:
        return inside
    place = 0
    while True:
        if inside:
            end = line.find('"', place)
            if end < 0:
                return True
            if line.startswith('"', end + 1):
                place = end + 2
            else:
                inside, place = False, end + 1
        elif line.startswith('"', place) and (place == 0 or line[place - 1] == delimiter):
            inside, place = True, place + 1
        else:
            place = line.find(delimiter, place) + 1
            if place == 0:
                return False


class SeenRows:
    """What rows of the file look like, to tell a cell of many lines from a quote that swallowed rows."""

    def __init__(self) -> None:
        self._width = 0
        self._spaced = False
        self._rows = self._single = 0
        self._values: list[set[str] | None] = []

    def begin(self, header: Sequence[str]) -> None:
        self._width = len(header)
        self._spaced = any(name.startswith(" ") for name in header[1:])
        self._values = [set() for _ in header]

    def add(self, cells: Sequence[str], lines: int) -> None:
        self._rows += 1
        self._single += lines == 1
        for place, cell in enumerate(cells):
            values = self._values[place]
            if values is not None:
                if len(cell) > _LONGEST_VALUE or (len(values) >= _MOST_VALUES and cell not in values):
                    self._values[place] = None
                else:
                    values.add(cell)

    def swallowed(self, lines: Sequence[Line], delimiter: str) -> bool:
        """Return whether the lines of one quoted row look like rows themselves.

        A line does if it has as many cells as the header, without a space after a separator as prose has it, and known values in
        the columns that have few. It is a fault if half of the lines inside, two at least, look so; or if all do, and their
        values in such a column are known ones.
        """
        if self._width == 1:
            alone = self._rows >= _MANY_ROWS and self._single == self._rows
            return alone and len(lines) >= _MANY_LINES
        inner = [line.text for line in lines[1:-1] if line.text.strip()]
        like = sum(self._is_like_a_row(text, delimiter, certain=False) for text in inner)
        if like >= 2 and 2 * like >= len(inner):
            return True
        return all(self._is_like_a_row(line.text, delimiter, certain=True) for line in lines)

    def _is_like_a_row(self, text: str, delimiter: str, *, certain: bool) -> bool:
        cells = text.split(delimiter)
        if len(cells) != self._width or (not self._spaced and any(cell.startswith(" ") for cell in cells[1:])):
            return False
        few = [
            cell in values
            for values, cell in zip(self._values, cells, strict=True)
            if values is not None and self._rows >= 3 * len(values) and (certain or self._rows >= _MANY_ROWS)
        ]
        return all(few) and (bool(few) or not certain)
