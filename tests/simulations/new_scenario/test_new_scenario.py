"""`silotune new`: what it writes is run as it is; what will not do is refused by name, without a word of a record."""

from __future__ import annotations

import csv
import json
import math
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import ModelError
from shared.job.training import TrainingConfig
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.tensors.optimizers import build_optimizer, set_learning_rate
from simulations.new_scenario.document import _value
from simulations.new_scenario.lengths import LENGTHS, Backbone, look_at_backbone, measure
from simulations.new_scenario.rule import (
    RATES,
    STEPS,
    STEPS_ON_SAMPLES,
    Counts,
    accumulated,
    noise_share,
    sample_rate,
    settings_for,
)
from simulations.scenario import Scenario, load_scenario

WORDS = (
    "film",
    "joy",
    "dull",
    "plot",
    "worse",
    "script",
    "bright",
    "funny",
    "cast",
    "sit",
    "bores",
    "late",
    "warm",
    "made",
)
Run = Callable[..., Any]


def sentence(number: int, length: int = 6) -> str:
    """A text of its own for every number."""
    words = []
    for _ in range(length):
        words.append(WORDS[number % len(WORDS)])
        number = number // len(WORDS) + 7 * number % 13
    return " ".join(words)


def rows(count: int = 240) -> list[dict[str, Any]]:
    """Records with a column for every purpose."""
    return [
        {
            "note": f"{sentence(i)} {sentence(i * 31 + 5, 1 + i % 4)} {WORDS[i % 14]} {WORDS[i // 14 % 14]}",
            "triage": ["routine", "urgent"][(i // 3) % 2],
            "stars": (i % 7) / 2,
            "hospital": ["North", "South", "East"][i % 3],
            "patient_id": f"P{i // 2}",
            "id": f"A-{1000 + i}",
            "constant": "same",
        }
        for i in range(count)
    ]


def write_csv(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return path


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def new(silotune: Run, tmp_path: Path, tiny_bert: Path) -> Run:
    """Run `silotune new` on a file of this test, with a tiny backbone, and return the scenario."""

    def run(data: Path, *options: object, out: Path | None = None, backbone: Path | None = tiny_bert) -> Scenario:
        target = out or tmp_path / "mine.toml"
        more = ["--backbone", backbone] if backbone else []
        done = silotune("new", data, *options, *more, "--out", target)
        assert done.status == 0, done.err
        assert f"next: silotune simulate {target}" in done.out
        return load_scenario(target)

    return run


@pytest.fixture
def refused(silotune: Run, tmp_path: Path, tiny_bert: Path) -> Run:
    """Run `silotune new` and return its message; nothing may have been written."""

    def run(data: Path, *options: object) -> str:
        before = sorted(tmp_path.iterdir())
        done = silotune("new", data, "--backbone", tiny_bert, "--out", tmp_path / "mine.toml", *options)
        assert done.status in (1, 2), done.out
        assert sorted(tmp_path.iterdir()) == before
        return str(done.err)

    return run


def test_options_are_checked_before_records_are_read(refused: Run, tmp_path: Path) -> None:
    (tmp_path / "blank.csv").write_text("note,triage\n ,a\n")
    columns = ("--text", "note", "--label", "triage")
    assert "blank" in refused(tmp_path / "blank.csv", *columns)
    assert "epsilon is -3; expected" in refused(tmp_path / "blank.csv", *columns, "--epsilon", "-3")
    assert "delta is 2.0; expected" in refused(tmp_path / "blank.csv", *columns, "--delta", "2")


# --- what is written ---


def test_what_is_written_runs_as_it_is(new: Run, tmp_path: Path, silotune: Run) -> None:
    data = write_csv(tmp_path / "notes.csv", rows())
    scenario = new(data, "--text", "note", "--label", "triage", "--public", "--sites", 2)
    assert scenario.job.task.labels == ("routine", "urgent")
    assert scenario.data.kind == "public"
    assert scenario.data.num_test == 48
    assert scenario.job.privacy.epsilon == 8.0
    done = silotune("simulate", tmp_path / "mine.toml", "--out", tmp_path / "run", "--json")
    assert done.status == 0, done.err
    figures = json.loads(done.out)
    assert figures["epsilon_max_site"] <= 8.0
    assert {"accuracy_federated_dp", "accuracy_central_dp", "accuracy_non_private"} <= figures.keys()


def test_every_setting_says_why(new: Run, tmp_path: Path) -> None:
    new(write_csv(tmp_path / "notes.csv", rows()), "--text", "note", "--label", "triage")
    text = (tmp_path / "mine.toml").read_text(encoding="utf-8")
    for key in (
        "max_length",
        "labels",
        "rounds",
        "learning_rate",
        "sample_rate",
        "max_grad_norm",
        "epsilon",
        "delta",
        "num_test",
    ):
        (at,) = [number for number, line in enumerate(text.splitlines()) if line.startswith(f"{key} = ")]
        line, above = text.splitlines()[at], text.splitlines()[at - 1]
        assert "  # " in line or above.startswith("# "), key
    assert max(map(len, text.splitlines())) <= 110
    assert "what is looked up in private records is itself a release" in text


def test_settings_do_not_depend_on_the_texts(new: Run, tmp_path: Path) -> None:
    mine = new(write_csv(tmp_path / "a.csv", rows()), "--text", "note", "--label", "triage", out=tmp_path / "a.toml")
    other = [row | {"note": " ".join(reversed(row["note"].split()))} for row in rows()]
    theirs = new(write_csv(tmp_path / "b.csv", other), "--text", "note", "--label", "triage", out=tmp_path / "b.toml")
    for section in ("training", "privacy", "lora", "model", "federation"):
        assert getattr(mine.job, section) == getattr(theirs.job, section)


def test_a_site_column(new: Run, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "notes.csv", rows())
    scenario = new(data, "--text", "note", "--label", "triage", "--site", "hospital")
    assert (scenario.partition.kind, scenario.partition.column) == ("column", "site")
    assert {record["site"] for record in scenario.load_data()[0]} == {"North", "South", "East"}


def test_sites_of_a_column_count_like_as_many_equal_ones(new: Run, tmp_path: Path) -> None:
    """Sizes are rounded down once, as sites do it when they declare theirs."""
    data = write_csv(tmp_path / "notes.csv", rows())
    named = new(data, "--text", "note", "--label", "triage", "--site", "hospital", out=tmp_path / "a.toml")
    made = new(data, "--text", "note", "--label", "triage", "--sites", 3, out=tmp_path / "b.toml")
    assert named.job.training == made.job.training


def test_a_file_with_other_delimiter_and_encoding(new: Run, refused: Run, tmp_path: Path) -> None:
    """As a German spreadsheet writes it."""
    data = tmp_path / "notes.csv"
    lines = [f"{row['note']} f\u00fcr K\u00f6ln;{row['triage']};{row['hospital']}" for row in rows()]
    data.write_text("\n".join(["note;triage;Haus", *lines]), encoding="cp1252")
    columns = ("--text", "note", "--label", "triage", "--site", "Haus")
    assert "separated by ';'" in refused(data, *columns, "--encoding", "cp1252")
    assert "delimiter: expected one character" in refused(data, *columns, "--delimiter", ";;")
    assert "encoding: unknown text encoding" in refused(data, *columns, "--encoding", "klingon")
    scenario = new(data, *columns, "--delimiter", ";", "--encoding", "cp1252", "--quoting", "none")
    train = scenario.data.train
    assert train is not None
    assert (train.delimiter, train.encoding, train.quoting) == (";", "cp1252", "none")
    assert all(record["text"].endswith(" f\u00fcr K\u00f6ln") for record in scenario.load_data()[0])


def test_a_person_column_protects_persons(new: Run, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "notes.csv", rows())
    scenario = new(data, "--text", "note", "--label", "triage", "--person", "patient_id", "--unit", "customer")
    assert (scenario.job.privacy.unit, scenario.job.privacy.records_per_person) == ("customer", 4)
    train, test = scenario.load_data()
    assert len(train) + len(test) == 240
    assert "80 % of the customers to train" in " ".join((tmp_path / "mine.toml").read_text().replace("#", "").split())
    assert (
        new(data, "--text", "note", "--label", "triage", "--person", "patient_id", "--force").job.privacy.unit
        == "patient"
    )


def test_equal_texts_are_not_parted(new: Run, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "notes.csv", [row for row in rows() for _ in range(3)])
    train, test = new(data, "--text", "note", "--label", "triage").load_data()
    assert not {record["text"] for record in train} & {record["text"] for record in test}


def test_a_test_file(new: Run, tmp_path: Path) -> None:
    data, test = (write_csv(tmp_path / f"{name}.csv", rows(count)) for name, count in (("a", 240), ("b", 60)))
    scenario = new(data, "--text", "note", "--label", "triage", "--test", test, "--public")
    assert [len(part) for part in scenario.load_data()] == [240, 60]
    # The records of the sites are private unless declared otherwise; those of --test are public by its name.
    for kind, evaluation in ((None, "public"), ("--public", "public"), ("--synthetic", "synthetic")):
        options = ("--text", "note", "--label", "triage", "--test", test, "--force", *([kind] if kind else []))
        data_of = new(data, *options).data
        assert (data_of.declared_kind, data_of.evaluation_kind) == ((kind or "--private")[2:], evaluation)


def test_scores(new: Run, refused: Run, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "notes.csv", rows())
    assert "--range 1,5" in refused(data, "--text", "note", "--score", "stars")
    assert new(data, "--text", "note", "--score", "stars", "--range", "0,5").job.task.target_range == (0, 5)
    looked_up = new(data, "--text", "note", "--score", "stars", "--public", "--force")
    assert looked_up.job.task.target_range == (0, 3)
    german = [row | {"stars": f"{row['stars']:.2f}".replace(".", ",")} for row in rows()]
    said = refused(write_csv(tmp_path / "german.csv", german), "--text", "note", "--score", "stars", "--force")
    assert "(a decimal comma? write a point)" in said
    assert "1,50" not in said


def test_labels_that_are_numbers(new: Run, refused: Run, tmp_path: Path) -> None:
    records = [row | {"grade": i % 5, "weight": i * 37 % 211, "share": i / 7} for i, row in enumerate(rows())]
    data = write_csv(tmp_path / "notes.csv", records)
    assert new(data, "--text", "note", "--label", "grade").job.task.labels == ("0", "1", "2", "3", "4")
    said = refused(data, "--text", "note", "--label", "weight", "--force")
    assert "may be classes or amounts" in said
    assert "--score weight instead of --label" in said
    assert "as by --score share" in refused(data, "--text", "note", "--label", "share", "--force")
    some = [row | {"share": "" if i == 7 else f"{i / 7:.3f}"} for i, row in enumerate(records)]
    said = refused(write_csv(tmp_path / "gap.csv", some), "--text", "note", "--label", "share", "--force")
    assert "--score share" in said or "share" in said.split("row")[0]
    asked = new(data, "--text", "note", "--label", "weight", "--task", "regression", "--range", "0,300", "--force")
    assert asked.job.task.kind == "regression"
    assert new(data, "--text", "note", "--label", "share", "--public", "--force").job.task.kind == "regression"


def test_words_with_tags(new: Run, tmp_path: Path) -> None:
    records = [
        {"words": [*sentence(i).split(), WORDS[i % 14]], "marks": ["O", "B-drug", "I-drug", "O", "O", "B-name", "O"]}
        for i in range(150)
    ]
    scenario = new(write_lines(tmp_path / "notes.jsonl", records), "--tokens", "words", "--tags", "marks")
    assert scenario.job.task.labels == ("O", "B-drug", "I-drug", "B-name", "I-name")
    assert scenario.job.privacy.max_grad_norm == RATES["token_classification"].max_grad_norm
    assert (scenario.job.lora.last_layers, scenario.job.lora.alpha) == (2, 16.0)


def tagged_file(path: Path, between: str = "\t", *, tag: str = "B-drug", count: int = 150) -> Path:
    """Sentences of one tagged word a line."""
    lines = ["-DOCSTART- O", ""]
    for i in range(count):
        lines += [f"{word}{between}{tag if k == 2 else 'O'}" for k, word in enumerate(sentence(i).split())]
        lines += [f"{WORDS[i % 14]}{between}O", ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"tag": "O"}, "the tag O alone"),
        ({"count": 60}, "60 records; a scenario needs 100"),
        ({"options": ("--max-length", 4000)}, "the backbone reads 64 tokens"),
    ],
)
def test_a_refused_file_of_tagged_words_leaves_nothing_and_replaces_nothing(
    new: Run, refused: Run, tmp_path: Path, fault: dict[str, Any], said: str
) -> None:
    options = fault.pop("options", ())
    data = tagged_file(tmp_path / "corpus.iob", **fault)
    message = refused(data, *options)
    assert said in message
    assert ".silotune-new" not in message
    assert "mine.data.jsonl" not in message
    new(tagged_file(tmp_path / "good.iob"))
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("mine.*")}
    assert len(kept) == 2
    assert said in refused(data, *options, "--force")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("mine.*")} == kept


