"""Who and what is refused in a real federation, and what a person is told; one federation, which the tests use in turn."""

from __future__ import annotations

import copy
import json
import re
import shutil
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import Message

from client.link.answering import answering
from client.link.client import Credentials
from client.node.node import Node
from client.node.status import read_status
from client.site.home import open_site
from server.store.home import CoordinatorConfig
from server.store.submission import Submission
from shared.errors import ConfigError, TrustError
from shared.job.job import Job
from shared.job.parsing import load_toml
from shared.trust import audit_log
from shared.trust.audit_log import Entry, Event
from shared.trust.pki import approve, create_ca, make_request, write_public
from shared.trust.signing import SigningKey
from shared.wire.messages import DESCRIBE, SiteDescription, pack_description, unpack_describe
from simulations.federation.processes import HOST, Federation, change_toml
from tests.conftest import Outcome
from tests.integration.eventually import eventually
from tests.integration.link.parts import site


@pytest.fixture(scope="module")
def federation(found_federation: Callable[..., Federation]) -> Federation:
    """Coordinator and the sites a, b and c run; c has a certificate that the coordinator was not given."""
    made = found_federation(["a", "b", "c"], policy={"max_steps": 1900})
    change_toml(made.coordinator.config, listen_host="0.0.0.0")  # noqa: S104 (what is tested)
    for certificate in made.coordinator.trust.glob("sites/c-*.crt"):
        certificate.unlink()
    made.start_coordinator()
    for name in "abc":
        made.start_site(name)
    for name in "ab":
        eventually(lambda name=name: read_status(made.site(name))["healthy"])
    return made


@pytest.fixture(scope="module")
def running(
    federation: Federation, federation_job: Callable[..., Job], evaluation_records: list[dict[str, Any]]
) -> Iterator[Submission]:
    """A job that a and b take part in, of more short rounds than the quickest machine gets through."""
    job = federation_job(
        name="long",
        training={"rounds": 1900, "local_steps": 1},
        privacy={"noise_multiplier": 30.0, "sample_rate": 0.1},
    )
    submission = federation.submit(job, evaluation_records)
    eventually(lambda: submission.state().get("round", 0) >= 1, timeout=240)
    yield submission
    if submission.is_open and "coordinator" in federation.processes:
        submission.request_stop()
        federation.wait(submission, timeout=60)


def coordinator_log(federation: Federation, event: Event) -> list[Entry]:
    return [entry for entry in audit_log.read(federation.coordinator.audit) if entry.event == event]


def removals(federation: Federation, name: str) -> list[Entry]:
    return [entry for entry in coordinator_log(federation, Event.SITE_REMOVED) if entry.details["site"] == name]


def site_log(federation: Federation, name: str, event: Event) -> list[Entry]:
    return [entry for entry in audit_log.read(federation.site(name).audit) if entry.event == event]


def copied(federation: Federation, folder: Path) -> Federation:
    """Return a copy of the coordinator's folder without its jobs, for what the running one must not see."""
    made = copy.copy(federation)
    made.folder = folder
    ignored = shutil.ignore_patterns("jobs")
    shutil.copytree(federation.coordinator.path, made.coordinator.path, ignore=ignored)
    return made


def charges(federation: Federation, name: str) -> int:
    """Return how many releases a site has charged to its budget."""
    ledger = open_site(federation.site(name), passphrase=None).ledger()
    return sum(entry.kind == "reserve" for entry in ledger.entries())


def problem_of(federation: Federation, name: str) -> str:
    return str(read_status(federation.site(name)).get("problem"))


