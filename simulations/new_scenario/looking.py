"""What the records of a file are, found by reading them on this machine; or a refusal that says why they will not do.

Guarantee (tests: tests/simulations/new_scenario/test_new_scenario.py): no message holds a text, a pair, a response or an
id of a record. Labels, tags and the names of sites may be shown: they are what a scenario has to name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared.data.cells import shorten
from shared.data.datasets import PERSON_ROLE, DataSource, Record, read_records
from shared.errors import DataError
from shared.job.kinds import TaskKind
from shared.job.parsing import parse
from shared.numbers import comma_hint, read_number
from shared.privacy.persons import Persons
from simulations.new_scenario.question import SITE_ROLE, Question, columns_of

LEAST_RECORDS = 100
"""Fewer give no useful model at any budget worth stating, with or without privacy."""
MOST_LABELS = 500
MOST_SITES = 1000
LEAST_AT_A_SITE = 16
_FEW_NUMBERS = 20
_MOST_SHOWN = 5
_ID = re.compile(r"[A-Za-z0-9_:#./-]*\d[A-Za-z0-9_:#./-]*")
_NUMBER = re.compile(r"\s*[+-]?(\d+([.,]\d+)*|\.\d+)([eE][+-]?\d+)?\s*%?\s*")


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the records are.

    Attributes:
        kind: kind of task.
        columns: role -> column in the file.
        labels: of the task, in the order of the logits; () where it has none.
        value_range: of regression or pixels.
        num_records: in the file; None if nothing was looked up.
        units_at_sites: records, or persons, of each site by the column `site`; () where a partition makes the sites. Exact:
            only what sites would declare of it may be written or decide (`declared_size`).
        num_units: records or persons in all.
        texts: what a tokenizer has to measure; () for images.
        remarks: what the engineer should know, one sentence each.
    """

    kind: TaskKind
    columns: dict[str, str]
    labels: tuple[str, ...] = ()
    value_range: tuple[float, float] | None = None
    num_records: int | None = None
    num_units: int = 0
    units_at_sites: tuple[int, ...] = ()
    texts: Sequence[Any] = ()
    remarks: tuple[str, ...] = ()


def look(question: Question, kind: TaskKind) -> tuple[Findings, list[dict[str, Any]]]:
    """Read the file and return what it holds, and the records.

    Raises:
        DataError: if the file cannot be read, or its records will not do for the task.
    """
    columns = columns_of(kind, question.columns)
    described = {"path": str(question.data), "columns": columns, **question.file_format}
    records = read_records(parse(DataSource, described, source="what the options say of the file"), base=Path())
    if len(records) < LEAST_RECORDS:
        raise DataError(
            f"{question.data} holds {len(records)} records; a scenario needs {LEAST_RECORDS} at least, and some thousands for a "
            "budget that protects anybody."
        )
    found = Findings(kind=kind, columns=columns, num_records=len(records))
    found = CHECKS[kind](question, found, records)
    return _with_sites(question, found, records), records


# --- kinds of task ---


def _classes(question: Question, found: Findings, records: Sequence[Record]) -> Findings:
    column = found.columns["label"]
    values = [record["label"] for record in records]
    if found.kind == "sequence_classification":
        _require_text(question, found, records, "text")
        numbers, wrong = _numbers(values)
        if question.kind is None and not question.labels and not wrong:
            found = _numeric_labels(question, found, numbers)
            if found.kind == "regression":
                return _scores(question, found, records)
    labels = _labels(question, column, values, records)
    return replace(found, labels=labels, texts=[record["text"] for record in records], remarks=(
        *found.remarks, *_label_remarks(column, Counter(map(str, values)))))  # fmt: skip


def _pairs(question: Question, found: Findings, records: Sequence[Record]) -> Findings:
    for role in ("text", "pair"):
        _require_text(question, found, records, role, repeated=True)
    column = found.columns["label"]
    labels = _labels(question, column, [record["label"] for record in records], records)
    if len(labels) != 2:
        raise DataError(
            f"column {column!r} has {len(labels)} labels ({_shown(labels)}); pairs need two, one of them for a match."
            + " A grade of likeness is no task here: make two labels of it." * bool(_score_instead(column, labels))
        )
    if not question.labels:
        labels = tuple(sorted(labels, key=_means_a_match))
    remark = f"{labels[1]!r} counts as a match; with --labels OTHER,MATCH the other way round."
    texts = [(record["text"], record["pair"]) for record in records]
    return replace(found, labels=labels, texts=texts, remarks=(*found.remarks, remark))


