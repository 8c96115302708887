"""Helm charts: what they render fits Kubernetes, every value counts, wrong ones are refused, no secret is there."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from jsonschema import Draft202012Validator

from server.commands import coordinator_app
from server.serving.access.token_commands import tokens_app
from server.serving.commands import serve
from tests.charts.rendering import (
    CHARTS,
    COORDINATOR,
    NEEDED,
    SERVE,
    Refused,
    Values,
    at,
    leaves,
    load,
    merged,
    objects,
    one,
    pod,
    text,
)

BOTH = (SERVE, COORDINATOR)
MONITORED = {"enabled": True, "token": {"secret": "a"}, "ca": {"secret": "b"}, "serverName": "films.example.org"}
FULL: dict[str, Values] = {
    SERVE: {"replicas": 2, "tokens": {"accessMode": "ReadWriteMany"}, "serviceMonitor": MONITORED},
    COORDINATOR: {"metrics": {"enabled": True, "serviceMonitor": {"enabled": True}}},
}
KUBERNETES = ("1.30", "1.36")
# Set by the charts themselves, which give these options places in the pod.
PLACED = {"registry", "policy", "host", "port", "certificate", "key", "tokens"}
# A file: in a pod each version's first window is the baseline.
LEFT_OUT = {"drift-baseline"}


# What Kubernetes says


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("values", ["needed", "full"])
@pytest.mark.parametrize("chart", BOTH)
def test_kubernetes_takes_what_is_rendered(chart: str, values: str, version: str) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate")
    found = objects(chart, FULL[chart] if values == "full" else {})
    for each in found:
        if each["kind"] == "ServiceMonitor":  # of an operator
            assert each["apiVersion"] == "monitoring.coreos.com/v1"
        else:
            kubernetes.validate(each, version, strict=True)
    assert {"NetworkPolicy", "Service", "PersistentVolumeClaim"} <= {each["kind"] for each in found}
    assert ("ServiceMonitor" in {each["kind"] for each in found}) == (values == "full")


@pytest.mark.parametrize("chart", BOTH)
def test_the_version_is_that_of_the_project(chart: str) -> None:
    project = tomllib.loads((CHARTS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    described = load(chart, "Chart.yaml")
    assert (described["version"], described["appVersion"]) == (project["version"], project["version"])


# Values


def validator(chart: str) -> Draft202012Validator:
    schema = json.loads((CHARTS / chart / "values.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def faults(chart: str, values: Values) -> list[str]:
    given = merged(merged(load(chart, "values.yaml"), NEEDED[chart]), values)
    return [error.message for error in validator(chart).iter_errors(given)]


COMMON = {
    "image.repository": "example.org/silotune",
    "image.tag": "9.9.9",
    "image.digest": f"sha256:{'a' * 64}",
    "image.pullPolicy": "Always",
    "imagePullSecrets": [{"name": "pull"}],
    "resources.requests.cpu": "1500m",
    "resources.requests.memory": "3Gi",
    "resources.limits.cpu": "7",
    "resources.limits.memory": "9Gi",
    "temporary.size": "9Gi",
    "service.type": "LoadBalancer",
    "service.port": 8443,
    "service.annotations": {"example.org/lb": "internal"},
    "networkPolicy.enabled": False,
    "networkPolicy.from": [{"namespaceSelector": {"matchLabels": {"team": "wards"}}}],
    "podAnnotations": {"example.org/note": "kept"},
    "podLabels": {"team": "wards"},
    "nodeSelector": {"disk": "encrypted"},
    "tolerations": [{"key": "tuned", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
}
OTHERS: dict[str, Values] = {
    SERVE: {
        **COMMON,
        "model": "films@candidate",
        "models.claim": "other",
        "models.subPath": "models/of/wards",
        "policy.configMap": "other",
        "policy.key": "other.toml",
        "tls.secret": "other",
        "tokens.existingClaim": "other",
        "tokens.size": "9Gi",
        "tokens.storageClass": "fast",
        "tokens.accessMode": "ReadWriteMany",
        "replicas": 3,
        "options.threads": 7,
        "options.log-format": "text",
        "serviceMonitor.enabled": True,
        "serviceMonitor.interval": "5m",
        "serviceMonitor.token.secret": "other",
        "serviceMonitor.token.key": "other",
        "serviceMonitor.ca.secret": "other",
        "serviceMonitor.ca.key": "other",
        "serviceMonitor.serverName": "other.example.org",
        "serviceMonitor.labels": {"release": "prometheus"},
    },
    COORDINATOR: {
        **COMMON,
        "hosts": ["other.example.org"],
        "passphrase.secret": "other",
        "passphrase.key": "other",
        "certificate.secret": "other",
        "certificate.certificateKey": "other.crt",
        "certificate.caKey": "other-ca.crt",
        "state.existingClaim": "other",
        "state.size": "9Gi",
        "state.storageClass": "fast",
        "timeZone": "Europe/Berlin",
        "service.loadBalancerSourceRanges": ["192.0.2.0/24"],
        "networkPolicy.metricsFrom": [{"podSelector": {"matchLabels": {"team": "wards"}}}],
        "metrics.enabled": True,
        "metrics.serviceMonitor.enabled": True,
        "metrics.serviceMonitor.interval": "5m",
        "metrics.serviceMonitor.labels": {"release": "prometheus"},
    },
}
# On what other values some have an effect.
GIVEN: dict[str, Values] = {
    "replicas": {"tokens": {"accessMode": "ReadWriteMany"}},
    "serviceMonitor": {"serviceMonitor": MONITORED},
    "metrics": {"metrics": {"enabled": True, "serviceMonitor": {"enabled": True}}},
    "networkPolicy.metricsFrom": {"metrics": {"enabled": True}},
}


@pytest.mark.parametrize("chart", BOTH)
def test_every_value_is_known_here_and_to_the_schema(chart: str) -> None:
    values = load(chart, "values.yaml")
    assert set(leaves(values)) == set(OTHERS[chart])
    assert set(values) | {"global"} == set(validator(chart).schema["properties"])
    assert faults(chart, {}) == []


@pytest.mark.parametrize(("chart", "path"), [(chart, path) for chart in BOTH for path in OTHERS[chart]])
def test_every_value_changes_what_is_rendered(chart: str, path: str) -> None:
    other = OTHERS[chart][path]
    given = GIVEN.get(path) or GIVEN.get(path.partition(".")[0]) or {}
    before = {} if path.endswith("enabled") else given
    after = merged(given, at(path, other))
    assert faults(chart, after) == []
    assert objects(chart, before) != objects(chart, after)
    if not isinstance(other, bool):
        found = json.dumps(objects(chart, after))
        told = [other] if isinstance(other, str | int) else re.findall(r"[\w./-]{4,}", json.dumps(other))
        assert all(str(word) in found for word in told), told


WRONG: list[tuple[str, str, Any]] = [
    *((chart, "unknown", 1) for chart in BOTH),
    *((chart, "image.digest", "sha256:abc") for chart in BOTH),
    *((chart, "resources.limits.memory", "a lot") for chart in BOTH),
    *((chart, "service.type", "ExternalName") for chart in BOTH),
    *((chart, "networkPolicy.enabled", "yes") for chart in BOTH),
    *((SERVE, path, "") for path in ("model", "models.claim", "policy.configMap", "tls.secret")),
    (SERVE, "model", "films; rm"),
    (SERVE, "models.subPath", "../other"),
    (SERVE, "replicas", 2),
    (SERVE, "replicas", 0),
    (SERVE, "options.threads", "two"),
    (SERVE, "options.port", 1),
    (SERVE, "options.tokens", "x"),
    (SERVE, "serviceMonitor.enabled", True),
    (COORDINATOR, "hosts", []),
    (COORDINATOR, "hosts", ["a; rm -rf /"]),
    (COORDINATOR, "hosts", ["$(id)"]),
    (COORDINATOR, "passphrase.secret", ""),
    (COORDINATOR, "passphrase.value", "words"),
    (COORDINATOR, "certificate.secret", "'; id"),
    (COORDINATOR, "service.loadBalancerSourceRanges", ["everybody"]),
    (COORDINATOR, "replicas", 2),
]


@pytest.mark.parametrize(("chart", "path", "value"), WRONG)
def test_what_is_wrong_is_refused(chart: str, path: str, value: Any) -> None:
    assert faults(chart, at(path, value))


@pytest.mark.parametrize("chart", BOTH)
def test_helm_refuses_it_too(chart: str) -> None:
    text(chart, {})
    for _, path, value in [each for each in WRONG if each[0] == chart]:
        with pytest.raises(Refused, match=r"schema"):
            text(chart, at(path, value))


# What a pod may do


@pytest.mark.parametrize("chart", BOTH)
def test_a_pod_may_do_as_little_as_possible(chart: str) -> None:
    spec = pod(objects(chart, FULL[chart]))
    assert spec["automountServiceAccountToken"] is False
    secure = spec["securityContext"]
    assert (secure["runAsNonRoot"], secure["runAsUser"], secure["runAsGroup"]) == (True, 10001, 10001)
    assert secure["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
    for container in [*spec["initContainers"], *spec["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert set(container["resources"]) == {"requests", "limits"}
        places = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert places <= {"/tmp", "/var/lib/silotune"}  # noqa: S108 (a volume of the pod)


@pytest.mark.parametrize("chart", BOTH)
def test_no_secret_is_rendered(chart: str) -> None:
    found = objects(chart, FULL[chart])
    assert not [each for each in found if each["kind"] == "Secret"]
    for container in [*pod(found)["initContainers"], *pod(found)["containers"]]:
        names = [each["name"] for each in container.get("env", [])]
        assert not [name for name in names if re.search(r"PASSPHRASE$|PASSWORD|TOKEN$|KEY$", name)]


@pytest.mark.parametrize("chart", BOTH)
def test_nothing_is_called_and_only_one_port_is_reached(chart: str) -> None:
    policy = one(objects(chart), "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []
    (rule,) = policy["ingress"]
    container = pod(objects(chart))["containers"][0]
    assert [each["port"] for each in rule["ports"]] == [each["name"] for each in container["ports"]]
    (port,) = one(objects(chart), "Service")["spec"]["ports"]
    assert port["targetPort"] == container["ports"][0]["name"]


def test_budgets_are_for_several_and_claims_stay() -> None:
    assert "PodDisruptionBudget" not in [each["kind"] for each in objects(SERVE)]
    assert one(objects(SERVE, FULL[SERVE]), "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    for chart, name in ((SERVE, "site-tokens"), (COORDINATOR, "site-state")):
        kept = one(objects(chart), "PersistentVolumeClaim", name)["metadata"]["annotations"]
        assert kept == {"helm.sh/resource-policy": "keep"}


# What the command line knows


def options(command: Any) -> dict[str, Any]:
    """Return the options of a command by their long names."""
    app = command
    if not isinstance(command, typer.main.click.Command):
        app = typer.Typer(add_completion=False)
        app.command()(command)
        app = typer.main.get_command(app)
    return {name[2:]: each for each in app.params for name in each.opts if name.startswith("--")}


def subcommand(app: typer.Typer, name: str) -> Any:
    return typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]


def given_options(words: list[str]) -> set[str]:
    return {word[2:].partition("=")[0] for word in words if word.startswith("--")}


def test_options_of_serve_are_those_of_the_command() -> None:
    known = options(serve)
    schema = validator(SERVE).schema["properties"]["options"]["properties"]
    assert set(schema) == set(known) - PLACED - LEFT_OUT - {"help"}
    for name, each in schema.items():
        choices = getattr(known[name].type, "choices", None)
        assert each.get("enum") == (list(choices) if choices else None), name
        if choices is None:
            kind = {"integer": "integer", "number": "float", "boolean": "boolean"}[each["type"]]
            assert known[name].type.name.startswith(kind), name
    spec = pod(objects(SERVE, {"options": {"batch-wait-ms": 0.5, "body-bytes": 4 << 20, "explain": True}}))
    words = spec["containers"][0]["args"]
    assert given_options(words) <= set(known)
    assert given_options(words) >= PLACED
    assert {"--batch-wait-ms=0.5", f"--body-bytes={4 << 20}", "--explain"} <= set(words)
    init = spec["initContainers"][0]["args"]
    assert given_options(init) <= set(options(subcommand(tokens_app, init[1])))


def test_commands_of_the_coordinator_are_those_of_the_command_line() -> None:
    spec = pod(objects(COORDINATOR, FULL[COORDINATOR]))
    script = spec["initContainers"][0]["args"][0]
    for line in re.findall(r"silotune coordinator (.*)", script):
        name, *words = line.split()
        assert given_options(words) <= set(options(subcommand(coordinator_app, name)))
        assert given_options(words)
    assert spec["containers"][0]["args"][:2] == ["coordinator", "start"]


def test_the_paths_that_are_asked_exist() -> None:
    from server.serving.serving import ROUTES

    container = pod(objects(SERVE))["containers"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/healthz", "port": "https", "scheme": "HTTPS"}
    (endpoint,) = one(objects(SERVE, FULL[SERVE]), "ServiceMonitor")["spec"]["endpoints"]
    assert {"/healthz", endpoint["path"]} <= set(ROUTES)
    assert f"--port={container['ports'][0]['containerPort']}" in container["args"]


def test_charts_hold_what_git_has() -> None:
    assert sorted(path.name for path in CHARTS.iterdir() if path.is_dir()) == sorted(BOTH)
    assert Path(CHARTS / "README.md").exists()
