"""A disk that takes no more: each command that writes ends with one sentence, and leaves no half file under a real name."""

from __future__ import annotations

import errno
import io
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.disk import small_files

Silotune = Callable[..., Any]
MASK = "deidentify --column review --engine rules"
COMMANDS = {
    "simulate": "simulate W/scenario.toml --out W/new/run",
    "sweep": "sweep W/scenario.toml --set data.kind=public --axis training.rounds=1,2 --out W/new",
    "report": "report W/run",
    "compliance report": "report W/run --format html",
    "audit": "audit W/run",
    "new": "new W/train.csv --text review --label verdict --out W/new/s.toml",
    "deidentify": f"{MASK} W/train.csv --out W/new/masked.csv",
    "deidentify with a report": f"{MASK} W/short.jsonl --out W/new/masked.jsonl --report W/new/counts.json",
    "monitor": "monitor W/run W/train.csv --text review --window 20 --out W/new",
    "explain": "explain W/run 'a dull plot' --html W/new/why.html",
    "plan": "plan --records 1000 --sample-rate 0.05 --epsilon 3 --steps 10 --out W/new",
    "export": "export W/run --to merged --out W/new/model",
    "export to a graph": "export W/run --to onnx --precision int8 --out W/new/model",
    "models": "models add W/run --name films --registry W/new/models",
    "tokens": "tokens add ward --tokens W/new/tokens.db --scope predict",
    "pki": "pki init W/new/ca --name C",
    "site": "site init W/new/site --name n --coordinator h:1 --data W/train.csv --column text=review",
    "coordinator": "coordinator init W/new/hub --host localhost",
}
# SQLite makes its file before it can fill it, and locks are empty: neither says anything wrong.
MAY_BE_EMPTY = {"ledger.db", "tokens.db", "audit.lock"}


@pytest.fixture(scope="module")
def made(finished_run: Path, write_scenario: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disk")
    write_scenario(folder, training={"rounds": 2})
    (folder / "short.jsonl").write_text('{"review": "a dull plot"}\n' * 9)
    shutil.copytree(finished_run, folder / "run")
    return folder


def content(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("limit", [0, 3_000])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_ends_a_command_with_one_sentence(
    name: str, limit: int, made: Path, silotune: Silotune, tmp_path: Path
) -> None:
    world = tmp_path / "w"
    shutil.copytree(made, world)
    before = content(world)
    with small_files(limit):
        outcome = silotune(*(word.replace("W/", f"{world}/") for word in shlex.split(COMMANDS[name])))
    assert "Traceback" not in outcome.out + outcome.err
    after = content(world)
    assert before.keys() <= after.keys()
    new = {path: data for path, data in after.items() if path not in before}
    assert [path for path, data in new.items() if data and path.name.startswith(".")] == [], "half a file stays"
    assert [
        path for path, data in new.items() if not data and path.name[0] != "." and path.name not in MAY_BE_EMPTY
    ] == []
    if outcome.status == 0:
        assert limit, "nothing could be written, and nothing was said"
        return
    said = outcome.err.rpartition("error: ")[2]
    assert said != outcome.err, outcome
    assert "File too large" in said or "full" in said, said
    if limit == 0:
        assert {path: after[path] for path in before} == before


@pytest.mark.parametrize("name", ["version", "settings", "predict"])
def test_standard_output_that_takes_no_more(
    name: str, made: Path, silotune: Silotune, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sys.stdout", Full())
    outcome = silotune(name, *([made / "run", "a dull plot"] if name == "predict" else []))
    assert outcome.status == 1
    assert outcome.err.startswith("error: something could not be written: No space left on device.")


def test_fault_weights_that_a_library_cannot_write_are_no_damaged_model(
    made: Path, silotune: Silotune, tmp_path: Path
) -> None:
    with small_files(100_000):  # whatever comes before the weights is smaller
        outcome = silotune("export", made / "run", "--to", "merged", "--out", tmp_path / "model")
    assert "could not be written (File too large); nothing was left there" in outcome.err
    assert list(tmp_path.iterdir()) == []
