"""Small files of keys and certificates, read whole but never more than they can hold."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from shared.errors import TrustError


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
