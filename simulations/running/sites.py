"""The simulated sites of one process: found by partition id, opened once, trained side by side where that is asked."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from flwr.app import Context, Message

from client.app import OpenSite, attempt, packed
from client.site.site import Site
from shared.privacy.randomness import SiteRandomness
from shared.wire.messages import READY, Refusal, RequestKind, unpack_request
from simulations.running.together import ready_together, train_together


def answer_together(messages: Sequence[tuple[Message, Context]], open_site: OpenSite) -> list[Message]:
    """Return the answers to training requests of simulated nodes, which are trained side by side; see `train_together`.

    Args:
        messages: each with the context of its node, all of one kind.
        open_site: as for `make_client_app`.
    """
    kind: RequestKind = "ready" if messages[0][0].metadata.message_type == READY else "train"
    asked = [
        attempt(context, open_site, lambda site, message=message: (site, unpack_request(message.content, kind)))  # type: ignore[misc]
        for message, context in messages
    ]
    together = ready_together if kind == "ready" else train_together
    trained = iter(together([found for found in asked if not isinstance(found, Refusal)]))
    answers = [found if isinstance(found, Refusal) else next(trained) for found in asked]
    return [packed(answer, message) for answer, (message, _) in zip(answers, messages, strict=True)]


def simulated_site(context: Context, *, sites: Path, injected_seed: str | None = None) -> Site:
    """Return the site of a simulated node, told apart by its partition id.

    Args:
        context: Flower's context.
        sites: folder with one `NAME/home/site.toml` per site; partition ids follow the order of names.
        injected_seed: for tests only: reproducible randomness, which marks every release as not private.
    """
    homes = _homes_at(sites, sites.stat().st_mtime_ns)
    return _open(homes[int(str(context.node_config["partition-id"]))], injected_seed)


def site_homes(sites: Path) -> list[Path]:
    """Return the homes of simulated sites in the order of their partition ids."""
    return sorted(path.parent for path in sites.glob("*/home/site.toml"))


@functools.lru_cache(maxsize=4)
def _homes_at(sites: Path, _changed: int) -> list[Path]:
    """Return `site_homes`, listed again when the folder changed: not by each of a thousand sites for every message."""
    return site_homes(sites)


@functools.lru_cache(maxsize=4096)
def _open(home: Path, injected_seed: str | None) -> Site:
    if injected_seed is None:
        return Site(home)
    return Site(home, new_randomness=lambda: SiteRandomness.injected(f"{injected_seed}/{home.parent.name}"))


def forget_simulated_sites() -> None:
    """Close all simulated sites: one process may run many simulations, and none needs the sites of the last one."""
    _open.cache_clear()
    _homes_at.cache_clear()
