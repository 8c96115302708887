"""Asking nodes over Flower's public Grid and collecting what they answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from flwr.app import Message
from flwr.serverapp.grid import Grid

from server.roster import POLL_SECONDS

_LONGEST_POLL_SECONDS = 1.0
_PATIENT_SHARE = 0.75  # of the time that the answers took last time passes before the first look
# A request may be lost with the process that pulled it, while its node stays online. Sites answer a repeated one with what
# they stored, so asking again costs no budget; each time after twice as long.
ASK_AGAIN_SECONDS = 30.0


def exchange(
    grid: Grid,
    requests: Callable[[Sequence[int]], list[Message]],
    nodes: Sequence[int],
    *,
    timeout: float,
    expected: float,
    repeat: bool,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[tuple[int, Message]]:
    """Ask `nodes` and collect (node that was asked, reply) until all answered or `timeout` seconds passed.

    Flower's own `send_and_receive` polls every three seconds; this begins with every tenth of one. A reply is matched by the
    request that it answers: an error about a lost message comes from the SuperLink, not from the node.

    Args:
        requests: makes the messages for some nodes, signed now.
        expected: seconds that the answers will take, as far as one knows; asking before costs the sites' calls their time.
        repeat: ask those again who are silent; only for sites that answer a repeated request as the first.
        meanwhile: what can be done once the requests are out.
    """
    node_of: dict[str, int] = {}

    def ask(some: Sequence[int]) -> None:
        messages = requests(some)
        pushed = set(grid.push_messages(messages))
        metadata = [message.metadata for message in messages]
        node_of.update({facts.message_id: facts.dst_node_id for facts in metadata if facts.message_id in pushed})

    started, ask_again = time.monotonic(), ASK_AGAIN_SECONDS
    if nodes:
        ask(nodes)
    meanwhile()
    collected: dict[int, Message] = {}
    time.sleep(max(0.0, min(_PATIENT_SHARE * expected, _LONGEST_POLL_SECONDS) - (time.monotonic() - started)))
    while waiting := {identifier for identifier, node in node_of.items() if node not in collected}:
        arrived = list(grid.pull_messages(waiting))
        for message in arrived:
            node = node_of.get(message.metadata.reply_to_message_id)
            if node is not None:
                collected.setdefault(node, message)
        elapsed = time.monotonic() - started
        if elapsed > timeout:
            break
        if repeat and elapsed > ask_again:
            ask([node for node in nodes if node not in collected])
            ask_again += 2 * ask_again
        if not arrived:
            # A long round is asked about less often: the delay stays within two percent of it.
            time.sleep(min(max(POLL_SECONDS, elapsed / 50), _LONGEST_POLL_SECONDS))
    return list(collected.items())
