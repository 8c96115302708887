"""What a user calls a model: NAME, NAME@ALIAS, NAME:N, or the path of a run or model folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from server.registry.history import CHAMPION, History, HistoryEntry
from server.registry.policy import POLICY_FILE
from server.registry.registry import Registry, Version, registry_folder
from shared.errors import ConfigError, RegistryError, TrustError, excerpt
from shared.job.parsing import nearest

_REFERENCE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})(?:@([A-Za-z0-9][A-Za-z0-9._-]{0,63})|:([1-9][0-9]{0,8}))?")


@dataclass(frozen=True)
class Resolved:
    """The model that a reference leads to.

    Attributes:
        folder: the model's folder.
        version: None of a path.
        how: which one it is, for people.
    """

    folder: Path
    version: Version | None
    how: str


def resolve(registry: Registry, reference: str, *, retired: bool = False, history: History | None = None) -> Resolved:
    """Return the model that a reference names; whoever uses a version verifies it (`server.registry.verification.verify`).

    A name that is registered is that model, even if a folder here has the same name; `./NAME` is the folder.

    Args:
        retired: whether a retired version is found too; only NAME:N can name one.
        history: of the model, where the caller has read it already.

    Raises:
        ConfigError: if there is no such model, version or alias; the nearest one is said.
        RegistryError: if the version is retired, also if its path is given.
        TrustError: if signatures or history do not hold.
    """
    parts = _REFERENCE.fullmatch(reference)
    path = Path(reference).expanduser()
    if parts is None and (inside := _place_of(path)) is not None:
        # Whoever names a version by its path gets what its name leads to: verified, and not if it is retired.
        root, name, number = inside
        own = registry if registry.path.resolve() == root else registry.at(root)
        return resolve(own, f"{name}:{number}", retired=retired)
    if parts is None or (parts[1] not in registry.names() and parts[2] is None and parts[3] is None and path.is_dir()):
        if not path.is_dir():
            raise ConfigError(
                f"{excerpt(reference)} is neither a folder nor a name of a model; expected NAME, NAME@ALIAS, NAME:N, or the "
                "path of a run or model folder."
            )
        return Resolved(path, None, f"the folder {path}")
    name, alias, number = parts.groups()
    numbers = registry.require(name)
    if number is not None and retired:
        version, how = registry.version(name, int(number)), ""
    else:
        history = history or registry.history(name)
        version, how = _version(registry, numbers, history, alias, number)
        if not retired:
            history.require_in_use(version.number)
    return Resolved(version.model, version, f"{version.reference}{how}")


def _place_of(path: Path) -> tuple[Path, str, str] | None:
    """Return the registry in which a version lies, its name and number, if a path leads there; None of other paths."""
    found = path.resolve()
    for folder in (found, found.parent):
        model, root = folder.parent.parent, folder.parent.parent.parent
        reference = _REFERENCE.fullmatch(f"{model.name}:{folder.name}")
        if folder.parent.name == "versions" and reference is not None and (root / POLICY_FILE).exists():
            return root, model.name, folder.name
    return None


def require_version(registry: Registry, reference: str, *, retired: bool = False) -> Version:
    """Return the version that a reference names; otherwise as `resolve`.

    Raises:
        ConfigError: also if it is the path of a folder.
    """
    found = resolve(registry, reference, retired=retired).version
    if found is None:
        raise ConfigError(f"{excerpt(reference)} is a folder, no version of a model; add it with: silotune models add")
    return found


def _version(
    registry: Registry, numbers: Sequence[int], history: History, alias: str | None, number: str | None
) -> tuple[Version, str]:
    """Return the version, and how it was chosen."""
    name = history.model
    if number is not None:
        return registry.version(name, int(number)), ""
    if alias is None and not history.aliases:
        usable = [one for one in numbers if one not in history.retired]
        if not usable:
            raise RegistryError(f"every version of {name} is retired; add a new one.")
        return registry.version(name, usable[-1]), ", the newest; none was promoted yet"
    wanted = alias or CHAMPION
    if wanted not in history.aliases:
        raise ConfigError(f"{name} has no {wanted!r}; {nearest(wanted, list(history.aliases) or ['none yet'])}")
    return _named(registry, name, history.aliases[wanted]), f", its {wanted}"


def _named(registry: Registry, name: str, entry: HistoryEntry) -> Version:
    """Return the version that an entry of the history promoted, and no other that stands in its place."""
    version = registry.version(name, entry.version)
    if version.manifest_sha256 != entry.manifest_sha256:
        raise TrustError(
            f"{version.reference} is not the one that was promoted to {entry.alias!r} on {entry.at[:10]}: its manifest is "
            "another. Do not use it; restore the version from a backup, or promote another."
        )
    return version


def resolve_verified(registry: Registry, reference: str) -> Resolved:
    """Return what a reference leads to; a version is verified. Raises as `resolve` and `server.registry.verification.verify`."""
    from server.registry.verification import verify

    found = resolve(registry, reference)
    if found.version is not None:
        verify(found.version)
    return found


def verified_folder(
    reference: str, registry: Path | None, policy: Path | None, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Return the folder of the model that a reference names, for commands that load it; a version is verified before.

    A path that leads nowhere is returned as it is: whoever reads a folder says best what is missing in it.

    Args:
        say: is told which version was taken.

    Raises:
        SilotuneError: as `resolve` and `server.registry.verification.verify`.
    """
    place = Registry(registry_folder(registry), policy)
    named = _REFERENCE.fullmatch(reference) is not None
    if not (place.path.is_dir() if named else _place_of(Path(reference).expanduser())):
        return Path(reference)
    found = resolve_verified(place, reference)
    if found.version is not None:
        say(f"taking {found.how}, verified")
    return found.folder
