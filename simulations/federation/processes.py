"""A whole federation on one machine: a coordinator and sites as separate processes, over gRPC and TLS with authentication.

Everything is what a real consortium runs: the CA approves requests, keys are made where they are used, the processes are
started by the `silotune` command. Only the network is short: all of it is loopback.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import tomli_w

from client import commands as site_commands
from client.link.handshake import TlsFacts, tls_facts
from client.site.home import SiteHome
from server import commands as coordinator_commands
from server.coordinator.run_file import RunSettings, submit
from server.records.privacy import SiteRecord, read_sites
from server.records.results import read_evaluation
from server.records.rounds import read_rounds
from server.rounds.secure.attempts import ATTEMPTS_FILE, Attempts
from server.store.home import CoordinatorHome
from server.store.submission import Submission
from shared.data.datasets import DataSource, write_jsonl
from shared.epsilons import rounded_up
from shared.errors import RunError
from shared.files.atomic import write_text
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.parsing import load_toml
from shared.job.values import Unit
from shared.privacy.filter import Composition
from shared.processes import die_with_parent
from shared.tasks import Record, task_of
from shared.trust import audit_log
from shared.trust.audit_log import Event
from shared.trust.pki import approve, create_ca, publish, revoke
from shared.trust.signing import SigningKey, load_verify_key

HOST = "127.0.0.1"
HOSTS = ("localhost", HOST)
_NOT_EPHEMERAL = range(20_000, 32_000)
"""Ports below those that systems give to outgoing connections: Linux from 32768 on, others from 49152 (RFC 6335, section 6)."""
ANY_PORT = f"{HOST}:0"  # the settings' own are for one coordinator and one site a machine
COMMAND = ("-m", "cli")
_OF_ROUNDS = (Event.READY_ASKED, Event.ROUND_ASKED, Event.ROUND_COMPLETED)


@dataclass
class Federation:
    """A consortium in one folder.

    Attributes:
        folder: holds `ca/`, `coordinator/` and one folder for each site.
        port: where the coordinator listens for sites.
        connect_port: where the sites connect to; differs if a test puts something in between.
        environment: added to that of every process.
        processes: running children by name; the coordinator is "coordinator".
    """

    folder: Path
    port: int = field(default_factory=lambda: free_port())
    connect_port: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    signer: SigningKey = field(default_factory=SigningKey.generate)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def ca(self) -> Path:
        """Folder of the CA."""
        return self.folder / "ca"

    @property
    def coordinator(self) -> CoordinatorHome:
        """Folder of the coordinator."""
        return CoordinatorHome(self.folder / "coordinator")

    def site(self, name: str) -> SiteHome:
        """Folder of a site."""
        return SiteHome(self.folder / name)

    def found(self) -> None:
        """Make the CA and the coordinator."""
        create_ca(self.ca, name="Silotune consortium", passphrase=None)
        home = self.coordinator
        with _quietly():
            coordinator_commands.init(
                home.path,
                host=list(HOSTS),
                listen_host=HOST,
                listen_port=self.port,
            )
        change_toml(home.config, metrics_listen=ANY_PORT)
        publish(self.ca, home.trust)
        certificate = self._approve(home.path / "server.csr", "server.crt", hosts=HOSTS)
        with _quietly():
            coordinator_commands.install(home.path, certificate=certificate, ca=self.ca / "ca.crt")

    def join(
        self,
        name: str,
        records: Sequence[Record],
        *,
        epsilon: float,
        epsilon_alone: float | None = None,
        unit: Unit = "record",
        composition: Composition = "fixed",
        compute: ComputeConfig | None = None,
        evaluation_share: float = 0.0,
        policy: Mapping[str, Any] | None = None,
    ) -> SiteHome:
        """Make a site from `records`, get it approved and admit it.

        Args:
            epsilon: the site's budget, for one job and in total.
            epsilon_alone: the same for what it sends by itself, if secure aggregation fails; by default equal.
            unit: what the budget protects.
            composition: how the site measures its spending; "fixed" for runs whose plans are all made before they start.
            compute: its speed settings.
            evaluation_share: of its records, held out of training.
            policy: keys of its policy.toml to replace.
        """
        home = self.site(name)
        data = self.folder / f"{name}.jsonl"
        write_jsonl(data, list(records))
        address = f"{HOST}:{self.connect_port or self.port}"
        with _quietly():
            site_commands.init(
                home.path,
                name=name,
                coordinator=address,
                data=data,
                columns=[f"{role}={role}" for role in records[0]],
                epsilon=epsilon,
                unit=unit,
                signer=[f"consortium={self.signer.verify_key.text}"],
                composition=composition,
            )
        change_toml(home.config, metrics_listen=ANY_PORT)
        if epsilon_alone is not None:
            change_toml(home.config, budget=load_toml(home.config)["budget"] | {"epsilon_alone": epsilon_alone})
            change_toml(home.policy, max_epsilon_alone=epsilon_alone)
        if compute is not None:
            change_toml(home.config, compute=compute.model_dump(mode="json", exclude_none=True))
        if evaluation_share:
            change_toml(home.config, evaluation_share=evaluation_share)
        if policy is not None:
            change_toml(home.policy, **policy)
        certificate = self._approve(home.path / f"{name}.csr", f"{name}.crt")
        with _quietly():
            site_commands.install(home.path, certificate=certificate, ca=self.ca / "ca.crt")
        self.admit(certificate)
        return home

    def admit(self, certificate: Path) -> None:
        """Put a site's certificate into the coordinator's trust store."""
        with _quietly():
            coordinator_commands.install(self.coordinator.path, site=[certificate])

    def rotate(self, name: str) -> None:
        """Exchange a site's key; the running node takes it up, and the old certificate stays valid."""
        home = self.site(name)
        with _quietly():
            site_commands.rotate(home.path)
        certificate = self._approve(home.path / f"{name}.csr", f"{name}-next.crt")
        self.admit(certificate)
        with _quietly():
            site_commands.install(home.path, certificate=certificate)

    def renew_server_certificate(self) -> None:
        """Install a new certificate for the coordinator; it takes it up by itself."""
        certificate = self._approve(self.coordinator.path / "server.csr", "server-next.crt", hosts=HOSTS)
        with _quietly():
            coordinator_commands.install(self.coordinator.path, certificate=certificate)

    def revoke(self, target: str) -> None:
        """Revoke a site's certificates, or the one with a serial number, and publish the list to the coordinator."""
        revoke(self.ca, target, passphrase=None)
        publish(self.ca, self.coordinator.trust)

    def start_coordinator(self, *options: str) -> None:
        """Start the coordinator and wait until sites can connect."""
        self.spawn_coordinator(*options)
        self._await("the coordinator", self._coordinator_runs)

    def spawn_coordinator(self, *options: str) -> None:
        """Start the coordinator without waiting for it."""
        self._spawn("coordinator", ["coordinator", "start", str(self.coordinator.path), *options])

    def _coordinator_runs(self) -> bool:
        # A coordinator that was killed left a status that says it runs.
        said = self.coordinator.read_status()
        return bool(said.get("pid") == self.processes["coordinator"].pid and said["state"] == "running")

    def start_site(self, name: str, *, program: Sequence[str] = COMMAND) -> None:
        """Start a site's node; it connects by itself.

        Args:
            program: arguments of Python that start `silotune`; a test gives one that misbehaves.
        """
        self._spawn(name, ["site", "start", str(self.site(name).path)], program=program)

    def submit(self, job: Job, evaluation: Sequence[Record], *, compute: ComputeConfig | None = None) -> Submission:
        """Sign a job and hand it to the coordinator."""
        columns = {role: role for role in task_of(job).roles}
        settings = RunSettings(
            evaluation=DataSource(path="evaluation.jsonl", columns=columns), compute=compute or ComputeConfig()
        )
        home = self.coordinator
        key = load_verify_key(home.path / "round.pub")
        return submit(home.jobs, job, settings, evaluation, signer=self.signer, coordinator=key)

    def wait(self, submission: Submission, *, timeout: float) -> dict[str, Any]:
        """Wait until a job has ended and return its state.

        Raises:
            RunError: if it does not end in time.
        """
        self._await(submission.name, lambda: not submission.is_open, timeout=timeout)
        return submission.state()

    def kill(self, name: str) -> None:
        """End a process as a power cut would."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def stop(self) -> None:
        """End all processes in an orderly way."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 20
        for process in self.processes.values():
            try:
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()

    def log_of(self, name: str) -> str:
        """Return what a process printed."""
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def tls(self) -> TlsFacts:
        """Shake hands with the coordinator."""
        return tls_facts(f"{HOST}:{self.port}", (self.ca / "ca.crt").read_bytes())

    def _approve(self, request: Path, name: str, *, hosts: Sequence[str] = ()) -> Path:
        from cryptography.hazmat.primitives.serialization import Encoding

        role = "server" if hosts else "site"
        certificate = approve(self.ca, request.read_bytes(), role=role, hosts=hosts, passphrase=None, rotate=True)
        path = self.folder / name
        path.write_bytes(certificate.public_bytes(Encoding.PEM))
        return path

    def _spawn(self, name: str, arguments: Sequence[str], *, program: Sequence[str] = COMMAND) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(  # noqa: S603 (our own command)
                [sys.executable, *program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def _await(self, what: str, condition: Any, *, timeout: float = 90.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise RunError(
                        f"{name} ended by itself; {self.folder / name}.log says:\n{self.log_of(name)[-2000:]}"
                    )
            if time.monotonic() > deadline:
                raise RunError(f"{what} was not ready after {timeout:g} s; the logs are in {self.folder}.")
            time.sleep(0.1)


def round_overheads(federation: Federation, submission: Submission, sites: Sequence[str]) -> list[float]:
    """Return, for each round, the seconds that were not training or evaluation: send, wait, store, aggregate, make durable.

    Measured from one completed round to the next (the first from its request) in the audit logs; the slowest site's training
    time is taken from the sites' own.
    """
    job = submission.state()["job_sha256"]
    training: dict[int, float] = {}
    for name in sites:
        for entry in audit_log.read(federation.site(name).audit):
            if entry.event == Event.RELEASE_STORED and entry.details["job"] == job:
                number = int(entry.details["round"])
                training[number] = max(training.get(number, 0.0), float(entry.details["seconds_training"]))
    evaluation = {
        record["round"]: record["seconds_evaluation"]
        for record in map(
            json.loads, (submission.run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        )
    }
    overheads, before = [], None
    for entry in audit_log.read(federation.coordinator.audit):
        if entry.details.get("job") != job or entry.event not in _OF_ROUNDS:
            continue
        time_now, number = datetime.fromisoformat(entry.time), int(entry.details["round"])
        if before is None:
            before = time_now
        elif entry.event == Event.ROUND_COMPLETED:
            seconds = (time_now - before).total_seconds()
            overheads.append(seconds - evaluation[number] - training[number])
            before = time_now
    return overheads


def summary(
    federation: Federation, submission: Submission, job: Job, sites: Sequence[str], facts: TlsFacts
) -> Mapping[str, Any]:
    """Return the figures of a finished run."""
    metric = task_of(job).primary_metric
    evaluation = read_evaluation(submission.run_folder / "evaluation.json")
    overhead = statistics.median(round_overheads(federation, submission, sites))
    records = read_sites(submission.run_folder)
    return {
        "run_dir": str(submission.run_folder),
        f"{metric}_federated_dp": None if evaluation.primary is None else round(evaluation.primary, 4),
        "rounds": submission.progress(),
        "sites": len(sites),
        "round_overhead_seconds_median": round(overhead, 3),
        **(_of_shares(submission, job, records) or _of_sites(records)),
        "delta": job.privacy.delta,
        "tls_version": facts.tls_version,
        "alpn": facts.alpn,
    }


def _of_sites(records: Sequence[SiteRecord]) -> dict[str, Any]:
    return {"epsilon_max_site": float(rounded_up(max(record.epsilon_bound or 0.0 for record in records), 4))}


def _of_shares(submission: Submission, job: Job, records: Sequence[SiteRecord]) -> dict[str, Any] | None:
    """Return both promises and what the rounds cost; None where sites add no shares."""
    shared = records[0].shared
    if shared is None:
        return None
    rounds = read_rounds(submission.run_folder / "metrics.jsonl", complete=True)[1:]
    attempts = Attempts(submission.run_folder / ATTEMPTS_FILE, job)
    return {
        "epsilon": float(rounded_up(max(record.epsilon_planned or 0.0 for record in records), 4)),
        "epsilon_alone": float(rounded_up(max(record.epsilon_alone or 0.0 for record in records), 4)),
        "max_colluding": shared.colluding,
        "honest_min": shared.honest,
        "attempts": attempts.made,
        "dropped": max(len(records) - len(record.sites) for record in rounds),
        "bytes_up_per_round": round(statistics.mean(record.bytes_up or 0 for record in rounds)),
    }


def change_toml(path: Path, **keys: Any) -> None:
    """Replace top-level keys of a TOML file."""
    write_text(path, tomli_w.dumps(load_toml(path) | keys))


def free_port() -> int:
    """Return a TCP port that is free now, and that no outgoing connection will take before it is listened on."""
    for port in random.sample(_NOT_EPHEMERAL, 100):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind((HOST, port))
            return port
    raise RunError(f"none of 100 TCP ports from {_NOT_EPHEMERAL[0]} to {_NOT_EPHEMERAL[-1]} is free.")


def now() -> str:
    """Return the time for a folder's name."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S")


@contextlib.contextmanager
def _quietly() -> Any:
    """Keep what a command prints for its user from a program's output."""
    with contextlib.redirect_stdout(StringIO()):
        yield
