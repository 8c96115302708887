"""`registry.toml`: whose signatures a registry of models trusts, and what may be promoted there.

It is the root of all trust here, so whoever may write it decides. Where others may write the registry's folder, keep the file
out of their reach and name it (`--policy`, SILOTUNE_MODELS_POLICY).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from shared.job.parsing import Section, load_toml, parse
from shared.job.values import Epsilon, Name, Value
from shared.trust.keystore import check_unwritable
from shared.trust.signing import VerifyKey, check_keys

POLICY_FILE = "registry.toml"

Role = Literal["signer", "officer", "former"]


class RegistryPolicy(Section):
    """`registry.toml`: the sections of keys have a name of your choice and the public key, `ed25519:...`."""

    promotion_by: tuple[Literal["signer", "officer"], ...] = Field(default=("officer",), min_length=1)
    """Whose keys may set an alias or retire a version."""
    open_aliases: tuple[Name, ...] = ("candidate",)
    """Aliases that signers may set as well, within the same limits."""
    max_epsilon: Epsilon | None = None
    """A version is promoted only if its statement has an epsilon, and one that is not larger: of two promises the first."""
    max_epsilon_alone: Epsilon | None = None
    """Likewise of the second promise of a run whose sites share the noise, if secure aggregation fails. None: `max_epsilon`."""
    min_metric: Value | None = None
    """A version is promoted only if its primary metric is at least this good: not below it; of a loss or an error, not above.
    One that was measured on another model, as int8 exports have it from their run, does not count."""
    require_audit: Literal["any", "consistent"] | None = None
    """A version is promoted only if its run was audited: with whatever result but `violated`, or with `consistent`."""
    signers: dict[Name, str] = Field(min_length=1)
    """Who may add versions."""
    officers: dict[Name, str] = {}
    """Who may promote and retire; see `promotion_by`."""
    former: dict[Name, str] = {}
    """Keys of people who left: what they signed stays valid, whatever their role was, and these commands sign nothing new with
    them. Nothing tells when something was signed: whoever keeps such a key and may write the folder can still sign for it. A key
    that was stolen does not belong here: leave it out, and add and promote anew."""

    @field_validator("signers", "officers", "former")
    @classmethod
    def _check_keys(cls, keys: dict[str, str]) -> dict[str, str]:
        check_keys(keys)
        return keys

    def name_of(self, key: VerifyKey, *roles: Role) -> str | None:
        """Return the name of whoever has this key and one of the roles; None if nobody does."""
        tables: Mapping[Role, dict[str, str]] = {
            "signer": self.signers,
            "officer": self.officers,
            "former": self.former,
        }
        pairs = ((name, text) for role in roles for name, text in tables[role].items())
        return next((name for name, text in pairs if VerifyKey.parse(text) == key), None)

    def may_set(self, alias: str | None) -> tuple[Role, ...]:
        """Return whose keys may set `alias`, or (None) retire a version."""
        return tuple(dict.fromkeys((*self.promotion_by, *(("signer",) if alias in self.open_aliases else ()))))


def load_policy(path: Path) -> RegistryPolicy:
    """Read `registry.toml`.

    Raises:
        ConfigError: if it is missing or not valid.
        TrustError: if everybody may write it.
    """
    check_unwritable(path, "says whose signatures are trusted,")
    return parse(RegistryPolicy, load_toml(path), source=str(path))


def policy_template(name: str, key: VerifyKey) -> str:
    """Return the `registry.toml` of a new registry, whose first signer is its officer as well."""
    return f"""# Whose signatures this registry trusts, and what may be promoted. docs/settings.md explains every key.
promotion_by = ["officer"]  # who may set aliases and retire versions
open_aliases = ["candidate"]  # a signer may set these as well
# max_epsilon = 8.0
# max_epsilon_alone = 8.0  # the second promise of shared noise
# min_metric = 0.8
# require_audit = "any"

[signers]  # may add versions
"{name}" = "{key.text}"

[officers]  # make a key with: silotune pki signer OFFICER
"{name}" = "{key.text}"
"""
