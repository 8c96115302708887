"""What trackers are told, and that whatever they do no run stops, waits or is told twice."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from server.tracking import Target, Tracking, Watched, read_targets, tracking
from server.tracking.run_told import EPSILON, Ending, Figures, RunTold, figures_of, settings_of
from server.tracking.tensorboard_tracker import at_least
from shared.errors import ConfigError
from shared.job.job import Job
from shared.job.parsing import parse
from tests.server.tracking.told import EPSILONS, checkpoint, told

MakeJob = Callable[..., Job]


class Heard:
    """A tracker that keeps what it is told, fails as often as it is told to, and hangs while `hangs` is not set."""

    def __init__(self) -> None:
        self.runs: dict[str, list[Figures]] = {}
        self.endings: list[Ending] = []
        self.failures, self.hangs = 0, threading.Event()
        self.hangs.set()
        self.begun: list[RunTold] = []

    def record(self, run: RunTold, known_as: str | None) -> Any:
        """Begin a run, or go on with one."""
        self.meet()
        self.begun.append(run)
        name = known_as or f"id-{len(self.runs)}"
        outer = self

        class Recording:
            id, is_new = name, known_as is None

            def send(self, figures: Sequence[Figures]) -> None:
                outer.meet()
                outer.runs.setdefault(name, []).extend(figures)

            def finish(self, ending: Ending) -> None:
                outer.meet()
                outer.endings.append(ending)

        return Recording()

    def meet(self) -> None:
        """Hang, or fail."""
        self.hangs.wait(60)
        if self.failures:
            self.failures -= 1
            raise OSError("no route to user:secret@example.org")


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Heard]:
    found = Heard()
    monkeypatch.setattr(tracking, "_tracker_of", lambda target: lambda: found)
    yield found
    found.hangs.set()


TARGET = Target("mlflow", "https://user:secret@example.org")


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_every_round_arrives_once_in_order_with_the_recorded_epsilon(
    heard: Heard, classification_job: MakeJob, tmp_path: Path
) -> None:
    job, said = classification_job(), []
    with Tracking([TARGET], said.append) as trackers:
        observer = trackers.observer(told(job, tmp_path / "run"))
        for number in range(4):
            observer.round_done(checkpoint(job, number))
        observer.ended(checkpoint(job, 3), complete=True)
    (figures,) = heard.runs.values()
    assert [one.round for one in figures] == [0, 1, 2, 3]
    assert figures[0].values == {"public/loss": 0.7, "public/accuracy": 0.5}
    for one, epsilon in zip(figures[1:], EPSILONS[1:], strict=True):
        assert epsilon is not None
        assert epsilon <= one.values[EPSILON] < epsilon + 1.1e-4
    assert [ending.status for ending in heard.endings] == ["completed"]
    assert said == []
    assert "clinic" not in repr((heard.begun[0].settings, heard.begun[0].tags, figures))


def test_a_resumed_run_goes_on_as_the_same_one(heard: Heard, classification_job: MakeJob, tmp_path: Path) -> None:
    job = classification_job()
    with Tracking([TARGET], pytest.fail) as trackers:
        observer = trackers.observer(told(job, tmp_path / "run"))
        observer.round_done(checkpoint(job, 0))
        observer.round_done(checkpoint(job, 1))
    with Tracking([TARGET], pytest.fail) as trackers:
        observer = trackers.observer(told(job, tmp_path / "run"))
        observer.resumed(checkpoint(job, 1))
        observer.round_done(checkpoint(job, 2))
        observer.ended(checkpoint(job, 2), complete=True)
    assert [one.round for one in heard.runs["id-0"]] == [0, 1, 2]
    assert len(heard.runs) == 1
    assert [ending.status for ending in heard.endings] == ["stopped", "completed"]
    text = (tmp_path / "run" / "tracking.json").read_text()
    assert json.loads(text) == {"trackers": {"mlflow:https://example.org": {"id": "id-0", "rounds": 3}}}


def test_what_metrics_of_sites_spend_is_told_too(heard: Heard, classification_job: MakeJob, tmp_path: Path) -> None:
    job = classification_job()
    last = checkpoint(job, 3)
    spent = figures_of(last.history[-1], metrics=True).values[EPSILON]
    with Tracking([TARGET], pytest.fail) as trackers:
        observer = trackers.observer(told(job, tmp_path / "run"))
        observer.round_done(last)
        more = checkpoint(job, 3)
        object.__setattr__(more.history[-1], "epsilon_max", 0.5)
        observer.metrics_done(more)
        observer.ended(more, complete=True)
    (figures,) = heard.runs.values()
    assert [(one.round, one.values.get(EPSILON)) for one in figures[-2:]] == [(3, spent), (3, 0.5)]
    assert len(figures) == 5


def test_a_failing_tracker_is_said_once_and_gets_everything_later(
    heard: Heard, classification_job: MakeJob, tmp_path: Path
) -> None:
    job, said = classification_job(), []
    heard.failures = 2
    with Tracking([TARGET], said.append) as trackers:
        observer = trackers.observer(told(job, tmp_path / "run"))
        for number in range(4):
            observer.round_done(checkpoint(job, number))
            wait_for(lambda: not trackers._senders[0]._due)
            time.sleep(0.05)
        observer.ended(checkpoint(job, 3), complete=True)
    assert [one.round for one in heard.runs["id-0"]] == [0, 1, 2, 3]
    assert len(said) == 1
    assert "takes nothing: OSError: no route to example.org" in said[0]
    assert "secret" not in said[0]


@pytest.mark.parametrize("fault", ["hangs", "fails"])
def test_no_run_waits_for_a_tracker(heard: Heard, classification_job: MakeJob, tmp_path: Path, fault: str) -> None:
    """What did not arrive is said at the end."""
    job, said = classification_job(), []
    if fault == "hangs":
        heard.hangs.clear()
    else:
        heard.failures = 1000
    started = time.monotonic()
    with Tracking([TARGET], said.append, seconds=0.5) as trackers:
        observer = trackers.observer(told(job, tmp_path / "run"))
        for number in range(4):
            observer.round_done(checkpoint(job, number))
        observer.ended(checkpoint(job, 3), complete=True)
        assert time.monotonic() - started < 0.4
    assert time.monotonic() - started < 3
    assert "did not get everything of run-1 (rounds 0 to 3 and its end)" in said[-1]
    assert not heard.runs


def test_fault_a_tracker_in_the_run_itself_would_stop_it(
    heard: Heard, classification_job: MakeJob, tmp_path: Path
) -> None:
    """The tracker of these tests does fail: called directly, it raises."""
    heard.failures = 1
    with pytest.raises(OSError, match="no route"):
        heard.record(RunTold(experiment="e", name="n", settings={}, tags={}), None)


def test_a_run_that_never_began_is_not_told(heard: Heard, classification_job: MakeJob, tmp_path: Path) -> None:
    with Tracking([TARGET], pytest.fail) as trackers:
        trackers.observer(told(classification_job(), tmp_path / "run"))
    assert not heard.begun
    assert not (tmp_path / "run" / "tracking.json").exists()


def test_an_error_ends_the_run_as_failed(heard: Heard, classification_job: MakeJob, tmp_path: Path) -> None:
    job, trackers = classification_job(), Tracking([TARGET], pytest.fail)
    trackers.observer(told(job, tmp_path / "run")).round_done(checkpoint(job, 1))
    trackers.__exit__(RuntimeError, RuntimeError(), None)
    assert [ending.status for ending in heard.endings] == ["failed"]


def test_weights_leave_only_where_that_is_asked_for(heard: Heard, classification_job: MakeJob, tmp_path: Path) -> None:
    job = classification_job()
    for weights in (False, True):
        folder = tmp_path / str(weights)
        (folder / "adapter").mkdir(parents=True)
        with Tracking([TARGET], pytest.fail, weights=weights) as trackers:
            trackers.observer(told(job, folder)).ended(checkpoint(job, 3), complete=True)
    assert [list(ending.artifacts) for ending in heard.endings] == [[], ["adapter"]]


def test_metrics_of_private_records_are_not_told(classification_job: MakeJob) -> None:
    record = checkpoint(classification_job(), 2).history[-1]
    assert set(figures_of(record, metrics=False).values) == {EPSILON}


def test_settings_are_the_jobs_without_places_on_this_machine(classification_job: MakeJob) -> None:
    job = classification_job()
    found = settings_of(job)
    assert found["privacy.epsilon"] == 8.0
    assert found["training.rounds"] == 3
    assert found["lora.target_modules"] == "query, value"
    assert Path(job.model.backbone).is_absolute()
    assert found["model.backbone"] == Path(job.model.backbone).name


@pytest.mark.parametrize("value", [0.1, 3.3333, 1e-7, 4.0, 16777217.0])
def test_an_epsilon_in_32_bits_is_never_smaller(value: float) -> None:
    assert value <= at_least(value) <= value * (1 + 2**-22)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("comet:x", "names no tracker; expected mlflow:URI, tensorboard:FOLDER, wandb or wandb:offline"),
        ("mlflow:", "names no tracker"),
        ("mlflow", "--track 'mlflow' names no tracker"),
        ("mlflow:runs/here", "not in a plain folder; use mlflow:sqlite:///mlflow.db"),
        ("tensorboard:/proc/board", "cannot be made"),
        ("wandb:nowhere", "names no tracker"),
        ("wandb", "W&B has no key"),
        ("tensorboard:/dev/null", "is no folder"),
        ("mlflow:http://[", "names no tracker"),
    ],
)
def test_a_mistake_is_named(text: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        Tracking(read_targets([text]), pytest.fail)


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=rf'pip install "silotune\[{name}\]"'):
            read_targets([f"{name}:offline"])


def test_one_tracker_twice_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="twice"):
        read_targets(["wandb:offline", "wandb:offline"])


def test_secret_times_are_not_told(classification_job: MakeJob) -> None:
    privacy = {
        "mechanism": "central",
        "unit": "site",
        "noise_multiplier": 1.5,
        "central": {"num_sites": 100, "clip_norm": 0.5},
    }
    raw = classification_job().model_dump(mode="json", exclude_unset=True) | {
        "privacy": privacy,
        "federation": {"min_sites": 100},
    }
    job = parse(Job, raw, source="test")
    with pytest.raises(ConfigError, match="times of rounds are secret"):
        Watched.of(["wandb:offline"]).require_times_told(job)
    Watched.of([]).require_times_told(job)
