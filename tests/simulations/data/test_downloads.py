"""Public data fetched from a real server on this machine: only the recorded bytes are kept, whatever the server does."""

from __future__ import annotations

import contextlib
import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request

import pytest

from shared.errors import DataError, RunError
from simulations.data import builtin_data, downloads
from simulations.data.archives import sha256_of
from simulations.data.builtin_data import BANKING77, BC5CDR, BUILTIN
from simulations.data.downloads import PublicFile

CONTENT = b"text,category\r\n" + b"where is my card?,card_arrival\r\n" * 2_000
SIZE = f"{len(CONTENT):,}"


@dataclass
class Server:
    """A web server on this machine.

    Attributes:
        answers: what a path does with its handler.
        asked: the paths that were asked for, in order.
    """

    url: str = ""
    answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            state.answers.get(self.path, lambda handler: handler.send_error(404))(self)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        state.url = f"http://127.0.0.1:{running.server_port}"
        yield state
        running.shutdown()


def send(body: bytes, *, declared: int | None = None) -> Callable[[BaseHTTPRequestHandler], None]:
    """Answer with `body`; `declared` is the length in the header, -1 for none."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        if declared != -1:
            handler.send_header("Content-Length", str(len(body) if declared is None else declared))
        handler.end_headers()
        with contextlib.suppress(OSError):  # the client had enough
            handler.wfile.write(body)

    return answer


def redirect(target: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def recorded(url: str, content: bytes = CONTENT) -> PublicFile:
    return PublicFile(name="some.csv", url=url, size=len(content), sha256=sha256_of(content))


def test_the_recorded_file_is_kept(server: Server, tmp_path: Path) -> None:
    server.answers["/some.csv"] = send(CONTENT)
    file = recorded(f"{server.url}/some.csv")
    assert file.fetch(tmp_path / "data")
    assert (tmp_path / "data" / "some.csv").read_bytes() == CONTENT
    assert not file.fetch(tmp_path / "data")
    assert server.asked == ["/some.csv"]
    assert file.read(tmp_path / "data" / "some.csv") == CONTENT


def test_a_length_need_not_be_told(server: Server, tmp_path: Path) -> None:
    server.answers["/some.csv"] = send(CONTENT, declared=-1)
    assert recorded(f"{server.url}/some.csv").fetch(tmp_path)


def test_redirects_are_followed_on_the_web_only(server: Server, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)
    server.answers |= {
        "/moved": redirect("/some.csv"),
        "/some.csv": send(CONTENT),
        "/loop": redirect("/loop"),
        "/file": redirect(secret.as_uri()),
    }
    assert recorded(f"{server.url}/moved").fetch(tmp_path / "data")
    for path in ("/loop", "/file"):
        with pytest.raises(DataError, match="answered with 302"):
            recorded(server.url + path).fetch(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_redirect_from_https_to_http_is_refused() -> None:
    with pytest.raises(DataError, match="not encrypted"):
        downloads._NoDowngrade().redirect_request(
            Request("https://a.example/x"), None, 302, "Found", Message(), "http://a.example/x"
        )
    assert downloads._NoDowngrade().redirect_request(
        Request("https://a.example/x"), None, 302, "Found", Message(), "https://b.example/x"
    )


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (send(CONTENT.replace(b"card", b"cord")), r"has SHA-256 [0-9a-f]{64}, expected .*was not read"),
        (send(CONTENT[:1000]), rf"ended after 1,000 of {SIZE} bytes"),
        (send(CONTENT[:1000], declared=len(CONTENT)), rf"ended after 1,000 of {SIZE} bytes"),
        (send(CONTENT + b"x"), rf"offers {len(CONTENT) + 1:,} bytes, expected {SIZE}"),
        (send(CONTENT * 50, declared=-1), rf"more than the expected {SIZE} bytes"),
        (send(b""), r"ended after 0 of"),
        (lambda handler: handler.send_error(404), r"answered with 404 Not Found"),
        (lambda handler: handler.send_error(503), r"answered with 503"),
        (lambda handler: handler.wfile.write(b"nonsense\r\n\r\n"), r"the connection broke"),
        (lambda handler: handler.connection.close(), r"the connection broke|cannot be reached"),
    ],
    ids=["other", "short", "cut", "long", "endless", "empty", "404", "503", "no-http", "hung-up"],
)
def test_whatever_else_comes_is_not_kept(
    server: Server, tmp_path: Path, answer: Callable[[BaseHTTPRequestHandler], None], message: str
) -> None:
    server.answers["/some.csv"] = answer
    with pytest.raises(DataError, match=message) as caught:
        recorded(f"{server.url}/some.csv").fetch(tmp_path)
    assert "Nothing was kept" in str(caught.value)
    assert f"put it, unchanged, into {tmp_path} as some.csv" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_no_more_than_the_size_is_read(server: Server, tmp_path: Path) -> None:
    sent = 0

    def endless(handler: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(2_000):
                handler.wfile.write(bytes(100_000))
                sent += 100_000
        except OSError:
            return

    server.answers["/some.csv"] = endless
    with pytest.raises(DataError, match="the rest was not fetched"):
        recorded(f"{server.url}/some.csv").fetch(tmp_path)
    assert sent < 50_000_000  # what buffers on the way hold, not the 200 MB that were offered


def test_a_server_that_says_nothing_or_drips(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(2)

    def drip(handler: BaseHTTPRequestHandler) -> None:
        send(b"", declared=-1)(handler)
        try:
            for _ in range(100):
                handler.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            return

    server.answers |= {"/silent": silent, "/drip": drip}
    monkeypatch.setattr(downloads, "SILENCE_SECONDS", 0.3)
    with pytest.raises(DataError, match=r"said nothing for 0\.3 s"):
        recorded(f"{server.url}/silent").fetch(tmp_path)
    monkeypatch.setattr(downloads, "DOWNLOAD_SECONDS", 0.3)
    with pytest.raises(DataError, match=r"needed more than 0\.3 s"):
        recorded(f"{server.url}/drip").fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_network(server: Server, tmp_path: Path) -> None:
    closed = PublicFile(name="some.csv", url="http://127.0.0.1:9/some.csv", size=1, sha256="0" * 64)
    with pytest.raises(DataError, match=r"127\.0\.0\.1:9.* cannot be reached: .*HTTPS_PROXY"):
        closed.fetch(tmp_path)
    with pytest.raises(DataError, match=r"ftp://.* no address of a web server"):
        closed.fetch(tmp_path, mirror="ftp://127.0.0.1")
    with pytest.raises(DataError, match="no address of a web server"):
        closed.fetch(tmp_path, mirror=str(tmp_path))


def test_the_proxy_of_the_environment_is_used(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers["http://data.example/some.csv"] = send(CONTENT)
    monkeypatch.setenv("http_proxy", server.url)
    assert recorded("http://data.example/some.csv").fetch(tmp_path)
    assert server.asked == ["http://data.example/some.csv"]


def test_a_file_that_is_there_and_another_one(server: Server, tmp_path: Path) -> None:
    server.answers["/some.csv"] = send(CONTENT)
    file = recorded(f"{server.url}/some.csv")
    (tmp_path / "some.csv").write_bytes(b"my own notes")
    with pytest.raises(DataError, match=r"some\.csv has SHA-256 .*--force replaces it"):
        file.fetch(tmp_path)
    assert (tmp_path / "some.csv").read_bytes() == b"my own notes"
    assert server.asked == []
    assert file.fetch(tmp_path, replace=True)
    assert (tmp_path / "some.csv").read_bytes() == CONTENT
    # What fails leaves what was there.
    (tmp_path / "some.csv").write_bytes(b"my own notes")
    server.answers["/some.csv"] = send(CONTENT[:-1])
    with pytest.raises(DataError, match="Nothing was kept"):
        file.fetch(tmp_path, replace=True)
    assert (tmp_path / "some.csv").read_bytes() == b"my own notes"
    assert [path.name for path in tmp_path.iterdir()] == ["some.csv"]


def test_a_folder_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    server.answers["/some.csv"] = send(CONTENT)
    (tmp_path / "in-the-way").write_text("")
    with pytest.raises(RunError, match="could not write"):
        recorded(f"{server.url}/some.csv").fetch(tmp_path / "in-the-way" / "data")


def test_gzipped_copies_are_read_up_to_the_size(tmp_path: Path) -> None:
    file = recorded("https://data.example/some.csv")
    assert file.find([tmp_path]) is None
    copy = tmp_path / "some.csv.gz"
    copy.write_bytes(gzip.compress(CONTENT))
    assert file.find([tmp_path / "none", tmp_path]) == copy
    assert file.read(copy) == CONTENT
    copy.write_bytes(gzip.compress(bytes(10_000_000)))
    with pytest.raises(DataError, match="more than the recorded"):
        file.read(copy)
    for damaged in (gzip.compress(CONTENT)[:50], b"no gzip"):
        copy.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read"):
            file.read(copy)


# --- the command ---


@pytest.fixture
def empty_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, and no data beside the project."""
    monkeypatch.setenv("SILOTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SILOTUNE_DATA", raising=False)
    monkeypatch.setattr(builtin_data, "data_folders", lambda: [builtin_data.data_folder()])
    return tmp_path