def test_the_copy_of_tagged_words_is_told(silotune: Run, tmp_path: Path, tiny_bert: Path) -> None:
    data = tagged_file(tmp_path / "corpus.iob")
    done = silotune("new", data, "--test", data, "--backbone", tiny_bert, "--out", tmp_path / "mine.toml")
    for part in ("data", "test"):
        copy = f"mine.{part}.jsonl: a copy of all 150 sentences in the format that scenarios read"
        assert f"{copy}; it is as private as corpus.iob\n" in done.out


@pytest.mark.parametrize("options", [(), ("--epsilon", 8), ("--epsilon", 3)])
def test_the_default_epsilon_is_not_said_to_be_asked_for(new: Run, tmp_path: Path, options: tuple[object, ...]) -> None:
    new(write_csv(tmp_path / "notes.csv", rows()), "--text", "note", "--label", "triage", *options)
    line = next(line for line in (tmp_path / "mine.toml").read_text().splitlines() if line.startswith("epsilon"))
    assert ("# asked for (--epsilon);" if 3 in options else "# the default; --epsilon;") in line


@pytest.mark.parametrize("between", ["\t", " ", "\tNN\tx\t"])
def test_a_file_of_tagged_words(new: Run, refused: Run, tmp_path: Path, between: str) -> None:
    data = tagged_file(tmp_path / "corpus.iob", between)
    scenario = new(data)
    assert scenario.job.task.kind == "token_classification"
    assert sum(map(len, scenario.load_data())) == 150
    assert (tmp_path / "mine.data.jsonl").exists()
    assert 'path = "mine.data.jsonl"' in (tmp_path / "mine.toml").read_text()
    assert "it is as private as corpus.iob" in " ".join((tmp_path / "mine.toml").read_text().split("\n# "))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert "is there already" in refused(data)


