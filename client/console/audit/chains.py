"""Whether the audit log and the ledger of a site are unbroken, checked from their first entry on.

Guarantee (tests: tests/client/console/test_chains.py): what is said was found since the files were written last, at most ten
minutes ago; a check of a log of years takes seconds of a processor that training needs as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from client.budget.accounts import LEDGER_FILE, Budgets
from client.site.home import SiteHome
from shared.errors import SilotuneError
from shared.trust.audit_log import Verified, verify
from shared.trust.signing import load_verify_key
from shared.web.turns import Turn

_KEPT_SECONDS, _PATIENCE = 600, 1.0


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a check found.

    Attributes:
        at: seconds since 1970.
        log: of the audit log; None if something is broken.
        problem: what; "" if nothing is.
    """

    at: int
    log: Verified | None
    problem: str


class Chains:
    """Checks one at a time; safe to use from several threads.

    Args:
        budgets: reads the ledger.
        now: whole seconds since 1970.
    """

    def __init__(self, home: SiteHome, budgets: Budgets, *, now: Callable[[], int]) -> None:
        self._home, self._budgets, self._now = home, budgets, now
        self._turn = Turn()
        self._kept: tuple[object, Checked] | None = None

    def checked(self) -> Checked:
        """Return what was found, anew where a file was written since, or it is long ago.

        Raises:
            Busy: others wait for it.
        """
        with self._turn:
            files, now = self._files(), self._now()
            kept = self._kept
            if kept is None or kept[0] != files or not 0 <= now - kept[1].at < _KEPT_SECONDS:
                kept = (files, self._check(now))
                is_whole = kept[1].log is None or kept[1].log.end_checked
                self._kept = kept if is_whole else None
            return kept[1]

    def _check(self, now: int) -> Checked:
        try:
            log = verify(self._home.audit, verify_head=load_verify_key(self._home.path / "log.pub"), patience=_PATIENCE)
            self._budgets.check()
        except SilotuneError as error:
            return Checked(at=now, log=None, problem=str(error))
        return Checked(at=now, log=log, problem="")

    def _files(self) -> object:
        """Return what is another value once a file was written or exchanged."""
        paths = [*self._home.audit.glob("*.json*"), self._home.path / LEDGER_FILE, self._home.path / "log.pub"]
        found = []
        for path in sorted(paths):
            try:
                status = path.stat()
            except OSError:
                continue
            found.append((path.name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        return found