@pytest.fixture
def small_bank(monkeypatch: pytest.MonkeyPatch, empty_folders: Path) -> Path:
    """`banking77` with two small files in the place of the recorded ones."""
    files = tuple(
        PublicFile(
            name=file.name, url=f"https://data.invalid/{file.name}", size=len(CONTENT), sha256=sha256_of(CONTENT)
        )
        for file in BANKING77
    )
    data = BUILTIN["banking77"]
    changed = type(data)(**{**vars(data), "home": files})
    monkeypatch.setattr(builtin_data, "BUILTIN", {**BUILTIN, "banking77": changed})
    monkeypatch.setattr(builtin_data, "BANKING77", files)
    return empty_folders


def test_fetch_then_a_scenario_finds_it(server: Server, small_bank: Path, silotune: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"`silotune data fetch banking77` downloads it \(CC-BY-4\.0; PolyAI"):
        builtin_data.load_banking77()
    server.answers |= {f"/copies/{file.name}": send(CONTENT) for file in BANKING77}
    done = silotune("data", "fetch", "banking77", "--mirror", f"{server.url}/copies/")
    assert done.status == 0, done.err
    assert "licence CC-BY-4.0" in done.out
    assert "PolyAI" in done.out
    assert done.out.count(f"fetched, {SIZE} bytes, SHA-256 as recorded") == 2
    assert len(builtin_data.load_banking77().train) == 2_000
    listed = {row["name"]: row for row in json.loads(silotune("data", "list", "--json").out)}
    assert listed["banking77"]["here"] == "yes"
    assert listed["bc5cdr"]["here"] == listed["movie-reviews"]["here"] == "no"
    assert listed["digits"]["here"] == "yes"
    again = silotune("data", "fetch", "banking77")
    assert again.out.count("here already") == 2
    assert len(server.asked) == 2