def rounds_of(submission: Submission) -> list[dict[str, Any]]:
    lines = (submission.run_folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def site_key(name: str) -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    """Return a site's key and its request; the site has no folder."""
    return make_request(name=name, role="site")


def admit(federation: Federation, name: str, request: bytes) -> Path:
    """Have the CA approve a request and the coordinator admit it."""
    path = federation.folder / f"{name}.crt"
    path.write_bytes(approve(federation.ca, request, role="site", passphrase=None).public_bytes(Encoding.PEM))
    federation.admit(path)
    return path


def shown(federation: Federation, key: ec.EllipticCurvePrivateKey, certificate: Path) -> Credentials:
    """Return what a site without a folder shows."""
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Credentials(ca=(federation.ca / "ca.crt").read_bytes(), certificate=certificate.read_bytes(), key=pem)


def refused_by_all(federation: Federation, submission: Submission) -> dict[str, str]:
    """Wait until both sites refused the job, stop it and return their reasons."""
    eventually(lambda: submission.state().get("refused", {}).keys() >= {"a", "b"} and submission.state().get("waiting"))
    return dict(submission.state()["refused"])


def end(federation: Federation, submission: Submission) -> None:
    submission.request_stop()
    assert federation.wait(submission, timeout=60)["state"] == "stopped"


# --- who may connect ---


def test_a_key_that_nobody_registered_is_refused_and_told_why(
    federation: Federation, silotune: Callable[..., Outcome]
) -> None:
    why = "does not lie in the coordinator's trust store; ask the coordinator"
    eventually(lambda: why in problem_of(federation, "c"))
    told = silotune("site", "status", federation.site("c").path)
    assert told.status == 1
    assert "waiting" in told.out
    assert "does not admit this site" in told.out
    assert why in federation.log_of("c")
    assert "c" not in federation.coordinator.read_status()["sites"]
    (noted,) = eventually(lambda: coordinator_log(federation, Event.CONNECTION_REFUSED)[:1])
    assert noted.details["site"] == "c"
    assert why in noted.details["reason"]


def test_a_coordinator_of_another_ca_is_not_talked_to(federation: Federation, tmp_path: Path) -> None:
    home = federation.join("f", [{"text": "a dull plot", "label": "bad"}] * 20, epsilon=8.0)
    create_ca(tmp_path / "other", name="Another consortium", passphrase=None)
    node = Node(home, passphrase=None)
    thread = threading.Thread(target=node.run)
    shutil.copy(tmp_path / "other" / "ca.crt", home.ca_certificate)
    thread.start()
    try:
        # 1. Only the CA was exchanged: the site's own certificate does not fit any more.
        eventually(lambda: "was not signed by this CA (Another consortium)" in problem_of(federation, "f"))
        # 2. All of its identity is of another consortium: the coordinator's certificate does not hold.
        certificate = approve(tmp_path / "other", (home.path / "f.csr").read_bytes(), role="site", passphrase=None)
        home.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
        eventually(lambda: "does not hold" in problem_of(federation, "f"))
        problem = problem_of(federation, "f")
        assert f"the certificate of {HOST}:{federation.port} does not hold" in problem
        assert "Check that ca.crt is the consortium's" in problem
        assert not site_log(federation, "f", Event.NODE_CONNECTED)
    finally:
        node.stop()
        thread.join(timeout=30)


def test_an_expired_certificate_ends_the_connection_and_its_renewal_mends_it(federation: Federation) -> None:
    key, request = site_key("short")
    credentials = shown(federation, key, admit(federation, "short", request))
    with site(federation.port, credentials, lambda asked, welcome: None) as (_, told):
        eventually(lambda: told.of("welcome"))
        # Its certificate is exchanged for one that ends in three seconds.
        begin = datetime.now(UTC) - timedelta(days=1) + timedelta(seconds=3)
        ending = approve(federation.ca, request, role="site", days=1, passphrase=None, now=begin)
        (admitted,) = federation.coordinator.trust.glob("sites/short-*.crt")
        write_public(admitted.with_name("short-ending.crt"), ending.public_bytes(Encoding.PEM))
        admitted.unlink()
        (trouble,) = eventually(lambda: told.of("trouble")[:1])
        assert trouble[1] == "NotAdmitted"
        assert "the certificate of short expired on" in trouble[2]
        (removed,) = eventually(lambda: removals(federation, "short"))
        assert removed.details["reason"].startswith("expired: the certificate of short expired on ")
        eventually(lambda: "short" not in federation.coordinator.read_status()["sites"])
        # The same key, certified anew.
        before = len(told.of("welcome"))
        admit(federation, "short", request)
        eventually(lambda: len(told.of("welcome")) > before)


# --- which jobs are accepted ---


def test_a_job_signed_by_a_stranger_is_refused_by_every_site(
    federation: Federation,
    federation_job: Callable[..., Job],
    evaluation_records: list[dict[str, Any]],
    silotune: Callable[..., Outcome],
) -> None:
    stranger = copy.copy(federation)
    stranger.signer = SigningKey.generate()
    submission = stranger.submit(federation_job(name="stranger"), evaluation_records)
    refused = refused_by_all(federation, submission)
    text = f"it is signed by {stranger.signer.verify_key.text}, which is not among this site's signers"
    for name in "ab":
        assert text in refused[name]
        assert any(text in entry.details["reason"] for entry in site_log(federation, name, Event.REQUEST_REFUSED))
        assert text in federation.log_of(name)
        assert text in "".join(e.details["reason"] for e in coordinator_log(federation, Event.SITE_REFUSED))
        assert charges(federation, name) == 0
    shown = silotune("coordinator", "status", federation.coordinator.path).out
    assert f"a refused: PolicyError: site a refuses the job stranger:\n    - {text}" in shown
    assert "0 of 2 nodes take part, federation.min_sites is 2" in shown
    end(federation, submission)


def test_a_job_beyond_the_epsilon_or_on_another_backbone_is_refused_by_every_site(
    federation: Federation,
    federation_job: Callable[..., Job],
    evaluation_records: list[dict[str, Any]],
    tiny_bert: Path,
    tmp_path: Path,
    silotune: Callable[..., Outcome],
) -> None:
    other = tmp_path / "other-bert"
    shutil.copytree(tiny_bert, other)
    job = federation_job(
        name="greedy",
        model={"backbone": str(other), "max_length": 24},
        privacy={"noise_multiplier": 0.5},
    )
    submission = federation.submit(job, evaluation_records)
    refused = refused_by_all(federation, submission)
    shown = silotune("coordinator", "status", federation.coordinator.path).out
    for name in "ab":
        assert re.search(
            r"its plan costs epsilon [\d.]+ at delta 1e-05; this site accepts at most 8 per job", refused[name]
        )
        assert (
            f"its model.backbone {str(other)!r} is not among those that this site has listed by hash" in refused[name]
        )
        assert f"{name} refused: PolicyError: site {name} refuses the job greedy:" in shown
        assert not site_log(federation, name, Event.JOB_PREPARED)
    end(federation, submission)


def test_a_job_that_was_changed_after_it_was_signed_is_not_even_sent(
    federation: Federation,
    federation_job: Callable[..., Job],
    evaluation_records: list[dict[str, Any]],
    tmp_path: Path,
    silotune: Callable[..., Outcome],
) -> None:
    elsewhere = copied(federation, tmp_path)
    draft = elsewhere.submit(federation_job(name="tampered"), evaluation_records)
    file = draft.path / "signed_job.json"
    changed = file.read_text().replace(r"\"noise_multiplier\":1.0", r"\"noise_multiplier\":0.0001")
    assert changed != file.read_text()
    file.write_text(changed)
    submission = Submission(federation.coordinator.jobs / "0900-tampered")
    shutil.move(draft.path, submission.path)
    state = federation.wait(submission, timeout=90)
    assert state["state"] == "failed"
    assert "signature" in state["problem"]
    assert "what was signed has changed" in state["problem"]
    shown = silotune("coordinator", "status", federation.coordinator.path).out
    assert "0900-tampered: failed" in shown
    assert "what was signed has changed" in shown
    eventually(
        lambda: state["problem"] in [e.details["problem"] for e in coordinator_log(federation, Event.JOB_FINISHED)]
    )


def test_what_a_site_says_is_shown_as_it_is(
    federation: Federation,
    federation_job: Callable[..., Job],
    evaluation_records: list[dict[str, Any]],
    tmp_path: Path,
    silotune: Callable[..., Outcome],
) -> None:
    elsewhere = copied(federation, tmp_path)
    submission = elsewhere.submit(federation_job(name="shown"), evaluation_records)
    submission.note("running", refused={"a": "no [/bold] [red]such[/red] thing"}, waiting="for [/a]")
    shown = silotune("coordinator", "status", elsewhere.coordinator.path).out
    assert "a refused: no [/bold] [red]such[/red] thing" in shown
    assert "waiting: for [/a]" in shown


# --- what listens ---


def foreign_addresses() -> list[str]:
    """Return the IPv4 addresses of this machine beyond loopback."""
    return [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]


def test_nothing_listens_but_the_port_for_sites_and_no_process_is_started(
    federation: Federation, running: Submission
) -> None:
    listening = {}
    for name in ("coordinator", "a", "b"):
        process = psutil.Process(federation.processes[name].pid)
        assert process.children() == []
        found = [c for c in process.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
        listening[name] = {f"{connection.laddr.ip}:{connection.laddr.port}" for connection in found}
    # Beside it, on loopback, the pages for monitoring.
    told = {"coordinator": federation.coordinator.read_status(), **{n: read_status(federation.site(n)) for n in "ab"}}
    pages = {name: str(said["metrics"]).removeprefix("http://").removesuffix("/metrics") for name, said in told.items()}
    assert all(page.startswith("127.0.0.1:") for page in pages.values())
    (link,) = listening["coordinator"] - {pages["coordinator"]}
    assert link.endswith(f":{federation.port}")
    assert listening == {"coordinator": {pages["coordinator"], link}, "a": {pages["a"]}, "b": {pages["b"]}}
    # Each tells what is so.
    for name, page in pages.items():
        with urllib.request.urlopen(f"http://{page}/healthz", timeout=10) as answer:
            assert json.loads(answer.read()) == {"healthy": True, "troubles": []}, name


@pytest.mark.skipif(not foreign_addresses(), reason="this machine has only loopback addresses")
def test_from_elsewhere_the_port_answers_over_tls_only(federation: Federation) -> None:
    context = ssl.create_default_context(cafile=str(federation.ca / "ca.crt"))
    context.set_alpn_protocols(["h2"])
    for address in foreign_addresses():
        with (
            socket.create_connection((address, federation.port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as wrapped,
        ):
            assert (wrapped.version(), wrapped.selected_alpn_protocol()) == ("TLSv1.3", "h2")
        with socket.create_connection((address, federation.port), timeout=10) as plain:
            plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            try:
                answer = plain.recv(100)
            except ConnectionError:
                answer = b""
            # Nothing, or a TLS alert; never a frame of HTTP/2.
            assert answer[:1] in (b"", b"\x15")


def test_no_option_turns_tls_or_authentication_off(
    federation: Federation, silotune: Callable[..., Outcome], tmp_path: Path
) -> None:
    assert CoordinatorConfig.model_fields.keys() == {
        "name",
        "hosts",
        "listen_host",
        "listen_port",
        "metrics_listen",
        "log_format",
    }
    for command in ("init", "install", "start", "submit"):
        told = silotune("coordinator", command, "--help").out.lower()
        for word in ("insecure", "no-tls", "no-auth", "control-host", "plain"):
            assert word not in told
    changed = copy.copy(federation)
    changed.folder = tmp_path
    changed.coordinator.path.mkdir()
    shutil.copy(federation.coordinator.config, changed.coordinator.config)
    change_toml(changed.coordinator.config, control_host="0.0.0.0")  # noqa: S104 (must be refused)
    with pytest.raises(ConfigError, match="control_host"):
        changed.coordinator.load_config()


# --- while a job runs ---


def test_a_site_that_calls_itself_otherwise_than_it_was_admitted_is_refused(
    federation: Federation, running: Submission
) -> None:
    key, request = site_key("impostor")
    credentials = shown(federation, key, admit(federation, "impostor", request))

    def lie(message: Message, node: int, waited: float) -> Message:
        assert message.metadata.message_type == DESCRIBE
        assert unpack_describe(message.content) is not None
        description = SiteDescription(site="a", declared_records=32, version="1")
        return Message(pack_description(description), reply_to=message)

    with site(federation.port, credentials, answering(lie)):
        reason = eventually(lambda: running.state().get("refused", {}).get("impostor"))
    assert "its key was admitted for 'impostor', but it calls itself 'a'" in reason
    (entry,) = [e for e in coordinator_log(federation, Event.SITE_REFUSED) if e.details["site"] == "impostor"]
    assert entry.details["reason"] == reason
    assert rounds_of(running)[-1]["sites"] == ["a", "b"]


def test_a_site_that_is_admitted_late_joins_and_once_revoked_is_out_at_once_for_good(
    federation: Federation, running: Submission, silotune: Callable[..., Outcome]
) -> None:
    # 1. The node of c has been waiting all the time.
    certificate = federation.folder / "c.crt"
    federation.admit(certificate)
    eventually(lambda: "c" in rounds_of(running)[-1]["sites"])
    assert read_status(federation.site("c"))["healthy"]
    # 2. Revoked in the midst of a job.
    federation.revoke("c")
    started = time.monotonic()
    eventually(lambda: "does not admit this site" in problem_of(federation, "c"))
    seconds = time.monotonic() - started
    assert seconds < 20  # two or three on a machine that is not busy
    (removed,) = eventually(lambda: removals(federation, "c"))
    assert removed.details["reason"].startswith("revoked: the certificate of c was revoked on ")
    assert "was revoked" in problem_of(federation, "c")
    assert "was revoked" in federation.log_of("c")
    assert silotune("site", "status", federation.site("c").path).status == 1
    # 3. The others go on without it.
    reached = rounds_of(running)[-1]["round"]
    eventually(lambda: rounds_of(running)[-1]["round"] >= reached + 2)
    assert rounds_of(running)[-1]["sites"] == ["a", "b"]
    # 4. It cannot come back: not by a fresh start, not by its certificate, not by a new one for its key.
    federation.kill("c")
    federation.site("c").status.unlink()
    federation.start_site("c")
    with pytest.raises(TrustError, match="revoked"):
        federation.admit(certificate)
    request = (federation.site("c").path / "c.csr").read_bytes()
    with pytest.raises(TrustError, match="cannot be certified again"):
        approve(federation.ca, request, role="site", passphrase=None)
    eventually(lambda: "was revoked" in problem_of(federation, "c"))
    assert rounds_of(running)[-1]["sites"] == ["a", "b"]


def test_a_signer_that_is_struck_out_while_the_node_runs_is_refused_from_then_on(
    federation: Federation, running: Submission, silotune: Callable[..., Outcome]
) -> None:
    policy = federation.site("a").policy
    before = load_toml(policy)
    before_that = charges(federation, "a")
    change_toml(policy, signers={"another": SigningKey.generate().verify_key.text})

    def refusals() -> list[Entry]:
        return [e for e in coordinator_log(federation, Event.UPDATE_REFUSED) if "signers" in e.details["reason"]]

    eventually(refusals)
    assert {entry.details["site"] for entry in refusals()} == {"a"}
    assert eventually(lambda: running.state().get("waiting"))
    shown = silotune("coordinator", "status", federation.coordinator.path).out
    assert "1 valid updates, federation.min_sites is 2 (a: PolicyError: site a refuses the job long:" in shown
    assert "which is not among this site's signers" in shown
    spent = charges(federation, "a")
    time.sleep(3)
    assert charges(federation, "a") == spent >= before_that
    # Written back, the job goes on by itself.
    change_toml(policy, signers=before["signers"])
    reached = rounds_of(running)[-1]["round"]
    eventually(lambda: rounds_of(running)[-1]["round"] > reached)
    # The state is written after the round's line of metrics.
    eventually(lambda: not running.state().get("waiting"))


def test_what_came_of_it_is_in_logs_that_hold(federation: Federation) -> None:
    federation.stop()
    for folder in (federation.coordinator.audit, *(federation.site(name).audit for name in "abcf")):
        assert audit_log.verify(folder).entries > 0
