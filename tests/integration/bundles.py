"""App bundles that hold code, as somebody makes them who reached the Control API; ours hold none."""

from __future__ import annotations

from collections.abc import Mapping

import tomli_w
from flwr.cli.build import build_fab_from_files


def bundle_with_code(module: str, source: str, config: Mapping[str, str]) -> bytes:
    """Return a bundle of one Python module that holds `server_app` and `client_app`.

    Args:
        module: its name.
        source: its text.
        config: keys that both apps find in `context.run_config`, with their values.
    """
    project = {
        "project": {"name": module.replace("_", "-"), "version": "1.0.0", "license": "Apache-2.0", "dependencies": []},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "somebody",
                    "components": {"serverapp": f"{module}:server_app", "clientapp": f"{module}:client_app"},
                    "config": dict(config),
                }
            }
        },
    }
    files = {"pyproject.toml": tomli_w.dumps(project).encode(), f"{module}.py": source.encode()}
    bundle, _ = build_fab_from_files(files)
    return bundle
