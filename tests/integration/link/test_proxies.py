"""A site behind the proxies that hospitals and banks run: squid and tinyproxy themselves, where they are installed."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from client.link.answering import answering
from client.link.client import Unreachable, welcome
from client.link.handshake import tls_facts
from server.link.grid import LinkGrid
from simulations.federation.processes import free_port
from tests.integration.link.parts import HOST, Consortium, eventually, serving, site
from tests.integration.link.test_link import ask, data_of, same

# What stands in a URL must be quoted; tinyproxy's own settings know letters and digits only.
PASSWORDS = {"squid": ("p:a@ss/word", "p%3Aa%40ss%2Fword"), "tinyproxy": ("pass1word", "pass1word")}


def squid(folder: Path, port: int) -> list[str]:
    hashed = subprocess.run(
        ["openssl", "passwd", "-apr1", PASSWORDS["squid"][0]], capture_output=True, text=True, check=True
    ).stdout
    (folder / "passwords").write_text(f"anna:{hashed}")
    (folder / "squid.conf").write_text(f"""
        http_port {HOST}:{port}
        auth_param basic program /usr/lib/squid/basic_ncsa_auth {folder}/passwords
        auth_param basic children 1
        acl known proxy_auth REQUIRED
        http_access allow known
        http_access deny all
        cache deny all
        pid_filename {folder}/squid.pid
        access_log none
        cache_log {folder}/squid.log
        coredump_dir {folder}
        shutdown_lifetime 0 seconds
        visible_hostname proxy.example.org
        """)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o777)  # squid gives root's rights up
    return ["squid", "-N", "-f", str(folder / "squid.conf")]


def tinyproxy(folder: Path, port: int) -> list[str]:
    (folder / "tinyproxy.conf").write_text(f"""
Port {port}
Listen {HOST}
Timeout 600
MaxClients 20
BasicAuth anna {PASSWORDS["tinyproxy"][0]}
""")
    return ["tinyproxy", "-d", "-c", str(folder / "tinyproxy.conf")]


Proxy = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture(params=[squid, tinyproxy], ids=["squid", "tinyproxy"])
def proxy(request: pytest.FixtureRequest) -> Iterator[tuple[int, str, Proxy]]:
    """Return a port, a quoted password, and what starts the proxy there."""
    program: str = request.param.__name__
    if shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
        pytest.skip(f"{program} is not installed; on Debian: apt install {program}")
    port = free_port()
    # Not below `tmp_path`: squid runs as another user, who may not enter it.
    folder = Path(tempfile.mkdtemp(prefix=f"{program}-"))
    command = request.param(folder, port)
    made: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        made.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        eventually(lambda: _listens(port))
        return made[-1]

    yield port, PASSWORDS[program][1], start
    for process in made:
        process.kill()
        process.wait()
    shutil.rmtree(folder)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def test_a_site_works_through_a_proxy_that_asks_for_a_password(tmp_path: Path, proxy: tuple[int, str, Proxy]) -> None:
    port, password, start = proxy
    process, consortium = start(), Consortium(tmp_path / "consortium")
    mine = consortium.credentials["a"]
    with serving(consortium, host="0.0.0.0") as (server, heard):  # noqa: S104
        address = f"localhost:{server.port}"
        for who, answer in ((f"anna:{password}@", None), ("anna:wrong@", "407|401"), ("", "407|401")):
            through = f"http://{who}{HOST}:{port}"
            if answer is None:
                assert tls_facts(address, mine.ca, proxy=through).tls_version == "TLSv1.3"
                assert welcome(address, mine, proxy=through).site == "a"
            else:
                with pytest.raises(Unreachable, match=answer) as refused:
                    tls_facts(address, mine.ca, proxy=through)
                assert "wrong" not in str(refused.value)
                with pytest.raises(Unreachable, match="through the proxy") as refused:
                    welcome(address, mine, proxy=through)
                assert "wrong" not in str(refused.value)
        grid, data = LinkGrid(server, 1), bytes(300_000)
        with site(server.port, mine, answering(same), proxy=f"http://anna:{password}@{HOST}:{port}"):
            eventually(lambda: heard.open == {"a"})
            (node,) = eventually(lambda: list(grid.get_node_ids()))
            assert [data_of(reply) for reply in grid.send_and_receive([ask(grid, node, data)], timeout=60)] == [data]
            # The proxy is started again, as it is every night: the site comes back by itself.
            process.kill()
            process.wait()
            eventually(lambda: heard.open == set())
            start()
            eventually(lambda: heard.open == {"a"})
            assert [data_of(reply) for reply in grid.send_and_receive([ask(grid, node, data)], timeout=60)] == [data]
