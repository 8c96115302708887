"""Explanations over HTTP: those of `silotune explain`, bounded, and off unless they are wanted."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.registry.references import Resolved
from server.serving import explaining as explaining_module
from server.serving.models import Plan, load
from shared.errors import ConfigError
from shared.job.compute import ComputeConfig
from shared.runtime.attributions import explain
from shared.runtime.export.exporting import export
from shared.runtime.export.folder import ModelFolder
from shared.runtime.inference import load_tuned
from tests.server.serving.live import Live

TEXT = "a quiet film"


def test_it_explains_as_the_command_does(explaining: Live, small_run: Path) -> None:
    job = ModelFolder.read(small_run).job
    expected = explain(load_tuned(small_run, job, ComputeConfig(device="cpu", precision="float32")), TEXT)
    found = explaining.post("/v1/explain", {"text": TEXT}).json()
    assert (found["version"], found["prediction"], found["target"]) == ("films:2", expected.says, expected.target)
    for one, word in zip(found["words"], expected.words, strict=True):
        assert (one["text"], one["begin"], one["end"]) == (word.text, word.begin, word.end)
        assert one["attribution"] == pytest.approx(word.attribution, abs=1e-4)
    total = sum(one["attribution"] for one in found["words"])
    assert total == pytest.approx(found["output"] - found["baseline_output"] + found["gap"], abs=1e-5)
    assert TEXT not in str(found)
    usage = found["usage"]
    assert usage["readings"] == 3 + sum(32 << n for n in range(5) if 32 << n <= found["steps"]), (
        "itself, both ends, every attempt"
    )
    assert usage["tokens"] == usage["text_tokens"] * usage["readings"]
    other = explaining.post("/v1/explain", {"text": TEXT, "label": job.task.labels[0], "baseline": "mask"})
    assert job.task.labels[0] in other.json()["target"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "texts"),
        ({"pair": ["a", "b"]}, "texts"),
        ({"text": TEXT, "label": "none of them"}, "label"),
        ({"text": TEXT, "word": 1}, "word"),
        ({"text": "a" * 100_001}, "text"),
        ({"text": "  "}, None),
        ({"text": TEXT, "steps": 10_000}, "steps"),
    ],
)
def test_what_does_not_fit_is_refused(explaining: Live, body: dict[str, Any], param: str | None) -> None:
    found = explaining.post("/v1/explain", body)
    assert (found.status_code, found.json()["error"]["param"]) == (400, param)
    assert "--" not in found.json()["error"]["message"]


def test_it_is_off_unless_it_is_wanted(films: Live) -> None:
    found = films.post("/v1/explain", {"text": TEXT})
    assert (found.status_code, found.json()["error"]["code"]) == (404, "explains_nothing")


def test_few_wait(explaining: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    held, statuses = threading.Event(), list[int]()
    real = explaining_module.attribute

    def slow(*given: Any, **options: Any) -> Any:
        held.wait(30)
        return real(*given, **options)

    monkeypatch.setattr(explaining_module, "attribute", slow)
    ask = lambda: statuses.append(explaining.post("/v1/explain", {"text": TEXT}).status_code)  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(explaining_module._WAITING)]
    for one in threads:
        one.start()
    service = explaining.service
    while service.explaining is None or service.explaining.waiting < explaining_module._WAITING:
        time.sleep(0.01)
    full = explaining.post("/v1/explain", {"text": TEXT})
    assert (full.status_code, full.headers["retry-after"]) == (503, "5")
    assert explaining.post("/v1/predict", {"texts": [TEXT]}).status_code == 200, "predictions go on"
    held.set()
    for one in threads:
        one.join(30)
    assert statuses == [200] * len(threads)


def test_whoever_is_gone_is_computed_no_further(explaining: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, began = list[int](), threading.Event()
    real = explaining_module.attribute

    def slow(*given: Any, before_each: Any, **options: Any) -> Any:
        def each(num_texts: int) -> None:
            began.set()
            time.sleep(0.2)
            passes.append(1)
            before_each(num_texts)

        return real(*given, before_each=each, **options)

    monkeypatch.setattr(explaining_module, "attribute", slow)
    with httpx.Client(base_url=explaining.address, timeout=0.3) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/explain", json={"text": TEXT})
    assert began.wait(10)
    service = explaining.service
    assert service.explaining is not None
    deadline = time.monotonic() + 10
    while service.explaining.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(passes) < 6, "a whole explanation takes more"


def test_a_version_without_its_adapter_is_refused_at_the_start(small_run: Path, tmp_path: Path) -> None:
    merged = export(ModelFolder.read(small_run), tmp_path / "merged", "merged", "float32")
    with pytest.raises(ConfigError, match="versions that hold their adapter"):
        load(Resolved(merged.path, None, ""), dataclasses.replace(Plan("torch"), explain=True))
