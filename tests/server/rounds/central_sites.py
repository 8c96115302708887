"""A hundred sites that answer with fixed updates, and a coordinator that adds the noise; no model anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from server.rounds.central import CentralPrivacy, SitesRound
from server.rounds.loop import Coordinator
from server.rounds.observer import Observer
from server.store.checkpoint import Checkpoint
from shared.job.job import Job
from shared.job.parsing import parse
from shared.privacy.central import CentralPlan, SitesSum
from shared.privacy.randomness import SiteRandomness
from shared.tensors.adapters import Shapes, encode
from shared.wire.messages import SiteDescription, TrainReply, pack_description, pack_reply, unpack_request
from simulations.running.grid import InProcessGrid

NUM_SITES = 100
INITIAL = {"head.b": torch.zeros(4), "w": torch.zeros(6, 3)}
SHAPES = {name: tensor.shape for name, tensor in INITIAL.items()}
PRIVACY = {
    "mechanism": "central",
    "unit": "site",
    "noise_multiplier": 1.5,
    "central": {"num_sites": NUM_SITES, "clip_norm": 0.5},
}


def make_job(**sections: Any) -> Job:
    raw: dict[str, Any] = {
        "name": "central",
        "task": {"kind": "sequence_classification", "labels": ["x", "y"]},
        "training": {"rounds": 4, "local_steps": 2},
        "privacy": PRIVACY,
        "federation": {"min_sites": NUM_SITES},
    }
    return parse(Job, raw | sections, source="test")


def update_of(node: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(node)
    return {name: torch.randn(shape, generator=generator) * 0.02 * node for name, shape in SHAPES.items()}


def released(
    attempt: SitesRound, updates: Iterable[Mapping[str, Tensor]] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (adapter, server state) that an attempt releases of these updates."""
    aggregation = attempt.aggregation(INITIAL, {}, SHAPES)
    for update in updates:
        aggregation.add(update, 8)
    return aggregation.result()


def clipped_sum(
    plan: CentralPlan, updates: Iterable[Mapping[str, Tensor]], shapes: Shapes, clip_norm: float
) -> SitesSum:
    """Return the pair of these updates, as production makes it."""
    total = plan.new_sum(shapes, clip_norm)
    for update in updates:
        total.add(update)
    return total.total()


def reply_of(node: int, job: Job, round_number: int, update: Mapping[str, Tensor]) -> TrainReply:
    return TrainReply(
        site=f"s{node:03}",
        round_number=round_number,
        job_sha256=job.sha256,
        update=encode(dict(update)),
        declared_records=8,
        noise_multiplier=0.0,
        sample_rate=job.privacy.sample_rate,
        max_grad_norm=job.privacy.max_grad_norm,
        delta=job.privacy.delta,
        steps=job.training.local_steps,
        randomness="os",
        epsilon_budget=0.0,
    )


def grid_of(
    num_sites: int = NUM_SITES,
    *,
    update: Callable[[int], Mapping[str, Tensor]] = update_of,
    asked: list[tuple[int, int]] | None = None,
) -> InProcessGrid:
    """Nodes 1, 2, ... that answer with `update(node)`; `asked` collects (round, node)."""
    app = ClientApp()

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        described = SiteDescription(site=f"s{context.node_id:03}", declared_records=8, version="1")
        return Message(pack_description(described), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        request = unpack_request(message.content)
        if asked is not None:
            asked.append((request.round_number, context.node_id))
        reply = reply_of(context.node_id, request.job, request.round_number, update(context.node_id))
        return Message(pack_reply(reply), reply_to=message)

    return InProcessGrid(app, num_sites)


def coordinator(
    job: Job,
    folder: Path,
    *,
    save: Callable[[Checkpoint], None] = lambda checkpoint: None,
    observer: Observer | None = None,
    seed: str | None = None,
) -> Coordinator:
    """A coordinator with its account in `folder`; `seed` makes its randomness reproducible, and not private."""

    def injected() -> SiteRandomness:
        return SiteRandomness.injected(str(seed))

    return Coordinator(
        job=job,
        initial_adapter=INITIAL,
        update_shapes=SHAPES,
        evaluate=lambda adapter: {"loss": float(adapter["w"].sum())},
        evaluate_every=1,
        save=save,
        observer=observer or Observer(),
        privacy=CentralPrivacy(job, folder, new_randomness=SiteRandomness.from_os if seed is None else injected),
    )
