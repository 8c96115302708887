"""The coordinator's long-lived process: keeps the link to the sites up and drives the jobs.

It holds no state of its own: what it does follows from the folder, so it may be killed at any moment and started again
(tests/integration/test_federation_failures.py). It starts no process and listens on one port.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.coordinator import metrics
from server.coordinator.attempt import Attempt
from server.coordinator.journal import Journal
from server.link.server import LinkFiles, LinkServer, SiteState
from server.store.home import CoordinatorHome
from server.store.submission import Submission, now_text, submissions
from shared.errors import SilotuneError, TrustError
from shared.files.atomic import write_json
from shared.files.backup import refuse_unpacked
from shared.service.machine import Clock, descriptors
from shared.service.manager import ServiceManager
from shared.service.page import Pages
from shared.trust.audit_log import Event
from shared.trust.certificates import certificate_end, load_certificate
from shared.trust.keystore import passphrase_from_environment
from shared.trust.node_keys import load_server_key
from shared.trust.trust_store import verify_certificate

if TYPE_CHECKING:
    from server.tracking import Watched

log = logging.getLogger("silotune.coordinator")

POLL_SECONDS = 0.5
# A defect that shows this often without a new round in between will not go away by itself; a full disk or a lost network may.
_MOST_DEFECTS = 8
_LONGEST_WAIT_SECONDS = 30.0
_FAREWELL_SECONDS = 20.0


class Supervisor:
    """One coordinator at work.

    Args:
        home: its folder; locked while `run` runs.
        watched: who watches its jobs besides, see `server.tracking`.

    Attributes:
        lingers: whether the thread of a job still runs after `run`; PyTorch then aborts a process that ends by itself.
    """

    def __init__(self, home: CoordinatorHome, watched: Watched | None = None) -> None:
        self.home, self._watched = home, watched
        self._config = home.load_config()
        self._passphrase = passphrase_from_environment()
        self._log = home.open_log(home.load_round_key(self._passphrase))
        self._journal = Journal(self._log)
        self._stop = threading.Event()
        self._link = self._new_link()
        self._sites: dict[str, SiteState] = {}
        self._trust_problem: str | None = None
        self._problem: str | None = None
        self._certificate_until: str | None = None
        self._attempts: dict[str, _Attempts] = {}
        self._active: Attempt | None = None
        self._manager, self._clock = ServiceManager(), Clock()
        self._started, self._link_restarts = now_text(), 0
        self._metrics: str | None = None
        self._said: dict[str, Any] = {}
        self.lingers = False

    def stop(self) -> None:
        """Ask `run` to return; safe in a signal handler and in any thread."""
        self._stop.set()

    def run(self) -> None:
        """Work until `stop` is called.

        Raises:
            SilotuneError: the folder is not complete, or the port is taken.
        """
        refuse_unpacked(self.home.path, "silotune coordinator restore BACKUP HOME")
        with self.home.locked():
            check_server_certificate(self.home, self._passphrase)
            self._log.append(Event.COORDINATOR_STARTED, pid=os.getpid())
            try:
                self._say("starting")
                self._start_link()
                self._manager.ready()
                with self._pages():
                    while not self._stop.is_set():
                        self._turn()
                        self._stop.wait(POLL_SECONDS)
            finally:
                self._manager.stopping()
                if self._active is not None:
                    self._active.halt()
                    if not self._active.join(_FAREWELL_SECONDS):
                        log.warning("job %s did not end in time; it resumes all the same", self._active.submission.name)
                        self.lingers = True
                self._link.stop()
                with contextlib.suppress(SilotuneError):
                    self._journal.write(everything=True)
                self._say("stopped")
                self._log.append(Event.COORDINATOR_STOPPED, pid=os.getpid())

    @contextlib.contextmanager
    def _pages(self) -> Iterator[None]:
        pages = Pages(self._config.metrics_listen, metrics.pages(self.home, lambda: self._said))
        self._metrics = pages.told
        try:
            yield
        finally:
            pages.close()

    def _new_link(self) -> LinkServer:
        files = LinkFiles(
            certificate=self.home.server_certificate,
            key=self.home.server_key,
            trust=self.home.trust,
            passphrase=self._passphrase,
        )
        return LinkServer(self._config.address, files, events=self._journal)

    def _start_link(self) -> None:
        self._link.start()
        log.info("sites connect to %s (mutual TLS 1.3)", self._config.address)

    def _turn(self) -> None:
        try:
            if not self._link.alive:
                self._restart_link()
            self._look_at_sites()
            self._manager.alive()  # the link answered; a full disk, or whatever follows, is no reason to be started anew
            self._journal.write()
            self._drive()
            self._say("running")
            self._problem = None
        except (SilotuneError, OSError) as error:
            problem = str(error) or type(error).__name__
            if problem != self._problem:
                log.error("%s", problem)  # once, however long it lasts
            self._problem = problem
            self._say("troubled", problem=problem)
        connected = sum(site.online for site in self._sites.values())
        job = f", job {self._active.submission.name}" if self._active else ""
        self._manager.tell(f"{connected} of {len(_valid(self._sites))} sites connected{job}")

    def _restart_link(self) -> None:
        """Open the port anew: sites connect again by themselves, and the run at hand resumes from its folder."""
        if self._active is not None:
            self._active.halt()
        self._link = self._new_link()
        self._start_link()
        # Only now: as long as the port cannot be opened it is tried twice a second.
        log.warning("the link to the sites ended; it is open again")
        self._link_restarts += 1
        self._log.append(Event.LINK_RESTARTED, reason="it ended")

    # --- who may connect ---

    def _look_at_sites(self) -> None:
        """Note who may connect and who may not any more; the link itself has gone by it already."""
        sites, problem = self._link.sites()
        if problem != self._trust_problem:
            self._trust_problem = problem
            if problem:
                self._log.append(Event.TRUST_BROKEN, reason=problem)
        before, now = _keys(self._sites), _keys(sites)
        refused = {node: reason for site in sites.values() for node, reason in site.facts.refused.items()}
        for node, (name, _) in before.items():
            if node not in now:
                reason = problem or refused.get(node, "its certificate is no longer in the trust store")
                who = "a key of site" if any(name == other for other, _ in now.values()) else "site"
                log.warning("%s %s may not connect any more: %s", who, name, reason, extra={"site": name})
                self._log.append(Event.SITE_REMOVED, site=name, reason=reason)
        for node, (name, end) in now.items():
            if node not in before:
                until = end.isoformat() if end else None
                log.info("site %s may connect until %s", name, until, extra={"site": name})
                self._log.append(Event.SITE_REGISTERED, site=name, until=until)
        self._sites = sites

    # --- jobs ---

    def _drive(self) -> None:
        """Run the oldest open job; start it again if it ended without being complete."""
        if self._active is not None:
            submission = self._active.submission
            stopping = submission.stop_requested and submission.is_open
            if stopping:
                self._active.halt()
            if self._active.alive:
                return
            if stopping:
                self._finish(submission, "stopped")
            elif submission.is_open and self._active.held:
                self._hold(submission)
            elif submission.is_open:
                self._failed(submission)
            else:
                self._finish(submission, submission.state()["state"])
            self._active = None
        for submission in submissions(self.home.jobs):
            if not submission.is_open:
                continue
            if submission.stop_requested:
                self._finish(submission, "stopped")
                continue
            attempts = self._attempts.setdefault(submission.name, _Attempts())
            if submission.state()["state"] == "submitted":  # it is new, or somebody resumed it
                attempts = self._attempts[submission.name] = _Attempts()
            if attempts.held:
                continue
            if time.monotonic() < attempts.not_before:
                return
            if submission.state()["state"] == "submitted":
                state = submission.state()
                self._log.append(
                    Event.JOB_SUBMITTED, job=state["job_sha256"], name=submission.name, signer=state.get("signer")
                )
            # Before it begins: on a full disk this fails, and one attempt after the other would be started.
            submission.note("running", started=datetime.now(UTC).isoformat(timespec="milliseconds"))
            self._active = Attempt(self.home, submission, self._link, self._watched)
            log.info("job %s runs", submission.name, extra={"job": submission.name})
            return

    def _failed(self, submission: Submission) -> None:
        """Plan another attempt, later each time; give up only on what cannot go away."""
        attempts, progress, state = self._attempts[submission.name], submission.progress(), submission.state()
        attempts.count = 1 if progress > attempts.progress else attempts.count + 1
        attempts.progress = progress
        problem = state.get("problem") or "see its log"
        if state.get("defect") and attempts.count >= _MOST_DEFECTS:
            submission.note(problem=f"{attempts.count} attempts without a new round; the last one: {problem}")
            self._finish(submission, "failed")
            return
        wait = min(2.0 ** (attempts.count - 1) - 1, _LONGEST_WAIT_SECONDS)
        attempts.not_before = time.monotonic() + wait
        job = submission.name
        log.warning("job %s ended early (%s); it resumes in %.0f s", job, problem, wait, extra={"job": job})

    def _hold(self, submission: Submission) -> None:
        """Leave a job alone until this process is started anew, which a person does who has read why; others go on."""
        self._attempts[submission.name].held = True
        log.error(
            "job %s rests: start the coordinator anew to resume it (%s)",
            submission.name,
            submission.state().get("problem"),
            extra={"job": submission.name},
        )

    def _finish(self, submission: Submission, state: Any) -> None:
        if state != "completed":
            _state_spent(submission, self.home.audit)
        submission.note(state)
        known = submission.state()
        log.info("job %s: %s", submission.name, state, extra={"job": submission.name})
        self._log.append(
            Event.JOB_FINISHED, job=known["job_sha256"], name=submission.name, state=state, problem=known.get("problem")
        )

    def _say(self, state: str, **facts: object) -> None:
        # A certificate that is just being exchanged may be half there; the one before it is served until it is whole.
        certificate_problem = None
        try:
            self._certificate_until = certificate_end(self.home.server_certificate).isoformat()
        except SilotuneError as error:
            certificate_problem = str(error)
        self._said = {
            "state": state,
            "pid": os.getpid(),
            "started": self._started,
            "updated": now_text(),
            "address": self._config.address,
            "metrics": self._metrics,
            "sites": {name: _told(site) for name, site in _valid(self._sites).items()},
            "trust_problem": self._trust_problem,
            "job": self._active.submission.name if self._active else None,
            "round": self._active.progress.told() if self._active else None,
            "certificate_until": self._certificate_until,
            "certificate_problem": certificate_problem,
            "link_restarts": self._link_restarts,
            "descriptors": descriptors(),
            "clock": self._clock.facts(),
        } | facts
        # A full disk must not end a coordinator that only wants to say so.
        with contextlib.suppress(SilotuneError):
            write_json(self.home.status, self._said)


def _valid(sites: Mapping[str, SiteState]) -> dict[str, SiteState]:
    """Return the sites that may connect."""
    return {name: site for name, site in sites.items() if site.facts.valid}


def _keys(sites: Mapping[str, SiteState]) -> dict[int, tuple[str, datetime | None]]:
    """Return number of a key that may connect -> name and end of its certificate."""
    return {node: (name, end) for name, site in sites.items() for node, end in site.facts.valid.items()}


def _told(site: SiteState) -> dict[str, Any]:
    """Return what the status says of a site."""
    seen = None if site.seen_before is None else datetime.now(UTC) - timedelta(seconds=site.seen_before)
    return {
        "online": site.online,
        "until": max(str(end) for end in site.facts.valid.values()),
        "last_seen": None if seen is None else seen.isoformat(timespec="seconds"),
    }


class _Attempts:
    """How often a job was started without a new round, and when it may be started again."""

    def __init__(self) -> None:
        self.count, self.progress, self.not_before, self.held = 0, -1, 0.0, False


def check_server_certificate(home: CoordinatorHome, passphrase: str | None) -> None:
    """Check that the coordinator can be trusted by its sites.

    Raises:
        TrustError: a file is missing, the key does not open, the certificate has expired, or is not for this key.
    """
    for path in (home.ca_certificate, home.server_certificate, home.server_key):
        if not path.exists():
            raise TrustError(
                f"{path} is missing. Send {home.path}/server.csr to whoever runs the CA, then: silotune coordinator install "
                f"{home.path} --certificate FILE --ca FILE"
            )
    certificate = load_certificate(home.server_certificate)
    verify_certificate(certificate, load_certificate(home.ca_certificate), datetime.now(UTC))
    key = load_server_key(home.server_key, passphrase)
    if key.public_key() != certificate.public_key():
        raise TrustError(f"{home.server_certificate} was made for another key than {home.server_key}.")


def _state_spent(submission: Submission, audit: Path) -> None:
    """Have it stated what the sites of a run that is given up may have spent; that it cannot be is no reason to go on with it."""
    if not (submission.run_folder / "job.json").exists():
        return  # nobody was asked for anything
    from server.coordinator.production import write_spent_of  # loads PyTorch

    try:
        write_spent_of(submission, audit)
    except Exception as error:
        log.error("what job %s has spent could not all be stated: %s", submission.name, error, exc_info=True)
        problem = f"what its sites spent could not all be stated ({type(error).__name__}); their own ledgers have it"
        with contextlib.suppress(SilotuneError):
            if not submission.state().get("problem"):  # why it ended comes first
                submission.note(problem=problem)
