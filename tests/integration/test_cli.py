"""The command line: what people and scripts rely on."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.reports.run.render import write_report
from server.runs.folder import load_job
from shared.errors import RunError
from shared.job.compute import ComputeConfig
from shared.runtime.inference import load_tuned, predict
from shared.version import silotune_version
from simulations.audit.run import audit_run_mechanism

Silotune = Callable[..., Any]


def test_help_names_every_command(silotune: Silotune) -> None:
    outcome = silotune("--help")
    assert outcome.status == 0
    for command in ("demo", "simulate", "sweep", "predict", "generate", "monitor", "explain", "report", "version"):
        assert command in outcome.out
        assert "Usage" in silotune(command, "--help").out
    text = " ".join(silotune("simulate", "--help").out.split())
    for option in ("--set", "--out", "--resume", "--stop-after", "--json"):
        assert option in text


def test_version(silotune: Silotune) -> None:
    assert silotune("version").out == silotune_version() + "\n"
    assert silotune("--version") == silotune("version")
    assert silotune("--version", "nonsense").out == silotune_version() + "\n", "it comes before everything else"


def test_predict_answers_arguments_in_order(silotune: Silotune, finished_run: Path) -> None:
    texts = ["a quiet joy", "it bores", "a quiet joy from start to end and then some more"]
    outcome = silotune("predict", finished_run, *texts)
    assert outcome.status == 0
    lines = [line.split("  ") for line in outcome.out.splitlines()]
    assert [line[2] for line in lines] == texts
    job = load_job(finished_run)
    expected = predict(load_tuned(finished_run, job, ComputeConfig()), texts)
    assert [line[0] for line in lines] == [p["label"] for p in expected]
    assert [line[1] for line in lines] == [f"{p['probability']:.3f}" for p in expected]


def stdin(text: str | bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(text if isinstance(text, bytes) else text.encode()))


def test_predict_keeps_row_numbers_and_tells_what_it_leaves_out(
    silotune: Silotune, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", stdin(b"fine\r\n\r\nPRIVATE \xff\r\nPRIVATE \0\r\rlast"))
    outcome = silotune("predict", finished_run, "--json")
    assert outcome.status == 0, outcome.err
    answers = [json.loads(line) for line in outcome.out.splitlines()]
    assert [(answer["row"], answer["text"]) for answer in answers] == [(1, "fine"), (6, "last")]
    assert outcome.err.splitlines() == [
        "left out: 2 rows left blank: line 2, line 5",
        "left out: 1 row not in the encoding: line 3",
        "left out: 1 row with a NUL character: line 4",
    ]
    wrong = silotune("predict", finished_run, "fine", "PRIVATE \udcff")
    assert wrong.status == 1
    assert "text 2 holds half of a surrogate pair" in wrong.err
    assert "PRIVATE" not in wrong.err


def test_predict_reads_standard_input_and_writes_json_lines(
    silotune: Silotune, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", stdin("a quiet joy\n\n  it bores \nschön\n"))
    outcome = silotune("predict", finished_run, "--json")
    assert outcome.status == 0
    answers = [json.loads(line) for line in outcome.out.splitlines()]
    assert [answer["text"] for answer in answers] == ["a quiet joy", "it bores", "schön"]
    for answer in answers:
        assert set(answer["probabilities"]) == {"bad", "good"}
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["probability"] == max(answer["probabilities"].values())
        assert answer["probabilities"][answer["label"]] == answer["probability"]
    assert [answer["row"] for answer in answers] == [1, 3, 4]
    assert outcome.err.strip() == "left out: 1 row left blank: line 2"
    monkeypatch.setattr("sys.stdin", stdin("\n"))
    empty = silotune("predict", finished_run)
    assert empty.status == 1
    assert "there is no text (1 lines were left out)" in empty.err


def test_predict_labels_the_rows_of_a_file(silotune: Silotune, finished_run: Path, tmp_path: Path) -> None:
    table = tmp_path / "notes.tsv"
    table.write_text('day\tnote\n1\t"so" quiet\n2\ta quiet joy\n3\t\n4\tit bores\n')
    asked = ["predict", finished_run, "--file", table, "--text", "note", "--json"]
    answers = [json.loads(line) for line in silotune(*asked, "--quoting", "none").out.splitlines()]
    assert [(answer["row"], answer["text"]) for answer in answers] == [
        (1, '"so" quiet'),
        (2, "a quiet joy"),
        (4, "it bores"),
    ]
    checked = silotune(*asked)
    assert [json.loads(line)["row"] for line in checked.out.splitlines()] == [2, 4]
    assert checked.err.splitlines() == [
        "left out: 1 row malformed: notes.tsv, row 1 (line 2)",
        "left out: 1 row without a text: notes.tsv, row 3 (line 4)",
    ]
    for wrong, message in (
        ([*asked[:4]], "no column 'text' among the 2 of its first line; name it by --text"),
        ([*asked, "a text"], "--file and texts were both given"),
        ([*asked[:2], "a text", "--text", "note"], "--text says how --file is read, but no --file was given"),
        ([*asked[:3], tmp_path, "--json"], "is a folder; give one file"),
        ([*asked[:3], tmp_path / "none.csv"], "does not exist"),
        ([*asked, "--encoding", "klingon"], "klingon"),
    ):
        refused = silotune(*wrong)
        assert (refused.status > 0, message in refused.err) == (True, True), refused


def test_simulate_stops_resumes_and_prints_one_json_line(
    silotune: Silotune, scenario_file: Callable[..., Path], tmp_path: Path
) -> None:
    path, folder = scenario_file(), tmp_path / "run"
    common = ("simulate", path, "--out", folder, "--set", "training.rounds=2", "--set", "partition.num_sites=2")
    stopped = silotune(*common, "--stop-after", "1")
    assert stopped.status == 0, stopped.err
    assert "stopped after round 1; continue with --resume --out" in stopped.out
    assert json.loads((folder / "run.json").read_text())["status"] == "stopped"
    assert not (folder / "report.html").exists()
    done = silotune(*common, "--resume", "--json")
    assert done.status == 0, done.err
    (line,) = done.out.splitlines()
    figures = json.loads(line)
    assert figures["run_dir"] == str(folder)
    assert 0 <= figures["accuracy_federated_dp"] <= 1
    assert figures["delta"] == 1e-5
    spent = [json.loads(p.read_text())["epsilon_spent"] for p in folder.glob("sites/*/privacy.json")]
    assert len(spent) == 2, "--set must reach the partition"
    assert figures["epsilon_max_site"] == pytest.approx(max(spent), abs=1e-4)
    assert load_job(folder).training.rounds == 2, "--set must reach the job"
    assert "round 2/2" in done.err, "progress goes to the other stream"
    again = silotune(*common, "--resume", "--json")  # finished already: nothing to do, same figures
    assert json.loads(again.out)["epsilon_max_site"] == figures["epsilon_max_site"]


def test_a_human_sees_figures_statement_and_report(
    silotune: Silotune, scenario_file: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "[bold]run[^1]" / "[" / "red]"  # what rich would take for markup is a name
    done = silotune("simulate", scenario_file(training={"rounds": 1}), "--out", folder)
    assert done.status == 0, done.err
    assert f"run_dir  {folder}\n" in done.out
    assert f"report: {folder / 'report.html'}" in done.out
    assert json.loads((folder / "statement.json").read_text())["one_site"] in " ".join(done.out.split())
    assert "accuracy_federated_dp" in done.out


def test_the_report_is_written_once_and_also_if_the_audit_fails(
    silotune: Silotune, scenario_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def fail(folder: Path) -> None:
        raise RunError("no canary sings")

    def write(folder: Path) -> Path:
        written.append(folder)
        return write_report(folder)

    monkeypatch.setattr("server.reports.run.write_report", write)
    for number, audit in enumerate((audit_run_mechanism, fail)):
        monkeypatch.setattr("simulations.simulating.audit_run_mechanism", audit)
        folder = tmp_path / f"run-{number}"
        outcome = silotune("simulate", scenario_file(training={"rounds": 1}), "--out", folder)
        assert (outcome.status, "no canary sings" in outcome.err) == ((1, True) if number else (0, False))
        assert written == [folder]
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert ("Audits: what an attack" in page) == (number == 0)
        written.clear()


def test_report_is_written_anew(silotune: Silotune, scenario_file: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    silotune("simulate", scenario_file(training={"rounds": 1}), "--out", folder)
    (folder / "report.html").unlink()
    outcome = silotune("report", folder)
    assert outcome.status == 0
    assert outcome.out.strip() == str(folder / "report.html")
    assert (folder / "report.html").read_text().startswith("<!")
    missing = silotune("report", tmp_path)
    assert missing.status == 1
    assert missing.err.startswith("error: ")


def test_a_process_keeps_standard_output_clean(
    scenario_file: Callable[..., Path], tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """In a process of its own, where libraries write to the real streams."""
    with start("simulate", scenario_file(training={"rounds": 1}), "--out", tmp_path / "run", "--json") as process:
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert len(out.splitlines()) == 1
    assert json.loads(out)["run_dir"] == str(tmp_path / "run")
    assert "Warning" not in err
    assert "Loading weights" not in err, "bars of libraries do not belong between ours"


def test_a_blank_text_is_no_question(finished_run: Path, silotune: Callable[..., Any]) -> None:
    outcome = silotune("predict", finished_run, "a dull plot", " ")
    assert outcome.status == 1
    assert outcome.err == "error: text 2 is blank; give what is to be read.\n"
    assert outcome.out == ""


def test_a_text_does_not_steer_the_terminal(finished_run: Path, silotune: Callable[..., Any]) -> None:
    done = silotune(
        "predict", finished_run, "fine\x07 \x9b2J\u202e and\ta caf\u00e9\u00a0\U0001f469\u200d\u2695", "b\r!"
    )
    assert done.status == 0
    lines = done.out.splitlines()
    assert lines[0].endswith("fine\ufffd \ufffd2J\ufffd and\ta caf\u00e9\u00a0\U0001f469\u200d\u2695")
    assert lines[1].endswith("b\ufffd!")


def test_closed_standard_streams_are_no_file_of_ours(tmp_path: Path) -> None:
    probe = (
        "import cli, os; cli.open_streams(); at = os.open('probe', os.O_CREAT | os.O_WRONLY); os.write(at, b'%d' % at)"
    )
    command = [sys.executable, "-c", probe]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(
        ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", *command], cwd=tmp_path, env=environment, check=True
    )
    assert int((tmp_path / "probe").read_bytes()) > 2


def test_a_closed_standard_input_holds_no_text(
    finished_run: Path, silotune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in (["predict", finished_run], ["explain", finished_run], ["monitor", finished_run]):
        monkeypatch.setattr("sys.stdin", None)
        refused = silotune(*command)
        assert refused.status != 0
        assert refused.err.startswith("error: ")


def test_a_working_folder_that_was_removed_is_told(
    silotune: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    refused = silotune("plan", "--records", 1000, "--batch-size", 10, "--steps", 10, "--epsilon", 3, "--out", "here")
    assert refused.status == 2
    assert "is not there any more; change into another" in refused.err
