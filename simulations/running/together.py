"""Several simulated sites in one process, trained side by side over one backbone; every one keeps its own account.

Each site admits, charges, stores and releases by itself, with the code of a real site; only the training between is shared,
and there each gets what it would get alone (`client.training.trainer`). Real sites are never trained together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from client.site.release import Begun, Update
from client.site.secure.shares import Shares
from client.site.site import Site
from client.training.independence import settle_stacks
from client.training.trainer import LocalRound, train_local_rounds
from shared.errors import place_of
from shared.secure_sum.messages import Ready
from shared.tensors.optimizers import steps_taken
from shared.wire.messages import Refusal, TrainReply, TrainRequest

log = logging.getLogger("silotune.site")

Answers = list[TrainReply | Ready | Refusal]


def train_together(requests: Sequence[tuple[Site, TrainRequest]]) -> Answers:
    """Answer one training request of each site, in order."""
    return _answered(requests, lambda site: site.update, compute=_train, done="trained")


def ready_together(requests: Sequence[tuple[Site, TrainRequest]]) -> Answers:
    """Answer one request to get ready for a round under secure aggregation of each site, in order."""
    return _answered(requests, lambda site: site.shares, compute=Shares.compute, done="computed")


def _answered(
    requests: Sequence[tuple[Site, TrainRequest]],
    of: Callable[[Site], Update | Shares],
    *,
    compute: Callable[[Sequence[Begun]], Sequence[Any]],
    done: str,
) -> Answers:
    """Answer one request of each site, in order.

    Args:
        of: what of a site answers.
        compute: returns the result of each of several sites that were asked the same, as `of` finishes it.
        done: to them meanwhile, for the log.
    """
    answers: dict[int, TrainReply | Ready | Refusal] = {}
    alike: dict[object, list[tuple[int, Site, Begun]]] = {}
    for place, (site, request) in enumerate(requests):
        begun = site.guarded(partial(of(site).begin, request), job=request.job, round_number=request.round_number)
        if isinstance(begun, Begun):
            # One pass serves sites that start from the same values and have come equally far.
            key = (id(begun.runtime), begun.request_sha256, steps_taken(begun.work.optimizer_state))
            alike.setdefault(key, []).append((place, site, begun))
        else:
            answers[place] = begun
    for group in alike.values():
        started = time.monotonic()
        results = _computed([begun for _, _, begun in group], compute, done)
        seconds = (time.monotonic() - started) / len(group)
        for (place, site, begun), result in zip(group, results, strict=True):
            act = (
                partial(of(site).make_begun, _anew(site, begun))
                if result is None
                else partial(of(site).finish, begun, result, seconds=seconds)
            )
            request = begun.request
            answers[place] = site.guarded(act, job=request.job, round_number=request.round_number)
    return [answers[place] for place in range(len(requests))]


def _computed(
    group: Sequence[Begun], compute: Callable[[Sequence[Begun]], Sequence[Any]], done: str
) -> Sequence[Any | None]:
    """Return every site's result; None for all if something failed, so that each is computed alone and fails alone."""
    try:
        return compute(group)
    except Exception as error:  # whose fault it is shows when each is computed alone
        log.error("%d sites could not be %s together; each is %s alone: %s", len(group), done, done, place_of(error))
        return [None] * len(group)


def _train(group: Sequence[Begun]) -> list[LocalRound]:
    first = group[0]
    if len(group) > 1 and first.plan.private:
        settle_stacks(first.runtime)
    return train_local_rounds(
        first.runtime,
        [begun.work for begun in group],
        first.start,
        training=first.request.job.training,
        plan=first.plan,
        round_number=first.request.round_number,
    )


def _anew(site: Site, begun: Begun) -> Begun:
    """Return what was begun with coins and noise drawn anew: its streams were given to a computation that broke off.

    Nothing of that one leaves, so no two releases share a stream; an injected source gives what the site would get alone.
    """
    return replace(begun, work=replace(begun.work, randomness=site.new_randomness()))