def test_a_tagged_word_with_a_space_stays_whole_or_its_line_is_named(new: Run, refused: Run, tmp_path: Path) -> None:
    data = tagged_file(tmp_path / "corpus.iob")
    text = data.read_text(encoding="utf-8")
    assert f", line {len(text.splitlines()) + 1} has 3 columns, line 3 has 2" in refused_with(
        refused, data, text + "a\tb\tO\n"
    )
    data.write_text(text + "\nNew York\tB-drug\nNew\xa0York\tO\n", encoding="utf-8")
    new(data)
    last = json.loads((tmp_path / "mine.data.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert last == {"tokens": ["New York", "New\xa0York"], "tags": ["B-drug", "O"]}


def refused_with(refused: Run, data: Path, text: str) -> str:
    data.write_text(text, encoding="utf-8")
    return str(refused(data))


@pytest.mark.parametrize(
    ("column", "wrong", "options", "said"),
    [
        (
            "stars",
            "1_3",
            ("--text", "note", "--score", "stars", "--range", "0,20"),
            r"a number in every record, not at row 7, 9;",
        ),
        (
            "triage",
            "secret",
            ("--text", "note", "--label", "triage", "--labels", "routine,urgent"),
            r"not name, at row 7, 9\.",
        ),
    ],
)
def test_a_value_that_does_not_fit_is_named_by_its_rows(
    refused: Run, tmp_path: Path, column: str, wrong: str, options: tuple[str, ...], said: str
) -> None:
    records = [record | ({column: wrong} if number in (7, 9) else {}) for number, record in enumerate(rows(), start=1)]
    message = refused(write_csv(tmp_path / "notes.csv", records), *options)
    assert re.search(said, message)
    assert wrong not in message


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([1] * 63 + ["1_3"], "numbers alone, in every record, not at row 7."),
        ([1] * 60, "images of 2 sizes, another one than in row 1 at row 7;"),
        (5, "found something else at row 7."),
    ],
)
def test_an_image_that_does_not_fit_is_named_by_its_row(refused: Run, tmp_path: Path, wrong: object, said: str) -> None:
    records: list[dict[str, Any]] = [{"scan": [i % 17] * 64, "finding": str(i % 3)} for i in range(150)]
    records[6]["scan"] = wrong
    data = write_lines(tmp_path / "scans.jsonl", records)
    options = ("--pixels", "scan", "--label", "finding", "--shape", "1,8,8")
    assert said in refused(data, *options)
    assert "expected 3 numbers" in refused(data, *options[:-1], "1.7,8,8")
    assert "expected 3 numbers" in refused(data, *options[:-1], "1,8,8,")


