"""What people of a site do with jobs that wait for them: list, read, approve, refuse; for the command line and for pages.

It may be used while the node runs, which sees what was decided at the coordinator's next question.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.approval.request import Request, RequestState, Rules
from client.approval.requests import Approvals
from client.site.declared import DECLARED_FILE, known_size
from client.site.home import SiteHome, open_log
from shared.errors import PolicyError
from shared.files.backup import refuse_unpacked
from shared.job.job import Job
from shared.trust.keystore import Seal, load_secret

if TYPE_CHECKING:
    from client.approval.facts import Facts, Lines
    from client.approval.grounds import Part
    from client.policy.policy import Policy
    from client.site.config import SiteConfig


class ApprovalDesk:
    """The requests of one site, for its own people; opened from its folder.

    Every method raises `ConfigError` if settings or policy cannot be read, `TrustError` if the requests or the log cannot be
    trusted, and `RunError` if they cannot be written.

    Args:
        home: the site's folder.
        passphrase: opens its keys; None for keys that are protected by file permissions only.
        clock: tells the time, with time zone.
    """

    def __init__(
        self, home: SiteHome, *, passphrase: str | None, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        refuse_unpacked(home.path, "silotune site restore BACKUP HOME")
        self.home, self._clock = home, clock
        self.site = home.load_config().name  # first: a folder that is no site's is told as that
        self.seal = Seal(load_secret(home.storage_key, passphrase=passphrase))
        self._log = open_log(home, passphrase=passphrase)
        self._approvals = Approvals(home.approvals, site=self.site, seal=self.seal, log=self._log, clock=clock)

    @property
    def rules(self) -> Rules:
        """What the policy says of approvals now."""
        return Rules.of(self.policy())

    def requests(self, rules: Rules | None = None) -> list[tuple[Request, RequestState]]:
        """Return all requests and where they stand, those that wait first; by the policy's rules or by others."""
        return self._approvals.listed(rules or self.rules)

    def nothing(self) -> str:
        """Return why there may be no request."""
        if self.policy().approval == "required":
            return "no job was asked for"
        return 'no job was asked for; policy.toml has approval = "none", so its rules alone decide'

    def seen(self, named: str) -> tuple[Request, str]:
        """Return one request, and what a decision on it as it stands now names (`Request.mark`); raises as `facts`."""
        rules = self.rules
        request, _ = self._approvals.find(named, rules)
        return request, request.mark(rules, self._clock())

    def parts(self, request: Request) -> dict[Part, str]:
        """Return what a request's facts follow from beside the budget, as `client.approval.grounds` compares it; quick."""
        home, last = self.home, self._approvals.last_approved(request, self.rules)
        settings = (home.config, home.path / DECLARED_FILE)
        return {
            "request": request.id,
            "validity": "in time" if self._clock() < request.not_after else "over",
            "policy": _sha256(home.policy),
            "settings": " ".join(_sha256(path) for path in settings),
            "compared": last.id if last is not None else "",
        }

    def facts(self, named: str, *, lines: Lines, by_id: bool = False) -> Facts:
        """Return one request, whole; takes seconds of accounting.

        Args:
            named: the job's name, or the beginning of its SHA-256 or of the request's id.
            lines: tells what a job does to the budget.
            by_id: it is the whole id and nothing else.

        Raises:
            RunError: it means none, or more than one.
        """
        from client.approval.facts import Here, facts_of

        policy = self.policy()
        rules = Rules.of(policy)
        request, _ = self._approvals.find(named, rules, by_id=by_id)
        config = self.home.load_config()
        here = Here(
            site=config.name,
            dataset=config.dataset,
            unit=config.budget.unit,
            columns=config.data.columns,
            settings=self._settings(config, request.signed().job),
        )
        last = self._approvals.last_approved(request, rules)
        return facts_of(request, policy=policy, here=here, lines=lines, last=last, now=self._clock())

    def approve(
        self, named: str, *, by: str, reason: str = "", seen: str | None = None, moved: Mapping[str, Any] | None = None
    ) -> tuple[Request, RequestState]:
        """Note that an account approves a request; see `client.approval.requests.Approvals.approve`."""
        return self._approvals.approve(named, self.rules, by=by, reason=reason, seen=seen, moved=moved)

    def refuse(self, named: str, *, by: str, reason: str, seen: str | None = None) -> Request:
        """Note that an account refuses a request or withdraws an approval; see `client.approval.requests.Approvals.refuse`."""
        return self._approvals.refuse(named, self.rules, by=by, reason=reason, seen=seen)

    def policy(self) -> Policy:
        """Return what the site accepts now."""
        from client.policy.policy import load_policy

        return load_policy(self.home.policy)

    def _settings(self, config: SiteConfig, job: Job) -> str:
        from client.site.terms import check_terms

        if (size := self._size(config)) is None:
            return ""
        try:
            check_terms(config, job, declared_records=size)
        except PolicyError as error:
            return str(error)
        return ""

    def _size(self, config: SiteConfig) -> int | None:
        """Return the declared size; None before the node first asked for it."""
        if config.declared_records is not None:
            return config.declared_records
        return known_size(self.home.path, dataset=config.dataset, unit=config.budget.unit)


def _sha256(path: Path) -> str:
    """Return what is another text once a file of settings is another; "" if it is not there."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""
