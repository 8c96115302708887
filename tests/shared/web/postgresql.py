"""A real PostgreSQL of the tests' own, if its programs are installed (Debian: postgresql)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from simulations.federation.processes import free_port


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
        make = [place / "initdb", "--auth=trust", "--username=tests", "--no-sync", "--encoding=UTF8", "-D", data]
        subprocess.run(make, check=True, capture_output=True, cwd=folder, **account)
        server, url = _start([place / "postgres", "-D", data, "-k", folder, "-h", "127.0.0.1", "-F"], folder, account)
        with server:
            try:
                yield url
            finally:
                server.send_signal(signal.SIGINT)  # waits for nobody's connection
                server.wait(20)


def _start(command: list[Any], folder: str, account: dict[str, str]) -> tuple[subprocess.Popen[bytes], str]:
    """Start it on a free port, which another test's process may take first: then it ends at once and gets another."""
    told = Path(folder) / "log"
    for _ in range(5):
        port = free_port()
        url = f"postgresql://tests@127.0.0.1:{port}"
        with told.open("wb") as log:
            server = subprocess.Popen([*command, "-p", str(port)], stdout=log, stderr=log, cwd=folder, **account)
        if _answers(server, url):
            return server, url
        server.kill()
        server.wait()
    raise RuntimeError(f"PostgreSQL did not start; the last of five tries printed:\n{told.read_text(errors='replace')}")


def _answers(server: subprocess.Popen[bytes], url: str) -> bool:
    end = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < end:
        try:
            psycopg.connect(f"{url}/postgres", connect_timeout=2).close()
        except psycopg.OperationalError:
            time.sleep(0.1)
        else:
            return True
    return False
