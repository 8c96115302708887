"""Every failure that a federation meets, for real: processes die, lines are cut, disks fill up, clocks are wrong.

One federation of four sites serves all tests; before each, everything runs and is connected. Each test ends with the
books of all sites and of the coordinator in agreement.
"""

from __future__ import annotations

import contextlib
import functools
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from client.node.health import is_connected
from client.node.status import read_status
from server.store.submission import Submission
from shared.job.job import Job
from shared.trust import audit_log
from shared.trust.audit_log import Event
from shared.trust.certificates import load_certificate
from simulations.federation.processes import HOST, Federation, change_toml, free_port
from tests.integration import eventually as waiting
from tests.integration.books import (
    assert_books_agree,
    charges_of,
    coordinator_entries,
    ledger_epsilon,
    of_site,
    privacy_record,
    rounds_of,
    site_entries,
)

eventually = functools.partial(waiting.eventually, timeout=240.0)
SITES = ("a", "b", "c", "d")
# What the guide promises: in which time the status names a site that is dead, and in which all are connected again.
TOLD_SECONDS, BACK_SECONDS = 10.0, 5.0

pytestmark = [pytest.mark.endurance, pytest.mark.timeout(900)]


class Line:
    """A TCP line between a site and the coordinator that can be cut."""

    def __init__(self, target: int) -> None:
        self._target, self.port = target, free_port()
        self._open: list[socket.socket] = []
        self._carries = threading.Event()
        self._listener: socket.socket | None = None
        self.mend()

    def mend(self) -> None:
        """Carry again."""
        self._carries.set()
        if self._listener is None:
            self._listener = socket.create_server((HOST, self.port))
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Break all connections and refuse new ones."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open.clear()

    def swallow(self) -> None:
        """Carry nothing any more, without a sign: as a firewall that forgets a connection."""
        self._carries.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
                far = socket.create_connection((HOST, self._target))
            except OSError:
                if self._listener is not listener:
                    return
                near.close()  # nobody listens behind the line
                continue
            self._open += [near, far]
            for ends in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._carries.wait()
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@dataclass
class Consortium:
    """The federation of this file.

    Attributes:
        lines: from each site to the coordinator.
        small_disks: folders that have a file system of their own.
        submissions: all jobs so far.
    """

    federation: Federation
    lines: dict[str, Line]
    make_job: Callable[..., Job]
    evaluation: list[dict[str, Any]]
    small_disks: list[Path] = field(default_factory=list)
    submissions: list[Submission] = field(default_factory=list)

    def submit(self, *, rounds: int, local_steps: int = 2, timeout: float = 300.0, min_sites: int = 2) -> Submission:
        """Submit a job; `timeout` is long, so that what a test waits for is not the end of a round's patience."""
        number = len(self.submissions) + 1
        job = self.make_job(
            name=f"job-{number}",
            seed=number,
            training={"rounds": rounds, "local_steps": local_steps},
            privacy={"noise_multiplier": 8.0},
            federation={"min_sites": min_sites, "round_timeout_seconds": timeout},
        )
        self.submissions.append(self.federation.submit(job, self.evaluation))
        return self.submissions[-1]

    def finish(self, submission: Submission, *, sites: tuple[str, ...] = SITES) -> list[dict[str, Any]]:
        """Wait for the end of a job, check the books, and return its rounds."""
        state = self.federation.wait(submission, timeout=300)
        assert state["state"] == "completed", state
        records = rounds_of(submission)
        assert [record["round"] for record in records] == list(range(len(records)))
        assert_books_agree(self.federation, submission, sites=sites)
        return records

    def start(self, name: str, **options: Any) -> None:
        """Start a site and wait until it is connected."""
        self.federation.start_site(name, **options)
        eventually(lambda: self.is_connected(name))

    def is_connected(self, name: str) -> bool:
        """Return whether a site's process that runs now is connected."""
        said = read_status(self.federation.site(name))
        process = self.federation.processes.get(name)
        # Whether it is healthy is another matter: of the small file system it says that it is nearly full.
        return bool(process and is_connected(said) and said["pid"] == process.pid)

    def told_connected(self) -> set[str]:
        """Return the sites that the running coordinator's status shows as connected."""
        said = self.federation.coordinator.read_status()
        assert said["pid"] == self.federation.processes["coordinator"].pid
        return {name for name, site in said["sites"].items() if site["online"]}

    def stop(self, name: str) -> None:
        """Stop a process in an orderly way."""
        process = self.federation.processes.pop(name)
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(timeout=60)

    def trains(self, name: str, submission: Submission, *, round_number: int | None = None) -> bool:
        """Return whether a site has charged a round, this one or any, that it has not stored yet."""
        job = submission.state()["job_sha256"]
        charged = [
            entry.details["payload"]["round"]
            for entry in site_entries(self.federation, name, Event.LEDGER_ENTRY)
            if entry.details["kind"] == "reserve" and entry.details["payload"]["job_id"] == job
        ]
        stored = [
            entry.details["round"]
            for entry in site_entries(self.federation, name, Event.RELEASE_STORED)
            if entry.details["job"] == job
        ]
        open_rounds = charged[len(stored) :]
        return bool(open_rounds) if round_number is None else round_number in open_rounds


