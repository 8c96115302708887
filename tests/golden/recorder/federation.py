"""A federation of real homes inside one process: the coordinator's ServerApp asks the sites' ClientApp.

Up to version 0.1 both were apps that Flower started, and are found by their kind, in whatever module they stand.
Only the network between them is left out: requests are signed, ledgers sealed and audit logs kept.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import ServerApp
from flwr.serverapp.grid import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity


def serve(coordinator: Path, sites: Sequence[Path], job: str) -> None:
    """Run the submitted `job` of a coordinator's home over sites' homes until it has ended."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID
    found = _find("server", ServerApp)
    if found is None:
        _run_submission(HomesGrid(sites), coordinator, job)
        return
    app = found[1]
    context = _context(SUPERLINK_NODE_ID)
    context.run_config = {"home": str(coordinator.resolve()), "job": job}
    app(HomesGrid(sites), context)


class HomesGrid(Grid):
    """A Grid with one node for each site's home; its node answers when its reply is pulled, in the order of requests."""

    def __init__(self, sites: Sequence[Path]) -> None:
        found = _find("client", ClientApp)
        self._sites = dict(enumerate(sites, start=1))
        if found is None:
            self._apps = {node: _app_of(home) for node, home in self._sites.items()}
        else:
            modules = {node: _copy(found[0], node) for node in self._sites}
            self._apps = {node: _apps(module, ClientApp)[0] for node, module in modules.items()}
        self._contexts = {node: _context(node) for node in self._sites}
        self._waiting: dict[str, Message] = {}
        self._run = Run.create_empty(run_id=1)

    def set_run(self, run: Run) -> None:
        """See `Grid`."""
        self._run = run

    @property
    def run(self) -> Run:
        """See `Grid`."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See `Grid`."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """See `Grid`."""
        return list(self._sites)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """See `Grid`; the name is the one under which the coordinator admitted the node's key."""
        return [NodeInfo(node_id=node, name=home.name) for node, home in self._sites.items()]

    run_id = 1

    def names(self) -> dict[int, str]:
        """Return node -> the name under which the coordinator admitted its key."""
        return {node: home.name for node, home in self._sites.items()}

    def keys(self, name: str) -> list[bytes]:
        """Return the key of a site, as its certificate would."""
        from shared.trust.node_keys import load_private_key
        from shared.trust.receipts import spki

        (home,) = (home for home in self._sites.values() if home.name == name)
        return [spki(load_private_key(home / "keys" / "site.key", None).public_key())]

    def may_repeat(self, message_id: str) -> bool:
        """Return that no site was killed."""
        return False

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `Grid`."""
        identifiers = []
        for message in messages:
            identifier = str(uuid4())
            message.metadata.__dict__["_message_id"] = identifier
            self._waiting[identifier] = message
            identifiers.append(identifier)
        return identifiers

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
        os.environ["SILOTUNE_SITE_HOME"] = str(self._sites[node].resolve())
        reply: Message = self._apps[node](message, self._contexts[node])
        return reply


def _context(node: int) -> Context:
    return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})


def _run_submission(grid: Any, coordinator: Path, job: str) -> None:
    from server.coordinator.production import run_submission
    from server.store.home import CoordinatorHome
    from server.store.submission import Submission

    home = CoordinatorHome(coordinator.resolve())
    run_submission(grid, home, Submission(home.jobs / job))


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


def _find(package: str, kind: type[Any]) -> tuple[ModuleType, Any] | None:
    """Return the module below `package` that holds an app of this kind, and the app; None if there is none."""
    top = importlib.import_module(package)
    for found in sorted(pkgutil.walk_packages(top.__path__, f"{package}."), key=lambda m: m.name):
        if found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        if apps := _apps(module, kind):
            return module, apps[0]
    return None


def _apps(module: ModuleType, kind: type[Any]) -> list[Any]:
    return [value for value in vars(module).values() if isinstance(value, kind)]


def _copy(module: ModuleType, number: int) -> ModuleType:
    """Return the module executed once more: a site keeps its home open in its process, and each site has one."""
    assert module.__file__ is not None
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_{number}", module.__file__)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copy
    spec.loader.exec_module(copy)
    return copy