def _scores(question: Question, found: Findings, records: Sequence[Record]) -> Findings:
    _require_text(question, found, records, "text")
    columns = columns_of("regression", found.columns)
    values = [record.get("score", record.get("label")) for record in records]
    numbers, wrong = _numbers(values)
    if wrong:
        hint = comma_hint(values[row - 1] for row in wrong)
        raise DataError(
            f"column {columns['score']!r} does not hold a number in every record, not at {_rows(wrong)}{hint}; regression "
            "needs one."
        )
    low, high = question.value_range or (min(numbers), max(numbers))
    if low >= high:
        raise DataError(
            f"column {columns['score']!r} holds one and the same number in every record; nothing can be learned."
        )
    if question.value_range is None and question.data_kind == "private":
        column = columns["score"]
        as_score = (
            "" if "score" in question.columns else f"column {column!r} counts as scores, as by --score {column}: "
        )
        raise DataError(
            f"{as_score}the range of scores is public, and the lowest and highest number of private records would tell about "
            "single ones. Give what scores can be, for example --range 1,5; or --public if the records are."
        )
    texts = [record["text"] for record in records]
    return replace(found, kind="regression", columns=columns, value_range=(low, high), texts=texts)


def _tags(question: Question, found: Findings, records: Sequence[Record]) -> Findings:
    words, tags = _listed(records, "tokens"), _listed(records, "tags")
    column = found.columns["tags"]
    for row, (own, marks) in enumerate(zip(words, tags, strict=True), start=1):
        if len(own) != len(marks):
            raise DataError(f"row {row:,} has {len(own)} tokens and {len(marks)} tags; each token needs one.")
    seen = Counter(tag for marks in tags for tag in marks)
    if foreign := sorted(tag for tag in seen if not re.fullmatch(r"O|[BI]-.+", tag)):
        raise DataError(
            f"column {column!r} holds {len(foreign)} tags that are not IOB ({_shown(foreign)}); expected O, B-NAME and I-NAME."
        )
    kinds = sorted({tag[2:] for tag in seen if tag != "O"})
    if not kinds:
        raise DataError(f"column {column!r} holds the tag O alone; there is nothing to find.")
    if len(kinds) > MOST_LABELS // 2:
        raise DataError(f"column {column!r} names {len(kinds):,} kinds of entities; {MOST_LABELS // 2} are the most.")
    labels = question.labels or ("O", *(f"{mark}-{kind}" for kind in kinds for mark in "BI"))
    _require_known(column, tags, labels)
    return replace(found, labels=tuple(labels), texts=words)


def _free_text(question: Question, found: Findings, records: Sequence[Record]) -> Findings:
    _require_text(question, found, records, "text")
    return replace(found, texts=[record["text"] for record in records])


def _dialogue(question: Question, found: Findings, records: Sequence[Record]) -> Findings:
    for role in ("prompt", "response"):
        _require_text(question, found, records, role, repeated=True)
    return replace(found, texts=[(record["prompt"], record["response"]) for record in records])


def _images(question: Question, found: Findings, records: Sequence[Record]) -> Findings:
    column = found.columns["pixels"]
    images = _listed(records, "pixels")
    if others := [row for row, image in enumerate(images, start=1) if len(image) != len(images[0])]:
        raise DataError(
            f"column {column!r} holds images of {len({*map(len, images)})} sizes, another one than in row 1 at {_rows(others)}; "
            "scale them to one."
        )
    found_numbers = [_numbers(image) for image in images]
    if wrong := [row for row, (_, bad) in enumerate(found_numbers, start=1) if bad]:
        raise DataError(
            f"column {column!r} does not hold pixel values, numbers alone, in every record, not at {_rows(wrong)}."
        )
    values = [numbers for numbers, _ in found_numbers]
    low, high = question.value_range or _pixel_range(min(map(min, values)), max(map(max, values)))
    labels = _labels(question, found.columns["label"], [record["label"] for record in records], records)
    return replace(found, labels=labels, value_range=(low, high), texts=[values[0]])


CHECKS: Mapping[TaskKind, Callable[[Question, Findings, Sequence[Record]], Findings]] = {
    "sequence_classification": _classes,
    "pair_matching": _pairs,
    "regression": _scores,
    "token_classification": _tags,
    "causal_lm": _free_text,
    "replies": _dialogue,
    "image_classification": _images,
}
"""What each kind of task asks of its records, and finds in them."""


# --- columns ---