@pytest.fixture(scope="module")
def made(
    found_federation: Callable[..., Federation],
    federation_job: Callable[..., Job],
    evaluation_records: list[dict[str, Any]],
) -> Iterator[Consortium]:
    federation = found_federation(SITES, epsilon=500.0, policy={"max_steps": 100_000})
    small_disks = [path for path in (federation.coordinator.path, federation.site("d").path) if _on_small_disk(path)]
    lines = {}
    for name in SITES:
        lines[name] = Line(federation.port)
        change_toml(federation.site(name).config, coordinator=f"{HOST}:{lines[name].port}")
    consortium = Consortium(federation, lines, federation_job, evaluation_records, small_disks)
    yield consortium
    for process in federation.processes.values():
        process.send_signal(signal.SIGCONT)
    federation.stop()
    for path in small_disks:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture
def consortium(made: Consortium) -> Consortium:
    """Everything runs and is connected."""
    federation = made.federation
    for submission in made.submissions:
        if submission.is_open:  # of a test that failed
            submission.request_stop()
    for name, process in list(federation.processes.items()):
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
        else:
            del federation.processes[name]
    for name in [name for name in federation.processes if name not in (*SITES, "coordinator")]:
        made.stop(name)
    if "coordinator" not in federation.processes:
        federation.start_coordinator()
    for name in SITES:
        made.lines[name].mend()
        if name not in federation.processes:
            federation.start_site(name)
    for name in SITES:
        eventually(lambda name=name: made.is_connected(name))
    eventually(lambda: not any(submission.is_open for submission in made.submissions))
    return made


def _on_small_disk(path: Path) -> bool:
    """Move a folder to a file system of its own, if this user may make one."""
    aside = path.with_name(f"{path.name}-aside")
    path.rename(aside)
    path.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", "size=300m,mode=700", "tmpfs", str(path)]
    mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    shutil.copytree(aside, path, dirs_exist_ok=True)
    shutil.rmtree(aside)
    return mounted


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Fill the file system of a folder to the last byte."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(65536))
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1))
    try:
        yield
    finally:
        ballast.unlink()


@contextlib.contextmanager
def no_writes(process: int) -> Iterator[None]:
    """Let no file of a process grow: as a quota that is used up."""
    soft, hard = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process, resource.RLIMIT_FSIZE, (soft, hard))


def took_part(submission: Submission, name: str, *, after: int) -> bool:
    """Return whether a site's update was taken in a round after `after`."""
    return any(name in record["sites"] for record in rounds_of(submission) if record["round"] > after)


# --- sites die, are cut off, are slow ---