def test_pairs(new: Run, tmp_path: Path) -> None:
    records = [{"q": sentence(i), "a": sentence(i * 7 + 1), "fits": ["yes", "no"][i % 2]} for i in range(200)]
    data = write_csv(tmp_path / "pairs.csv", records)
    assert new(data, "--text", "q", "--pair", "a", "--label", "fits").job.task.labels == ("no", "yes")
    turned = new(data, "--text", "q", "--pair", "a", "--label", "fits", "--labels", "yes,no", "--force")
    assert turned.job.task.labels == ("yes", "no")


def test_text_for_gpt2(new: Run, tmp_path: Path, tiny_gpt2: Path) -> None:
    records = [{"note": sentence(i, 8), "question": sentence(i), "answer": sentence(i * 5)} for i in range(150)]
    data = write_csv(tmp_path / "notes.csv", records)
    scenario = new(data, "--text", "note", backbone=tiny_gpt2)
    assert scenario.job.task.kind == "causal_lm"
    assert scenario.job.lora.target_modules == ("c_attn", "c_proj", "c_fc")
    replies = new(data, "--prompt", "question", "--response", "answer", "--force", backbone=tiny_gpt2)
    assert replies.job.task.kind == "replies"


def test_a_decoder_that_labels(new: Run, tmp_path: Path, tiny_gpt2: Path) -> None:
    records = [{"note": sentence(i, 8), "kind": ["calm", "urgent"][i % 2]} for i in range(150)]
    scenario = new(write_csv(tmp_path / "notes.csv", records), "--text", "note", "--label", "kind", backbone=tiny_gpt2)
    assert scenario.job.task.kind == "sequence_classification"
    assert scenario.job.lora.target_modules == ("c_attn", "c_proj", "c_fc")


