"""The ClientApp: Flower messages in and out of a `Site`; the same object in every transport.

Sites are opened once per process and kept, so a round pays no import, no model load and no tokenisation.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.home import SiteHome, open_site
from client.site import Site
from client.slots import Slots
from client.together import train_together
from shared.errors import ConfigError, SilotuneError
from shared.keystore import passphrase_from_environment
from shared.messages import (
    MetricsReply,
    Refusal,
    SiteDescription,
    TrainReply,
    pack_description,
    pack_metrics,
    pack_refusal,
    pack_reply,
    unpack_describe,
    unpack_request,
)
from shared.privacy.randomness import SiteRandomness

log = logging.getLogger("silotune.site")

OpenSite = Callable[[Context], Site]
Answer = SiteDescription | TrainReply | MetricsReply | Refusal
ResultT = TypeVar("ResultT")


def make_client_app(open_site: OpenSite, *, slots: Slots | None = None) -> ClientApp:
    """Return a ClientApp that answers with the site that `open_site` finds for a node.

    Args:
        slots: when answers leave, where the site's settings ask for slots.
    """
    app, slots = ClientApp(), slots or Slots()

    def answered(message: Message, context: Context, act: Callable[[Site], Answer]) -> Message:
        """Return the site's answer as a Flower message, in its slot; whatever is wrong becomes a refusal."""
        opened: list[Site] = []

        def act_in(site: Site) -> Answer:
            opened.append(site)
            return act(site)

        with slots.next_after_now(lambda: opened[0].config.answers.slot_seconds if opened else 0.0):
            return _packed(_attempt(context, open_site, act_in), message)

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        return answered(message, context, lambda site: site.accept(unpack_describe(message.content)))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answered(message, context, lambda site: site.answer(unpack_request(message.content)))

    @app.query("metrics")
    def metrics(message: Message, context: Context) -> Message:
        return answered(message, context, lambda site: site.answer_metrics(unpack_request(message.content, "metrics")))

    return app


def answer_together(messages: Sequence[tuple[Message, Context]], open_site: OpenSite) -> list[Message]:
    """Return the answers to training requests of simulated nodes, which are trained side by side; see `train_together`.

    Args:
        messages: each with the context of its node.
        open_site: as for `make_client_app`.
    """
    asked = [
        _attempt(context, open_site, lambda site, message=message: (site, unpack_request(message.content)))  # type: ignore[misc]
        for message, context in messages
    ]
    trained = iter(train_together([found for found in asked if not isinstance(found, Refusal)]))
    answers = [found if isinstance(found, Refusal) else next(trained) for found in asked]
    return [_packed(answer, message) for answer, (message, _) in zip(answers, messages, strict=True)]


def _attempt(context: Context, open_site: OpenSite, act: Callable[[Site], ResultT]) -> ResultT | Refusal:
    try:
        site = open_site(context)
    except SilotuneError as error:
        log.error("the site cannot be opened: %s", error)
        return Refusal.withheld("")
    try:
        return act(site)
    except SilotuneError as error:
        return site.refuse_unreadable(error)


def _packed(answer: Answer, message: Message) -> Message:
    if isinstance(answer, TrainReply):
        content = pack_reply(answer)
    elif isinstance(answer, MetricsReply):
        content = pack_metrics(answer)
    elif isinstance(answer, SiteDescription):
        content = pack_description(answer)
    else:
        content = pack_refusal(answer)
    return Message(content, reply_to=message)


def this_site(context: Context) -> Site:
    """Return the real site that this process stands for: the folder named by SILOTUNE_SITE_HOME, with all its guards.

    For Flower's own SuperNode, which is a fallback: it executes the code of a bundle, which `client.node` never does.
    """
    home = os.environ.get("SILOTUNE_SITE_HOME")
    if not home:
        raise ConfigError("set SILOTUNE_SITE_HOME to the site's folder (the one with site.toml).")
    return _open_real(Path(home))


@functools.lru_cache(maxsize=1)
def _open_real(home: Path) -> Site:
    return open_site(SiteHome(home), passphrase=passphrase_from_environment())


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


app = make_client_app(this_site)
