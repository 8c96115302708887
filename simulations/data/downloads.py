"""Public files fetched over HTTP from their home, or from a mirror, and kept only if they are the recorded ones.

Guarantees (tests: tests/simulations/data/test_downloads.py):
    - What is kept has the recorded size and SHA-256, wherever it came from; nothing else is written.
    - A file is there in full or not at all: an interrupted download leaves nothing and is simply started again.
    - No more than the recorded size is read, and no download takes longer than `DOWNLOAD_SECONDS`.
    - A file that is there already and is not the recorded one is replaced only if that is asked for.
"""

from __future__ import annotations

import gzip
import http.client
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from shared.errors import DataError
from shared.files import atomic
from shared.version import silotune_version
from simulations.data.archives import sha256_of

DOWNLOAD_SECONDS = 300
SILENCE_SECONDS = 30
"""A server that says nothing for so long is given up."""

_CHUNK = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class PublicFile:
    """One recorded file at a public address.

    Attributes:
        name: in the data folder; a gzipped copy, `name` and .gz, is read as well.
        url: where its publisher has it, at a fixed commit.
        size: bytes, not compressed.
        sha256: of the same bytes, hexadecimal.
    """

    name: str
    url: str
    size: int
    sha256: str

    def find(self, folders: Sequence[Path]) -> Path | None:
        """Return the first copy in `folders`, whatever it holds."""
        places = [folder / name for folder in folders for name in (self.name, f"{self.name}.gz")]
        return next((place for place in places if place.is_file()), None)

    def read(self, path: Path) -> bytes:
        """Return the content of a copy, decompressed.

        Raises:
            DataError: if it is not the recorded one.
        """
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                data: bytes = file.read(self.size + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} cannot be read ({type(error).__name__}); put a whole copy in its place.") from None
        self.require_recorded(data, str(path))
        return data

    def require_recorded(self, data: bytes, what: str) -> None:
        """Raise `DataError` unless `data` is the recorded content."""
        if len(data) > self.size:
            raise DataError(f"{what} holds more than the recorded {self.size:,} bytes; it was not read.")
        if (found := sha256_of(data)) != self.sha256:
            raise DataError(f"{what} has SHA-256 {found}, expected {self.sha256}; it was not read.")

    def fetch(self, folder: Path, *, mirror: str | None = None, replace: bool = False) -> bool:
        """Put the file into `folder`; return False if it was there already.

        Args:
            folder: is made if it is not there.
            mirror: address of a folder that has the file under `name`; None asks its publisher.
            replace: write over a file that is not the recorded one.

        Raises:
            DataError: if it cannot be had, or what came is not the recorded file; nothing was written then.
            RunError: if the disk does not take it.
        """
        path = folder / self.name
        if path.exists():
            try:
                self.read(path)
                return False
            except DataError as error:
                if not replace:
                    raise DataError(f"{error} --force replaces it by the recorded file.") from None
        url = self.url if mirror is None else f"{mirror.rstrip('/')}/{self.name}"
        try:
            data = download(url, size=self.size)
            self.require_recorded(data, f"what {url} sent")
        except DataError as error:
            raise DataError(
                f"{error} Nothing was kept. Try again, or fetch {self.url} on another machine and put it, unchanged, into "
                f"{folder} as {self.name}."
            ) from None
        atomic.write_bytes(path, data)
        return True


def download(url: str, *, size: int) -> bytes:
    """Return the `size` bytes behind an http or https address; the environment's proxies are used.

    Raises:
        DataError: saying what happened instead.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise DataError(f"{url} is no address of a web server; expected one that starts with https:// or http://.")
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    headers = {"User-Agent": f"silotune/{silotune_version()}", "Accept-Encoding": "identity"}
    try:
        with build_opener(_NoDowngrade).open(Request(url, headers=headers), timeout=SILENCE_SECONDS) as answer:  # noqa: S310
            return _body(answer, url, size, deadline)
    except HTTPError as error:
        raise DataError(f"{url} was answered with {error.code} {error.reason}.") from None
    except TimeoutError:
        raise DataError(f"{url}: the server said nothing for {SILENCE_SECONDS} s.") from None
    except URLError as error:
        raise DataError(f"{url} cannot be reached: {error.reason}. Check the network and HTTPS_PROXY.") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(f"{url}: the connection broke ({type(error).__name__}).") from None


def _body(answer: Any, url: str, size: int, deadline: float) -> bytes:
    """Return the body, of exactly `size` bytes."""
    declared = answer.headers.get("Content-Length", "")
    if declared.isdecimal() and int(declared) > size:
        raise DataError(f"{url} offers {int(declared):,} bytes, expected {size:,}; they were not fetched.")
    body = bytearray()
    while chunk := answer.read1(min(_CHUNK, size + 1 - len(body))):
        body += chunk
        if len(body) > size:
            raise DataError(f"{url} sent more than the expected {size:,} bytes; the rest was not fetched.")
        if time.monotonic() > deadline:
            raise DataError(f"{url} needed more than {DOWNLOAD_SECONDS} s for {size:,} bytes.")
    if len(body) < size:
        raise DataError(f"{url} ended after {len(body):,} of {size:,} bytes.")
    return bytes(body)


class _NoDowngrade(HTTPRedirectHandler):
    """Follows redirects, but never from https to what anybody on the way could read and change."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        if req.type == "https" and urlsplit(newurl).scheme != "https":
            raise DataError(f"{req.full_url} leads to {newurl}, which is not encrypted; it was not followed.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
