"""`silotune monitor` with a real model: files, folders that grow, standard input; counts and figures, never a text."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import ConfigError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.runtime.export.peft import save_peft_folder
from shared.runtime.inference import load_tuned, predict
from shared.runtime.runtime import load_runtime
from shared.tools.monitor.commands import _duration, _period, _Stop, load_adjustment
from tests.conftest import LINES

Silotune = Callable[..., Any]
ROOT = Path(__file__).parents[4]
CPU = ComputeConfig(device="cpu")
PAIRS = [
    " ".join(pair) for pair in itertools.product(sorted({word for line in LINES for word in line.split()}), repeat=2)
]


@pytest.fixture(scope="module")
def run_dir(classification_job: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a classifier that gives both labels, with an evaluation."""
    folder = tmp_path_factory.mktemp("run")
    job = classification_job()
    runtime = load_runtime(job, CPU)
    generator = torch.Generator().manual_seed(3)
    state = {name: 0.5 * torch.randn(t.shape, generator=generator) for name, t in runtime.initial.items()}
    runtime.load(state)
    outputs = torch.cat([row for row, _ in runtime.outputs(runtime.encode([{"text": pair} for pair in PAIRS]))])
    runtime.load(runtime.initial)
    state["head.linear.bias"][1] -= (outputs[:, 1] - outputs[:, 0]).median()
    save_peft_folder(folder / "adapter", runtime, job, state)
    (folder / "job.json").write_text(job.canonical_json())
    evaluation = {"labels": ["bad", "good"], "confusion": [[80, 20], [30, 70]]}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


@pytest.fixture(scope="module")
def texts(run_dir: Path, classification_job: Callable[..., Job]) -> dict[str, list[str]]:
    """Texts by what the model says of them."""
    job = classification_job()
    runtime = load_tuned(run_dir, job, CPU)
    found: dict[str, list[str]] = {"bad": [], "good": []}
    for prediction in predict(runtime, PAIRS):
        if prediction["probability"] > 0.55:
            found[prediction["label"]].append(prediction["text"])
    runtime.load(runtime.initial)
    assert min(map(len, found.values())) > 20
    return found


