"""A site's list of approvals, with its seal and log, and signed jobs to put on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from client.approval.request import Request, RequestState, Rules
from client.approval.requests import Approvals
from client.approval.store import STORE_FILE
from shared.errors import AwaitingApproval
from shared.job.job import Job
from shared.job.parsing import parse
from shared.trust import audit_log
from shared.trust.audit_log import AuditLog, Entry
from shared.trust.keystore import Seal
from shared.trust.signed_job import SignedJob, sign_job
from shared.trust.signing import SigningKey

NOON = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)
SIGNER, OTHER_SIGNER, COORDINATOR = (SigningKey.from_bytes(bytes([n]) * 32) for n in (1, 2, 3))
LOG_KEY = SigningKey.from_bytes(bytes([4]) * 32)
ONE = Rules(needed=1, valid=timedelta(days=7))
TWO = Rules(needed=2, valid=timedelta(days=7))


@dataclass
class Desk:
    """The folder of a site as far as approvals need it, and its clock; `opened` is what another process would see."""

    folder: Path
    now: datetime = NOON
    rules: Rules = ONE
    signer: SigningKey = field(default_factory=lambda: SIGNER)

    @property
    def file(self) -> Path:
        return self.folder / STORE_FILE

    def opened(self) -> Approvals:
        log = AuditLog(self.folder / "audit", seal_head=LOG_KEY, clock=lambda: self.now)
        return Approvals(self.file, site="north", seal=Seal(bytes(32)), log=log, clock=lambda: self.now)

    def signed(
        self,
        name: str = "triage",
        *,
        signer: SigningKey | None = None,
        coordinator: SigningKey = COORDINATOR,
        days: float = 30,
        **sections: Any,
    ) -> SignedJob:
        raw: dict[str, Any] = {
            "name": name,
            "task": {"kind": "sequence_classification", "labels": ["bad", "good"]},
            "training": {"rounds": 10},
            "privacy": {"noise_multiplier": 1.0},
        }
        return sign_job(
            parse(Job, raw | sections, source="test job"),
            signer=signer or self.signer,
            coordinator=coordinator.verify_key,
            issued=self.now,
            not_after=self.now + timedelta(days=days),
        )

    def asked(self, signed: SignedJob) -> None:
        """Ask for a job that waits then."""
        with pytest.raises(AwaitingApproval):
            self.opened().admit(signed, self.rules)

    def states(self) -> dict[str, RequestState]:
        return {request.name: state for request, state in self.opened().listed(self.rules)}

    def only(self) -> tuple[Request, RequestState]:
        (found,) = self.opened().listed(self.rules)
        return found

    def events(self) -> list[str]:
        return [entry.event for entry in self.entries()]

    def entries(self) -> list[Entry]:
        return [entry for entry in audit_log.read(self.folder / "audit") if entry.event.startswith("approval.")]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def four_eyes(tmp_path: Path) -> Desk:
    return Desk(tmp_path, rules=TWO)


MakeSigned = Callable[..., SignedJob]