def test_images(new: Run, refused: Run, tmp_path: Path) -> None:
    records = [{"scan": [(i * k) % 17 for k in range(64)], "finding": str(i % 3)} for i in range(150)]
    data = write_lines(tmp_path / "scans.jsonl", records)
    scenario = new(data, "--pixels", "scan", "--label", "finding", "--shape", "1,8,8", backbone=None)
    assert scenario.job.task.image_shape == (1, 8, 8)
    assert scenario.job.task.pixel_range == (0, 16)
    assert "--shape" in refused(data, "--pixels", "scan", "--label", "finding", "--force")


def test_declared_reads_no_record(new: Run, refused: Run, tmp_path: Path) -> None:
    absent = tmp_path / "notes.csv"  # is not even there
    options = ("--text", "note", "--label", "triage", "--declared", "--labels", "routine,urgent", "--max-length", 32)
    scenario = new(absent, *options, "--records", 4000, "--sites", 4)
    assert scenario.job.task.labels == ("routine", "urgent")
    assert (scenario.job.model.max_length, scenario.data.num_test, scenario.partition.num_sites) == (32, 800, 4)
    assert "No record was read for it" in (tmp_path / "mine.toml").read_text(encoding="utf-8")
    assert "--records, --sites must say it" in refused(absent, *options, "--force")


def test_odd_names_survive(new: Run, tmp_path: Path) -> None:
    column, label = 'no"te\\ 注', 'très "urgent"\t#1'
    records = [{column: row["note"], "tri age": label if row["triage"] == "urgent" else "x"} for row in rows()]
    data = write_csv(tmp_path / "北京 notes.csv", records)
    scenario = new(data, "--text", column, "--label", "tri age")
    assert set(scenario.job.task.labels) == {label, "x"}
    assert len(scenario.load_data()[1]) == 48


def test_many_labels_are_wrapped() -> None:
    names = [f"label number {number}" for number in range(77)]
    assert tomllib.loads(f"x = {_value(names)}")["x"] == names
    assert max(map(len, _value(names).splitlines())) <= 125


# --- what is refused ---