def test_a_dead_and_a_cut_off_site_are_left_out_and_take_part_again_when_they_return(consortium: Consortium) -> None:
    federation = consortium.federation
    submission = consortium.submit(rounds=14, local_steps=150)
    eventually(lambda: consortium.trains("c", submission) and consortium.trains("d", submission))
    consortium.lines["d"].swallow()
    federation.kill("c")
    # Whoever looks is told long before the round gives them up, also of a line that says nothing of its end.
    started = time.monotonic()
    waiting.eventually(lambda: consortium.told_connected() == {"a", "b"}, timeout=TOLD_SECONDS)
    print(f"told after {time.monotonic() - started:.1f} s")  # noqa: T201
    noted = {entry.details["site"] for entry in coordinator_log(federation, Event.SITE_DISCONNECTED)}
    assert noted == {"c", "d"}
    lost = eventually(lambda: coordinator_entries(federation, submission, Event.ROUND_ASKED))[-1].details["round"]
    # The round's own patience is five minutes: it goes on because two nodes show no sign of life.
    record = eventually(lambda: next((r for r in rounds_of(submission) if r["failed"]), None))
    assert record["round"] == lost
    assert record["sites"] == ["a", "b"]
    assert set(record["failed"]) == {"c", "d"}
    consortium.lines["d"].mend()
    federation.start_site("c")
    records = consortium.finish(submission)
    for name in "cd":
        assert took_part(submission, name, after=record["round"]), records
        stated = privacy_record(submission, name)
        assert stated is not None
        # Nobody at the coordinator can know whether they executed that round, so it counts.
        assert record["round"] in stated["rounds_unanswered"]
        assert stated["epsilon_bound"] >= ledger_epsilon(federation, name, submission) * (1 - 1e-9)
    assert all(set(charges_of(federation, name, submission).values()) == {1} for name in "abcd")


def test_a_run_that_is_stopped_in_a_round_says_what_its_sites_may_have_spent_in_it(consortium: Consortium) -> None:
    """Their updates may be on the way, and their ledgers have the charge: nobody resumes such a run to hear of it."""
    federation = consortium.federation
    submission = consortium.submit(rounds=3, local_steps=150, min_sites=4)
    eventually(lambda: all(consortium.trains(name, submission) for name in SITES))
    submission.request_stop()
    eventually(lambda: not submission.is_open)
    done = rounds_of(submission)[-1]["round"]
    for name in SITES:
        stated = privacy_record(submission, name)
        assert stated is not None
        assert stated["rounds_unanswered"] == [done + 1]
        assert stated["epsilon_bound"] >= ledger_epsilon(federation, name, submission) * (1 - 1e-9)


def test_a_site_that_dies_and_is_back_at_once_is_asked_again(consortium: Consortium) -> None:
    """Its node never goes offline, so nobody tells the coordinator that the request died with the process."""
    federation = consortium.federation
    submission = consortium.submit(rounds=1, local_steps=150, min_sites=4)
    eventually(lambda: consortium.trains("c", submission))
    federation.kill("c")
    federation.start_site("c")
    records = consortium.finish(submission)
    assert records[1]["sites"] == list(SITES)
    # What it computed before it died is charged, though it never left.
    assert charges_of(federation, "c", submission) == {1: 2}
    assert charges_of(federation, "a", submission) == {1: 1}


def test_a_minute_without_network_in_the_middle_of_a_round(consortium: Consortium) -> None:
    federation = consortium.federation
    before = {name: len(site_entries(federation, name, Event.NODE_STARTED)) for name in SITES}
    submission = consortium.submit(rounds=3, local_steps=100, min_sites=4)
    eventually(lambda: all(consortium.trains(name, submission) for name in SITES))
    acknowledged = rounds_of(submission)
    for line in consortium.lines.values():
        line.cut()
    waiting.eventually(lambda: not consortium.told_connected(), timeout=TOLD_SECONDS)
    time.sleep(60)
    assert submission.is_open
    assert len(rounds_of(submission)) <= 2
    for line in consortium.lines.values():
        line.mend()
    waiting.eventually(lambda: consortium.told_connected() == set(SITES), timeout=BACK_SECONDS)
    records = consortium.finish(submission)
    assert len(records) == 4
    assert records[: len(acknowledged)] == acknowledged
    assert all(record["sites"] == list(SITES) for record in records[1:])
    for name in SITES:
        assert set(charges_of(federation, name, submission).values()) == {1}
        assert len(site_entries(federation, name, Event.NODE_STARTED)) == before[name], "nobody was restarted"


