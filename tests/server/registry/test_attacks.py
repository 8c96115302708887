"""One test for each way in which somebody who can write into a registry's folder could pass off something else."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.registry.adding import add
from server.registry.history import HistoryEntry
from server.registry.manifest import Manifest
from server.registry.promotion import promote, retire
from server.registry.references import resolve
from server.registry.registry import Registry
from server.registry.verification import verify
from shared.errors import SilotuneError, TrustError
from shared.trust.signed_folder import file_hashes
from shared.trust.signing import SigningKey
from tests.server.registry.keys import OFFICER, SIGNER, STRANGER


def version_folder(registry: Registry, number: int = 1) -> Path:
    return registry.path / "films" / "versions" / str(number)


def sign_again(folder: Path, key: SigningKey, **changes: Any) -> None:
    """Sign the files as they are now, as somebody with a key would."""
    raw = json.loads((folder / "manifest.json").read_text())
    for name in ("signer", "signature", "format"):
        del raw[name]
    (folder / "manifest.json").unlink()
    fields = Manifest.model_validate(
        raw
        | changes
        | {"files": file_hashes(folder), "signer": key.verify_key.text, "signature": "", **Manifest.header}
    )
    plain = {
        name: getattr(fields, name) for name in Manifest.model_fields if name not in ("signer", "signature", "format")
    }
    (folder / "manifest.json").write_text(Manifest.sign(key, **plain).text())


def check(registry: Registry, number: int = 1) -> None:
    verify(registry.version("films", number))


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


FILES: dict[str, Callable[[Path], object]] = {
    "was changed": lambda model: append(model / "adapter" / "README.md"),
    "is missing": lambda model: (model / "evaluation.json").unlink(),
    "was added": lambda model: (model / "adapter" / "extra.json").write_text("{}"),
    "no plain file": lambda model: (model / "link.json").symlink_to("job.json"),
}


@pytest.mark.parametrize("what", FILES)
def test_any_changed_file_is_found(what: str, registry: Registry) -> None:
    check(registry)
    FILES[what](version_folder(registry) / "model")
    with pytest.raises(TrustError, match=what):
        check(registry)
    with pytest.raises(TrustError, match=what):
        promote(registry, registry.version("films", 1), "champion", OFFICER)


def test_an_edited_statement_is_found_whoever_signed_it(registry: Registry) -> None:
    path = version_folder(registry) / "model" / "statement.json"
    path.write_text(path.read_text().replace("(3.333, ", "(1.333, "))
    with pytest.raises(TrustError, match=r"statement\.json' was changed"):
        check(registry)
    sign_again(version_folder(registry), SIGNER)
    with pytest.raises(TrustError, match=r"claims \(1.333, 1e-05\) in its words; recomputed it is \(3.333"):
        check(registry)


@pytest.mark.parametrize("number", [1, 2])
def test_a_changed_manifest_is_found(number: int, registry: Registry) -> None:
    path = version_folder(registry, number) / "manifest.json"
    path.write_text(path.read_text().replace('"epsilon": 3.', '"epsilon": 1.'))
    with pytest.raises(TrustError, match="not one by"):
        check(registry, number)


def test_a_foreign_key_is_refused(registry: Registry) -> None:
    sign_again(version_folder(registry), STRANGER)
    with pytest.raises(TrustError, match="not among the signers"):
        check(registry)
    sign_again(version_folder(registry), OFFICER)  # the role counts, too
    with pytest.raises(TrustError, match="not among the signers"):
        check(registry)


def test_a_summary_that_says_more_than_the_files_is_found(registry: Registry) -> None:
    folder = version_folder(registry)
    summary = json.loads((folder / "manifest.json").read_text())["summary"]
    sign_again(folder, SIGNER, summary=summary | {"epsilon": 0.1})
    with pytest.raises(TrustError, match=r"does not say what its files do \(epsilon\)"):
        check(registry)


def test_a_swapped_version_is_found(registry: Registry, small_run: Path) -> None:
    one, two = version_folder(registry, 1), version_folder(registry, 2)
    promote(registry, registry.version("films", 1), "champion", OFFICER)
    # Another number.
    one.rename(one.with_name("9"))
    shutil.copytree(two, one)
    with pytest.raises(TrustError, match="the folder was swapped"):
        check(registry, 1)
    # Another name.
    shutil.rmtree(one)
    other = add(registry, small_run, "other", signer=("sam", SIGNER))
    shutil.copytree(other.path, one)
    with pytest.raises(TrustError, match="the folder was swapped"):
        check(registry, 1)
    # Another version that a trusted signer made for this very place after it was promoted.
    shutil.rmtree(one)
    one.with_name("9").rename(one)
    sign_again(one, SIGNER, note="another")
    check(registry, 1)
    with pytest.raises(TrustError, match="is not the one that was promoted"):
        resolve(registry, "films")
    # A link to a folder elsewhere.
    one.rename(registry.path / "elsewhere")
    one.symlink_to(registry.path / "elsewhere")
    with pytest.raises(TrustError, match="reached by a link"):
        check(registry, 1)


def rewritten(registry: Registry, change: Callable[[list[dict[str, Any]]], None]) -> None:
    path = registry.path / "films" / "aliases.json"
    content = json.loads(path.read_text())
    change(content["entries"])
    path.write_text(json.dumps(content))


def forged(key: SigningKey, **fields: Any) -> Callable[[list[dict[str, Any]]], None]:
    """Return what adds an entry that follows in every way, but is signed by `key`."""

    def change(entries: list[dict[str, Any]]) -> None:
        last = HistoryEntry.model_validate(entries[-1])
        known = {**last.model_dump(exclude={"signer", "signature", "format"}), "number": len(entries) + 1}
        entry = HistoryEntry.sign(key, **known | {"previous": last.sha256, "former": last.version, "why": ""} | fields)
        entries.append(entry.model_dump())

    return change


REWRITTEN: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "changed": (lambda entries: entries[0].update(version=2), "not one by"),
    "reason changed": (lambda entries: entries[1].update(why="because"), "not one by"),
    "first removed": (lambda entries: entries.pop(0), "history was rewritten"),
    "one removed": (lambda entries: entries.pop(1), "history was rewritten"),
    "moved": (lambda entries: entries.reverse(), "history was rewritten"),
    "repeated": (lambda entries: entries.append(entries[-1]), "history was rewritten"),
    "by a signer": (forged(SIGNER, version=2), "may not do that here"),
    "by a stranger": (forged(STRANGER, version=2), "may not do that here"),
    "of another model": (forged(OFFICER, version=2, model="other"), "for the model 'other'"),
    "retires the champion": (forged(OFFICER, action="retire", alias=None, former=None), "which an alias names"),
    "says another former one": (forged(OFFICER, former=None, version=2), "does not say what it changes"),
}


@pytest.mark.parametrize("case", REWRITTEN)
def test_a_rewritten_history_is_found(case: str, registry: Registry) -> None:
    for number in (1, 2, 1):
        promote(registry, registry.version("films", number), "champion", OFFICER)
    assert resolve(registry, "films").how == "films:1, its champion"
    change, message = REWRITTEN[case]
    rewritten(registry, change)
    with pytest.raises(SilotuneError, match=message):
        resolve(registry, "films")
    with pytest.raises(SilotuneError, match=message):
        promote(registry, registry.version("films", 2), "champion", OFFICER)


def test_rules_that_were_tightened_hold_from_then_on(registry: Registry) -> None:
    promote(registry, registry.version("films", 1), "candidate", SIGNER)
    open_rules = registry.policy_file.read_text()
    tight = open_rules.replace('open_aliases = ["candidate"]', "open_aliases = []")
    assert tight != open_rules
    registry.policy_file.write_text(tight)
    with pytest.raises(TrustError, match="put the rule back"):
        Registry(registry.path).history("films")
    registry.policy_file.write_text(open_rules)
    promote(registry, registry.version("films", 1), "champion", OFFICER)
    registry.policy_file.write_text(tight)
    found = Registry(registry.path)
    assert resolve(found, "films").how == "films:1, its champion"
    assert found.history("films").aliases.keys() == {"candidate", "champion"}
    rewritten(found, forged(SIGNER, alias="candidate", former=1, version=2))
    with pytest.raises(TrustError, match="may not do that here"):
        found.history("films")


def test_a_retired_version_does_not_come_back(registry: Registry) -> None:
    retire(registry, registry.version("films", 1), OFFICER)
    rewritten(registry, lambda entries: entries.clear())
    # Not guaranteed: an older state of the folder cannot be told from a backup, but by the hash of the last entry.
    assert not registry.history("films").retired
    retire(registry, registry.version("films", 1), OFFICER)
    sha256 = hashlib.sha256(registry.version("films", 1).manifest_sha256.encode()).hexdigest()
    rewritten(registry, forged(OFFICER, action="promote", alias="champion", former=None, manifest_sha256=sha256))
    with pytest.raises(TrustError, match="was retired before"):
        registry.history("films")


def test_a_policy_elsewhere_trusts_nobody_in_the_folder(registry: Registry, tmp_path: Path) -> None:
    policy = tmp_path / "trust.toml"
    policy.write_text(registry.policy_file.read_text())
    registry.policy_file.write_text(policy.read_text().replace(SIGNER.verify_key.text, STRANGER.verify_key.text))
    sign_again(version_folder(registry), STRANGER)
    check(Registry(registry.path))  # whoever may write registry.toml decides
    with pytest.raises(TrustError, match="not among the signers"):
        check(Registry(registry.path, policy))
