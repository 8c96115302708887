"""Sites of a small job under secure aggregation that answer with the real protocol; what they add is chosen by the test."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from shared.errors import SilotuneError
from shared.job.job import Job
from shared.job.parsing import parse
from shared.privacy.plan import PrivacyPlan
from shared.secure_sum.keys import shown_key
from shared.secure_sum.messages import unpack_roster
from shared.secure_sum.site import SecureSite
from shared.trust.certificates import spki
from shared.wire.messages import (
    Refusal,
    SiteDescription,
    TrainReply,
    TrainRequest,
    pack_description,
    pack_ready,
    pack_refusal,
    pack_reply,
    unpack_request,
)
from simulations.running.grid import InProcessGrid

NUM_WORDS = 8
GRID_STEPS = 1 << 24

Behaviour = Callable[["SimpleSite", TrainRequest], RecordDict]


def secure_job(**sections: Any) -> Job:
    raw: dict[str, Any] = {
        "name": "secure",
        "task": {"kind": "sequence_classification", "labels": ["x", "y"]},
        "training": {"rounds": 2, "optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.5},
        "privacy": {"mechanism": "distributed", "max_colluding": 0, "noise_multiplier": 1.0, "sample_rate": 0.25},
        "federation": {"min_sites": 2},
    }
    for name, values in sections.items():
        raw[name] = {**raw[name], **values} if isinstance(values, dict) and name in raw else values
    raw["training"]["local_steps"] = 1
    return parse(Job, raw, source="test")


class SimpleSite:
    """One site: its protocol is real, its sum is `steps` in every coordinate."""

    def __init__(self, name: str, steps: int, *, declared: int = 8) -> None:
        self.name, self.steps, self.declared = name, steps, declared
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.machine: SecureSite | None = None
        self.attempts: list[tuple[int, int]] = []
        self.sent: list[bytes] = []

    def ready(self, request: TrainRequest) -> RecordDict:
        self.attempts.append((request.round_number, request.attempt))
        self.machine = SecureSite(
            site=self.name,
            job_sha256=request.job.sha256,
            round_number=request.round_number,
            attempt=request.attempt,
            adapter_sha256=hashlib.sha256(request.adapter).hexdigest(),
            declared_records=self.declared,
            key=self.key,
            certificate=spki(self.key.public_key()),
        )
        return pack_ready(self.machine.ready())

    def masked(self, request: TrainRequest) -> RecordDict:
        assert self.machine is not None
        roster = unpack_roster(request.adapter)
        context = self.machine.accept(roster, min_sites=request.job.federation.min_sites, key_of=shown_key)
        words = np.full(NUM_WORDS, self.steps, np.int64).view(np.uint64)
        return self.reply(request, self.machine.masked(words, context).to_bytes())

    def reply(self, request: TrainRequest, update: bytes, **numbers: Any) -> RecordDict:
        """Return the answer with this input; `numbers` are what the site says otherwise than it should."""
        plan = PrivacyPlan.from_job(request.job)
        self.sent.append(update)
        reply = TrainReply(
            site=self.name,
            round_number=request.round_number,
            job_sha256=request.job.sha256,
            update=update,
            declared_records=self.declared,
            noise_multiplier=plan.noise_multiplier,
            sample_rate=plan.sample_rate,
            max_grad_norm=plan.max_grad_norm,
            delta=plan.delta,
            steps=1,
            randomness="os",
            epsilon_budget=8.0,
        )
        return pack_reply(replace(reply, **numbers))


def grid_of(
    sites: Iterable[SimpleSite],
    *,
    at_ready: Mapping[str, Behaviour] | None = None,
    at_masked: Mapping[str, Behaviour] | None = None,
) -> InProcessGrid:
    """Nodes that answer as `sites`, some of them otherwise than they should."""
    order, app = list(sites), ClientApp()

    def answered(message: Message, act: Callable[[], RecordDict], name: str) -> Message:
        try:
            return Message(act(), reply_to=message)
        except SilotuneError as error:
            refusal = Refusal(site=name, code=type(error).__name__, reason=str(error))
            return Message(pack_refusal(refusal), reply_to=message)

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        site = order[context.node_id - 1]
        told = SiteDescription(site=site.name, declared_records=site.declared, version="1")
        return Message(pack_description(told), reply_to=message)

    @app.train("ready")
    def ready(message: Message, context: Context) -> Message:
        site = order[context.node_id - 1]
        act = (at_ready or {}).get(site.name, SimpleSite.ready)
        return answered(message, lambda: act(site, unpack_request(message.content, "ready")), site.name)

    @app.train("masked")
    def masked(message: Message, context: Context) -> Message:
        site = order[context.node_id - 1]
        act = (at_masked or {}).get(site.name, SimpleSite.masked)
        return answered(message, lambda: act(site, unpack_request(message.content, "masked")), site.name)

    return InProcessGrid(app, len(order))
