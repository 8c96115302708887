"""Public texts: what must not be among them, and which of them are held out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from server.compression.public_texts import PublicTexts, read_public_texts
from shared.data.known_texts import ContentSum
from shared.data.text_stream import TextFormat
from shared.errors import DataError
from shared.files.atomic import write_json
from shared.job.job import Job
from shared.runtime.export.exporting import read_model
from shared.runtime.export.folder import ModelFolder
from shared.runtime.export.parts import Parts
from tests.server.compression.kinds import new_run, public_lines

Reading = Callable[..., PublicTexts]


@pytest.fixture
def run(task_job: Callable[..., Job], tmp_path: Path) -> ModelFolder:
    return new_run(tmp_path / "run", "classification", task_job)


@pytest.fixture
def read(run: ModelFolder, tmp_path: Path) -> Reading:
    parts = read_model(run)
    assert isinstance(parts, Parts)

    def reading(lines: list[str], *, seed: int = 0) -> PublicTexts:
        path = tmp_path / "public.txt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return read_public_texts(path, TextFormat(), parts, run.path, seed=seed)

    return reading


def _trained_on(run: ModelFolder, texts: list[str]) -> None:
    home = run.path / "sites" / "north" / "home"
    home.mkdir(parents=True)
    rows = [json.dumps({"text": text, "label": "good"}) + "\n" for text in texts]
    (home / "data.jsonl").write_text("".join(rows), encoding="utf-8")


@pytest.mark.parametrize("kind", ["pairs", "replies", "entities"])
def test_training_texts_of_every_shape_are_refused(kind: str, task_job: Callable[..., Job], tmp_path: Path) -> None:
    source, lines = new_run(tmp_path / "run", kind, task_job), public_lines(kind)
    parts = read_model(source)
    assert isinstance(parts, Parts)
    first, second = ("text", "pair") if kind == "pairs" else ("prompt", "response")
    records = [
        {"tokens": line.split()} if kind == "entities" else dict(zip((first, second), line.split("\t"), strict=True))
        for line in lines
    ]
    home = source.path / "sites" / "north" / "home"
    home.mkdir(parents=True)
    (home / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    path = tmp_path / "public.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="records that a site of this run trained on"):
        read_public_texts(path, TextFormat(), parts, source.path, seed=0)


def test_training_texts_are_refused(run: ModelFolder, read: Reading) -> None:
    lines = public_lines()
    _trained_on(run, [line.upper() for line in lines[:8]])
    with pytest.raises(DataError, match=r"8 of the 140 texts .* covered by no privacy statement"):
        read(lines)


def test_a_few_that_are_equal_by_chance_are_told_and_change_nothing(run: ModelFolder, read: Reading) -> None:
    lines = public_lines()
    before = read(lines)
    assert "is your word" in before.remarks[-1]
    _trained_on(run, lines[:3])
    after = read(lines)
    assert "3 of the texts" in after.remarks[-1]
    assert [one.key for one in after.training] == [one.key for one in before.training]


def test_evaluation_records_are_refused(run: ModelFolder, read: Reading) -> None:
    lines = public_lines()
    write_json(run.path / "run.json", {"status": "completed", "evaluation_texts": ContentSum(lines).as_dict()})
    with pytest.raises(DataError, match="public evaluation records of this run"):
        read(lines)


def test_held_out_texts_are_no_copies_of_others(read: Reading) -> None:
    lines = public_lines()
    found = read([*lines, *[f" {line.title()} " for line in lines]])
    assert (found.number, len(found.held_out)) == (140, 14)
    assert not {one.key for one in found.held_out} & {one.key for one in found.training}
    assert {one.key for one in read(lines, seed=1).held_out} != {one.key for one in found.held_out}


def test_too_few_texts_are_refused(read: Reading) -> None:
    with pytest.raises(DataError, match="99 different texts that the model can read, expected at least 100"):
        read(public_lines(count=99) * 3)


def test_pairs_need_both_texts(task_job: Callable[..., Job], tmp_path: Path) -> None:
    run = new_run(tmp_path / "pairs", "pairs", task_job)
    parts, path = read_model(run), tmp_path / "public.txt"
    assert isinstance(parts, Parts)
    path.write_text("\n".join([*public_lines("pairs"), "alone", ""]), encoding="utf-8")
    found = read_public_texts(path, TextFormat(), parts, run.path, seed=0)
    assert found.number == 140
    assert "left out: 1 texts that the model cannot read" in found.remarks[-1]
    path.write_text("\n".join(public_lines()), encoding="utf-8")
    with pytest.raises(DataError, match="no pair; give both texts with a tab"):
        read_public_texts(path, TextFormat(), parts, run.path, seed=0)