def _require_text(
    question: Question, found: Findings, records: Sequence[Record], role: str, *, repeated: bool = False
) -> None:
    """Refuse a column of numbers, of ids, of one value, or of a few values that look like labels."""
    column = found.columns[role]
    values = [record[role] for record in records]
    if sum(_NUMBER.fullmatch(value) is not None for value in values) > len(values) / 2:
        raise DataError(f"column {column!r} holds numbers, not text; name the column that a person wrote as --{role}.")
    distinct = len(set(values))
    if distinct > 0.9 * len(values) and sum(_ID.fullmatch(value) is not None for value in values) > 0.9 * len(values):
        raise DataError(
            f"column {column!r} looks like ids, one for each record, not like text; name another as --{role}."
        )
    if distinct < 2:
        raise DataError(
            f"column {column!r} holds one and the same text in every record; nothing can be learned from it."
        )
    if not repeated and distinct <= max(20, len(values) // 50):
        raise DataError(
            f"column {column!r} holds {distinct} different texts in {len(values):,} records, as labels do, not texts; were "
            f"--{role} and --label swapped?"
        )


def _labels(question: Question, column: str, values: Sequence[Any], records: Sequence[Record]) -> tuple[str, ...]:
    """Return the labels, declared or found."""
    counts = Counter(map(str, values))
    if len(counts) < 2:
        raise DataError(
            f"column {column!r} has one label only ({_shown(counts)}); a classifier needs two, and there is nothing to learn."
        )
    if len(counts) > len(values) / 2:
        raise DataError(
            f"column {column!r} has {len(counts):,} different values in {len(values):,} records: it looks like free text or ids, "
            "not like labels. Name another column, or none to learn the text itself (causal_lm)."
            + _score_instead(column, values)
        )
    if len(counts) > MOST_LABELS:
        raise DataError(
            f"column {column!r} has {len(counts):,} labels; {MOST_LABELS} are the most here. Merge rare ones before."
            + _score_instead(column, values)
        )
    if question.labels:
        _require_known(column, [[str(value)] for value in values], question.labels)
        return question.labels
    return tuple(sorted(counts))


def _score_instead(column: str, values: Sequence[Any]) -> str:
    """Return the way out for a column of numbers, most of them with a decimal point or not, that was named as the label."""
    numbers = sum(_NUMBER.fullmatch(str(value)) is not None for value in values)
    if numbers <= len(values) / 2:
        return ""
    rest = f", once the {len(values) - numbers:,} records without one are mended" if numbers < len(values) else ""
    return f" It holds numbers: if they are ratings or amounts, name it by --score {column} instead of --label{rest}."


def _require_known(column: str, cells: Sequence[Sequence[str]], labels: Sequence[str]) -> None:
    """Refuse values that were not declared; `cells` has those of each row."""
    if unknown := {value for cell in cells for value in cell} - {*labels}:
        rows = [row for row, cell in enumerate(cells, start=1) if not unknown.isdisjoint(cell)]
        raise DataError(
            f"column {column!r} holds {len(unknown)} values that --labels does not name, at {_rows(rows)}. Add them, or mend "
            "the data."
        )


def _label_remarks(column: str, counts: Mapping[str, int]) -> list[str]:
    remarks = []
    folded: dict[str, list[str]] = {}
    for label in counts:
        folded.setdefault(" ".join(label.casefold().split()), []).append(label)
    if twins := [group for group in folded.values() if len(group) > 1]:
        remarks.append(f"Labels that differ in case or spaces only: {_shown(twins[0])}; they count as different ones.")
    if rare := [label for label, count in counts.items() if count < 20]:
        remarks.append(
            f"fewer than 20 records have the label {_shown(sorted(rare))} of {column!r}: under noise it will hardly be learned."
            if len(rare) == 1
            else f"{len(rare)} labels of {column!r} have fewer than 20 records each ({_shown(sorted(rare))}): under noise "
            "they will hardly be learned."
        )
    return remarks


def _numeric_labels(question: Question, found: Findings, numbers: Sequence[float]) -> Findings:
    """Decide what a label of numbers is: classes if it has few whole ones, scores if it has others."""
    column, distinct = found.columns["label"], len(set(numbers))
    if distinct <= 2 or (distinct <= _FEW_NUMBERS and all(number.is_integer() for number in numbers)):
        remark = (
            f"{column!r} holds {distinct} different numbers: taken for classes. --score {column} instead of --label predicts "
            "the number."
        )
        return replace(found, remarks=(*found.remarks, remark))
    if all(number.is_integer() for number in numbers):
        raise DataError(
            f"column {column!r} holds {distinct:,} different whole numbers, which may be classes or amounts. Say which: --task "
            f"sequence_classification, or --score {column} instead of --label for a number to predict."
        )
    remark = f"{column!r} holds {distinct:,} different numbers: taken for scores (regression)."
    return replace(found, kind="regression", remarks=(*found.remarks, remark))


def _with_sites(question: Question, found: Findings, records: Sequence[Record]) -> Findings:
    """Count records, or persons, of each site."""
    persons = None
    if PERSON_ROLE in found.columns:
        persons = Persons.from_ids([record[PERSON_ROLE] for record in records])
    num_units = len(records) if persons is None else persons.count
    if num_units < LEAST_RECORDS:
        raise DataError(
            f"{num_units} {question.unit or 'person'}s have records in {question.data}; a scenario needs "
            f"{LEAST_RECORDS} at least."
        )
    found = replace(found, num_units=num_units)
    if SITE_ROLE not in found.columns:
        return found
    column = found.columns[SITE_ROLE]
    units: dict[str, set[int]] = {}
    for row, record in enumerate(records):
        units.setdefault(str(record[SITE_ROLE]), set()).add(row if persons is None else int(persons.owners[row]))
    sizes = Counter({name: len(own) for name, own in units.items()})
    if len(sizes) < 2:
        raise DataError(
            f"column {column!r} names one site only ({_shown(sizes)}); without --site, --sites makes several."
        )
    if len(sizes) > MOST_SITES or len(sizes) > num_units / LEAST_AT_A_SITE:
        raise DataError(
            f"column {column!r} names {len(sizes):,} sites for {num_units:,} {question.unit or 'record'}s; it looks like an id. "
            f"A site needs {LEAST_AT_A_SITE} at least."
        )
    if small := [name for name, size in sizes.items() if size < LEAST_AT_A_SITE]:
        raise DataError(
            f"{len(small)} sites of column {column!r} have fewer than {LEAST_AT_A_SITE} {question.unit or 'record'}s "
            f"({_shown(sorted(small))}); leave them out of the file, or merge them with others."
        )
    return replace(found, units_at_sites=tuple(size for _, size in sizes.most_common()))


# --- values ---


def _numbers(values: Sequence[Any]) -> tuple[list[float], list[int]]:
    """Return the finite numbers among the values, and the places, from 1, of those that are none."""
    found, wrong = [], []
    for place, value in enumerate(values, start=1):
        try:
            found.append(read_number(value))
        except ValueError:
            wrong.append(place)
    return found, wrong


def _listed(records: Sequence[Record], role: str) -> list[list[Any]]:
    """Return the lists of a column as they are, texts cut at their spaces."""
    values = [record[role] for record in records]
    if wrong := [row for row, value in enumerate(values, start=1) if not isinstance(value, str | list | tuple)]:
        raise DataError(f"{role} are lists, or texts with spaces between; found something else at {_rows(wrong)}.")
    return [value.split() if isinstance(value, str) else list(value) for value in values]


def _rows(rows: Sequence[int]) -> str:
    """Return the first of these rows; the records are all rows of the file, in its order."""
    return f"row {shorten([f'{row:,}' for row in rows], _MOST_SHOWN)}"


def _pixel_range(low: float, high: float) -> tuple[float, float]:
    """Return the usual scale that these values fit into, which is of the format and not of the images."""
    for least, most in ((0.0, 1.0), (0.0, 16.0), (0.0, 255.0), (-1.0, 1.0), (0.0, 65_535.0)):
        if least <= low and high <= most:
            return least, most
    raise DataError("pixel values fit no usual scale; give theirs, for example --range 0,4095.")


def _means_a_match(label: str) -> tuple[int, str]:
    yes = {"match", "1", "true", "yes", "y", "positive", "duplicate", "same", "entailment", "related", "equivalent"}
    return int(label.casefold().strip() in yes), label


def _shown(names: Any) -> str:
    """Return some names for a message; what is as long as a text is counted, not shown."""
    short = [str(name) for name in names if len(str(name)) <= 40 and len(str(name).split()) <= 5]
    listed = [repr(name) for name in short[:_MOST_SHOWN]]
    rest = len(names) - len(listed)
    more = f"{rest:,} that {'is' if rest == 1 else 'are'} not shown" if rest else ""
    return " and ".join(part for part in (", ".join(listed), more) if part)
