"""Aliases and retirement: who may, when, and what is written down of it.

Guarantees (tests: tests/server/registry/test_promotion.py)
    * Nothing is promoted that does not verify, that is retired, or that the policy's limits exclude, and nobody promotes whose
      key lacks the role (test_only_an_officer_promotes, test_limits_of_the_policy).
    * A promotion is one file replaced: a kill leaves the old state or the new one
      (test_adding.py: test_a_kill_leaves_the_old_state_or_the_new_one).
"""

from __future__ import annotations

import re
from datetime import UTC, datetime

from server.registry.history import History, HistoryEntry
from server.registry.manifest import Manifest
from server.registry.policy import RegistryPolicy
from server.registry.registry import Registry, Version, check_no_number
from server.registry.verification import verify
from shared.epsilons import as_set, rounded_up
from shared.errors import ConfigError, RegistryError, TrustError, excerpt
from shared.job.values import NAME_PATTERN
from shared.trust.signing import SigningKey

_MOST_REASON = 1000


def promote(
    registry: Registry,
    version: Version,
    alias: str,
    key: SigningKey,
    *,
    why: str = "",
    now: datetime | None = None,
) -> HistoryEntry:
    """Let `alias` name `version` from now on; to roll back, promote the former version.

    Raises:
        ConfigError: if the alias or the reason cannot be, or it names that version already.
        TrustError: if the version does not verify, or the key may not do that.
        RegistryError: if the version is retired, or the policy's limits exclude it.
    """
    if not re.fullmatch(NAME_PATTERN, alias):
        raise ConfigError(
            f"{excerpt(alias)} is no alias; expected 1 to 64 letters, digits, points, underscores and hyphens."
        )
    check_no_number(alias, "an alias")
    _check_reason(why)
    registry.trusted(key, *registry.policy.may_set(alias))
    verify(version)
    check_limits(version.manifest, registry.policy)
    with registry.locked(version.manifest.name):
        history = _history_with(registry, version)
        current = history.aliases.get(alias)
        if current is not None and current.version == version.number:
            raise ConfigError(f"{alias!r} names {version.reference} already.")
        former = current.version if current else None
        return _append(history, version, key, why, now, action="promote", alias=alias, former=former)


def retire(
    registry: Registry, version: Version, key: SigningKey, *, why: str = "", now: datetime | None = None
) -> HistoryEntry:
    """Take a version out of use for good: it can neither be promoted nor served any more.

    Raises:
        ConfigError: if the reason cannot be.
        TrustError: if the key may not do that.
        RegistryError: if it is retired already, or an alias names it.
    """
    _check_reason(why)
    registry.trusted(key, *registry.policy.may_set(None))
    with registry.locked(version.manifest.name):
        history = _history_with(registry, version)
        if named := history.aliases_of(version.number):
            raise RegistryError(
                f"{version.reference} is named by {', '.join(named)}; promote another version there first, then retire this one."
            )
        return _append(history, version, key, why, now, action="retire", alias=None, former=None)


def check_limits(manifest: Manifest, policy: RegistryPolicy) -> None:
    """Raise `RegistryError` if the policy of the registry excludes a version from promotion."""
    refused = list(_excluded(manifest, policy))
    if refused:
        raise RegistryError(f"{manifest.name}:{manifest.version} cannot be promoted here: {'; '.join(refused)}.")


def _excluded(manifest: Manifest, policy: RegistryPolicy) -> list[str]:
    found, summary = [], manifest.summary
    if policy.max_epsilon is not None and (summary.epsilon is None or summary.epsilon > policy.max_epsilon):
        epsilon = "no epsilon is stated" if summary.epsilon is None else f"epsilon is {rounded_up(summary.epsilon)}"
        found.append(f"{epsilon}, max_epsilon is {as_set(policy.max_epsilon)}")
    most_alone = policy.max_epsilon if policy.max_epsilon_alone is None else policy.max_epsilon_alone
    if most_alone is not None and summary.epsilon_alone is not None and summary.epsilon_alone > most_alone:
        key = "max_epsilon" if policy.max_epsilon_alone is None else "max_epsilon_alone"
        found.append(f"its epsilon alone is {rounded_up(summary.epsilon_alone)}, {key} is {as_set(most_alone)}")
    if policy.min_metric is not None:
        borrowed = manifest.parent is not None and manifest.parent.same_evaluation and summary.precision != "float32"
        good = summary.value is not None and (
            summary.value >= policy.min_metric if summary.higher_is_better else summary.value <= policy.min_metric
        )
        if borrowed or not good:
            value = "not measured" if summary.value is None or borrowed else f"{summary.value:.4g}"
            found.append(f"{summary.metric or 'its metric'} is {value}, min_metric is {policy.min_metric:g}")
    if policy.require_audit is not None:
        verdicts = {audit.rpartition(": ")[2] for audit in summary.audits}
        wanted = {"consistent"} if policy.require_audit == "consistent" else {"consistent", "inconclusive"}
        if not verdicts & wanted:
            kind = "audited with the verdict consistent" if policy.require_audit == "consistent" else "audited"
            found.append(f"its run was not {kind} before it was added (silotune audit RUN)")
    return found


def _check_reason(why: str) -> None:
    if len(why) > _MOST_REASON or not why.isprintable():
        raise ConfigError(f"the reason has {len(why):,} characters; expected up to {_MOST_REASON:,} printable ones.")


def _history_with(registry: Registry, version: Version) -> History:
    """Return the history to go on from, once nobody else changes it.

    Raises:
        TrustError: if the version is no longer the one that was verified.
        RegistryError: if it was retired.
    """
    name = version.manifest.name
    if registry.version(name, version.number).manifest_sha256 != version.manifest_sha256:
        raise TrustError(f"{version.reference} was exchanged meanwhile; look who writes there, and try again.")
    history = registry.history(name)
    history.require_in_use(version.number)
    return history


def _append(
    history: History, version: Version, key: SigningKey, why: str, now: datetime | None, **fields: object
) -> HistoryEntry:
    moment = (now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds")
    new = history.with_entry(
        key, **fields, version=version.number, manifest_sha256=version.manifest_sha256, at=moment, why=why
    )
    new.write()
    return new.entries[-1]
