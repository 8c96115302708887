"""What a smaller model costs and gains: size, time and accuracy of the demo's and the bank's model, and of what is made of them.

Teachers are trained as the scenarios say, but for `data.num_confirm` records that are held out of the federation and of the
evaluation: their texts, without labels, are the public texts from which students learn. Accuracy is that of the graphs on the
scenario's evaluation records, which chose nothing. Times are processor time of ONNX Runtime on one thread for 16 texts of 25
tokens, in turns, and every ratio is of neighbours in time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Findings, Tell

PUBLIC: Mapping[str, int] = {"demo": 2000, "banking77": 1540}
"""Scenarios, and how many records become public texts: of the sites' records, and of the bank's 3,080 for evaluation."""
SEEDS, TURNS, RUNS, TEXTS, TOKENS = (0, 1, 2), 21, 3, 16, 25
STUDENTS: Mapping[str, Mapping[str, int]] = {
    "half the layers": {},
    "half the width": {"layers": 6, "intermediate": 768},
}
SCENARIOS = Path(__file__).resolve().parents[1] / "simulations"


def run(tell: Tell) -> Findings:
    """Train teachers and students, then measure them."""
    with tempfile.TemporaryDirectory(prefix="silotune-bench-") as temporary:
        folder = Path(temporary)
        for scenario in PUBLIC:
            for seed in SEEDS:
                tell(f"{scenario}, seed {seed}: teacher and students")
                train(folder, scenario, seed)
        return measured(folder, tell)


def train(folder: Path, scenario: str, seed: int) -> None:
    """Train a teacher and its students in `folder`; what is there already stays."""
    from server.compression.compressing import Size, compress
    from server.compression.distillation import Recipe
    from server.rounds.observer import Observer
    from shared.data.text_stream import TextFormat
    from shared.runtime.export.folder import ModelFolder
    from simulations.running.engine import run_scenario
    from simulations.scenario import load_scenario

    run_dir, file = folder / f"{scenario}-{seed}", folder / f"{scenario}-pool.txt"
    loaded = load_scenario(SCENARIOS / f"{scenario}.toml", _changes(scenario, seed))
    if not run_dir.exists():
        run_scenario(loaded, run_dir, observer=lambda arm: Observer())
    file.write_text(
        "".join(" ".join(one["text"].split()) + "\n" for one in loaded.load_confirmation()), encoding="utf-8"
    )
    for name, size in STUDENTS.items():
        if not (out := _student(folder, scenario, seed, name)).exists():
            compress(ModelFolder.read(run_dir), file, TextFormat(), out, Size(**size), Recipe(seed=seed))


def measured(folder: Path, tell: Tell) -> Findings:
    """Export what `train` left in `folder`, and measure every model that is there."""
    headlines: dict[str, list[float]] = {}
    details: dict[str, Any] = {}
    for scenario in PUBLIC:
        rows: dict[str, dict[str, list[float]]] = {}
        for seed in SEEDS:
            tell(f"{scenario}, seed {seed}: measuring")
            graphs = _graphs(folder, scenario, seed)
            accuracy = _accuracy(graphs, scenario, seed)
            teacher = accuracy["as trained, float32"]
            for name, value in accuracy.items():
                row = rows.setdefault(name, {})
                row.setdefault("accuracy, %", []).append(100 * value)
                row.setdefault("points lost", []).append(100 * (teacher - value))
                row.setdefault("graph, MB", []).append((graphs[name] / "model.onnx").stat().st_size / 1e6)
            headlines.setdefault(f"compression_points_lost_{scenario}", []).append(
                100 * (teacher - accuracy["half the layers, float32"])
            )
        for name, times in _times(_graphs(folder, scenario, SEEDS[0])).items():
            rows[name] |= times
        headlines.setdefault("compression_speedup", []).extend(rows["half the layers, float32"]["times as fast"])
        details[scenario] = rows
    return Findings(headlines, details)


def _changes(scenario: str, seed: int) -> list[str]:
    return [f"seed={seed}", f"data.num_confirm={PUBLIC[scenario]}", "baselines.arms=[]"]


def _student(folder: Path, scenario: str, seed: int, name: str) -> Path:
    return folder / "students" / f"{scenario}-{seed}-{name.replace(' ', '-')}"


def _graphs(folder: Path, scenario: str, seed: int) -> dict[str, Path]:
    """Return the graphs of the teacher and of every student that is there."""
    from shared.runtime.export.exporting import export
    from shared.runtime.export.folder import ModelFolder, Precision

    sources = {"as trained": folder / f"{scenario}-{seed}"}
    sources |= {name: path for name in STUDENTS if (path := _student(folder, scenario, seed, name)).exists()}
    precisions: Sequence[Precision] = ("float32", "int8")
    found: dict[str, Path] = {}
    for name, source in sources.items():
        for precision in precisions:
            out = folder / "graphs" / f"{scenario}-{seed}-{name.replace(' ', '-')}-{precision}"
            if not out.exists():
                export(ModelFolder.read(source), out, "onnx", precision)
            found[f"{name}, {precision}"] = out
    return found


def _accuracy(graphs: Mapping[str, Path], scenario: str, seed: int) -> dict[str, float]:
    from shared.runtime.export.exported import load_exported
    from shared.runtime.export.folder import ModelFolder
    from simulations.scenario import load_scenario

    _, test = load_scenario(SCENARIOS / f"{scenario}.toml", _changes(scenario, seed)).load_data()
    found = {}
    for name, path in graphs.items():
        model = load_exported(ModelFolder.read(path), threads=1)
        examples = model.encode(test)
        right = [int(row.argmax()) == one.target for row, one in zip(model.outputs(examples), examples, strict=True)]
        found[name] = sum(right) / len(right)
    return found


def _times(graphs: Mapping[str, Path]) -> dict[str, dict[str, list[float]]]:
    """Return milliseconds of a batch, and how many times as fast as the teacher in float32 it was in the same turn."""
    from shared.runtime.export.onnx import new_session

    ids = np.random.default_rng(0).integers(1000, 20_000, (TEXTS, TOKENS))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    sessions = {name: new_session(path / "model.onnx", threads=1) for name, path in graphs.items()}
    found: dict[str, dict[str, list[float]]] = {name: {"ms a batch": [], "times as fast": []} for name in sessions}
    for turn in range(-1, TURNS):
        taken = {}
        for name in list(sessions) if turn % 2 else list(sessions)[::-1]:
            began = time.process_time()
            for _ in range(RUNS):
                sessions[name].run(["logits"], feed)
            taken[name] = 1000 * (time.process_time() - began) / RUNS
        if turn >= 0:  # the first turn warms up
            for name, value in taken.items():
                found[name]["ms a batch"].append(value)
                found[name]["times as fast"].append(taken["as trained, float32"] / value)
    return found
