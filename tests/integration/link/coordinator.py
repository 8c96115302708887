"""The coordinator's end of the link in a process of its own: asks all sites on command, and tells what that cost.

Every line on standard input is a JSON object: `nodes` to wait for, bytes of the `size` to ask with, `seconds` to wait at most.
Every line on standard output is one as well: the port first, then the outcome of each command.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import psutil
from flwr.app import ConfigRecord, RecordDict

from server.link.grid import LinkGrid
from server.link.server import LinkFiles, LinkServer

ROOT = Path(__file__).parents[3]


class CoordinatorProcess:
    """That process, from outside."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.link.coordinator", str(folder), str(port)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = int(self._read()["port"])
        self.facts = psutil.Process(self._process.pid)

    def round(self, *, nodes: int, size: int, seconds: float = 60.0) -> dict[str, Any]:
        """Ask all sites, and return how many answered rightly, after how long, and the process's memory."""
        self.begin_round(nodes=nodes, size=size, seconds=seconds)
        return self.end_round()

    def begin_round(self, *, nodes: int, size: int, seconds: float = 60.0) -> None:
        """Ask all sites, and do not wait."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"nodes": nodes, "size": size, "seconds": seconds}) + "\n")
        self._process.stdin.flush()

    def end_round(self) -> dict[str, Any]:
        """Return the outcome of the round that was begun."""
        return self._read()

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the coordinator's process ended"
        return dict(json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def main(folder: Path, port: int) -> None:
    files = LinkFiles(certificate=folder / "server.pem", key=folder / "server.key", trust=folder / "trust")
    with LinkServer(f"127.0.0.1:{port}", files) as server:
        say(port=server.port)
        grid = LinkGrid(server, 1)
        for line in sys.stdin:
            say(**one_round(grid, **json.loads(line)))


def one_round(grid: LinkGrid, *, nodes: int, size: int, seconds: float) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while len(found := list(grid.get_node_ids())) < nodes and time.monotonic() < deadline:
        time.sleep(0.05)
    started, processor = time.monotonic(), time.process_time()
    content = RecordDict({"x": ConfigRecord({"data": bytes(size)})})
    waiting = set(grid.push_messages([grid.create_message(content, "train", node, "1") for node in found]))
    right, failed = 0, []
    while waiting and time.monotonic() < deadline:
        replies = list(grid.pull_messages(waiting))
        for reply in replies:
            waiting.discard(reply.metadata.reply_to_message_id)
            right += not reply.has_error() and reply.content == content
            failed += [reply.error.reason] if reply.has_error() else []
        if not replies:
            time.sleep(0.02)
    # Not getrusage, which begins with what the parent had.
    (most,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {
        "nodes": len(found),
        "right": right,
        "failed": failed,
        "seconds": time.monotonic() - started,
        "processor_seconds": time.process_time() - processor,
        "most_bytes": int(most) * 1024,
    }


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