TASK = ("--text", "note", "--label", "triage")
REFUSALS: dict[str, tuple[tuple[str, ...], str]] = {
    "no column": ((), r"found no column; name the columns of a task"),
    "half a task": (("--label", "triage"), r"found --label; name the columns"),
    "absent column": (("--text", "notes", "--label", "triage"), r"no column 'notes'.*'note', 'triage'.*Did you mean 'note'"),
    "one column twice": (("--text", "note", "--label", "note"), r"both name the column 'note'"),
    "one label": (("--text", "note", "--label", "constant"), r"'constant' has one label only"),
    "label of ids": (("--text", "note", "--label", "id"), r"'id' has 240 different values in 240 records.*free text or ids"),
    "swapped": (("--text", "triage", "--label", "note"), r"'triage' holds 2 different texts.*swapped"),
    "text of numbers": (("--text", "stars", "--label", "triage"), r"'stars' holds numbers, not text"),
    "text of ids": (("--text", "id", "--label", "triage"), r"'id' looks like ids"),
    "text of one value": (("--text", "constant", "--label", "triage"), r"one and the same text"),
    "site of ids": ((*TASK, "--site", "id"), r"names 240 sites for 240 records; it looks like an id"),
    "one site": ((*TASK, "--site", "constant"), r"names one site only"),
    "site and sites": ((*TASK, "--site", "hospital", "--sites", "3"), r"--sites has no place"),
    "unit without person": ((*TASK, "--unit", "patient"), r"needs --person"),
    "person without unit": ((*TASK, "--person", "patient_id", "--unit", "record"), r"leave one out"),
    "persons at two sites": (
        (*TASK, "--person", "patient_id", "--site", "hospital"),
        r"have records at more than one site",
    ),
    "another task": ((*TASK, "--task", "causal_lm"), r"--task causal_lm needs --text; found"),
    "no task": ((*TASK, "--task", "clasification"), r"did you mean"),
    "score of words": (("--text", "note", "--score", "triage"), r"does not hold a number"),
    "unknown label": ((*TASK, "--labels", "routine,other"), r"--labels does not name"),
    "public and synthetic": ((*TASK, "--public", "--synthetic"), r"contradict"),
    "range": (("--text", "note", "--score", "stars", "--range", "1"), r"expected 2 numbers"),
    "length": ((*TASK, "--max-length", "4000"), r"the backbone reads 64 tokens"),
    "delta": ((*TASK, "--delta", "0.5"), r"must be below 1/n"),
    "records": ((*TASK, "--records", "1000"), r"for --declared"),
    "a backbone that reads": (("--text", "note", "--backbone", "embedded:all-minilm-l6-v2"), r"needs one that writes"),
    "a budget of nothing": ((*TASK, "--epsilon", "0"), r"epsilon is 0"),
    "no toml": ((*TASK, "--out", "notes.csv"), r"ends in \.toml"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_name_what_was_found_and_no_record(
    refused: Run, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    records = rows()
    said = refused(write_csv(tmp_path / "notes.csv", records), *options)
    assert re.search(message, said), said
    for record in records:
        assert record["note"] not in said
        assert record["id"] not in said
        assert record["patient_id"] + " " not in said


def test_too_few_records(refused: Run, tmp_path: Path) -> None:
    said = refused(write_csv(tmp_path / "few.csv", rows(60)), "--text", "note", "--label", "triage")
    assert "60 records; a scenario needs 100" in said


def test_a_label_column_of_notes_is_not_shown(refused: Run, tmp_path: Path) -> None:
    records = [row | {"remark": "the patient was told that she may leave on Monday"} for row in rows()]
    said = refused(write_csv(tmp_path / "notes.csv", records), "--text", "note", "--label", "remark")
    assert "one label only" in said
    assert "Monday" not in said


def test_sites_too_small_or_of_one_label(refused: Run, tmp_path: Path) -> None:
    few = [row | {"ward": "tiny" if i < 5 else ["a", "b"][i % 2]} for i, row in enumerate(rows())]
    said = refused(write_csv(tmp_path / "few.csv", few), "--text", "note", "--label", "triage", "--site", "ward")
    assert "'tiny'" in said
    same = [row | {"ward": row["triage"]} for row in rows()]
    said = refused(write_csv(tmp_path / "same.csv", same), "--text", "note", "--label", "triage", "--site", "ward")
    assert "one and the same label" in said


def test_nothing_is_written_over(new: Run, silotune: Run, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "notes.csv", rows())
    new(data, "--text", "note", "--label", "triage")
    kept = (tmp_path / "mine.toml").read_bytes()
    options = (*TASK, "--epsilon", 3, "--out", tmp_path / "mine.toml")
    done = silotune("new", data, *options)
    assert done.status == 2
    assert "is there already; --force replaces it" in done.err
    assert (tmp_path / "mine.toml").read_bytes() == kept
    new(data, "--text", "note", "--label", "triage", "--epsilon", 3, "--force")
    assert (tmp_path / "mine.toml").read_bytes() != kept
    # Not even by force over the records.
    disguised = tmp_path / "data.toml"
    data.rename(disguised)
    assert "is the data itself" in silotune("new", disguised, "--text", "note", "--out", disguised, "--force").err


# --- the rule ---


@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("epsilon", [1.0, 3.0, 8.0])
def test_the_noise_on_a_weight_is_what_the_rule_says(kind: Any, epsilon: float) -> None:
    settings = settings_for(Counts(kind=kind, sites=(256,) * 6, epsilon=epsilon, delta=1e-5))
    event = GaussianSteps(
        noise_multiplier=settings.noise_multiplier, sample_rate=settings.sample_rate, steps=settings.steps
    )
    assert compose_epsilon([event], 1e-5) <= epsilon
    on_a_weight = settings.learning_rate * settings.noise_on_a_step * accumulated(settings.steps, settings.momentum)
    assert on_a_weight <= RATES[kind].noise * 1.06
    most = RATES[kind].most / settings.steps
    assert on_a_weight >= RATES[kind].noise * 0.94 or settings.learning_rate == pytest.approx(most, rel=0.05)


@pytest.mark.parametrize("steps", [STEPS, STEPS_ON_SAMPLES])
def test_noise_accumulates_as_in_the_trainers_own_optimiser(steps: int) -> None:
    training = TrainingConfig(
        rounds=steps, local_steps=1, optimizer="sgd", momentum=0.9, learning_rate=1.0, schedule="linear"
    )
    weights = torch.nn.Parameter(torch.zeros(40_000))
    optimizer = build_optimizer({"w": weights}, set(), training)
    generator = torch.Generator().manual_seed(0)
    for step in range(training.planned_steps):
        weights.grad = torch.randn(weights.shape, generator=generator)
        set_learning_rate(optimizer, training, step)
        optimizer.step()
    assert float(weights.detach().std()) == pytest.approx(accumulated(training.planned_steps, 0.9), rel=0.02)


def test_noise_of_sites_that_weigh_by_size() -> None:
    assert noise_share((500,)) == 1 / 500
    assert noise_share((500,) * 4) == pytest.approx(1 / 1000)
    sizes = (64, 1024, 256)
    noise = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0)) / torch.tensor(sizes)
    mean = (noise * torch.tensor(sizes)).sum(dim=1) / sum(sizes)
    assert float(mean.std()) == pytest.approx(noise_share(sizes), rel=0.02)


def test_more_records_and_larger_budgets_allow_larger_rates() -> None:
    def rate(sites: tuple[int, ...], epsilon: float) -> float:
        return settings_for(
            Counts(kind="sequence_classification", sites=sites, epsilon=epsilon, delta=1e-5)
        ).learning_rate

    assert rate((128,) * 4, 3) < rate((512,) * 4, 3) < rate((512,) * 4, 8)
    assert not settings_for(Counts(kind="sequence_classification", sites=(16, 16), epsilon=1.0, delta=1e-5)).enough
    assert settings_for(Counts(kind="sequence_classification", sites=(1024,) * 8, epsilon=3.0, delta=1e-5)).enough


def test_large_samples_until_they_are_large_enough() -> None:
    assert sample_rate((1024,) * 8) == 1
    assert sample_rate((4096,) * 8) == 0.5
    assert sample_rate((65_536,) * 2) == 0.125
    assert sample_rate((2**20,) * 8) == 0.0625


CHINESE = "医院的服务很好，医生也非常耐心，下次还会再来。"
GREEK = "Η κατάσταση του ασθενούς βελτιώθηκε σημαντικά μετά τη θεραπεία."
GERMAN = "Der Zustand der Patientin verbesserte sich nach Beginn der Antibiotikatherapie deutlich."
CLINICAL = "Pt c/o SOB x3d, hx CHF, CABG 2011; metoprolol 25mg BID, lisinopril 10 mg qd. BNP 1200, EKG NSR w/ PVCs."


@pytest.mark.parametrize(
    ("texts", "least", "most"),
    [
        ([CHINESE], 0.5, 1.0),
        ([GREEK], 0.5, 1.0),
        ([(CHINESE, GREEK)], 0.5, 1.0),
        ([GREEK.split()], 0.5, 1.0),
        ([GERMAN], 0.0, 0.1),
        ([CLINICAL], 0.0, 0.1),
        ([(CLINICAL, GREEK)], 0.2, 0.8),
        (["12.5 2,000 -- ?"], 0.0, 0.0),
    ],
)
def test_how_much_of_a_language_the_english_backbone_knows(texts: list[Any], least: float, most: float) -> None:
    english = look_at_backbone("embedded:all-minilm-l6-v2")
    assert least <= measure(english, texts).unknown <= most


def test_a_vocabulary_that_knows_a_script_letter_by_letter_is_told_from_one_whose_letters_are_words(
    tmp_path: Path, tiny_gpt2: Path
) -> None:
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(CHINESE))])
    )
    made = BertWordPieceTokenizer(str(tmp_path / "vocab.txt"))
    BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"), tokenizer_object=made._tokenizer).save_pretrained(
        tmp_path
    )
    chinese = Backbone(name="x", model_type="bert", positions=64, folder=tmp_path)
    assert measure(chinese, [CHINESE]).unknown == 0
    assert measure(chinese, [["医院", "的", "服务"]]).unknown == 0
    assert measure(chinese, [GREEK]).unknown == 1
    in_bytes = Backbone(name="x", model_type="gpt2", positions=64, folder=tiny_gpt2)
    assert measure(in_bytes, [GREEK]).unknown == 1
    assert measure(in_bytes, [CHINESE]).unknown == 1
    assert measure(in_bytes, ["the film is a quiet joy from start to end"]).unknown < 0.3, "of 300 tokens"


