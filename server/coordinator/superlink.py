"""Flower's SuperLink as the coordinator runs it; the only file of `server` that touches non-public Flower.

TLS and authentication of nodes are always on. The Control API, which Flower leaves open to whoever reaches it, is bound
to loopback and cannot be configured otherwise (tests/integration/test_superlink.py).

Its state is kept in memory: what must outlive it stands in the coordinator's own folder (docs/decisions/0009).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import logging.handlers
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import tomli_w
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp.grid import Grid
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from server.store.home import CoordinatorHome
from shared.errors import RunError
from shared.processes import die_with_parent

CONTROL_HOST = "127.0.0.1"
_START_TIMEOUT_SECONDS = 60.0
_UNREGISTERED = "unregistered"
_PULL_BACKOFF_SECONDS = 0.02
_NOISE = re.compile(r"uvicorn\.access|ControlServicer\.List|\[Fleet\.PushMessages\]|GetRun\]")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class KeyRemembered(RunError):
    """The SuperLink refuses a key for as long as it runs, because it was unregistered before."""


@dataclass(frozen=True, kw_only=True)
class RegisteredNode:
    """A node that may connect: its number, the name it was registered under, its key and whether it is online."""

    node_id: int
    name: str
    public_key: bytes
    online: bool


@dataclass(frozen=True, kw_only=True)
class FlowerRun:
    """A run as Flower sees it: status is "pending", "starting", "running" or "finished:completed|failed|stopped"."""

    run_id: int
    status: str
    details: str


class SuperLink:
    """The SuperLink process.

    Attributes:
        process: the running child, or None.
    """

    def __init__(self, home: CoordinatorHome, *, fleet_address: str, control_port: int) -> None:
        self._home, self._fleet_address, self._control_port = home, fleet_address, control_port
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """Return the command line; there is no way to leave out TLS or authentication."""
        return [
            str(Path(sys.executable).parent / "flower-superlink"),
            "--ssl-ca-certfile", str(self._home.ca_certificate),
            "--ssl-certfile", str(self._home.server_certificate),
            "--ssl-keyfile", str(self._home.server_key),
            "--enable-supernode-auth",
            "--database", FLWR_IN_MEMORY_DB_NAME,
            "--host", CONTROL_HOST,
            "--port", str(self._control_port),
            "--fleet-api-address", self._fleet_address,
            "--disable-runtime-dependency-installation",
        ]  # fmt: skip

    def start(self) -> None:
        """Start the process and wait until its Control API answers.

        Raises:
            RunError: if it ends or does not answer in time; the end of its log is quoted.
        """
        self._home.superlink_log.parent.mkdir(parents=True, exist_ok=True)
        search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        settings = {
            "PATH": search,
            "FLWR_HOME": str(self._home.flower),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }
        self.process = subprocess.Popen(  # noqa: S603 (our own command line)
            self.command(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **settings},
            preexec_fn=die_with_parent,
        )
        threading.Thread(target=_keep_output, args=(self.process, self._home.superlink_log), daemon=True).start()
        deadline = time.monotonic() + _START_TIMEOUT_SECONDS
        with self.control() as control:
            while not control.answers():
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise RunError(
                        f"the SuperLink did not start; its log ends with:\n{_last_lines(self._home.superlink_log)}"
                    )
                time.sleep(0.05)

    def control(self) -> contextlib.closing[Control]:
        """Return a client of the Control API, closed after the block."""
        return contextlib.closing(Control(self._control_port, self._home.ca_certificate))

    def alive(self) -> bool:
        """Return whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """End the process and what it started."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None


class Control:
    """The Control API on loopback: who may connect, which runs there are."""

    def __init__(self, port: int, ca_certificate: Path) -> None:
        self._client = ControlHttpClient.from_server_address(
            server_address=f"{CONTROL_HOST}:{port}",
            insecure=False,
            root_certificates=ca_certificate.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def answers(self) -> bool:
        """Return whether the API is there."""
        try:
            self._client.ListNodes(ListNodesRequest())
        except httpx.TransportError:
            return False
        return True

    def nodes(self) -> list[RegisteredNode]:
        """Return the nodes that may connect."""
        return [
            RegisteredNode(
                node_id=node.node_id, name=node.name, public_key=node.public_key, online=node.status == "online"
            )
            for node in self._list()
            if node.status != _UNREGISTERED
        ]

    def _list(self) -> Sequence[NodeInfo]:
        with _explained():
            return list(self._client.ListNodes(ListNodesRequest()).nodes_info)

    def register(self, name: str, public_key: ec.EllipticCurvePublicKey) -> int:
        """Let a key connect and return its node id.

        Raises:
            KeyRemembered: this key was unregistered before; only a SuperLink that is started anew takes it again.
        """
        key = public_key_to_bytes(public_key)
        if any(node.public_key == key and node.status == _UNREGISTERED for node in self._list()):
            raise KeyRemembered(f"the key of site {name} was removed before and is valid again.")
        with _explained():
            return int(self._client.RegisterNode(RegisterNodeRequest(public_key=key, name=name)).node_id)

    def unregister(self, node_id: int) -> None:
        """Let a key connect no more; its very next call is refused."""
        try:
            with _explained():
                self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))
        except RunError:
            # Of a node that never connected, Flower removes the key and then stumbles.
            if any(node.node_id == node_id for node in self.nodes()):
                raise

    def start_run(self, bundle: bytes, config: Mapping[str, Any]) -> int:
        """Start a run of `bundle` and return its number."""
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        request = StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(config)))
        with _explained():
            response = self._client.StartRun(request)
        if not response.HasField("run_id"):
            raise RunError("the SuperLink started no run; see its log.")
        return int(response.run_id)

    def run(self, run_id: int) -> FlowerRun | None:
        """Return a run, or None if the SuperLink does not know it."""
        try:
            found = self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict
        except httpx.HTTPStatusError:
            return None
        if run_id not in found:
            return None
        status = found[run_id].status
        name = f"{status.status}:{status.sub_status}" if status.sub_status else status.status
        return FlowerRun(run_id=run_id, status=name, details=status.details)

    def stop_run(self, run_id: int) -> None:
        """Stop a run."""
        with _explained():
            self._client.StopRun(StopRunRequest(run_id=run_id))

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def server_bundle(server_app: str, client_app: str) -> bytes:
    """Return an app bundle without any code: it names components of the package that is installed.

    A node of ours never downloads it; a stock SuperNode would find in it only the name of the installed ClientApp.
    """
    config = {
        "project": {"name": "silotune-run", "version": "1.0.0", "license": "Apache-2.0", "dependencies": []},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "silotune",
                    "components": {"serverapp": server_app, "clientapp": client_app},
                    "config": {"home": "", "job": ""},
                }
            }
        },
    }
    bundle, _ = build_fab_from_files({"pyproject.toml": tomli_w.dumps(config).encode()})
    return bundle


def public_key_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return a key in the form in which `RegisteredNode.public_key` holds it."""
    return public_key_to_bytes(key)


