"""Several simulated sites in one process, trained side by side over one backbone; every one keeps its own account.

Each site admits, charges, stores and releases by itself, with the code of a real site; only the training between is shared,
and there each gets what it would get alone (`client.training.trainer`). Real sites are never trained together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from client.site.release import Begun
from client.site.secure.shares import BegunShare, Shares
from client.site.site import Site
from client.training.gradient import NoisySum
from client.training.independence import settle_stacks
from client.training.trainer import LocalRound, train_local_rounds
from shared.errors import place_of
from shared.secure_sum.messages import Ready
from shared.tensors.optimizers import steps_taken
from shared.wire.messages import Refusal, TrainReply, TrainRequest

log = logging.getLogger("silotune.site")

BegunAt = tuple[int, Site, Begun]
BegunT = TypeVar("BegunT", Begun, BegunShare)


def train_together(requests: Sequence[tuple[Site, TrainRequest]]) -> list[TrainReply | Refusal]:
    """Answer one training request of each site, in order."""
    answers: dict[int, TrainReply | Refusal] = {}
    alike: dict[object, list[BegunAt]] = {}
    for place, (site, request) in enumerate(requests):
        begun = site.guarded(partial(site.update.begin, request), job=request.job, round_number=request.round_number)
        if isinstance(begun, Begun):
            # One pass serves sites that start from the same values and have come equally far.
            key = (id(begun.runtime), begun.request_sha256, steps_taken(begun.work.optimizer_state))
            alike.setdefault(key, []).append((place, site, begun))
        else:
            answers[place] = begun
    for group in alike.values():
        started = time.monotonic()
        results = _trained(group)
        seconds = (time.monotonic() - started) / len(group)
        for (place, site, begun), result in zip(group, results, strict=True):
            act = (
                partial(site.update.make_begun, _anew(site, begun))
                if result is None
                else partial(site.update.finish, begun, result, seconds=seconds)
            )
            request = begun.request
            answers[place] = site.guarded(act, job=request.job, round_number=request.round_number)
    return [answers[place] for place in range(len(requests))]


def ready_together(requests: Sequence[tuple[Site, TrainRequest]]) -> list[Ready | Refusal]:
    """Answer one request to get ready for a round under secure aggregation of each site, in order."""
    answers: dict[int, Ready | Refusal] = {}
    alike: dict[object, list[tuple[int, Site, BegunShare]]] = {}
    for place, (site, request) in enumerate(requests):
        begun = site.guarded(partial(site.shares.begin, request), job=request.job, round_number=request.round_number)
        if isinstance(begun, BegunShare):
            key = (id(begun.runtime), request.job.sha256, request.round_number, request.attempt, request.adapter)
            alike.setdefault(key, []).append((place, site, begun))
        else:
            answers[place] = begun
    for group in alike.values():
        started = time.monotonic()
        found = _summed([begun for _, _, begun in group])
        seconds = (time.monotonic() - started) / len(group)
        for (place, site, begun), one in zip(group, found, strict=True):
            act = (
                partial(site.shares.make, _anew(site, begun))
                if one is None
                else partial(site.shares.finish, begun, one, seconds=seconds)
            )
            answers[place] = site.guarded(act, job=begun.request.job, round_number=begun.request.round_number)
    return [answers[place] for place in range(len(requests))]


def _anew(site: Site, begun: BegunT) -> BegunT:
    """Return what was begun with coins and noise drawn anew: its streams were given to a computation that broke off.

    Nothing of that one leaves, so no two releases share a stream; an injected source gives what the site would get alone.
    """
    return replace(begun, work=replace(begun.work, randomness=site.new_randomness()))


def _summed(group: Sequence[BegunShare]) -> Sequence[NoisySum | None]:
    """Return every site's noisy sum; None for all if something failed, so that each is computed alone and fails alone."""
    try:
        return Shares.compute(group)
    except Exception as error:  # whose fault it is shows when each is computed alone
        log.error("%d sites could not be computed together; each is computed alone: %s", len(group), place_of(error))
        return [None] * len(group)


def _trained(group: Sequence[BegunAt]) -> Sequence[LocalRound | None]:
    """Return every site's round; None for all if something failed, so that each is trained alone and fails alone."""
    first = group[0][2]
    try:
        if len(group) > 1 and first.plan.private:
            settle_stacks(first.runtime)
        return train_local_rounds(
            first.runtime,
            [begun.work for _, _, begun in group],
            first.start,
            training=first.request.job.training,
            plan=first.plan,
            round_number=first.request.round_number,
        )
    except Exception as error:  # whose fault it is shows when each is trained alone
        log.error("%d sites could not be trained together; each is trained alone: %s", len(group), place_of(error))
        return [None] * len(group)
