"""The version of Silotune that is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def silotune_version() -> str:
    """Return the installed version of Silotune."""
    try:
        return version("silotune")
    except PackageNotFoundError:
        return "unknown"
