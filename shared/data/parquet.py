"""Parquet files, whose rows have no lines: read batch by batch; what is damaged ends in one error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.data.rows import Row
from shared.errors import DataError


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Open a `pyarrow.parquet.ParquetFile`; `DataError` if it is none, or turns out to be damaged while it is read."""
    import pyarrow as pa  # slow to load, and only Parquet needs it
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeError, ValueError, OverflowError):
        raise DataError(
            f"{path} cannot be read as Parquet: it is cut short, damaged or another format. Copy it again and compare checksums "
            "with its source, or set the right format."
        ) from None


def parquet_columns(path: Path) -> list[str]:
    """Return the column names of a Parquet file."""
    with open_parquet(path) as file:
        return list(file.schema_arrow.names)


def read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a Parquet file with these columns."""
    number = 0
    with open_parquet(path) as file:
        for batch in file.iter_batches(columns=list(dict.fromkeys(columns)), batch_size=1024):
            for cells in batch.to_pylist():
                number += 1
                yield Row(number, None, cells)
