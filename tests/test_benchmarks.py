"""The benchmarks' own machinery, and one small section for real; nothing here asserts a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import aggregation, harness, secure_sum
from benchmarks.harness import Findings, PeakMemory, alternate, merge, summarize, summarized


def _nothing(_: str) -> None:
    pass


def test_summary_states_median_spread_and_runs() -> None:
    assert summarize([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "runs": 3}
    nested = summarized({"a": {"b": [4.0, 2.0]}, "kept": "text", "number": 3})
    assert nested == {"a": {"b": summarize([2.0, 4.0])}, "kept": "text", "number": 3}
    with pytest.raises(ValueError, match="nothing was measured"):
        summarize([])


def test_pairs_alternate_and_ratios_stay_within_them() -> None:
    order: list[str] = []

    def measured(name: str, values: list[float]) -> harness.Measure:
        def measure() -> float:
            order.append(name)
            return values.pop(0)

        return measure

    peers = {"a": measured("a", [2.0, 20.0, 4.0]), "b": measured("b", [1.0, 1.0, 1.0])}
    # A machine that is ten times slower during the second pair does not show in the ratios.
    found = alternate(peers, measured("ours", [1.0, 2.0, 10.0, 4.0, 2.0, 8.0]), runs=3, tell=_nothing)
    assert order == ["a", "ours", "b", "ours", "ours", "a", "ours", "b", "a", "ours", "b", "ours"]
    assert found["a"].peer_over_ours() == [2.0, 2.0, 2.0]
    assert found["b"].ours_over_peer() == [2.0, 4.0, 8.0]


def test_a_section_that_is_run_again_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    first = Findings({"uplink_bytes_ratio": [0.5, 0.5]}, {"demo": {"bytes": [10.0, 11.0, 12.0]}})
    merge(path, "wire", first, wall_seconds=1.0)
    merge(path, "plan", Findings({"plan_seconds": [2.0]}), wall_seconds=1.0)
    again = merge(path, "plan", Findings({"plan_seconds": [1.0]}), wall_seconds=2.0)
    assert again == json.loads(path.read_text(encoding="utf-8"))
    assert again["uplink_bytes_ratio"] == {"median": 0.5, "min": 0.5, "max": 0.5, "runs": 2}
    assert again["plan_seconds"]["median"] == 1.0
    assert again["dp_step_time_ratio"] is None  # there, and not measured
    assert again["details"]["wire"]["demo"]["bytes"]["median"] == 11.0
    assert again["sections"].keys() == {"wire", "plan"}
    assert {"machine", "versions", "date", "meaning"} <= again.keys()
    with pytest.raises(ValueError, match="no meaning"):
        merge(path, "plan", Findings({"surprise": [1.0]}), wall_seconds=1.0)
    console = Console(record=True, width=200)
    harness.show(again, ["wire"], console)
    assert "uplink_bytes_ratio" in (text := console.export_text())
    assert "demo | bytes" in text


def test_peak_memory_sees_what_was_freed_before_the_end() -> None:
    with PeakMemory() as memory:
        block = np.ones(25_000_000)
        del block
    assert 190 < memory.megabytes < 260


def test_aggregation_for_real() -> None:
    found = aggregation.run(_nothing, runs=1, counts=(3,))
    assert not found.headlines  # three sites are not a thousand
    row = found.details["3 sites"]
    assert row["ours, seconds with decoding"][0] > 0
    assert row["ours / NumPy, seconds"][0] > 0


def test_both_sides_aggregate_to_the_same_mean() -> None:
    base = {name: torch.ones(shape) for name, shape in aggregation.SHAPES.items()}
    decoded = aggregation.Arrivals(base, 5, dict)
    ours, theirs = aggregation.ours_decoded(decoded), aggregation.numpy_decoded(decoded)
    for mine, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, their, rtol=1e-6)


def test_secure_sums_for_real() -> None:
    found = secure_sum.run(_nothing, runs=1, sites=(3,), words=(50,))
    assert not found.headlines
    row = found.details["3 sites, 50 words"]
    assert row["two threads, seconds"][0] > 0
    assert row["bytes up, a site"] > row["bytes up of the plain sum, a site"] == 400
