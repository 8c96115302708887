"""The attempts of a run survive a kill at any moment, and there are never more rosters than the job declares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import server.rounds.secure.attempts as attempts_module
from server.rounds.secure.attempts import ATTEMPTS_FILE, Attempts
from shared.errors import PrivacyError, RunError
from tests.server.rounds.secure.secure_sites import secure_job


def test_a_number_never_serves_for_two_rosters(tmp_path: Path) -> None:
    job, path = secure_job(), tmp_path / ATTEMPTS_FILE
    attempts = Attempts(path, job)
    assert attempts.number_of_next(1) == 1
    attempts.begin(1)
    assert Attempts(path, job).number_of_next(1) == 2  # another process, whatever became of the first
    Attempts(path, job).begin(1)
    assert Attempts(path, job).number_of_next(1) == 3
    assert Attempts(path, job).number_of_next(2) == 1
    assert Attempts(path, job).made == 2


def test_who_failed_is_remembered(tmp_path: Path) -> None:
    job, path = secure_job(), tmp_path / ATTEMPTS_FILE
    attempts = Attempts(path, job)
    attempts.failed(["b"])
    attempts.failed(["b", "c"])
    again = Attempts(path, job)
    assert [again.has_failed(name) for name in "abc"] == [False, True, True]
    assert again.order_of_trust("cba") == ["a", "c", "b"]


def test_whoever_refuses_twice(tmp_path: Path) -> None:
    """Once it is asked again by the next process, which a person has started; the second time it has dropped out."""
    job, path = secure_job(), tmp_path / ATTEMPTS_FILE
    attempts = Attempts(path, job)
    attempts.refused({"b": "its list is newer"})
    assert attempts.refusing == {"b": "its list is newer"}
    assert not attempts.has_failed("b")
    again = Attempts(path, job)
    assert again.refusing == {}
    assert not again.has_failed("b")
    assert again.order_of_trust("abc") == ["a", "c", "b"]
    again.refused({"b": "its list is newer"})
    assert again.has_failed("b")
    assert Attempts(path, job).has_failed("b")
    assert not Attempts(path, job).has_failed("c")


def test_a_file_of_an_older_version_knows_of_no_refusals(tmp_path: Path) -> None:
    job, path = secure_job(), tmp_path / ATTEMPTS_FILE
    path.write_text(json.dumps({"job_sha256": job.sha256, "rounds": [1, 1], "failures": {"b": 1}}))
    attempts = Attempts(path, job)
    assert (attempts.made, attempts.has_failed("b"), attempts.has_failed("a")) == (2, True, False)


def test_a_write_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, path = secure_job(), tmp_path / ATTEMPTS_FILE
    attempts = Attempts(path, job)
    attempts.begin(1)

    def full(*args: Any) -> None:
        raise RunError("no space left")

    monkeypatch.setattr(attempts_module, "write_json", full)
    with pytest.raises(RunError, match="no space"):
        attempts.begin(2)
    with pytest.raises(RunError, match="no space"):
        attempts.refused({"b": "it is full"})
    assert (attempts.made, Attempts(path, job).made) == (1, 1)
    assert attempts.refusing == {}


def test_spare_attempts_are_for_all_rounds_together(tmp_path: Path) -> None:
    job = secure_job(training={"rounds": 3}, privacy={"spare_attempts": 2})
    attempts = Attempts(tmp_path / ATTEMPTS_FILE, job)
    for number in (1, 1, 1):
        attempts.check_affordable(number)
        attempts.begin(number)
    # Three were made, two rounds are left: five is all that is declared.
    with pytest.raises(PrivacyError, match="declares 2 spare attempts to its sites over 3 rounds, and 2 were used"):
        attempts.check_affordable(1)
    for number in (2, 3):
        attempts.check_affordable(number)
        attempts.begin(number)
    with pytest.raises(PrivacyError, match="round 3 cannot be attempted again"):
        attempts.check_affordable(3)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        '{"rounds": [1]}',
        '{"job_sha256": 1, "rounds": ["1"], "failures": {}}',
        '{"job_sha256": 1, "rounds": [0], "failures": {}}',
        '{"job_sha256": 1, "rounds": [true], "failures": {}}',
        '{"job_sha256": 1, "rounds": [1], "failures": {"b": 0}}',
        '{"job_sha256": 1, "rounds": [1], "failures": ["b"]}',
        '{"job_sha256": 1, "rounds": [1], "failures": {}, "refusals": {"b": -1}}',
        '{"job_sha256": 1, "rounds": 1, "failures": {}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_file_is_said(tmp_path: Path, content: str) -> None:
    path = tmp_path / ATTEMPTS_FILE
    path.write_text(content)
    with pytest.raises(RunError, match=r"attempts\.json cannot be read"):
        Attempts(path, secure_job())


def test_a_file_that_cannot_be_opened_is_said(tmp_path: Path) -> None:
    (tmp_path / ATTEMPTS_FILE).mkdir()
    with pytest.raises(RunError, match=r"attempts\.json cannot be read \(IsADirectoryError\)"):
        Attempts(tmp_path / ATTEMPTS_FILE, secure_job())


def test_names_are_written_in_order(tmp_path: Path) -> None:
    """Whoever compares two copies of the file sees what differs, and not who came first."""
    path = tmp_path / ATTEMPTS_FILE
    attempts = Attempts(path, secure_job())
    attempts.failed(["c"])
    attempts.failed(["b"])
    attempts.refused({"e": "no"})
    attempts.refused({"d": "no"})
    content = json.loads(path.read_text())
    assert (list(content["failures"]), list(content["refusals"])) == (["b", "c"], ["d", "e"])


def test_the_file_of_another_job_is_refused(tmp_path: Path) -> None:
    path = tmp_path / ATTEMPTS_FILE
    Attempts(path, secure_job()).begin(1)
    assert json.loads(path.read_text())["rounds"] == [1]
    with pytest.raises(RunError, match="belongs to another job"):
        Attempts(path, secure_job(name="other"))
