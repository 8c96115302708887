"""The table of all settings, made from the configuration classes themselves, so that it cannot go stale."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from client.policy.policy import Policy
from client.site.config import SiteConfig
from server.coordinator.run_file import RunSettings
from server.registry.policy import RegistryPolicy
from server.store.home import CoordinatorConfig
from shared.job.job import Job
from simulations.scenario import Scenario

_HEAD = "| key | default | meaning |\n|---|---|---|"


def settings_table() -> str:
    """Return docs/settings.md."""
    job = "\n".join(_rows(Job, ""))
    scenario = "\n".join(row for row in _rows(Scenario, "") if not row.startswith(("| `job", "| `base`")))
    site = "\n".join(_rows(SiteConfig, ""))
    run = "\n".join(_rows(RunSettings, ""))
    policy = "\n".join(_rows(Policy, ""))
    coordinator = "\n".join(_rows(CoordinatorConfig, ""))
    registry = "\n".join(_rows(RegistryPolicy, ""))
    return (
        "# Settings\n\nMade by `silotune settings`; a test compares the two. Where a setting can be None, write the word: "
        '`last_layers = "none"` in TOML, `--set lora.last_layers=none` on the command line.\n\n'
        "## Job: what a coordinator asks of the sites\n\nIn a scenario file these sections stand at the top level.\n\n"
        f"{_HEAD}\n{job}\n\n## Scenario: what only a simulation needs\n\n{_HEAD}\n{scenario}\n\n"
        f"## Site: `site.toml`, what a site decides for itself\n\n{_HEAD}\n{site}\n\n"
        f"## Policy: `policy.toml`, what a real site accepts\n\n{_HEAD}\n{policy}\n\n"
        "## Run file: what `silotune coordinator submit` reads\n\nThe sections of a job stand at the top level, with these "
        f"beside them.\n\n{_HEAD}\n{run}\n\n"
        f"## Coordinator: `coordinator.toml`\n\n{_HEAD}\n{coordinator}\n\n"
        "## Registry of models: `registry.toml`, whose signatures count and what may be promoted\n\n"
        f"{_HEAD}\n{registry}\n"
    )


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = _section(field.annotation)
        if inner is not None:
            yield from _rows(inner, f"{prefix}{name}.")
        else:
            meaning = " ".join((field.description or "").split()).replace("|", "\\|")
            yield f"| `{prefix}{name}` | {_default(field)} | {meaning} |"


def _section(annotation: object) -> type[BaseModel] | None:
    """Return the section class in `X` or `X | None`, else None."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    for option in options:
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "`{}`"
    if field.default is PydanticUndefined:
        return "required"
    return f"`{field.default!r}`"
