"""Where things lie below a folder that has a class of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class _Folder(Protocol):
    @property
    def path(self) -> Path: ...


class Below:
    """A path below an object's `path`: `config = Below("site.toml")` in its class."""

    def __init__(self, place: str) -> None:
        self._place = place

    def __get__(self, folder: _Folder, kind: type) -> Path:
        return folder.path / self._place
