"""A site's end of the link in a process of its own, to be killed: `python -m tests.integration.link.lone_site FOLDER NAME PORT`.

It answers with what came, after as many seconds as `slow` in its folder says, and notes every request in `handled`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from flwr.app import Message

from client.link.answering import answering
from client.link.client import Credentials, LinkClient
from shared.link.frames import Welcome
from shared.link.line import Parcel

ROOT = Path(__file__).parents[3]


def start(folder: Path, port: int, credentials: Credentials) -> subprocess.Popen[bytes]:
    """Start that process."""
    folder.mkdir(exist_ok=True)
    for name in ("ca", "certificate", "key"):
        (folder / name).write_bytes(getattr(credentials, name))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.integration.link.lone_site", str(folder), str(port)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def main(folder: Path, port: int) -> None:
    shown = Credentials(**{name: (folder / name).read_bytes() for name in ("ca", "certificate", "key")})
    same = answering(lambda message, node, waited: Message(message.content, reply_to=message))

    def handle(request: Parcel, welcome: Welcome) -> bytes | None:
        with (folder / "handled").open("a") as file:
            file.write(f"{os.getpid()} {request.id.hex()}\n")
        time.sleep(float((folder / "slow").read_text()) if (folder / "slow").exists() else 0.0)
        return same(request, welcome)

    LinkClient(f"localhost:{port}", lambda: shown, handle).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
