"""The account that the coordinator keeps of each site: what came, what it was made of, and what was not answered.

An update that comes twice counts once, whoever asked for it: `with_update` is the only place that adds one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from shared.privacy.accounting import GaussianSteps, merged
from shared.privacy.plan import PrivacyPlan
from shared.privacy.statement import SiteRelease
from shared.wire.messages import TrainReply

Releases = Mapping[str, SiteRelease]


@dataclass(frozen=True, kw_only=True)
class Made:
    """What is kept of an update that came: everything but its bytes."""

    reply: TrainReply
    update_sha256: str

    @classmethod
    def of(cls, reply: TrainReply) -> Made:
        """Return `reply` without its bytes, and their hash."""
        return cls(reply=replace(reply, update=b""), update_sha256=hashlib.sha256(reply.update).hexdigest())


def unknown_release(site: str, declared_records: int, plan: PrivacyPlan) -> SiteRelease:
    """Return the empty account of a site of which nothing has come yet."""
    return SiteRelease(
        site=site,
        unit=plan.unit,
        records_per_person=plan.records_per_person,
        delta=plan.delta,
        max_grad_norm=plan.max_grad_norm,
        declared_records=declared_records,
        randomness="os",
        epsilon_budget=0.0,
        steps_planned=plan.planned_steps,
        private=plan.private,
        shared=plan.shared_noise,
    )


def with_update(
    release: SiteRelease, round_number: int, update_sha256: str, executed: GaussianSteps | None
) -> SiteRelease:
    """Return `release` with one more update; one that came before counts once."""
    if (round_number, update_sha256) in zip(release.rounds, release.updates, strict=True):
        return release
    return replace(
        release,
        events=release.events if executed is None else merged([*release.events, executed]),
        rounds=(*release.rounds, round_number),
        updates=(*release.updates, update_sha256),
    )
