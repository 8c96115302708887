"""A federation of real homes inside one process: the coordinator's ServerApp asks the sites' ClientApp.

Only the network between them is left out: requests are signed, ledgers sealed and audit logs kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.grid import Grid


def serve(coordinator: Path, sites: Sequence[Path], job: str) -> None:
    """Run the submitted `job` of a coordinator's home over sites' homes until it has ended."""
    from server.coordinator.production import run_submission
    from server.store.home import CoordinatorHome
    from server.store.submission import Submission

    home, grid = CoordinatorHome(coordinator.resolve()), HomesGrid(sites)
    run_submission(grid, home, Submission(home.jobs / job))  # type: ignore[arg-type]  # what it uses of a LinkGrid


class HomesGrid(Grid):
    """A Grid with one node for each site's home; its node answers when its reply is pulled, in the order of requests."""

    run_id = 1

    def __init__(self, sites: Sequence[Path]) -> None:
        self._sites = dict(enumerate(sites, start=1))
        self._apps = {node: _app_of(home) for node, home in self._sites.items()}
        self._contexts = {
            node: Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
            for node in self._sites
        }
        self._waiting: dict[str, Message] = {}
        self._run: object = None

    def set_run(self, run: object) -> None:
        """See `Grid`."""
        self._run = run

    @property
    def run(self) -> object:  # type: ignore[override]
        """See `Grid`."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See `Grid`."""
        from shared.link.envelope import request

        return request(
            content,
            run_id=1,
            message_id=str(uuid4()),
            message_type=message_type,
            node=dst_node_id,
            group_id=group_id,
            ttl=ttl,
        )

    def get_node_ids(self) -> Iterable[int]:
        """See `Grid`."""
        return list(self._sites)

    def names(self) -> dict[int, str]:
        """Return node -> the name under which the coordinator admitted its key."""
        return {node: home.name for node, home in self._sites.items()}

    def keys(self, name: str) -> list[bytes]:
        """Return the key of a site, as its certificate would."""
        from shared.trust.certificates import spki
        from shared.trust.node_keys import load_private_key

        (home,) = (home for home in self._sites.values() if home.name == name)
        return [spki(load_private_key(home / "keys" / "site.key", None).public_key())]

    def may_repeat(self, message_id: str) -> bool:
        """Return that no site was killed."""
        return False

    def arrivals(self) -> dict[int, int]:
        """Return that no site has come back."""
        return {}

    def holder(self, certificate: object) -> str:
        """Name no site: the golden jobs show no certificates, which only a secure sum does."""
        raise NotImplementedError("a secure sum is not recorded here")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `Grid`."""
        asked = {message.metadata.message_id: message for message in messages}
        self._waiting |= asked
        return list(asked)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See `Grid`."""
        asked = set(message_ids)
        chosen = [identifier for identifier in self._waiting if identifier in asked]
        return [self._answer(self._waiting.pop(identifier)) for identifier in chosen]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """See `Grid`."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        return self._apps[node](message, self._contexts[node])


def _app_of(home: Path) -> ClientApp:
    """Return the app of one site, which keeps its home open."""
    from client.app import make_client_app
    from client.site.home import SiteHome, open_site

    opened: list[Any] = []

    def site(context: Context) -> Any:
        if not opened:
            opened.append(open_site(SiteHome(home.resolve()), passphrase=None))
        return opened[0]

    return make_client_app(site)
