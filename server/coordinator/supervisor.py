"""The coordinator's long-lived process: keeps the SuperLink up, lets in whom the trust store names, drives the jobs.

It holds no state of its own: what it does follows from the folder, so it may be killed at any moment and started again
(tests/integration/test_federation_failures.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from datetime import UTC, datetime
from typing import Any

import httpx

from server.coordinator.superlink import Control, KeyRemembered, SuperLink, public_key_bytes, server_bundle
from server.store.home import CoordinatorHome
from server.store.submission import Submission, now_text, submissions
from shared.errors import RunError, SilotuneError, TrustError
from shared.files.atomic import write_json
from shared.trust.audit_log import Event
from shared.trust.certificates import load_certificate
from shared.trust.keystore import passphrase_from_environment
from shared.trust.node_keys import load_plain_pem_key
from shared.trust.trust_store import TrustStore, verify_certificate

log = logging.getLogger("silotune.coordinator")

POLL_SECONDS = 1.0
SERVER_APP, CLIENT_APP = "server.coordinator.production:app", "client.app:app"
# A defect that shows this often without a new round in between will not go away by itself; a full disk or a lost network may.
_MOST_DEFECTS = 8
_LONGEST_WAIT_SECONDS = 30.0
_TRUST_GRACE_SECONDS = 5.0


class Supervisor:
    """One coordinator at work.

    Args:
        home: its folder; locked while `run` runs.
    """

    def __init__(self, home: CoordinatorHome) -> None:
        self.home = home
        self._config = home.load_config()
        self._log = home.open_log(home.load_round_key(passphrase_from_environment()))
        self._stop = threading.Event()
        self._trust = TrustStore(home.trust)
        address = f"{self._config.fleet_host}:{self._config.fleet_port}"
        self._superlink = SuperLink(home, fleet_address=address, control_port=self._config.control_port)
        self._certificate = b""
        self._nodes: dict[str, Any] = {}
        self._trust_problem: str | None = None
        self._trusted_until = 0.0
        self._attempts: dict[str, _Attempts] = {}
        self._active: tuple[Submission, int] | None = None
        self._closing = contextlib.ExitStack()
        self._open_control: Control | None = None

    def stop(self) -> None:
        """Ask `run` to return; safe in a signal handler and in any thread."""
        self._stop.set()

    def run(self) -> None:
        """Work until `stop` is called.

        Raises:
            SilotuneError: the folder is not complete, or the SuperLink does not start.
        """
        with self.home.locked():
            check_server_certificate(self.home)
            self._log.append(Event.COORDINATOR_STARTED, pid=os.getpid())
            try:
                self._start_superlink()
                while not self._stop.is_set():
                    self._turn()
                    self._stop.wait(POLL_SECONDS)
            finally:
                self._closing.close()
                self._superlink.stop()
                self._say("stopped")
                self._log.append(Event.COORDINATOR_STOPPED, pid=os.getpid())

    def _start_superlink(self) -> None:
        self._say("starting")
        self._certificate = self.home.server_certificate.read_bytes()
        self._superlink.start()
        log.info("SuperLink listens on %s:%d (TLS)", self._config.fleet_host, self._config.fleet_port)
        # Whatever ran in an earlier SuperLink is over.
        self._active = None
        self._closing.close()
        self._open_control = None

    def _restart_superlink(self, reason: str) -> None:
        """Start the SuperLink anew: sites connect again by themselves, and a run resumes from its folder."""
        log.warning("starting the SuperLink again: %s", reason)
        self._log.append(Event.SUPERLINK_RESTARTED, reason=reason)
        self._superlink.stop()
        self._start_superlink()

    def _turn(self) -> None:
        try:
            if not self._superlink.alive():
                self._restart_superlink("it ended")
            elif self._superlink_must_restart():
                self._restart_superlink("another server certificate was installed")
            self._admit(self._control())
            self._drive(self._control())
            self._say("running")
        except (SilotuneError, OSError, httpx.HTTPError) as error:
            problem = str(error) or type(error).__name__
            log.error("%s", problem)
            self._say("troubled", problem=problem)

    def _control(self) -> Control:
        """Return the one client of the running SuperLink; a TLS handshake for every question would cost more."""
        if self._open_control is None:
            self._open_control = self._closing.enter_context(self._superlink.control())
        return self._open_control

    def _superlink_must_restart(self) -> bool:
        if self.home.server_certificate.read_bytes() == self._certificate:
            return False
        check_server_certificate(self.home)
        return True

    # --- who may connect ---

    def _admit(self, control: Control) -> None:
        """Make the SuperLink's list of keys equal to the valid certificates of the trust store."""
        try:
            identities, problem = self._trust.sites(datetime.now(UTC)), None
        except TrustError as error:
            if self._trusted_until > time.monotonic():
                return  # a file may be on its way
            # A trust store that cannot be trusted lets nobody in.
            identities, problem = [], str(error)
        else:
            self._trusted_until = time.monotonic() + _TRUST_GRACE_SECONDS
        if problem != self._trust_problem:
            self._trust_problem = problem
            if problem:
                log.error("%s", problem)
                self._log.append(Event.TRUST_BROKEN, reason=problem)
        keys = [(public_key_bytes(site.public_key), site) for site in identities if site.public_key is not None]
        valid = {key: site for key, site in keys if site.state == "valid"}
        reasons = {key: f"{site.state}: {site.reason}" for key, site in keys if site.state != "valid"}
        registered = {node.public_key: node for node in control.nodes()}
        for key, node in registered.items():
            if key not in valid or valid[key].name != node.name:
                control.unregister(node.node_id)
                reason = problem or reasons.get(key, "its certificate is no longer in the trust store")
                log.warning("site %s may not connect any more: %s", node.name, reason)
                self._log.append(Event.SITE_REMOVED, site=node.name, reason=reason)
        for key, site in valid.items():
            if key not in registered:
                assert site.public_key is not None  # noqa: S101 (selected above)
                try:
                    control.register(site.name, site.public_key)
                except KeyRemembered as error:
                    self._restart_superlink(str(error))
                    return
                except RunError as error:  # of one site; the others must not wait for it
                    log.error("site %s cannot be admitted: %s", site.name, error)
                    continue
                until = site.not_after.isoformat() if site.not_after else None
                log.info("site %s may connect until %s", site.name, until)
                self._log.append(Event.SITE_REGISTERED, site=site.name, until=until)
        nodes: dict[str, Any] = {}
        for key, site in valid.items():
            # While a key is exchanged, a site has two.
            online = key in registered and registered[key].online
            before = nodes.get(site.name, {"online": False, "until": ""})
            nodes[site.name] = {
                "online": online or before["online"],
                "until": max(str(site.not_after), before["until"]),
            }
        self._nodes = nodes

    # --- jobs ---

    def _drive(self, control: Control) -> None:
        """Run the oldest open job; start it again if it ended without being complete."""
        if self._active is not None:
            submission, run_id = self._active
            run = control.run(run_id)
            if submission.stop_requested and submission.is_open:
                if run is not None and not run.status.startswith("finished"):
                    control.stop_run(run_id)
                self._finish(submission, "stopped")
            elif run is not None and not run.status.startswith("finished"):
                return
            elif submission.is_open:
                self._failed(submission, run.details if run else "the SuperLink does not know it")
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
            if time.monotonic() < attempts.not_before:
                return
            if submission.state()["state"] == "submitted":
                state = submission.state()
                self._log.append(
                    Event.JOB_SUBMITTED, job=state["job_sha256"], name=submission.name, signer=state["signer"]
                )
            # Before the run is there: on a full disk this fails, and one run after the other would be started.
            submission.note("running")
            config = {"home": str(self.home.path.resolve()), "job": submission.name}
            run_id = control.start_run(server_bundle(SERVER_APP, CLIENT_APP), config)
            self._active = (submission, run_id)
            log.info("job %s runs (Flower's run %d)", submission.name, run_id)
            submission.note(flower_run=run_id)
            return

    def _failed(self, submission: Submission, details: str) -> None:
        """Plan another attempt, later each time; give up only on what cannot go away."""
        attempts, progress, state = self._attempts[submission.name], submission.progress(), submission.state()
        attempts.count = 1 if progress > attempts.progress else attempts.count + 1
        attempts.progress = progress
        problem = state.get("problem") or details
        if state.get("defect") and attempts.count >= _MOST_DEFECTS:
            submission.note(problem=f"{attempts.count} attempts without a new round; the last one: {problem}")
            self._finish(submission, "failed")
            return
        wait = min(2.0 ** (attempts.count - 1) - 1, _LONGEST_WAIT_SECONDS)
        attempts.not_before = time.monotonic() + wait
        log.warning("job %s ended early (%s); it resumes in %.0f s", submission.name, problem, wait)

    def _finish(self, submission: Submission, state: Any) -> None:
        submission.note(state)
        known = submission.state()
        log.info("job %s: %s", submission.name, state)
        self._log.append(
            Event.JOB_FINISHED, job=known["job_sha256"], name=submission.name, state=state, problem=known.get("problem")
        )

    def _say(self, state: str, **facts: object) -> None:
        # A full disk, or a certificate that is just being exchanged, must not end a coordinator that only wants to say so.
        with contextlib.suppress(SilotuneError):
            certificate = load_certificate(self.home.server_certificate)
            said = {
                "state": state,
                "pid": os.getpid(),
                "updated": now_text(),
                "fleet_address": f"{self._config.fleet_host}:{self._config.fleet_port}",
                "sites": self._nodes,
                "trust_problem": self._trust_problem,
                "job": self._active[0].name if self._active else None,
                "certificate_until": certificate.not_valid_after_utc.isoformat(),
            }
            write_json(self.home.status, said | facts)


class _Attempts:
    """How often a job was started without a new round, and when it may be started again."""

    def __init__(self) -> None:
        self.count, self.progress, self.not_before = 0, -1, 0.0


def check_server_certificate(home: CoordinatorHome) -> None:
    """Check that the coordinator can be trusted by its sites.

    Raises:
        TrustError: a file is missing, the certificate has expired, or is not for the key that lies here.
    """
    for path in (home.ca_certificate, home.server_certificate, home.server_key):
        if not path.exists():
            raise TrustError(
                f"{path} is missing. Send {home.path}/server.csr to whoever runs the CA, then: silotune coordinator install "
                f"{home.path} --certificate FILE --ca FILE"
            )
    certificate = load_certificate(home.server_certificate)
    verify_certificate(certificate, load_certificate(home.ca_certificate), datetime.now(UTC))
    if home.server_key.stat().st_mode & 0o077:
        raise TrustError(f"{home.server_key} can be read by others; run: chmod 600 {home.server_key}")
    key = load_plain_pem_key(home.server_key)
    if key.public_key() != certificate.public_key():
        raise TrustError(f"{home.server_certificate} was made for another key than {home.server_key}.")
