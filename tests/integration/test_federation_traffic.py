"""What a real run puts on the wire: nothing that can be read, and of the records nothing even for who decrypts it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from client.node.node import credentials_of
from client.site.home import open_site
from server.store.submission import Submission
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.models.backbones import backbone_sha256
from shared.runtime.runtime import load_runtime
from shared.tensors import adapters
from simulations.federation.processes import HOST, Federation
from tests.integration.proxy import RecordingProxy
from tests.integration.sniffer import LoopbackSniffer, may_sniff

# Planted: a sentence in the records of each site, and a name of a label, which stands in the job.
SENTENCES = {"a": "the quoll of Zanzibar hides in attic 7319", "b": "eleven okapis left the ward at 04:42"}
LABELS = ["heliotrope-5521", "vermilion-8874"]
CONTROL = b"this sentence was never meant to be encrypted: 90125"


@dataclass
class Run:
    """A finished run. Site a came through a proxy that saw what everybody on the way sees, site b through one that decrypts."""

    federation: Federation
    submission: Submission
    job: Job
    encrypted: RecordingProxy
    decrypted: RecordingProxy
    sniffer: LoopbackSniffer | None

    @property
    def adapter(self) -> bytes:
        """The first adapter that went out."""
        runtime = load_runtime(self.job, ComputeConfig())
        return adapters.encode(runtime.initial_global(exact=False))

    def updates(self, name: str) -> list[bytes]:
        """What a site sent, as it stored it."""
        site = open_site(self.federation.site(name), passphrase=None)
        stored = sorted(site.home.glob("rounds/*/round-*.safetensors"))
        return [site.outbox._read_round(path)[1]["update"].numpy().tobytes() for path in stored]


def planted_records(name: str) -> list[dict[str, Any]]:
    return [{"text": f"{SENTENCES[name]} {i}", "label": LABELS[i % 2]} for i in range(40)]


def say_in_the_clear() -> None:
    """Send the control sentence over the loopback interface."""
    with socket.create_server((HOST, 0)) as listener:

        def listen() -> None:
            peer, _ = listener.accept()
            with peer:
                while peer.recv(1000):
                    pass

        thread = threading.Thread(target=listen)
        thread.start()
        with socket.create_connection(listener.getsockname()) as speaker:
            speaker.sendall(CONTROL)
        thread.join(timeout=30)


def shown_by(federation: Federation, name: str) -> tuple[Path, Path]:
    """Return certificate and key of a site, which whoever wants to decrypt must have stolen."""
    shown = credentials_of(federation.site(name), passphrase=None)
    files = (federation.folder / "stolen.crt", federation.folder / "stolen.key")
    for path, data in zip(files, (shown.certificate, shown.key), strict=True):
        path.write_bytes(data)
    return files


@pytest.fixture(scope="module")
def run(
    found_federation: Callable[..., Federation], federation_job: Callable[..., Job], tiny_bert: Path
) -> Iterator[Run]:
    federation = found_federation([])
    home = federation.coordinator
    files = (home.server_certificate, home.server_key, home.trust / "ca.crt")
    with contextlib.ExitStack() as stack:
        encrypted = stack.enter_context(RecordingProxy(federation.port))
        decrypted = stack.enter_context(RecordingProxy(federation.port, server_files=files))
        rules = {"backbones": {str(tiny_bert): backbone_sha256(tiny_bert)}}
        for name, proxy in (("a", encrypted), ("b", decrypted)):
            federation.connect_port = proxy.port
            federation.join(name, planted_records(name), epsilon=8.0, policy=rules)
        decrypted.shows = shown_by(federation, "b")
        # A seed of its own: tests beside this one may send an adapter in the clear, and must not send this one.
        job = federation_job(seed=7319, task={"labels": LABELS})
        public = [{"text": f"a public line {i}", "label": LABELS[i % 2]} for i in range(8)]
        sniffer = stack.enter_context(LoopbackSniffer()) if may_sniff() else None
        federation.start_coordinator()
        for name in "ab":
            federation.start_site(name)
        submission = federation.submit(job, public)
        say_in_the_clear()
        state = federation.wait(submission, timeout=240)
        federation.stop()
        assert state["state"] == "completed", state
    return Run(federation, submission, job, encrypted, decrypted, sniffer)


def slices(data: bytes, *, number: int = 4, length: int = 64) -> list[bytes]:
    """Return pieces of `data` that are not met by chance: bytes of many values."""
    found = [data[i : i + length] for i in range(0, len(data) - length, length)]
    found = [piece for piece in found if len(set(piece)) > length // 2]
    assert len(found) >= number
    return found[:: len(found) // number]


def secrets(run: Run) -> dict[str, list[bytes]]:
    """Return all that must not be readable on the wire."""
    return {
        "records": [sentence.encode() for sentence in SENTENCES.values()],
        "labels": [label.encode() for label in LABELS],
        "adapter": slices(run.adapter),
        "updates": [piece for name in "ab" for update in run.updates(name) for piece in slices(update)],
    }


def test_on_the_way_to_the_coordinator_nothing_can_be_read(run: Run) -> None:
    passed = [*run.encrypted.sent, *run.encrypted.received]
    # All of the run came this way: handshakes for HTTP/2, and more than the adapter in both directions.
    hellos = [stream for stream in run.encrypted.sent if stream[:2] == b"\x16\x03" and b"\x02h2" in stream]
    assert hellos == [stream for stream in run.encrypted.sent if stream]
    assert sum(map(len, run.encrypted.sent)) > 2 * len(run.updates("a")[0])
    assert sum(map(len, run.encrypted.received)) > 2 * len(run.adapter)
    for what, pieces in secrets(run).items():
        for piece in pieces:
            assert not any(piece in stream for stream in passed), f"{what} can be read on the wire"


def test_who_decrypts_it_sees_job_and_updates_so_the_search_is_one(run: Run) -> None:
    sent, received = b"".join(run.decrypted.sent), b"".join(run.decrypted.received)
    for label in LABELS:
        assert label.encode() in received
    assert any(piece in received for piece in slices(run.adapter))
    for update in run.updates("b"):
        assert any(piece in sent for piece in slices(update))


def test_even_decrypted_nothing_of_a_record_leaves_a_site(run: Run) -> None:
    sent = b"".join(run.decrypted.sent)
    assert SENTENCES["b"].encode() not in sent
    for word in SENTENCES["b"].split():
        if len(word) > 4:
            assert word.encode() not in sent
    for label in LABELS:
        assert label.encode() not in sent


@pytest.mark.skipif(not may_sniff(), reason="raw sockets are not allowed here")
def test_on_the_whole_machine_nothing_can_be_read(run: Run) -> None:
    assert run.sniffer is not None
    # 1. The recording is one: complete, with the sentence that was sent in the clear, and with every part of the run.
    assert run.sniffer.num_dropped == 0
    assert run.sniffer.holds(CONTROL)
    federation = run.federation
    assert run.sniffer.ports() >= {federation.port, run.encrypted.port, run.decrypted.port}
    # 2. Nothing that is worth reading is in it: between sites, proxies and coordinator.
    for what, pieces in secrets(run).items():
        for piece in pieces:
            assert not run.sniffer.ports_with(piece), f"{what} can be read on the loopback interface"


def test_nothing_of_a_record_is_written_down_outside_of_the_data(run: Run) -> None:
    federation = run.federation
    folders = [federation.coordinator.path, *(federation.site(name).path for name in "ab")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += [federation.folder / f"{name}.log" for name in ("a", "b", "coordinator")]
    assert any(path.name == "audit-00001.jsonl" for path in files)
    assert any(path.name == "coordinator.log" for path in files)
    for path in files:
        data = path.read_bytes()
        for sentence in SENTENCES.values():
            assert sentence.encode() not in data, path
