"""Every file of a run, damaged in every way: whatever reads it ends with a message that names a file, never with a traceback."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.damage import GONE, changed, places_of

FILES = [
    "job.json",
    "run.json",
    "checkpoint.safetensors",
    "metrics.jsonl",
    "evaluation.json",
    "statement.json",
    "audit/tier1.json",
    "repeats.json",
    "folds.json",
    "site_metrics.json",
    "sites/site-1/privacy.json",
    "sites/site-1/home/site.toml",
    "sites/site-1/home/data.jsonl",
    "sites/site-1/home/ledger.db",
    "baselines/non-private/evaluation.json",
    "baselines/non-private/metrics.jsonl",
    "adapter/silotune_state.safetensors",
    "adapter/adapter_config.json",
]
WRONG_VALUES: list[Any] = [None, [], {}, "text", -1, 10**400, float("nan"), True, [[[]]], "2026-99-99"]


@pytest.fixture(scope="module")
def finished(write_scenario: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run and its scenario."""
    from cli import main

    folder = tmp_path_factory.mktemp("finished")
    write_scenario(
        folder,
        training={"rounds": 2, "local_steps": 1},
        partition={"num_sites": 2},
        baselines={"arms": ["non-private"]},
        data={"evaluation_share": 0.2},
        site_metrics={"names": ["accuracy"]},
    )
    with pytest.raises(SystemExit) as ended:
        main(["simulate", str(folder / "scenario.toml"), "--out", str(folder / "run")])
    assert not ended.value.code
    run = folder / "run"
    arms: dict[str, Any] = {"federated": [0.5, 0.6], "non-private": [0.7, 0.8]}
    (run / "repeats.json").write_text(json.dumps({"seeds": [0, 1], "arms": arms}))
    by_metric = {arm: {"accuracy": values} for arm, values in arms.items()}
    (run / "folds.json").write_text(json.dumps({"folds": 2, "test_records": [6, 6], "arms": by_metric}))
    (folder / "texts.txt").write_text("a dull plot\n" * 12)
    return folder


def damages(content: bytes, seed: str) -> Iterator[tuple[str, bytes]]:
    """Yield (what, damaged content): cut short, other files, other shapes, and wrong values at some keys."""
    yield "empty", b""
    yield "cut", content[: len(content) // 2]
    yield "last byte gone", content[:-1] if content.rstrip() == content else content.rstrip()[:-1]
    yield "not JSON", b"not json\n"
    yield "binary", bytes(range(256)) * 4
    for text in (
        "[]",
        "{}",
        "null",
        "3",
        '"text"',
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        '{"a":' * 100_000,
        "a = " + "[" * 50_000,
    ):
        yield text[:12], text.encode()
    yield "half a character", content[:-2] + b"\xed\xa0\x80" + content[-2:]
    try:
        raw = json.loads(content)
    except ValueError:
        return
    chance = random.Random(seed)
    places = list(places_of(raw))
    for value in WRONG_VALUES:
        place = chance.choice(places)
        yield f"{place} = {str(value)[:10]}", json.dumps(changed(raw, place, value)).encode()
    for place in chance.sample(places, min(6, len(places))):
        yield f"without {place}", json.dumps(changed(raw, place, GONE)).encode()


COMMANDS = [
    ["report", "RUN"],
    ["simulate", "SCENARIO", "--out", "RUN", "--resume"],
    ["report", "RUN", "--format", "html"],
    ["audit", "RUN"],
    ["predict", "RUN", "a dull plot"],
    ["plan", "--job", "RUN/job.json"],
    ["monitor", "RUN", "TEXTS", "--window", "5"],
]
DAMAGES_EACH = int(os.environ.get("SILOTUNE_DAMAGES", "9"))
"""Of each file, drawn with a fixed seed; 100 are all."""


@pytest.mark.parametrize("name", FILES)
def test_damage_ends_with_a_message(silotune: Callable[..., Any], finished: Path, tmp_path: Path, name: str) -> None:
    every = list(damages((finished / "run" / name).read_bytes(), name))
    chosen = random.Random(f"{name} chosen").sample(every, min(DAMAGES_EACH, len(every)))
    commands = itertools.cycle(COMMANDS if name != "job.json" else [*COMMANDS, COMMANDS[5]])
    for number, (what, content) in enumerate(chosen):
        run = tmp_path / f"run-{number}"
        shutil.copytree(finished / "run", run)
        (run / name).write_bytes(content)
        given = {"RUN": run, "SCENARIO": finished / "scenario.toml", "TEXTS": finished / "texts.txt"}
        words = [str(given.get(word, word)).replace("RUN/", f"{run}/") for word in next(commands)]
        outcome = silotune(*words)  # an exception that is no message ends the test here
        if outcome.status not in (0, 3):
            message = outcome.err.rpartition("error: ")[2]
            assert message != outcome.err, (what, words, outcome.err)
            assert str(tmp_path) in message or name in message, (what, words, message)
            assert len(message) < 3_000
        shutil.rmtree(run)
