"""The folder of a registry: models by name, their versions, and who is trusted.

registry.toml                 whose signatures count, and what may be promoted
keys/registry.key             the registry's own key, where the first version was added without another
NAME/versions/N/model/        the model folder as it was added, and metrics.jsonl of its run
NAME/versions/N/manifest.json what it is, and every file's hash, signed; beside it signed_job.json, if the job was
NAME/aliases.json             every promotion and retirement, signed

Guarantees (tests: tests/server/registry/test_registry.py, test_attacks.py)
    * A version appears whole, with a number of its own, or not at all, whatever is killed and whoever adds at the same time.
    * What is handed out as a version was signed, for this name and number, by a key that the registry trusts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from server.registry.history import HISTORY_FILE, History, read_history
from server.registry.manifest import MANIFEST_FILE, Manifest
from server.registry.policy import POLICY_FILE, RegistryPolicy, Role, load_policy, policy_template
from shared.errors import ConfigError, TrustError, excerpt
from shared.files.atomic import exclusive_lock, write_text
from shared.files.outputs import check_own_folder, make_folder
from shared.files.places import Below
from shared.job.parsing import nearest
from shared.job.values import NAME_PATTERN
from shared.names import name_key
from shared.trust.keystore import passphrase_from_environment
from shared.trust.signed_file import plain_file
from shared.trust.signing import SigningKey, VerifyKey, load_signing_key, save_signing_key

SIGNED_JOB_FILE = "signed_job.json"
OWN_KEY = "this-registry"
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_OWN_FILES = (".lock", "keys")


@dataclass(frozen=True)
class Version:
    """One version, its manifest read and its signer trusted; the files are checked by `server.registry.verification`.

    Attributes:
        path: its folder.
        manifest_sha256: of the bytes of manifest.json.
        signer: the name of who signed it, by registry.toml.
    """

    path: Path
    manifest: Manifest
    manifest_sha256: str
    signer: str
    model = Below("model")
    signed_job = Below(SIGNED_JOB_FILE)

    @property
    def number(self) -> int:
        return self.manifest.version

    @property
    def reference(self) -> str:
        """NAME:N."""
        return f"{self.manifest.name}:{self.manifest.version}"


def registry_folder(path: Path | None) -> Path:
    """Return where a registry is: the folder that was named, or the one of this account."""
    return path or Path.home() / ".silotune" / "models"


def check_no_number(name: str, whose: str) -> None:
    """Raise `ConfigError` for a name of digits alone: NAME@2 and NAME:2 are too easily taken for each other."""
    if name.isdigit():
        raise ConfigError(
            f"{name!r} is no name of {whose}: digits alone are numbers of versions (NAME:{name}). Give a name with a letter, "
            f"such as v{name}."
        )


class Registry:
    """A folder of models; every call reads the files anew, but for the policy.

    Attributes:
        path: the folder.
    """

    policy_file = Below(POLICY_FILE)
    own_key = Below("keys/registry.key")

    def __init__(self, path: Path, policy: Path | None = None) -> None:
        self.path = path
        self._policy = policy

    def at(self, path: Path) -> Registry:
        """Return the registry of another folder, under the same policy where one was given; else under that folder's own."""
        return Registry(path, self._policy)

    @cached_property
    def policy(self) -> RegistryPolicy:
        """Whom it trusts, and what may be promoted.

        Raises:
            ConfigError: if there is no such file, or it is not valid.
        """
        if self._policy is None and not self.policy_file.exists():
            raise ConfigError(
                f"{self.path} is no registry of models yet (it has no {POLICY_FILE}). The first `silotune models add` makes it; "
                "or name another with --registry or SILOTUNE_MODELS."
            )
        return load_policy(self._policy or self.policy_file)

    def names(self) -> list[str]:
        """Return the names of all models, sorted."""
        if not self.path.is_dir():
            return []
        folders = (path for path in self.path.iterdir() if re.fullmatch(NAME_PATTERN, path.name))
        return sorted(path.name for path in folders if (path / "versions").is_dir() and self.numbers(path.name))

    def numbers(self, name: str) -> list[int]:
        """Return the numbers of a model's versions, rising."""
        folder = self._folder(name) / "versions"
        found = folder.iterdir() if folder.is_dir() else ()
        return sorted(int(path.name) for path in found if _NUMBER.fullmatch(path.name))

    def require(self, name: str) -> list[int]:
        """Return the numbers of a model's versions, which it has.

        Raises:
            ConfigError: if there is no such model; the nearest name is said.
        """
        if found := self.numbers(name):
            return found
        known = self.names()
        hint = nearest(name, known) if known else "it holds none yet; add one with: silotune models add RUN --name NAME"
        raise ConfigError(f"no model {excerpt(name)} in the registry {self.path}; {hint}")

    def version(self, name: str, number: int) -> Version:
        """Return a version, its manifest's signature and place checked.

        Raises:
            ConfigError: if there is none.
            TrustError: if the manifest was changed, is of another version, or its signer is not trusted.
        """
        if number not in self.require(name):
            known = ", ".join(map(str, self.numbers(name)))
            raise ConfigError(f"{name} has no version {number}; there are: {known}.")
        path = self._folder(name) / "versions" / str(number)
        if path.is_symlink() or path.parent.is_symlink() or path.parent.parent.is_symlink():
            raise TrustError(f"{path} is reached by a link, which no version is. Restore it from a backup.")
        source = path / MANIFEST_FILE
        with plain_file(source) as file:
            content = file.read(Manifest.most_bytes + 1)
        manifest = Manifest.open(content, source=str(source))
        if (manifest.name, manifest.version) != (name, number):
            raise TrustError(
                f"{source} is that of {manifest.name}:{manifest.version}, in the place of {name}:{number}: the folder was "
                f"swapped. {Manifest.advice}"
            )
        signer = self.policy.name_of(VerifyKey.parse(manifest.signer), "signer", "former")
        if signer is None:
            raise TrustError(
                f"{source} was signed by {manifest.signer}, which is not among the signers that {self._trust_file} names. "
                "Do not use this version; or have the key added there by whoever answers for the registry."
            )
        return Version(path, manifest, hashlib.sha256(content).hexdigest(), signer)

    def history(self, name: str) -> History:
        """Return every promotion and retirement of a model, checked; see `read_history` for the errors."""
        return read_history(self._folder(name) / HISTORY_FILE, name, self.policy)

    @contextmanager
    def locked(self, name: str) -> Iterator[Path]:
        """Wait until nobody else changes the model, and hold it; gives its folder, which is made if it is not there.

        Raises:
            ConfigError: if the name is none, or differs from another only in what people do not see.
            RunError: if the folder cannot be made.
        """
        folder = self._folder(name)
        make_folder(folder / "versions")
        with exclusive_lock(folder / ".lock", None):
            yield folder

    def check_name(self, name: str) -> None:
        """Raise `ConfigError` unless a model may be called `name`."""
        self._folder(name)
        check_no_number(name, "a model")
        if name in (POLICY_FILE, *_OWN_FILES):
            raise ConfigError(f"{name!r} is a file of the registry itself; choose another name.")
        alike = [other for other in self.names() if other != name and name_key(other) == name_key(name)]
        if alike:
            raise ConfigError(
                f"{name!r} is the name of the model {alike[0]!r} but for case; use that, or another name."
            )

    def found(self, signer: tuple[str, SigningKey] | None) -> SigningKey:
        """Make the registry if it is none yet, and return the key that signs versions.

        Args:
            signer: who signs; None: the registry's own key, which is made where the registry is.

        Raises:
            TrustError: the signer is not among the trusted ones, or the registry has no key of its own.
            RunError: something else lies in the folder.
        """
        check_own_folder(self.path, marker=POLICY_FILE, own=_OWN_FILES, what="registry of models")
        make_folder(self.path)
        passphrase = passphrase_from_environment()
        with exclusive_lock(self.path / ".lock", None):
            is_new = not self.policy_file.exists()
            if is_new and self._policy is None and signer is None and not self.own_key.exists():
                make_folder(self.own_key.parent)
                save_signing_key(self.own_key, SigningKey.generate(), passphrase)
            name, key = signer or (OWN_KEY, self._load_own(passphrase))
            if self._policy is not None:
                self.trusted(key, "signer")
            if is_new:
                shown = name if re.fullmatch(NAME_PATTERN, name) else "first-signer"
                text = self._policy.read_text("utf-8") if self._policy else policy_template(shown, key.verify_key)
                write_text(self.policy_file, text)
        self.trusted(key, "signer")
        return key

    def who(self, signer: tuple[str, SigningKey] | None) -> SigningKey:
        """Return the key of who acts; None: the registry's own."""
        return signer[1] if signer else self._load_own(passphrase_from_environment())

    def trusted(self, key: SigningKey, *roles: Role) -> None:
        """Raise `TrustError` unless `key` has one of the roles."""
        if self.policy.name_of(key.verify_key, *roles) is None:
            sections = " or ".join(f"[{role}s]" for role in roles)
            raise TrustError(
                f"the key {key.verify_key.text} may not do that: {self._trust_file} does not name it below {sections}. Whoever "
                "answers for the registry adds it there; or use a key that stands there."
            )

    @property
    def _trust_file(self) -> Path:
        return self._policy or self.policy_file

    def _load_own(self, passphrase: str | None) -> SigningKey:
        if not self.own_key.exists():
            raise TrustError(f"{self.path} has no key of its own; name the key file of who signs (--signer or --as).")
        return load_signing_key(self.own_key, passphrase)

    def _folder(self, name: str) -> Path:
        if not re.fullmatch(NAME_PATTERN, name):
            raise ConfigError(
                f"{excerpt(name)} is no name of a model; expected 1 to 64 letters (a to z, A to Z), digits, points, underscores "
                "and hyphens, a letter or digit first."
            )
        return self.path / name