def test_a_slow_site_is_left_out_and_takes_part_again(consortium: Consortium) -> None:
    federation = consortium.federation
    submission = consortium.submit(rounds=6, local_steps=60, timeout=8.0, min_sites=3)
    eventually(lambda: consortium.trains("c", submission))
    federation.processes["c"].send_signal(signal.SIGSTOP)
    record = eventually(lambda: next((r for r in rounds_of(submission) if "c" in r["failed"]), None))
    federation.processes["c"].send_signal(signal.SIGCONT)
    assert record["failed"]["c"] == "no answer within 8 s"
    assert record["sites"] == ["a", "b", "d"]
    records = consortium.finish(submission)
    assert took_part(submission, "c", after=record["round"]), records
    stated = privacy_record(submission, "c")
    assert stated is not None
    assert stated["epsilon_bound"] >= ledger_epsilon(federation, "c", submission) * (1 - 1e-9)


# --- sites that answer nonsense ---

SABOTEUR = """
from dataclasses import replace
import sys
import torch
import cli, client.app
from client.site import release
from flwr.app import ConfigRecord, RecordDict
from shared.tensors import adapters

honest_store, honest_reply, honest_pack = release.Update._store, release.TrainReply, client.app.pack_reply
deltas, sent = [], []

def store(self, begun, result):
    deltas.append(result.delta)
    return honest_store(self, begun, result)

def reply(**fields):
    honest, round_number = honest_reply(**fields), fields["round_number"]
    sent.append(honest.update)
    if round_number == 2:
        return replace(honest, update=adapters.encode({n: t * float("nan") for n, t in deltas[-1].items()}))
    if round_number == 3:
        return replace(honest, update=adapters.encode({n: torch.zeros(4_000_000) for n in ("v", "w", "x", "y")}))
    if round_number == 4:
        return replace(honest, update=b"no adapter at all")
    if round_number == 5:
        return replace(honest, round_number=1)
    return honest

def pack(reply):
    if len(sent) == 6:
        return RecordDict({"silotune": ConfigRecord({"kind": "update", "site": "../../c"})})
    return honest_pack(reply)

release.Update._store, release.TrainReply, client.app.pack_reply = store, reply, pack
cli.main(sys.argv[1:])
"""


def test_nonsense_is_refused_with_the_reason_and_the_round_goes_on(consortium: Consortium) -> None:
    federation = consortium.federation
    consortium.stop("c")
    consortium.start("c", program=("-c", SABOTEUR))
    submission = consortium.submit(rounds=7, min_sites=3)
    records = consortium.finish(submission)
    consortium.stop("c")
    refused = {
        entry.details["round"]: entry.details["reason"]
        for entry in coordinator_entries(federation, submission, Event.UPDATE_REFUSED)
        if of_site(entry, "c")
    }
    expected = {2: "NaN", 3: "at most", 4: "do not start like an adapter", 5: "stale", 6: "could not be read"}
    assert refused.keys() == expected.keys()
    assert all(text in refused[number] for number, text in expected.items()), refused
    assert [record["sites"] for record in records[1:]] == [
        list(SITES) if number in (1, 7) else ["a", "b", "d"] for number in range(1, 8)
    ]
    stated = privacy_record(submission, "c")
    assert stated is not None
    assert stated["epsilon_bound"] >= ledger_epsilon(federation, "c", submission) * (1 - 1e-9)


# --- disks ---


@pytest.mark.parametrize("how", ["full disk", "used-up quota"])
def test_a_site_without_disk_space_refuses_and_takes_part_again(consortium: Consortium, how: str) -> None:
    federation, folder = consortium.federation, consortium.federation.site("d").path
    if how == "full disk" and folder not in consortium.small_disks:
        pytest.skip("this user may not mount a small file system; the quota is tested")
    submission = consortium.submit(rounds=16, local_steps=80, min_sites=3)
    eventually(lambda: took_part(submission, "d", after=0))
    with full_disk(folder) if how == "full disk" else no_writes(federation.processes["d"].pid):
        lost = eventually(lambda: next((r for r in rounds_of(submission) if "d" in r["failed"]), None))
    records = consortium.finish(submission)
    assert federation.processes["d"].poll() is None, "the process lives through it"
    for reason in (record["failed"]["d"] for record in records if "d" in record["failed"]):
        assert not any(word in reason for word in (str(folder), "disk", "space", "large", "ledger"))
    assert took_part(submission, "d", after=lost["round"]), records


