"""Packs files that a version of the project left, for the test that later versions still open them.

Backbones are not packed: adapters only. The keys are those of a made-up consortium, drawn by the recorder.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

PARTS = {
    "images/scenario.toml": (),
    "images/run": (".lock", "data.jsonl", "rounds"),
    "images/stopped": (".lock",),
    "central/run": (".lock", "sites"),
    "persons/run": (".lock", "data.jsonl", "rounds"),
    "federation/coordinator": (".lock",),
    "federation/homes/clinic": (),
    "federation/clinic.csv": (),
    "federation/job.toml": (),
    "federation/test.csv": (),
    "federation/account.json": (),
    "federation/report.html": (),
    "federation/report.html.sig.json": (),
    "federation/site-report.html": (),
    "federation/site-report.html.sig.json": (),
}
"""What is packed of the recorder's kept files, and which names below it are left out."""


def pack(kept: Path, archive: Path) -> None:
    """Write what `PARTS` names of the folder `kept` (of `record --keep`) into an archive, tar.xz."""
    with tarfile.open(archive, "w:xz", preset=9) as packed:
        for part, left_out in PARTS.items():
            place = kept / part
            for path in [place, *sorted(place.rglob("*"))]:
                name = path.relative_to(kept)
                if {*path.relative_to(place).parts} & {*left_out}:
                    continue
                packed.add(path, arcname=str(name), recursive=False, filter=_nobodys)


def _nobodys(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out who packed it and when."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mtime = 0
    return entry
