"""The run's durable state after a round, in one file that is replaced atomically.

Guarantee: whatever moment a coordinator dies at, the file holds the state after some completed round, and a run that
resumes from it gives the same adapter, bit for bit on CPU, as one that never stopped
(tests/server/store/test_checkpoint.py, tests/integration/test_resume.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from server.records.rounds import RoundRecord
from shared.errors import PrivacyError, RunError
from shared.files.atomic import write_bytes
from shared.files.json_files import parse_object
from shared.privacy.accounting import GaussianSteps
from shared.privacy.shared_noise import SharedNoise
from shared.privacy.statement import SiteRelease


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """State after `round_number` completed rounds of the job with hash `job_sha256`.

    Attributes:
        best_adapter: of the best evaluation so far, where the job keeps that one; else empty.
        site_metrics: noisy counts by site and metric, once they were asked for; None before.
    """

    job_sha256: str
    round_number: int
    adapter: dict[str, Tensor]
    server_state: dict[str, Tensor] = field(default_factory=dict)
    releases: dict[str, SiteRelease] = field(default_factory=dict)
    history: list[RoundRecord] = field(default_factory=list)
    site_metrics: dict[str, dict[str, list[float]]] | None = None
    best_adapter: dict[str, Tensor] = field(default_factory=dict)

    @property
    def result(self) -> dict[str, Tensor]:
        """The global adapter that the run hands out, as far as it got."""
        return self.best_adapter or self.adapter


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Replace `path`; see the module's guarantee.

    Raises:
        RunError: if it cannot be written; the earlier checkpoint is still there.
    """
    header = {
        "job_sha256": checkpoint.job_sha256,
        "round_number": checkpoint.round_number,
        "releases": {name: asdict(release) for name, release in checkpoint.releases.items()},
        "history": [asdict(record) for record in checkpoint.history],
        "site_metrics": checkpoint.site_metrics,
    }
    tensors = {f"adapter/{name}": tensor.contiguous() for name, tensor in checkpoint.adapter.items()}
    tensors |= {f"server/{name}": tensor.contiguous() for name, tensor in checkpoint.server_state.items()}
    # Copies: they may be the very tensors of `adapter`, and a file holds no tensor twice.
    tensors |= {f"best/{name}": tensor.contiguous().clone() for name, tensor in checkpoint.best_adapter.items()}
    write_bytes(path, save(tensors, metadata={"checkpoint": json.dumps(header)}))


def load_checkpoint(path: Path, *, job_sha256: str) -> Checkpoint | None:
    """Return the checkpoint at `path`, or None if there is none.

    Raises:
        RunError: if it is damaged or belongs to another job.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = parse_object((file.metadata() or {})["checkpoint"])
        tensors = load(path.read_bytes())
        found = _built(header, tensors)
    except _UNREADABLE as error:
        raise RunError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}); restore it from a backup or start a new run."
        ) from None
    if header["job_sha256"] != job_sha256:
        raise RunError(
            f"the run in {path.parent} was started with another configuration (job {header['job_sha256'][:12]}, now "
            f"{job_sha256[:12]}). Resume with the job.json that lies there, or choose another run folder."
        )
    return found


_UNREADABLE = (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, PrivacyError)


def _built(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
    """Return the checkpoint of a file's parts; what is wrong with them raises one of `_UNREADABLE`."""
    if type(header["round_number"]) is not int or header["round_number"] < 0:
        raise ValueError("the round number is none")
    return Checkpoint(
        job_sha256=str(header["job_sha256"]),
        round_number=header["round_number"],
        adapter=_part(tensors, "adapter/"),
        server_state=_part(tensors, "server/"),
        best_adapter=_part(tensors, "best/"),
        releases={name: _release(raw) for name, raw in header["releases"].items()},
        history=[RoundRecord(**raw) for raw in header["history"]],
        site_metrics=header.get("site_metrics"),
    )


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _release(raw: dict[str, Any]) -> SiteRelease:
    tuples = {name: tuple(raw.get(name, ())) for name in ("rounds", "updates", "unanswered", "metrics")}
    events = tuple(GaussianSteps(**event) for event in raw["events"])
    single = {
        name: GaussianSteps(**raw[name]) if raw.get(name) else None for name in ("per_round", "metrics_mechanism")
    }
    shared = SharedNoise(**raw["shared"]) if raw.get("shared") else None
    return SiteRelease(**raw | tuples | {"events": events, "shared": shared} | single)