def mixed(texts: dict[str, list[str]], good: int, total: int) -> list[str]:
    """Return `total` texts, of which the model calls `good` good."""
    goods, bads = itertools.cycle(texts["good"]), itertools.cycle(texts["bad"])
    return [next(goods) if i * good // total != (i + 1) * good // total else next(bads) for i in range(total)]


def write_csv(path: Path, lines: Sequence[str], *, first_day: int = 1, per_day: int = 50) -> Path:
    rows = [f'2026-03-{first_day + i // per_day:02d}T06:00:00,"{line}"' for i, line in enumerate(lines)]
    path.write_text("\n".join(["when,note", *rows]) + "\n")
    return path


def events(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_windows_hold_what_predict_says_and_a_shift_is_alerted(
    silotune: Silotune, run_dir: Path, texts: dict[str, list[str]], tmp_path: Path
) -> None:
    lines = mixed(texts, 75, 150) + mixed(texts, 45, 50)
    path = write_csv(tmp_path / "notes.csv", lines)
    common = ("monitor", run_dir, path, "--text", "note", "--time", "when", "--every", "1d", "--out", tmp_path / "out")
    done = silotune(*common, "--json")
    assert done.status == 0, done.err
    found = events(done.out)
    assert [event["event"] for event in found] == ["window"] * 4 + ["alert", "alert", "summary"]
    windows, alert, summary = found[:4], found[4], found[-1]
    assert [w["labels"]["good"]["count"] for w in windows] == [25, 25, 25, 45]
    assert [w["begin"] for w in windows] == [f"2026-03-0{day}T00:00:00+00:00" for day in (1, 2, 3, 4)]
    assert [w["role"] for w in windows] == ["baseline", "tested", "tested", "tested"]
    assert (alert["window"], alert["label"], alert["change"]) == (4, "bad", pytest.approx(-0.4))
    assert alert["p_value"] <= summary["test"]["level"] == 0.05 / 100
    assert summary["windows_with_alerts"] == 1
    assert summary["test"]["false_alarm_bound"] == pytest.approx(0.05 * 3 / 100)
    # 0.9 predicted = 0.2 + 0.5 true would need more than all: the nearest share is 1.
    assert windows[3]["labels"]["good"]["adjusted"]["share"] == 1
    assert windows[1]["labels"]["good"]["adjusted"]["share"] == pytest.approx(0.6)
    document = json.loads((tmp_path / "out" / "monitor.json").read_text())
    assert document["windows_kept"] == windows
    assert (tmp_path / "out" / "monitor.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    failing = silotune(*common, "--fail-on-alert")
    assert failing.status == 4
    assert "ALERT bad −40.0 points" in " ".join(failing.out.split())
    assert "bad 50.0 % (36.6–63.4)" in " ".join(failing.out.split())
    calm = silotune(*common, "--fail-on-alert", "--min-shift", "0.5")
    assert calm.status == 0
    for said in (done.out, failing.out, (tmp_path / "out" / "monitor.json").read_text()):
        assert not any(line in said for line in set(lines)), "no text may be shown or stored"


def test_baselines_of_a_file_and_of_a_period(
    silotune: Silotune, run_dir: Path, texts: dict[str, list[str]], tmp_path: Path
) -> None:
    before = write_csv(tmp_path / "before.csv", mixed(texts, 60, 100))
    now = write_csv(tmp_path / "now.csv", mixed(texts, 5, 50) + mixed(texts, 30, 50), first_day=10)
    columns = ("--text", "note", "--time", "when", "--every", "1d", "--json")
    by_file = events(silotune("monitor", run_dir, now, "--baseline-file", before, *columns).out)
    assert by_file[-1]["baseline"]["labels"]["good"]["count"] == 60
    assert [w["alerts"] for w in by_file if w["event"] == "window"] == [["bad", "good"], []]
    period = ("--baseline-period", "2026-03-01/2026-03-03")
    by_period = events(silotune("monitor", run_dir, before, now, *period, *columns).out)
    windows = [w for w in by_period if w["event"] == "window"]
    assert [w["role"] for w in windows] == ["baseline", "baseline", "tested", "tested"]
    assert windows[2]["labels"]["good"]["p_value"] == by_file[0]["labels"]["good"]["p_value"]


def test_standard_input_in_windows_of_texts(
    silotune: Silotune, run_dir: Path, texts: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = "\n".join(mixed(texts, 30, 90)).encode() + b"\n\n\xff\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))
    done = silotune("monitor", run_dir, "--window", 40)
    assert done.status == 0, done.err
    said = " ".join(done.out.split())
    assert done.out.splitlines()[0].startswith("window 1  40 texts  bad 67.5 %")
    assert "10 (cut off)" in said
    assert "left out: 1 row not in the encoding: standard input, row 91 (line 92)." in said
    assert "shares and counts of private texts are private" in said
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    empty = silotune("monitor", run_dir)
    assert (empty.status, "there is no text to label" in empty.err) == (1, True)


def test_a_folder_is_followed_until_ctrl_c(run_dir: Path, texts: dict[str, list[str]], tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(mixed(texts, 10, 20)) + "\n")
    arguments = ["monitor", run_dir, folder, "--follow", "--poll", "0.05", "--window", "20", "--out", out, "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    with process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["labels"]["good"]["count"] == 10
        with (folder / "a.txt").open("a") as file:
            file.write("\n".join(mixed(texts, 8, 20)) + "\n")
        assert json.loads(process.stdout.readline())["labels"]["good"]["count"] == 8
        (folder / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in mixed(texts, 5, 20)))
        assert json.loads(process.stdout.readline())["labels"]["good"]["count"] == 5
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    (summary,) = events(rest)
    assert (summary["event"], summary["texts"], summary["windows"], summary["stopped"]) == ("summary", 60, 3, True)
    assert json.loads((out / "monitor.json").read_text())["texts"] == 60


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_wait_but_not_work(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with _Stop() as stop:
        assert stop.unless_asked(lambda: 1, 2) == 1
        assert stop.unless_asked(lambda: os.kill(os.getpid(), number) or time.sleep(30) or 1, 2) == 2
        assert stop.asked
        assert stop.unless_asked(lambda: 1, 2) == 2, "no further wait"
    with _Stop() as stop:
        os.kill(os.getpid(), number)  # at work
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_an_adjustment_needs_the_run_s_own_evaluation(run_dir: Path, tmp_path: Path) -> None:
    from shared.job.job_file import load_job

    job = load_job(run_dir)
    assert load_adjustment(run_dir, job) is not None
    assert load_adjustment(tmp_path, job) is None
    huge = '{"labels": ["bad", "good"], "confusion": [[1' + 400 * "0" + ", 0], [0, 1]]}"
    for content in (
        "{",
        '{"labels": ["good", "bad"], "confusion": [[1, 0], [0, 1]]}',
        '{"labels": ["bad", "good"]}',
        huge,
    ):
        (tmp_path / "evaluation.json").write_text(content)
        assert load_adjustment(tmp_path, job) is None
    (tmp_path / "evaluation.json").write_text('{"labels": ["bad", "good"], "confusion": [[1, 0], [0, 0]]}')
    assert load_adjustment(tmp_path, job) is None, "a label without records"


def test_durations_and_periods() -> None:
    assert [_duration(spec) for spec in ("90s", "30m", "1h", "2d", "1w")] == [90, 1800, 3600, 172_800, 604_800]
    assert _period("1970-01-02/1970-01-03T12:00") == (86_400, 216_000)
    for wrong in ("0d", "1", "1y", "-1d", "1.5h"):
        with pytest.raises(ConfigError, match="--every"):
            _duration(wrong)
    for wrong in (
        "2026-01-01",
        "a/b",
        "2026-01-01/2026-02-01/2026-03-01",
        "0001-01-01/2026-01-01",
        "2026-01-01/9999-12-31",
    ):
        with pytest.raises(ConfigError, match="FROM/TO"):
            _period(wrong)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("-", "a.txt"), "stands alone"),
        (("--follow",), "--follow needs files or folders"),
        (("a.csv", "--every", "1d"), "add --time"),
        (("--time", "t"), "--format csv"),
        (("a.csv", "--baseline-period", "1/2", "--baseline-file", "b.csv"), "exclude each other"),
        (("a.csv", "--poll", "0"), "--poll"),
        (("a.csv",), "a.csv does not exist"),
        (("a.csv", "--alpha", "2"), "--alpha"),
    ],
)
def test_mistakes_are_explained(silotune: Silotune, run_dir: Path, arguments: tuple[str, ...], text: str) -> None:
    outcome = silotune("monitor", run_dir, *arguments)
    assert outcome.status in (1, 2)
    assert text in outcome.err
    assert outcome.out == ""


def test_a_run_without_labels_of_texts_is_refused(
    silotune: Silotune, language_job: Callable[..., Job], tmp_path: Path
) -> None:
    (tmp_path / "job.json").write_text(language_job().canonical_json())
    outcome = silotune("monitor", tmp_path)
    assert (outcome.status, "sequence_classification" in outcome.err) == (2, True)
