"""`aliases.json` of a model: every promotion and retirement, signed and chained; where an alias points follows from them.

Formal guarantees (tests: tests/server/registry/test_attacks.py)
    * An entry that was changed, removed, added, moved or signed by a key without the role is found whenever the history is read
      (test_a_rewritten_history_is_found). A role that was taken back since is no fault where somebody with the role of
      `promotion_by` has signed a later entry, and so all before it (test_rules_that_were_tightened_hold_from_then_on).
    * An alias names a version by the hash of its manifest, so that another one in its folder is found
      (test_a_swapped_version_is_found).

Not guaranteed: that the newest entries were not cut off, which leaves an older state of the folder, as a backup would.
`silotune models aliases` prints number and hash of the last entry, to be noted elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from server.registry.policy import RegistryPolicy
from shared.errors import RegistryError, TrustError
from shared.files.atomic import write_json
from shared.files.json_files import canonical_json, read_object
from shared.trust.signing import Purpose, SignedDocument, SigningKey, VerifyKey

HISTORY_FILE = "aliases.json"
CHAMPION = "champion"

_FORMAT = "silotune-model-aliases/1"


class HistoryEntry(SignedDocument):
    """One promotion or retirement; `at` and `why` are the signer's own words.

    Attributes:
        model: name of the model.
        number: of this entry, from 1.
        action: "promote" or "retire".
        alias: that is set; None of a retirement.
        former: the version that the alias named before; None if none.
        version: the one that is promoted or retired.
        manifest_sha256: of its manifest.
        previous: SHA-256 of the entry before; None of the first.
        at: ISO 8601, UTC.
        why: for people.
    """

    purpose = Purpose.MODEL_ALIAS
    what = "an entry of a model's history"
    advice = "Do not use the model's aliases; restore the file from a backup."
    most_bytes = 1 << 16
    header = MappingProxyType({"format": "silotune-model-history/1"})

    format: Literal["silotune-model-history/1"]
    model: str
    number: int
    action: Literal["promote", "retire"]
    alias: str | None
    former: int | None
    version: int
    manifest_sha256: str
    previous: str | None
    at: str
    why: str

    @property
    def sha256(self) -> str:
        """Of the whole entry, its signature included."""
        return hashlib.sha256(canonical_json(self.model_dump()).encode()).hexdigest()


@dataclass(frozen=True)
class History:
    """All entries of one model, oldest first, each checked."""

    path: Path
    model: str
    entries: tuple[HistoryEntry, ...] = ()

    @property
    def aliases(self) -> dict[str, HistoryEntry]:
        """The entry that set each alias."""
        return {entry.alias: entry for entry in self.entries if entry.alias is not None}

    @property
    def retired(self) -> dict[int, HistoryEntry]:
        """The entry that retired each version."""
        return {entry.version: entry for entry in self.entries if entry.action == "retire"}

    def aliases_of(self, version: int) -> tuple[str, ...]:
        """Return the aliases that name `version`, the champion first."""
        found = [alias for alias, entry in self.aliases.items() if entry.version == version]
        return tuple(sorted(found, key=lambda alias: (alias != CHAMPION, alias)))

    def require_in_use(self, version: int) -> None:
        """Raise `RegistryError` if a version is retired."""
        entry = self.retired.get(version)
        if entry is not None:
            reason = f": {entry.why}" if entry.why else ""
            raise RegistryError(
                f"{self.model}:{version} was retired on {entry.at[:10]}{reason}. Choose another version."
            )

    def with_entry(self, key: SigningKey, **fields: Any) -> History:
        """Return the history with one more entry, signed by `key`; see `HistoryEntry` for the fields."""
        last = self.entries[-1].sha256 if self.entries else None
        entry = HistoryEntry.sign(key, model=self.model, number=len(self.entries) + 1, previous=last, **fields)
        return History(self.path, self.model, (*self.entries, entry))

    def write(self) -> None:
        """Write the file, whole or not at all."""
        write_json(self.path, {"format": _FORMAT, "entries": [entry.model_dump() for entry in self.entries]})


def read_history(path: Path, model: str, policy: RegistryPolicy) -> History:
    """Read and check the history of `model`; one that was never written is empty.

    Raises:
        TrustError: if an entry is not one, was changed, or is out of its order, or its signer lacks the role.
        RunError: if the file cannot be read.
    """
    if not path.exists():
        return History(path, model)
    content = read_object(path)
    raw = content.get("entries")
    if content.keys() != {"format", "entries"} or content["format"] != _FORMAT or not isinstance(raw, list):
        raise TrustError(f"{path} is not the history of a model; restore it from a backup.")
    history = History(path, model)
    without_role: str | None = None
    for number, fields in enumerate(raw, start=1):
        source = f"entry {number} of {path}"
        entry = HistoryEntry.open(canonical_json(fields).encode(), source=source)
        if problem := _problem(entry, history, policy):
            raise TrustError(f"{source} {problem}. {HistoryEntry.advice}")
        signer = VerifyKey.parse(entry.signer)
        if policy.name_of(signer, *policy.promotion_by, "former") is not None:
            without_role = None
        elif policy.name_of(signer, *policy.may_set(entry.alias)) is None:
            without_role = f"{source} was signed by {entry.signer}, whose key may not do that here"
        history = History(path, model, (*history.entries, entry))
    if without_role is not None:
        raise TrustError(
            f"{without_role}. If registry.toml was tightened since, put the rule back, let somebody of promotion_by set an "
            f"alias, and tighten it then. If not: {HistoryEntry.advice}"
        )
    return history


def _problem(entry: HistoryEntry, before: History, policy: RegistryPolicy) -> str | None:
    """Return why an entry with a good signature cannot stand after those before it."""
    entries: Sequence[HistoryEntry] = before.entries
    if entry.model != before.model:
        return f"was signed for the model {entry.model!r}"
    if entry.number != len(entries) + 1 or entry.previous != (entries[-1].sha256 if entries else None):
        return "does not follow the entry before it: the history was rewritten"
    if policy.name_of(VerifyKey.parse(entry.signer), "signer", "officer", "former") is None:
        return f"was signed by {entry.signer}, whose key may not do that here"
    current = before.aliases.get(entry.alias) if entry.alias is not None else None
    if (entry.action == "promote") != (entry.alias is not None) or entry.former != (current and current.version):
        return "does not say what it changes"
    if entry.version in before.retired:
        return f"is about version {entry.version}, which was retired before"
    if entry.action == "retire" and before.aliases_of(entry.version):
        return f"retires version {entry.version}, which an alias names"
    return None
