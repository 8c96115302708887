"""A research console that answers over real HTTP, and the browser of somebody who followed its link."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.http.serving import listen, make_server, place_at
from shared.web.accounts.links import OneTimeLink
from shared.web.application import make_application
from shared.web.console import Console
from simulations.console import index
from simulations.console.start import ROUTES, open_console
from tests.simulations.console.folders import make_run, make_sweep

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>'


@dataclass
class Serving:
    """A console that is served.

    Attributes:
        links: the paths that its terminal printed.
    """

    root: Path
    console: Console
    app: Any
    address: str
    links: list[str] = field(default_factory=list)

    def browser(self, **options: Any) -> Browser:
        """Return a browser that holds nothing yet."""
        return Browser(self, httpx.Client(base_url=self.address, timeout=60, **options))

    def signed_in(self) -> Browser:
        """Return a browser that followed the link of now."""
        browser = self.browser()
        assert browser.follow(self.links[-1]).status_code == 303
        return browser


@dataclass
class Browser:
    """Sends forms as a browser does: with the token of the page and its origin."""

    serving: Serving
    http: httpx.Client

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def page(self, path: str) -> str:
        """Return a page that has to be there."""
        answer = self.get(path)
        assert answer.status_code == 200, answer.text
        return answer.text

    def follow(self, link: str, **headers: str) -> httpx.Response:
        """Open a link and press its button."""
        found = re.search(r'name="csrf_token" value="([0-9a-f]{64})"', self.page(f"/{link}"))
        assert found
        sent = {"origin": self.serving.address} | headers
        return self.http.post("/link", data={"csrf_token": found[1], "code": link}, headers=sent)


@pytest.fixture(scope="module", autouse=True)
def _always_looks() -> Iterator[None]:
    """Tests change folders faster than people do."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(index, "_AGAIN_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Serving]]:
    """Return a function that serves the console of a folder."""
    ends: list[Callable[[], None]] = []

    def begin(root: Path) -> Serving:
        place = place_at("127.0.0.1", 0, None, None)
        listener = listen(place)
        port, links = listener.getsockname()[1], list[str]()
        link = OneTimeLink(links.append)
        console = open_console(root, place=place, port=port, reports=tmp_path_factory.mktemp("reports"), link=link)
        guarded, app = make_application(console, ROUTES)
        server = make_server(guarded, place)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
        thread.start()
        link.begin()

        def end() -> None:
            server.should_exit = True
            thread.join(20)

        ends.append(end)
        return Serving(root, console, app, f"http://127.0.0.1:{port}", links)

    yield begin
    for end in ends:
        end()


@pytest.fixture(scope="module")
def serving(serve: Callable[[Path], Serving], tmp_path_factory: pytest.TempPathFactory) -> Serving:
    """The console of a folder with runs of many kinds."""
    return serve(make_folder(tmp_path_factory.mktemp("research") / "runs"))


def make_folder(root: Path) -> Path:
    """Write runs of many kinds, a sweep, and what is damaged or hostile."""
    baselines = {"central-dp": 0.82, "non-private": 0.86, "non-private-all-layers": 0.88}
    make_run(root / "first", baselines=baselines, repeats=[0.80, 0.82, 0.79])
    make_run(root / "eps1", asked=1.0, executed=0.99991, value=0.70, training={"learning_rate": 0.7})
    make_run(root / "early", name="early", asked=8.0, executed=5.1, planned=7.999, value=0.81)
    make_run(root / "open", name="open", mechanism="none", asked=None, value=0.87)
    make_run(
        root / "deep" / "er" / "lm",
        name="replies",
        metric="perplexity",
        value=520.5,
        data="replies",
        partition={"kind": "dirichlet", "alpha": 0.3, "num_sites": 3},
    )
    make_run(root / "going", name="going", status="running", value=0.6)
    make_run(root / "evil", name=EVIL, data=EVIL, partition={"kind": "column", "column": EVIL}, training={EVIL: EVIL})
    (make_run(root / "broken") / "run.json").write_text("{")
    make_sweep(root / "sweeps" / "budgets")
    (root / "notes.txt").write_text("mine\n")
    return root


def files_of(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return everything beneath a folder: when it was changed, its mode, and what it holds."""
    return {
        path.relative_to(root).as_posix(): (
            path.lstat().st_mtime_ns,
            path.lstat().st_mode,
            path.read_bytes() if path.is_file() and not path.is_symlink() else b"",
        )
        for path in sorted(root.rglob("*"))
    }
