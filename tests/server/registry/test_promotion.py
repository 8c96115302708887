"""Who may promote what, and that a retired version stays out of use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.registry.adding import add
from server.registry.manifest import Parent
from server.registry.policy import load_policy
from server.registry.promotion import check_limits, promote, retire
from server.registry.references import resolve
from server.registry.registry import Registry
from server.registry.showing import claim
from shared.errors import ConfigError, RegistryError, TrustError
from tests.server.registry.keys import OFFICER, SIGNER, STRANGER


def with_policy(registry: Registry, *lines: str) -> Registry:
    """Return the registry with these lines put before its policy's."""
    text = registry.policy_file.read_text().replace("promotion_by", "# promotion_by", 1)
    registry.policy_file.write_text("\n".join([*lines, text]))
    return Registry(registry.path)


def test_only_an_officer_promotes(registry: Registry) -> None:
    version = registry.version("films", 2)
    for key in (SIGNER, STRANGER):
        with pytest.raises(TrustError, match=r"does not name it below \[officers\]"):
            promote(registry, version, "champion", key)
        with pytest.raises(TrustError, match=r"below \[officers\]"):
            retire(registry, version, key)
    promote(registry, version, "candidate", SIGNER)  # an open alias
    with pytest.raises(TrustError, match=r"below \[officers\] or \[signers\]"):
        promote(registry, version, "candidate", STRANGER)
    promote(registry, version, "champion", OFFICER, why="better on rare films")
    entry = registry.history("films").entries[-1]
    assert (entry.alias, entry.former, entry.version, entry.why) == ("champion", None, 2, "better on rare films")


def test_the_policy_says_who_promotes(registry: Registry) -> None:
    registry = with_policy(registry, 'promotion_by = ["signer"]')
    promote(registry, registry.version("films", 2), "champion", SIGNER)
    with pytest.raises(TrustError, match=r"below \[signers\]"):
        promote(registry, registry.version("films", 1), "champion", OFFICER)


def test_who_left_signs_nothing_new(registry: Registry) -> None:
    promote(registry, registry.version("films", 1), "champion", OFFICER)
    text = registry.policy_file.read_text().replace("[officers]", "[former]")
    registry.policy_file.write_text(
        text.replace("[signers]", f'[officers]\nstan = "{STRANGER.verify_key.text}"\n[signers]')
    )
    registry = Registry(registry.path)
    assert resolve(registry, "films").how == "films:1, its champion"
    with pytest.raises(TrustError, match=r"below \[officers\]"):
        promote(registry, registry.version("films", 2), "champion", OFFICER)
    promote(registry, registry.version("films", 2), "champion", STRANGER)


def test_rolling_back_is_promoting_the_former_one(registry: Registry) -> None:
    for number in (1, 2, 1):
        promote(registry, registry.version("films", number), "champion", OFFICER)
    assert [(entry.former, entry.version) for entry in registry.history("films").entries] == [(None, 1), (1, 2), (2, 1)]
    with pytest.raises(ConfigError, match="names films:1 already"):
        promote(registry, registry.version("films", 1), "champion", OFFICER)


def test_a_retired_version_is_out_of_use(registry: Registry) -> None:
    one, two = (registry.version("films", number) for number in (1, 2))
    promote(registry, two, "champion", OFFICER)
    with pytest.raises(RegistryError, match="is named by champion"):
        retire(registry, two, OFFICER)
    promote(registry, one, "champion", OFFICER)
    retire(registry, two, OFFICER, why="a label was wrong")
    for act in (lambda: promote(registry, two, "champion", OFFICER), lambda: retire(registry, two, OFFICER)):
        with pytest.raises(RegistryError, match=r"films:2 was retired on .*: a label was wrong"):
            act()
    with pytest.raises(RegistryError, match="was retired"):
        resolve(registry, "films:2")
    assert resolve(registry, "films:2", retired=True).version == two


LIMITS = {
    "max_epsilon = 3.0": "epsilon is 3.333, max_epsilon is 3",
    "min_metric = 1.5": r"accuracy is [01][.\d]*, min_metric is 1.5",
    'require_audit = "any"': "its run was not audited before it was added",
    'require_audit = "consistent"': "not audited with the verdict consistent",
}


