"""What a coordinator must not forget about the attempts of a run: which rosters went out, and who dropped out after one.

Guarantees (tests: tests/server/rounds/secure/test_attempts.py)
    * An attempt is in the file before its roster leaves, so a number never serves for two rosters, and no more rosters go out
      than the job declares to the sites, whatever moment the process dies at.
    * Who refused a roster is not asked again by this process; who does so twice has dropped out (test_whoever_refuses_twice).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
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
        self._refusals: Counter[str] = Counter()
        self._refusing: dict[str, str] = {}  # in this process
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
        self._write([*self._rounds, round_number], self._failures, self._refusals)

    def failed(self, sites: Iterable[str]) -> None:
        """Note, durably, who did not send after the roster had gone out."""
        self._write(self._rounds, self._failures + Counter(set(sites)), self._refusals)

    def refused(self, reasons: Mapping[str, str]) -> None:
        """Note, durably, who refused the roster before being charged, and in this process why."""
        self._write(self._rounds, self._failures, self._refusals + Counter(reasons.keys()))
        self._refusing |= reasons

    @property
    def refusing(self) -> Mapping[str, str]:
        """Why sites refused a roster, by name, since this process began: a person may have mended what was before."""
        return self._refusing

    def order_of_trust(self, names: Iterable[str]) -> list[str]:
        """Return `names`, those that failed least first."""
        return sorted(names, key=lambda name: (self._failures[name] + self._refusals[name], name))

    def has_failed(self, name: str) -> bool:
        """Return whether a site ever dropped out after a roster, or refused one more than once."""
        return self._failures[name] > 0 or self._refusals[name] > 1

    def _write(self, rounds: list[int], failures: Counter[str], refusals: Counter[str]) -> None:
        content = {"job_sha256": self._job.sha256, "rounds": rounds, "failures": dict(sorted(failures.items()))}
        write_json(self._path, content | {"refusals": dict(sorted(refusals.items()))})
        self._rounds, self._failures, self._refusals = rounds, failures, refusals

    def _read(self) -> None:
        try:
            content: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
            owner = content["job_sha256"]
            rounds = [_count(number) for number in content["rounds"]]
            failures, refusals = (
                Counter({str(name): _count(number) for name, number in counts.items()})
                for counts in (content["failures"], content.get("refusals", {}))  # an older version wrote none
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunError(
                f"{self._path} cannot be read ({type(error).__name__}); it says which attempts the sites were charged for. "
                "Restore it from a backup, or start a new run."
            ) from None
        if owner != self._job.sha256:
            raise RunError(f"{self._path} belongs to another job; choose another run folder.")
        self._rounds, self._failures, self._refusals = rounds, failures, refusals


def _count(value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError("not a positive whole number")
    return value