def test_a_download_that_stopped_half_way_is_started_again(
    server: Server, small_bank: Path, silotune: Callable[..., Any]
) -> None:
    first, second = (f"/{file.name}" for file in BANKING77)
    server.answers |= {first: send(CONTENT), second: send(CONTENT[:500])}
    assert "ended after 500" in silotune("data", "fetch", "banking77", "--mirror", server.url).err
    server.answers[second] = send(CONTENT)
    assert silotune("data", "fetch", "banking77", "--mirror", server.url).status == 0
    assert server.asked == [first, second, second]


def test_another_folder_is_found_by_the_variable(
    server: Server, small_bank: Path, silotune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers |= {f"/{file.name}": send(CONTENT) for file in BANKING77}
    done = silotune("data", "fetch", "banking77", "--mirror", server.url, "--to", small_bank / "mine")
    assert f"SILOTUNE_DATA={small_bank / 'mine'}" in done.out
    with pytest.raises(DataError, match="silotune data fetch"):
        builtin_data.load_banking77()
    monkeypatch.setenv("SILOTUNE_DATA", str(small_bank / "mine"))
    assert len(builtin_data.load_banking77().test or ()) == 2_000


def test_a_changed_file_is_told_and_replaced_only_by_force(
    server: Server, small_bank: Path, silotune: Callable[..., Any]
) -> None:
    server.answers |= {f"/{file.name}": send(CONTENT) for file in BANKING77}
    kept = builtin_data.data_folder() / BANKING77[0].name
    kept.parent.mkdir(parents=True)
    kept.write_text("text,category\n")
    listed = {row["name"]: row for row in json.loads(silotune("data", "list", "--json").out)}
    assert listed["banking77"]["here"] == "another file"
    assert "--force" in silotune("data", "fetch", "banking77", "--mirror", server.url).err
    assert silotune("data", "fetch", "banking77", "--mirror", server.url, "--force").status == 0
    assert kept.read_bytes() == CONTENT


@pytest.mark.usefixtures("empty_folders")
def test_names_and_options_that_do_not_fit(silotune: Callable[..., Any]) -> None:
    assert "did you mean 'banking77'?" in silotune("data", "fetch", "bankin77").err
    for option, value in (("--to", "x"), ("--mirror", "http://127.0.0.1:9")):
        refused = silotune("data", "fetch", "digits", option, value)
        assert refused.status == 2
        assert "comes in a package" in refused.err
    assert "nothing to fetch" in silotune("data", "fetch", "digits").out


@pytest.mark.usefixtures("empty_folders")
def test_the_list_for_people(silotune: Callable[..., Any]) -> None:
    listed = silotune("data", "list").out
    assert all(name in listed for name in BUILTIN)
    assert "CC-BY-4.0" in listed


def test_recorded_addresses_are_fixed_commits() -> None:
    for file in (*BANKING77, *BC5CDR):
        assert file.url.startswith("https://raw.githubusercontent.com/")
        assert len(file.url.split("/")[5]) == 40
        assert len(file.sha256) == 64
