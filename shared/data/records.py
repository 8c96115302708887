"""A record of a file knows its row, so that an error can name it wherever the record has come to stand among others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class FileRecord(dict[str, Any]):
    """Role -> value of one row.

    Attributes:
        row: its number in the file, from 1, as `shared.data.rows.Row` counts.
    """

    __slots__ = ("row",)

    def __init__(self, values: Mapping[str, Any], *, row: int) -> None:
        super().__init__(values)
        self.row = row

    def without(self, role: str) -> FileRecord:
        """Return the record without one of its values."""
        return FileRecord({name: value for name, value in self.items() if name != role}, row=self.row)


def named(record: Mapping[str, Any], number: int) -> str:
    """Return what an error calls a record: its row where it is of a file, else its number among those given, from 1."""
    return f"row {record.row} of the file" if isinstance(record, FileRecord) else f"record {number}"