def test_a_language_that_the_backbone_does_not_know_is_told(silotune: Run, tmp_path: Path) -> None:
    records = [row | {"note": f"{CHINESE}{i}{GREEK[i % 40 :]}"} for i, row in enumerate(rows())]
    data = write_csv(tmp_path / "notes.csv", records)
    done = silotune("new", data, *TASK, "--public", "--max-length", 64, "--out", tmp_path / "mine.toml")
    assert done.status == 0, done.err
    assert re.search(r"does not know the language of these texts: about [5-9]0 %", done.out)
    assert "by --backbone" in done.out
    assert "does not know the language" in (tmp_path / "mine.toml").read_text()
    data = write_csv(tmp_path / "english.csv", rows())
    done = silotune("new", data, *TASK, "--public", "--out", tmp_path / "english.toml")
    assert done.status == 0, done.err
    assert "does not know" not in done.out + (tmp_path / "english.toml").read_text()


def test_texts_of_which_only_the_beginning_is_read_are_told(silotune: Run, tmp_path: Path) -> None:
    long = [row | {"note": f"{row['note']} {sentence(i, 300)}"} for i, row in enumerate(rows())]
    data = write_csv(tmp_path / "notes.csv", long)
    done = silotune("new", data, *TASK, "--public", "--out", tmp_path / "mine.toml")
    assert done.status == 0, done.err
    told = " ".join(done.out.split())
    assert "about 0 % of the texts fit into 256 tokens" in told
    assert "--max-length, up to 512" in told
    done = silotune("new", data, *TASK, "--public", "--max-length", 512, "--out", tmp_path / "declared.toml")
    assert "of the texts fit into" not in done.out


def test_the_default_delta_does_not_tell_how_many_records_there_are(new: Run, tmp_path: Path) -> None:
    declared = ("--declared", "--labels", "routine,urgent", "--max-length", 32, "--records", 23_456, "--sites", 4)
    scenario = new(tmp_path / "notes.csv", *TASK, *declared)
    assert scenario.job.privacy.delta == 4e-6  # 1 / 234,560 is 4.26e-06


def test_lengths_rise_and_hold_what_is_common() -> None:
    assert list(LENGTHS) == sorted(LENGTHS)
    assert math.log2(LENGTHS[-1]) == 9


@pytest.mark.parametrize("content", ['{"model_type": "bert", "max_position_embeddings": 1e999}', "[" * 100_000, "{}"])
def test_a_backbone_whose_configuration_says_nothing_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"no usable config\.json"):
        look_at_backbone(str(tmp_path), None)