@pytest.mark.parametrize("how", ["full disk", "used-up quota"])
def test_a_coordinator_without_disk_space_waits_and_goes_on(consortium: Consortium, how: str) -> None:
    federation, folder = consortium.federation, consortium.federation.coordinator.path
    if how == "full disk" and folder not in consortium.small_disks:
        pytest.skip("this user may not mount a small file system; the quota is tested")
    submission = consortium.submit(rounds=5, local_steps=60, min_sites=4)
    eventually(lambda: len(rounds_of(submission)) >= 2)
    with full_disk(folder) if how == "full disk" else no_writes(federation.processes["coordinator"].pid):
        stands_at = len(rounds_of(submission))
        time.sleep(25)
        assert submission.is_open
        assert len(rounds_of(submission)) <= stands_at + 1
    records = consortium.finish(submission)
    assert federation.processes["coordinator"].poll() is None, "the process lives through it"
    assert all(record["sites"] == list(SITES) for record in records[1:])
    for name in SITES:
        assert set(charges_of(federation, name, submission).values()) == {1}


# --- clocks ---

WRONG_CLOCK = """
import functools, sys
from datetime import UTC, datetime, timedelta
import cli, client.node.node

late = lambda: datetime.now(UTC) + timedelta(minutes=6)
client.node.node.open_site = functools.partial(client.node.node.open_site, clock=late)
cli.main(sys.argv[1:])
"""


def test_a_wrong_clock_is_named_on_both_sides(consortium: Consortium) -> None:
    federation = consortium.federation
    consortium.stop("d")
    consortium.start("d", program=("-c", WRONG_CLOCK))
    submission = consortium.submit(rounds=2)
    records = consortium.finish(submission)
    consortium.stop("d")
    assert all(record["sites"] == ["a", "b", "c"] for record in records[1:])
    reason = records[-1]["failed"]["d"]
    assert "behind this site's clock" in reason
    assert "NTP" in reason
    assert "behind this site's clock" in federation.log_of("d")
    assert not charges_of(federation, "d", submission)


# --- keys ---


def test_a_copy_of_a_site_waits_outside_and_its_spending_shows_in_the_statement(consortium: Consortium) -> None:
    """A copied folder copies key and ledger. What is detected of it, and what is not:

    * While the site is connected, its copy is not admitted, and says why.
    * Once the site is dead, its copy is admitted: key and certificate are right.
    * Neither ledger knows what the other one charges from then on, and each is consistent in itself. That shows only
      where both sides' books are compared: the coordinator states more than either ledger holds.
    """
    federation = consortium.federation
    consortium.stop("c")
    shutil.copytree(federation.site("c").path, federation.site("c-copy").path)
    consortium.start("c")
    federation.start_site("c-copy")
    problem = eventually(lambda: read_status(federation.site("c-copy")).get("problem"))
    assert "a process with the key of c is connected already" in problem
    (noted,) = eventually(lambda: coordinator_log(federation, Event.TWIN_REFUSED)[-1:])
    assert noted.details["site"] == "c"
    submission = consortium.submit(rounds=14, local_steps=150, min_sites=3)
    eventually(lambda: any("c" in record["sites"] for record in rounds_of(submission)))
    assert read_status(federation.site("c-copy"))["state"] == "waiting"
    federation.kill("c")
    eventually(lambda: consortium.is_connected("c-copy"))
    reached = rounds_of(submission)[-1]["round"]
    records = consortium.finish(submission, sites=("a", "b", "d"))
    consortium.stop("c-copy")
    assert took_part(submission, "c", after=reached), records
    stated = privacy_record(submission, "c")
    assert stated is not None
    assert ledger_epsilon(federation, "c", submission) < stated["epsilon_spent"]
    with pytest.raises(AssertionError):
        assert_books_agree(federation, submission, sites=["c"])


