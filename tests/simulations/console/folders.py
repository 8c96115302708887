"""Folders of runs and sweeps as simulations write them, made in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from server.records.metrics import is_share

DELTA = 1e-5
STATEMENT = "made up"


def write_json(path: Path, value: object) -> None:
    """Write a file; without waiting for the disk, which hundreds of them would take long for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def make_run(
    folder: Path,
    *,
    name: str = "reviews",
    mechanism: str = "dp-sgd",
    asked: float | None = 3.0,
    executed: float | None = 2.98765,
    planned: float | None = None,
    metric: str = "accuracy",
    value: float = 0.8,
    num_sites: int = 3,
    num_rounds: int = 6,
    data: str = "movie-reviews",
    partition: dict[str, Any] | None = None,
    baselines: dict[str, float] | None = None,
    status: str = "completed",
    repeats: list[float] | None = None,
    randomness: str = "os",
    unit: str = "record",
    site_names: dict[str, str] | None = None,
    created: str = "2026-11-02T09:30:00+00:00",
    **settings: Any,
) -> Path:
    """Write a run of so many rounds, with the same value for every baseline's arm as `baselines` says."""
    _training(folder, mechanism, name, metric, value, num_rounds, asked, unit, settings, over=status == "completed")
    dataset = {"name": data, "test_records": 500, "partition": partition or {"kind": "iid", "num_sites": num_sites}}
    run = {
        "name": name,
        "status": status,
        "created": created,
        "seconds": 61.5,
        "dataset": dataset | ({"site_names": site_names} if site_names else {}),
    }
    write_json(folder / "run.json", run)
    for number in range(1, num_sites + 1):
        site = folder / "sites" / f"site-{number}"
        (site / "home").mkdir(parents=True)
        (site / "home" / "site.toml").write_text('name = "x"\n')
        if mechanism not in ("none", "central"):
            write_json(site / "privacy.json", _privacy(site.name, executed, planned, asked, randomness, unit))
    for arm, result in (baselines or {}).items():
        kind = "dp-sgd" if arm == "central-dp" else "none"
        _training(folder / "baselines" / arm, kind, name, metric, result, num_rounds, asked, unit, settings, over=True)
    if repeats:
        write_json(folder / "repeats.json", {"seeds": list(range(len(repeats))), "arms": {"federated": repeats}})
    return folder


def make_sweep(folder: Path, *, name: str = "budgets") -> Path:
    """Write a sweep of two budgets and none, two learning rates and two seeds, with the trials' runs."""
    tried, lines = [], []
    for epsilon in (1.0, 8.0, "inf"):
        for rate in (0.1, 0.2):
            setting = {"privacy.epsilon": epsilon, "training.learning_rate": rate}
            base = {1.0: 0.6, 8.0: 0.75, "inf": 0.85}[epsilon] - rate / 10
            executed = None if epsilon == "inf" else epsilon * 0.999
            for seed in (0, 1):
                key = f"{epsilon}-{rate}-{seed}".replace(".", "_")
                make_run(
                    folder / "trials" / key,
                    name=name,
                    mechanism="none" if executed is None else "dp-sgd",
                    asked=None if executed is None else float(epsilon),
                    executed=executed,
                    value=base + seed / 100,
                )
                result = {
                    "key": key,
                    "setting": setting,
                    "seed": seed,
                    "status": "completed",
                    "budget": epsilon,
                    "epsilon": executed,
                    "delta": DELTA,
                    "metric": "accuracy",
                    "higher_is_better": True,
                    "score": base + seed / 100,
                    "seconds": 3.0,
                    "job_sha256": "0" * 64,
                }
                lines.append(json.dumps(result))
            tried.append({"setting": setting, "epsilon": executed, "mean": base + 0.005, "sd": 0.007})
    (folder / "trials.jsonl").write_text("\n".join(lines) + "\n")
    head = {"format": "silotune-sweep/1", "name": name, "status": "completed", "num_trials": len(lines)}
    frontier = [one for one in tried if one["setting"]["training.learning_rate"] == 0.1]  # type: ignore[index]
    found = {"metric": "accuracy", "higher_is_better": True, "frontier": frontier, "settings_tried": tried}
    write_json(folder / "sweep.json", {**head, **found, "notes": ["Two seeds."]})
    return folder


def _training(
    folder: Path,
    mechanism: str,
    name: str,
    metric: str,
    value: float,
    num_rounds: int,
    asked: float | None,
    unit: str,
    settings: dict[str, Any],
    *,
    over: bool,
) -> None:
    privacy = {"mechanism": mechanism, "epsilon": asked, "delta": DELTA, "unit": unit}
    if mechanism == "central":
        privacy["central"] = {"num_sites": 100}
    job = {
        "schema_version": 1,
        "name": name,
        "seed": 0,
        "model": {"backbone": "embedded:all-minilm-l6-v2", "max_length": 32},
        "task": {"kind": "sequence_classification", "labels": ["negative", "positive"]},
        "training": {"rounds": num_rounds, "learning_rate": 1.5, **settings.get("training", {})},
        "privacy": privacy,
    }
    write_json(folder / "job.json", job)
    rounds = []
    for number in range(num_rounds + 1):
        share = number / num_rounds
        start = 0.5 if is_share(metric) else value * 3
        metrics = {metric: start + (value - start) * share, "loss": 0.7 - 0.2 * share}
        spent = None if mechanism == "none" or not number else (asked or 1.0) * share**0.5
        rounds.append(json.dumps({"round": number, "metrics": metrics, "epsilon_max": spent, "seconds": 1.5}))
    (folder / "metrics.jsonl").write_text("\n".join(rounds) + "\n")
    if over:
        evaluation = {"metrics": {metric: value, "loss": 0.5}, "primary_metric": metric, "round": num_rounds}
        write_json(
            folder / "evaluation.json", {**evaluation, "higher_is_better": is_share(metric), "num_examples": 500}
        )


def _privacy(
    site: str, executed: float | None, planned: float | None, asked: float | None, randomness: str, unit: str
) -> dict[str, Any]:
    return {
        "site": site,
        "unit": unit,
        "delta": DELTA,
        "steps_planned": 6,
        "steps_executed": 6,
        "epsilon_budget": asked,
        "epsilon_spent": executed,
        "epsilon_planned": planned,
        "randomness": randomness,
        "events": [{"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 6}],
        "rounds": [1, 2, 3, 4, 5, 6],
        "max_grad_norm": 1.0,
        "update_sha256": ["0" * 64] * 6,
        "declared_records": 1024,
        "statement": STATEMENT,
    }
