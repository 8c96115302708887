"""`silotune coordinator logs`: whose log is printed where no job is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.conftest import Outcome
from tests.server.console.homes import job_of, make_home, submit


def test_the_newest_job_that_ran_is_shown_while_a_newer_one_waits(
    silotune: Callable[..., Outcome], tmp_path: Path
) -> None:
    home = make_home(tmp_path)
    first, second = submit(home, job_of(), 1), submit(home, job_of("other"), 2)
    for nobody_ran in (("coordinator", "logs", home.path), ("coordinator", "logs", home.path, "--job", "1")):
        outcome = silotune(*nobody_ran)
        assert outcome.status == 1
        assert "never ran" in outcome.err
    first.log.write_text("round 1\nround 2\n")
    assert silotune("coordinator", "logs", home.path, "--last", 1).out == "round 2\n"
    assert silotune("coordinator", "logs", home.path, "--job", "2").status == 1  # who names it is told
    second.log.write_text("begun\n")
    assert silotune("coordinator", "logs", home.path).out == "begun\n"