def registered_names(grid: Grid) -> dict[int, str]:
    """Return node id -> name that the coordinator registered the node's key under, for all nodes online."""
    return {node.node_id: node.name for node in grid.get_nodes()}


def pull_promptly() -> None:
    """Make this process's Grid ask again soon for a reply that is still being uploaded.

    Flower waits a second (PULL_INITIAL_BACKOFF) when it catches a reply between its announcement and its last object,
    which at a poll of a tenth of a second happens in most rounds.
    """
    from flwr.superlink.grid import http_grid

    module: Any = http_grid
    if not isinstance(module.pull_objects, functools.partial):
        module.pull_objects = functools.partial(module.pull_objects, initial_backoff=_PULL_BACKOFF_SECONDS)
        # Grids make their messages themselves; Flower's own calls that deprecated, in every log.
        module.HttpGrid._deprecation_warning_logged = True


def _keep_output(process: subprocess.Popen[bytes], path: Path) -> None:
    """Write what the SuperLink and the ServerApp print to a file that is rotated, without the noise of polling."""
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=10 * 2**20, backupCount=5, encoding="utf-8")
    assert process.stdout is not None  # noqa: S101 (a pipe)
    with contextlib.closing(handler):
        for raw in process.stdout:
            line = _COLOURS.sub("", raw.decode("utf-8", errors="replace").rstrip())
            if line and not _NOISE.search(line):
                handler.emit(logging.makeLogRecord({"msg": line}))


def _last_lines(path: Path, count: int = 8) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return "\n".join(lines[-count:])


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise RunError(f"the SuperLink refused ({error.response.status_code}): {error.response.text[:300]}") from None
    except httpx.TransportError as error:
        raise RunError(f"the SuperLink does not answer ({type(error).__name__}); is the coordinator running?") from None