def test_a_key_is_exchanged_while_the_run_goes_on(consortium: Consortium) -> None:
    federation = consortium.federation
    home = federation.site("b")
    old = load_certificate(home.certificate)
    submission = consortium.submit(rounds=16, local_steps=60)
    eventually(lambda: took_part(submission, "b", after=0))
    federation.rotate("b")
    eventually(lambda: len(site_entries(federation, "b", Event.KEY_ROTATED)) == 1)
    at = rounds_of(submission)[-1]["round"]
    assert load_certificate(home.certificate).public_key() != old.public_key()
    eventually(lambda: consortium.is_connected("b"))
    federation.revoke(f"{old.serial_number:x}")
    consortium.finish(submission)
    assert took_part(submission, "b", after=at + 1)
    removed = [e.details for e in coordinator_log(federation, Event.SITE_REMOVED) if e.details["site"] == "b"]
    assert len(removed) == 1
    assert "revoked" in removed[0]["reason"]
    assert len([e for e in coordinator_log(federation, Event.SITE_REGISTERED) if e.details["site"] == "b"]) == 2


# --- the coordinator ---


def test_its_certificate_is_exchanged_while_the_run_goes_on(consortium: Consortium) -> None:
    federation = consortium.federation
    submission = consortium.submit(rounds=5, local_steps=100, min_sites=4)
    eventually(lambda: len(rounds_of(submission)) >= 2)
    old = federation.coordinator.server_certificate.read_bytes()
    federation.renew_server_certificate()
    shown = ssl.get_server_certificate((HOST, federation.port))
    assert ssl.PEM_cert_to_DER_cert(shown) == _der(federation.coordinator.server_certificate) != old
    reached = len(rounds_of(submission))
    consortium.lines["a"].cut()
    consortium.lines["a"].mend()
    records = consortium.finish(submission)
    assert len(records) > reached
    assert not coordinator_log(federation, Event.LINK_RESTARTED)
    assert all(record["sites"] == list(SITES) for record in records[1:])
    for name in SITES:
        assert set(charges_of(federation, name, submission).values()) == {1}


def test_a_coordinator_that_dies_is_back_within_seconds_and_the_run_goes_on(consortium: Consortium) -> None:
    federation = consortium.federation
    submission = consortium.submit(rounds=3, local_steps=60, min_sites=4)
    eventually(lambda: len(rounds_of(submission)) >= 2)
    acknowledged = rounds_of(submission)
    federation.kill("coordinator")
    started = time.monotonic()
    federation.start_coordinator()
    eventually(lambda: consortium.told_connected() == set(SITES))
    seconds, crowd = time.monotonic() - started, waiting.crowding()
    print(f"back after {seconds:.1f} s; {crowd:.1f} processes want each processor")  # noqa: T201
    assert seconds < BACK_SECONDS * crowd
    records = consortium.finish(submission)
    assert records[: len(acknowledged)] == acknowledged
    for name in SITES:
        assert set(charges_of(federation, name, submission).values()) == {1}


def test_what_was_asked_is_not_forgotten_when_coordinator_and_site_die_in_one_round(consortium: Consortium) -> None:
    federation = consortium.federation
    submission = consortium.submit(rounds=2, local_steps=150, min_sites=3)
    eventually(lambda: consortium.trains("d", submission))
    federation.kill("coordinator")
    federation.kill("d")
    federation.start_coordinator()
    records = consortium.finish(submission)
    assert all(record["sites"] == ["a", "b", "c"] for record in records[1:])
    stated = privacy_record(submission, "d")
    assert stated is not None
    assert stated["rounds_unanswered"][0] == 1
    assert stated["epsilon_bound"] >= ledger_epsilon(federation, "d", submission) * (1 - 1e-9) > 0


def _der(certificate: Path) -> bytes:
    return load_certificate(certificate).public_bytes(Encoding.DER)


def coordinator_log(federation: Federation, event: Event) -> list[Any]:
    return [entry for entry in audit_log.read(federation.coordinator.audit) if entry.event == event]
