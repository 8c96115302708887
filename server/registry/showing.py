"""What lists and pages of the command line say of a version; epsilons as `shared.epsilons` writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from server.registry.history import History, HistoryEntry
from server.registry.manifest import Manifest, Summary
from server.registry.registry import Registry, Version
from shared.epsilons import delta_rounded_up, rounded_up
from shared.errors import printable
from shared.files.json_files import read_if_there
from shared.trust.signing import VerifyKey


@dataclass(frozen=True)
class _Words:
    """What is shown of `statement.json`; its type computes epsilons, which takes seconds to load."""

    text: str


def claim(summary: Summary) -> str:
    """Return the guarantee of a version in a few words; the statement has all of them."""
    if summary.epsilon is None or summary.delta is None:
        return "not private"
    return f"epsilon {_epsilon(summary)}, delta {delta_rounded_up(summary.delta)}, for one {summary.unit}"


def statement_of(version: Version) -> str | None:
    """Return the statement of a version as it stands there; None of a run without one."""
    found = read_if_there(version.model / "statement.json", _Words)
    return found.text if found else None


def who_signed(registry: Registry, entry: HistoryEntry) -> str:
    """Return the name of who signed an entry."""
    return registry.policy.name_of(VerifyKey.parse(entry.signer), "officer", "signer", "former") or entry.signer


def row(version: Version, history: History) -> dict[str, Any]:
    """Return what lists have of a version; epsilon as it was computed, to be rounded up where people read it."""
    manifest, summary = version.manifest, version.manifest.summary
    retired = history.retired.get(version.number)
    parent = manifest.parent
    return {
        "model": manifest.name,
        "version": version.number,
        "trusted": True,
        "aliases": list(history.aliases_of(version.number)),
        "retired": retired.at if retired else None,
        "format": summary.format,
        "precision": summary.precision,
        "task": summary.task,
        "metric": summary.metric,
        "value": summary.value,
        "metric_text": _metric(manifest),
        "epsilon": summary.epsilon,
        "epsilon_alone": summary.epsilon_alone,
        "epsilon_text": _epsilon(summary),
        "delta": summary.delta,
        "unit": summary.unit,
        "signer": version.signer,
        "added": manifest.added,
        "num_bytes": manifest.num_bytes,
        "parent": (parent.reference or f"a model with SHA-256 {parent.model_sha256}") if parent else None,
        "job_sha256": summary.job_sha256,
        "manifest_sha256": version.manifest_sha256,
    }


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Return the table of `silotune models list`."""
    table = Table(box=None)
    for title in ("model", "aliases", "format", "metric", "epsilon", "signer", "added", "size", "made from"):
        table.add_column(title, justify="right" if title in ("epsilon", "size") else "left", overflow="fold")
    for one in rows:
        one = {key: printable(value) if isinstance(value, str) else value for key, value in one.items()}
        reference = f"{one['model']}:{one['version']}"
        if not one["trusted"]:
            table.add_row(reference, "DOES NOT VERIFY", "see below")
            continue
        table.add_row(
            reference,
            "retired" if one["retired"] else ", ".join(one["aliases"]),
            one["format"] if one["precision"] == "float32" else f"{one['format']} {one['precision']}",
            one["metric_text"],
            one["epsilon_text"],
            one["signer"],
            one["added"][:10],
            _size(one["num_bytes"]),
            (one["parent"] or "")[:40],
        )
    return table


def _epsilon(summary: Summary) -> str:
    """Return both promises where there are two."""
    if summary.epsilon is None:
        return "none"
    alone = "" if summary.epsilon_alone is None else f" (alone {rounded_up(summary.epsilon_alone)})"
    return rounded_up(summary.epsilon) + alone


def _metric(manifest: Manifest) -> str:
    """Return the metric, and on which model it was measured where that is another one."""
    summary, parent = manifest.summary, manifest.parent
    if summary.metric is None:
        return "not measured"
    measured_on = f" of {parent.reference or 'its run'}" if parent is not None and parent.same_evaluation else ""
    return f"{summary.metric} {'not defined' if summary.value is None else f'{summary.value:.4g}'}{measured_on}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
