"""A real PostgreSQL of the tests' own, if its programs are installed (Debian: postgresql)."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg


def programs() -> Path | None:
    """Return the folder with `initdb` and `postgres`."""
    found = shutil.which("initdb")
    places = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "postgres").exists()), None)


@contextmanager
def running(place: Path) -> Iterator[str]:
    """Run a server for a while and yield the URL of its superuser, without a database."""
    # PostgreSQL does not run as root.
    as_root = os.geteuid() == 0
    account = {"user": "nobody", "group": "nogroup"} if as_root else {}
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o777)  # noqa: S103 (of the other account)
        data = Path(folder) / "data"
        told = Path(folder) / "log"
        make = [place / "initdb", "--auth=trust", "--username=tests", "--no-sync", "--encoding=UTF8", "-D", data]
        subprocess.run(make, check=True, capture_output=True, cwd=folder, **account)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        serve = [place / "postgres", "-D", data, "-p", str(port), "-k", folder, "-h", "127.0.0.1", "-F"]
        with told.open("wb") as log, subprocess.Popen(serve, stdout=log, stderr=log, cwd=folder, **account) as server:
            try:
                url = f"postgresql://tests@127.0.0.1:{port}"
                _wait(url)
                yield url
            finally:
                server.send_signal(signal.SIGINT)  # waits for nobody's connection
                server.wait(20)


def _wait(url: str) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(f"{url}/postgres", connect_timeout=2).close()
            return
        except psycopg.OperationalError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
