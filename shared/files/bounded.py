"""Files of keys, certificates and settings, read whole but never more than they can hold."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from shared.errors import TrustError

MOST_TEXT_BYTES = 1 << 26
"""Of settings, jobs and exports that somebody names: far beyond any, and read in less than a second."""


def read_bounded(path: Path, what: str, most_bytes: int) -> tuple[bytes, int]:
    """Return content and mode of one and the same open file; `what` names it in errors.

    Raises:
        TrustError: if it is missing, cannot be read, or is longer than `most_bytes`.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(most_bytes + 1)
    except FileNotFoundError:
        raise TrustError(f"the {what} {path} does not exist; check the path, or restore it from its backup.") from None
    except OSError as error:
        raise TrustError(
            f"the {what} {path} cannot be read ({error.strerror}); check the path and its permissions."
        ) from None
    if len(content) > most_bytes:
        raise TrustError(f"the {what} {path} is longer than {most_bytes} bytes; check the path.")
    return content, stat.S_IMODE(mode)


def read_named_text(path: Path, encoding: str = "utf-8") -> str:
    """Return the text of a file that somebody named, its lines ended by LF. It may be a pipe, or a device that has no end.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no text, or longer than `MOST_TEXT_BYTES`.
    """
    return read_named_bytes(path).decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def read_named_bytes(path: Path) -> bytes:
    """Return the content of such a file; raises as `read_named_text`."""
    with path.open("rb") as file:
        content = file.read(MOST_TEXT_BYTES + 1)
    if len(content) > MOST_TEXT_BYTES:
        raise ValueError(f"it is longer than {MOST_TEXT_BYTES:,} bytes")
    return content
