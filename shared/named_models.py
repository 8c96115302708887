"""Which folder holds the model that a command is given: a path, or where a registry is installed, a name in it.

The registry is a room of `server`, which nothing here imports and which a site's image does not hold; so the command line says
at its start who resolves names (`resolve_by`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Resolver = Callable[[str, Path | None, Path | None], Path]


def _as_path(reference: str, registry: Path | None, policy: Path | None) -> Path:
    return Path(reference)


_resolver: Resolver = _as_path


def resolve_by(resolver: Resolver) -> None:
    """Let `resolver` find models: given a reference, a registry's folder and its policy it returns the folder of the model."""
    global _resolver
    _resolver = resolver


def model_folder(reference: str, registry: Path | None, policy: Path | None) -> Path:
    """Return the folder of a model; a version of a registry is verified first.

    Raises:
        SilotuneError: if there is no such version, or it does not verify.
    """
    return _resolver(reference, registry, policy)
