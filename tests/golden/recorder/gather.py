"""Turns what a run left on disk into text files that can be compared and read.

Guarantee: every file is represented. Text is copied as it is, a database becomes its rows, tensors
become names with hashes, all other bytes their size and SHA-256; a list names each path with its mode.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .wire import safetensors_facts

LISTING = "files.txt"


def gather(folder: Path, into: Path, *, without: tuple[str, ...] = ()) -> None:
    """Represent every file below `folder` in `into`; `without` names top-level entries that are inputs."""
    listing = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if name.parts[0] in without:
            continue
        mode = path.lstat().st_mode
        listing.append(f"{stat.filemode(mode)} {name}\n")
        if stat.S_ISREG(mode):
            _represent(path, into / name)
    into.mkdir(parents=True, exist_ok=True)
    (into / LISTING).write_text("".join(listing), encoding="utf-8")


def _represent(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    data = path.read_bytes()
    if data.startswith(b"SQLite format 3\0"):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(path)]
        target.with_name(target.name + ".jsonl").write_text("".join(lines), encoding="utf-8")
        return
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        facts |= safetensors_facts(data)
        target.with_name(target.name + ".json").write_text(
            json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        return
    target.write_bytes(data)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the schema, the version and all rows of an SQLite database."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
        for pragma in ("application_id", "user_version"):
            yield {pragma: database.execute(f"PRAGMA {pragma}").fetchone()[0]}
        tables = database.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
        for name, definition in tables:
            yield {"name": name, "sql": definition}
        for name, definition in tables:
            if definition is None or not definition.startswith("CREATE TABLE"):
                continue
            found = database.execute(f'SELECT * FROM "{name}" ORDER BY rowid')  # noqa: S608
            columns = [column[0] for column in found.description]
            for row in found:
                values = [v.hex() if isinstance(v, bytes) else v for v in row]
                yield {"table": name} | dict(zip(columns, values, strict=True))
    database.close()
