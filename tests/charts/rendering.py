"""The charts of charts/, rendered by Helm: the `helm` on the path, or Helm as a library."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

CHARTS = Path(__file__).parents[2] / "charts"
SERVE, COORDINATOR = "silotune-serve", "silotune-coordinator"
Values = dict[str, Any]
NEEDED: dict[str, Values] = {
    SERVE: {
        "model": "films",
        "models": {"claim": "registry"},
        "policy": {"configMap": "registry-policy"},
        "tls": {"secret": "serve-tls"},
    },
    COORDINATOR: {
        "hosts": ["fl.example.org", "10.0.0.5"],
        "passphrase": {"secret": "words"},
        "certificate": {"secret": "server-certificate"},
    },
}
"""What has no default."""


class Refused(Exception):
    """Helm does not take the values."""


def load(chart: str, file: str) -> Any:
    """Return a file of a chart, YAML or JSON."""
    return yaml.safe_load((CHARTS / chart / file).read_text(encoding="utf-8"))


def merged(values: Mapping[str, Any], over: Mapping[str, Any]) -> Values:
    """Return values with others over them, as Helm does."""
    found = copy.deepcopy(dict(values))
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = merged(found[key], value) if both else value
    return found


def at(path: str, value: Any) -> Values:
    """Return values with one, such as at("image.tag", "1")."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return dict(value)


def text(chart: str, values: Mapping[str, Any]) -> str:
    """Return what Helm renders, as text; skips without Helm.

    Raises:
        Refused: if values or templates do not fit.
    """
    values = merged(NEEDED[chart], values)
    if shutil.which("helm") is not None:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write(json.dumps(values))
            file.flush()
            command = ["helm", "template", "site", CHARTS / chart, "--namespace", "ward", "--values", file.name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Refused(done.stderr)
        return done.stdout
    helm = pytest.importorskip("helm_python", reason="neither helm nor helm-python-sdk is installed")
    try:
        with helm.Chart.load(CHARTS / chart) as loaded:
            found: dict[str, str] = loaded.render(values, name="site", namespace="ward")
    except helm.HelmError as error:
        raise Refused(str(error)) from None
    return "\n---\n".join(part for name, part in sorted(found.items()) if not name.endswith(".txt"))


def objects(chart: str, values: Mapping[str, Any] | None = None) -> list[Values]:
    """Return the objects that a chart makes."""
    return [found for found in yaml.safe_load_all(text(chart, values or {})) if found is not None]


def one(found: list[Values], kind: str, name: str = "site") -> Values:
    """Return the object of a kind and name."""
    (only,) = [each for each in found if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return only


def pod(found: list[Values]) -> Values:
    """Return the pod that a chart makes."""
    (only,) = [each for each in found if each["kind"] in ("Deployment", "StatefulSet")]
    spec: Values = only["spec"]["template"]["spec"]
    return spec


def leaves(values: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of all values; what is empty, or a list, is one."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path