@pytest.mark.parametrize("line", LIMITS)
def test_limits_of_the_policy(line: str, registry: Registry) -> None:
    registry = with_policy(registry, line)
    with pytest.raises(RegistryError, match=LIMITS[line]):
        promote(registry, registry.version("films", 1), "champion", OFFICER)
    assert registry.history("films").entries == ()


def test_both_promises_and_only_measured_metrics_count(registry: Registry) -> None:
    manifest = registry.version("films", 1).manifest
    two_promises = manifest.model_copy(update={"summary": manifest.summary.model_copy(update={"epsilon_alone": 8.5})})
    parent = Parent(reference="films:1", manifest_sha256=None, model_sha256=None, same_evaluation=True)
    int8 = manifest.model_copy(
        update={"summary": manifest.summary.model_copy(update={"precision": "int8"}), "parent": parent}
    )
    line = "[signers]\nsam = '" + SIGNER.verify_key.text + "'\n"
    for text, found, problem in (
        ("max_epsilon = 4.0\n", two_promises, "its epsilon alone is 8.500, max_epsilon is 4"),
        ("max_epsilon = 4.0\nmax_epsilon_alone = 8.0\n", two_promises, "8.500, max_epsilon_alone is 8"),
        ("min_metric = 0.0\n", int8, "accuracy is not measured, min_metric is 0"),
    ):
        registry.policy_file.write_text(text + line)
        with pytest.raises(RegistryError, match=problem):
            check_limits(found, load_policy(registry.policy_file))
        check_limits(manifest, load_policy(registry.policy_file))
    registry.policy_file.write_text("max_epsilon = 4.0\nmax_epsilon_alone = 9.0\n" + line)
    check_limits(two_promises, load_policy(registry.policy_file))
    assert claim(two_promises.summary).startswith("epsilon 3.333 (alone 8.500), delta")


@pytest.mark.parametrize(("verdict", "wanted"), [("consistent", "consistent"), ("inconclusive", "any")])
def test_an_audit_of_the_run_counts(verdict: str, wanted: str, registry: Registry, run: Path) -> None:
    (run / "audit").mkdir()
    audit = {
        "tier": 1,
        "audited": "the run",
        "claim": 3.3,
        "delta": 1e-5,
        "alpha": 0.05,
        "lower_bound": 1.0,
        "ceiling": 3.0,
    }
    (run / "audit" / "tier1.json").write_text(json.dumps(audit | {"verdict": verdict}))
    version = add(registry, run, "films", signer=("sam", SIGNER))
    assert version.manifest.summary.audits == [f"tier 1: {verdict}"]
    registry = with_policy(registry, f'require_audit = "{wanted}"', "max_epsilon = 4.0", "min_metric = 0.0")
    promote(registry, version, "champion", OFFICER)
    (run / "audit" / "tier1.json").write_text(json.dumps(audit | {"verdict": "violated"}))
    with pytest.raises(TrustError, match="says: violated"):
        add(registry, run, "films", signer=("sam", SIGNER))


@pytest.mark.parametrize("alias", ["", "a b", "../x", "-x", "x" * 65])
def test_an_alias_is_a_name(alias: str, registry: Registry) -> None:
    with pytest.raises(ConfigError, match="is no alias"):
        promote(registry, registry.version("films", 1), alias, OFFICER)
    with pytest.raises(ConfigError, match="the reason has"):
        promote(registry, registry.version("films", 1), "champion", OFFICER, why="a\nb")


BAD_POLICIES = {
    "max_epsilom = 3": "unknown key 'max_epsilom'; did you mean 'max_epsilon'",
    "max_epsilon = -1": "max_epsilon",
    'promotion_by = ["anybody"]': "promotion_by",
    "[officers]\nmax = 'ed25519:abc'": "is not a public key",
}


@pytest.mark.parametrize("text", BAD_POLICIES)
def test_a_policy_that_is_none_is_refused(text: str, registry: Registry) -> None:
    registry.policy_file.write_text(f'{text}\n[signers]\nsam = "{SIGNER.verify_key.text}"\n')
    with pytest.raises(ConfigError, match=BAD_POLICIES[text]):
        Registry(registry.path).version("films", 1)
