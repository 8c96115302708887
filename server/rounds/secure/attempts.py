"""What a coordinator must not forget about the attempts of a run: which rosters went out, and who dropped out after one.

Guarantee (tests: tests/server/rounds/secure/test_attempts.py): an attempt is in the file before its roster leaves, so a number
never serves for two rosters, and no more rosters go out than the job declares to the sites, whatever moment the process dies at.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shared.errors import PrivacyError, RunError
from shared.files.atomic import write_json
from shared.job.job import Job

ATTEMPTS_FILE = "attempts.json"


class Attempts:
    """The attempts of one run, in one file that is replaced atomically."""

    def __init__(self, path: Path, job: Job) -> None:
        """Open the file; without one, nothing was attempted.

        Raises:
            RunError: if it cannot be read, or belongs to another job.
        """
        self._path, self._job = path, job
        self._rounds: list[int] = []  # of each roster that went out, oldest first
        self._failures: Counter[str] = Counter()
        if path.exists():
            self._read()

    @property
    def made(self) -> int:
        """Rosters that went out."""
        return len(self._rounds)

    def number_of_next(self, round_number: int) -> int:
        """Return the number of a round's next attempt, 1-based."""
        return self._rounds.count(round_number) + 1

    def check_affordable(self, round_number: int) -> None:
        """Raise `PrivacyError` if another attempt is more than the job declares: the sites would refuse it."""
        rounds, spare = self._job.training.rounds, self._job.spare_attempts
        left = rounds - round_number  # each needs one more
        if len(self._rounds) + 1 + left > rounds + spare:
            again = len(self._rounds) - len(set(self._rounds))
            raise PrivacyError(
                f"round {round_number} cannot be attempted again: the job declares {spare} spare attempts to its sites over "
                f"{rounds} rounds, and {again} were used because a site dropped out after it had been shown the roster. The "
                "adapter of the last complete round stands in the checkpoint; plan a new run with more of "
                "privacy.spare_attempts, or without the sites that fail."
            )

    def begin(self, round_number: int) -> None:
        """Note, durably, that a roster is about to go out."""
        self._write([*self._rounds, round_number], self._failures)

    def failed(self, sites: Iterable[str]) -> None:
        """Note, durably, who did not send after the roster had gone out."""
        self._write(self._rounds, self._failures + Counter(set(sites)))

    def order_of_trust(self, names: Iterable[str]) -> list[str]:
        """Return `names`, those that failed least first."""
        return sorted(names, key=lambda name: (self._failures[name], name))

    def has_failed(self, name: str) -> bool:
        """Return whether a site ever dropped out after a roster."""
        return self._failures[name] > 0

    def _write(self, rounds: list[int], failures: Counter[str]) -> None:
        content = {"job_sha256": self._job.sha256, "rounds": rounds, "failures": dict(sorted(failures.items()))}
        write_json(self._path, content)
        self._rounds, self._failures = rounds, failures

    def _read(self) -> None:
        try:
            content: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
            owner = content["job_sha256"]
            rounds = [_count(number) for number in content["rounds"]]
            failures = Counter({str(name): _count(number) for name, number in content["failures"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunError(
                f"{self._path} cannot be read ({type(error).__name__}); it says which attempts the sites were charged for. "
                "Restore it from a backup, or start a new run."
            ) from None
        if owner != self._job.sha256:
            raise RunError(f"{self._path} belongs to another job; choose another run folder.")
        self._rounds, self._failures = rounds, failures


def _count(value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError("not a positive whole number")
    return value
