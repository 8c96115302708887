"""The demo data: 10,605 movie-review sentences with mean human ratings (Hutto and Gilbert, ICWSM 2014).

It comes out of the source archive of vaderSentiment 3.3.2 (MIT licence); see `simulations.data.archives`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.data.datasets import DataSource, Record, read_records, write_jsonl
from shared.errors import DataError
from shared.numbers import read_number
from shared.privacy.persons import Persons
from simulations.data.archives import Download, PackageArchive, cache_folder, make_cache, read_member, sha256_of

ARCHIVE = PackageArchive(
    requirement="vaderSentiment==3.3.2",
    file="vaderSentiment-3.3.2.tar.gz",
    size=2_466_783,
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

MOVIE_REVIEWS = "movie-reviews.jsonl"
MOVIE_REVIEWS_SHA256 = "ba8e1f37e6a77f162edee55466fab7cb2bce22b8304861e18c4cb88ab995e13f"


def load_movie_reviews(cache: Path | None = None, *, download: Download | None = None) -> list[dict[str, Any]]:
    """The demo data set: records of `text`, `rating` and `label` ("positive" if rating > 0 or "negative").

    The first call fetches it; later calls read `movie-reviews.jsonl` in the cache, which is rebuilt if it was
    changed. 5,242 records are positive; the 37 with rating 0 are negative; two texts occur twice, each time
    with equal labels.

    Args:
        cache: folder that keeps the archive and the data set; None is `cache_folder()`.
        download: puts the archive into the folder that it is given; None lets pip do it.

    Raises:
        DataError: if the archive is not in the cache and cannot be fetched, or is not the recorded one.
    """
    cache = cache or cache_folder()
    make_cache(cache)
    path = cache / MOVIE_REVIEWS
    if not path.is_file() or sha256_of(path.read_bytes()) != MOVIE_REVIEWS_SHA256:
        write_jsonl(path, parse_ratings(read_recorded(RATINGS, cache, download=download)))
    columns = {role: role for role in ("text", "label", "rating")}
    return read_records(DataSource(path=str(path.resolve()), columns=columns))


def read_recorded(member: str, cache: Path | None = None, *, download: Download | None = None) -> bytes:
    """One file of the recorded archive's inner archive, read in memory; arguments and errors as above."""
    return read_member(ARCHIVE.read(INNER_ARCHIVE, cache, download=download), member)


def split_public_test(
    records: Sequence[Record], *, num_test: int = 2000, seed: int, persons: Persons | None = None
) -> tuple[list[Record], list[Record]]:
    """Hold out `num_test` records as a public test set: (train, test), both in the order of `records`.

    The records whose SHA-256 of seed and text is smallest are held out, so the choice does not depend on
    their order. Records with the same text, up to case and white space, stay on the same side.

    With `persons`, all records of a person stay on the same side instead: those of a person whose other records train are
    not public. The persons with the smallest SHA-256 of all their texts are held out, so that each is as likely to be, however
    many records they have; different persons may have the same text.

    Raises:
        DataError: if `num_test` leaves no record on one side, or cannot be met with these records together.
    """
    if not 0 < num_test < len(records):
        raise DataError(
            f"{num_test} of {len(records)} records cannot be held out. Set num_test between 1 and {len(records) - 1}."
        )
    held_out: set[int] = set()
    for group in inseparable(records, seed=seed, persons=persons):
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


def fold_rows(records: Sequence[Record], folds: int, *, seed: int, persons: Persons | None = None) -> list[list[int]]:
    """Return the rows of each of `folds` parts, in the order of `records`: disjoint, covering all, as equal in size as can be.

    Records that `split_public_test` keeps on one side are in one part. The largest groups are dealt out first, each to the part
    that is smallest so far; among groups of one size the public seed decides.

    Raises:
        DataError: if there are fewer groups than parts.
    """
    groups = sorted(inseparable(records, seed=seed, persons=persons), key=len, reverse=True)
    if len(groups) < folds:
        what = "different texts" if persons is None else "persons"
        raise DataError(f"{len(groups)} {what} cannot make {folds} folds; lower simulation.folds or add records.")
    parts: list[list[int]] = [[] for _ in range(folds)]
    for group in groups:
        min(parts, key=len).extend(group)
    return [sorted(part) for part in parts]


def inseparable(records: Sequence[Record], *, seed: int, persons: Persons | None = None) -> list[list[int]]:
    """Return the rows in groups that must stay on one side of a split, in an order drawn from the public seed.

    A group is all records with one text, up to case and white space, or with `persons` all records of one person. The order
    does not depend on that of the records.
    """
    digests = [sha256_of(f"{seed}:{' '.join(_text_of(record).casefold().split())}".encode()) for record in records]
    if persons is not None:
        # Of all texts together: the smallest digest of a person would put those with many records first.
        def of_all(rows: list[int]) -> str:
            return sha256_of("".join(sorted(digests[row] for row in rows)).encode())

        return sorted((rows.tolist() for rows in persons.rows), key=of_all)
    groups: dict[str, list[int]] = {}
    for index, digest in enumerate(digests):
        groups.setdefault(digest, []).append(index)
    return [group for _, group in sorted(groups.items())]


def _text_of(record: Record) -> str:
    return str(next(record[role] for role in ("text", "prompt", "tokens", "pixels") if role in record))


def parse_ratings(data: bytes) -> list[dict[str, Any]]:
    """Records from lines of `id <tab> mean rating <tab> text`; UTF-8, rating between -4 and 4.

    Raises:
        DataError: if a line is otherwise; the message names the line only.
    """
    records = []
    for number, line in enumerate(data.decode("utf-8").splitlines(), start=1):
        try:
            _, rating_text, text = line.split("\t")
            rating = read_number(rating_text)
        except ValueError:
            raise DataError(f"{RATINGS}, line {number}: expected an id, a rating and a text with tabs.") from None
        if not -4 <= rating <= 4 or not text.strip():
            raise DataError(f"{RATINGS}, line {number}: expected a rating between -4 and 4, and a text.")
        label = "positive" if rating > 0 else "negative"
        records.append({"text": text.strip(), "label": label, "rating": rating})
    return records
