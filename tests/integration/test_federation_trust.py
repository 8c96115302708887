"""Who and what is refused in a real federation, and what a person is told; one federation, which the tests use in turn."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import Message

from client.node.fleet import FleetConnection, NotAdmitted, Unreachable
from client.node.node import Node
from client.node.status import read_status
from client.site.home import open_site
from server.coordinator.superlink import Control
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
from simulations.federation.processes import HOST, Federation, change_toml, free_port
from tests.conftest import Outcome
from tests.integration.bundles import bundle_with_code
from tests.integration.eventually import eventually

MALICIOUS = """
import json, os, time
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client_app = ClientApp()
server_app = ServerApp()

@client_app.query("steal")
def steal(message, context):
    folder = Path(str(context.run_config["folder"]))
    (folder / f"executed-at-{context.node_id}").write_text(str(os.getpid()))
    return Message(RecordDict({"loot": ConfigRecord({"text": "everything"})}), reply_to=message)

@server_app.main()
def main(grid, context):
    folder = Path(str(context.run_config["folder"]))
    nodes = {node.node_id: node.name for node in grid.get_nodes()}
    content = RecordDict({"order": ConfigRecord({"text": "hand it over"})})
    requests = [
        Message(content, dst_node_id=node, message_type=kind) for node in nodes for kind in ("query.steal", "train")
    ]
    waiting, found = {identifier for identifier in grid.push_messages(requests) if identifier}, []
    asked = {request.metadata.message_id: request.metadata for request in requests}
    deadline = time.monotonic() + 120
    while waiting and time.monotonic() < deadline:
        for reply in grid.pull_messages(waiting):
            request = asked[reply.metadata.reply_to_message_id]
            waiting.discard(request.message_id)
            found.append({
                "site": nodes[request.dst_node_id],
                "node": str(request.dst_node_id),
                "type": request.message_type,
                "error": reply.error.reason if reply.has_error() else None,
                "content": None if reply.has_error() else {k: dict(v) for k, v in reply.content.config_records.items()},
            })
        time.sleep(0.1)
    (folder / "replies.part").write_text(json.dumps(found))
    (folder / "replies.part").rename(folder / "replies.json")
"""


@pytest.fixture(scope="module")
def federation(found_federation: Callable[..., Federation]) -> Federation:
    """Coordinator and the sites a, b and c run; c has a certificate that the coordinator was not given."""
    made = found_federation(["a", "b", "c"], policy={"max_steps": 1900})
    change_toml(made.coordinator.config, fleet_host="0.0.0.0")  # noqa: S104 (what is tested)
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
    ignored = shutil.ignore_patterns("jobs", "*.db*", "flower")
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


def connection_of(federation: Federation, key: ec.EllipticCurvePrivateKey) -> FleetConnection:
    ca = (federation.ca / "ca.crt").read_bytes()
    return FleetConnection(f"{HOST}:{federation.fleet_port}", ca_certificate=ca, private_key=key)


def activated(connection: FleetConnection) -> bool:
    try:
        connection.activate()
    except (NotAdmitted, Unreachable):  # the latter while the SuperLink starts anew, to take a removed key again
        return False
    return True


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
    eventually(lambda: "does not admit this site's key" in problem_of(federation, "c"))
    shown = silotune("site", "status", federation.site("c").path)
    assert shown.status == 1
    assert "waiting" in shown.out
    assert "Either it is not registered, was revoked or has expired (ask the coordinator)" in shown.out
    assert "does not admit this site's key" in federation.log_of("c")
    assert "c" not in federation.coordinator.read_status()["sites"]


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
        assert f"the certificate of {HOST}:{federation.fleet_port} does not hold" in problem
        assert "Check that ca.crt is the consortium's" in problem
        assert not site_log(federation, "f", Event.NODE_CONNECTED)
    finally:
        node.stop()
        thread.join(timeout=30)


def test_an_expired_certificate_ends_the_connection_and_its_renewal_mends_it(federation: Federation) -> None:
    key, request = site_key("short")
    admit(federation, "short", request)
    connection = connection_of(federation, key)
    try:
        eventually(lambda: activated(connection))
        assert connection.pull() is None
        # Its certificate is exchanged for one that ends in three seconds.
        begin = datetime.now(UTC) - timedelta(days=1) + timedelta(seconds=3)
        ending = approve(federation.ca, request, role="site", days=1, passphrase=None, now=begin)
        (admitted,) = federation.coordinator.trust.glob("sites/short-*.crt")
        write_public(admitted.with_name("short-ending.crt"), ending.public_bytes(Encoding.PEM))
        admitted.unlink()

        def refusal() -> str:
            try:
                connection.pull()
            except NotAdmitted as error:
                return str(error)
            return ""

        assert "does not admit this site's key any more" in eventually(refusal)
        (removed,) = eventually(lambda: removals(federation, "short"))
        assert removed.details["reason"].startswith("expired: the certificate of short expired on ")
        eventually(lambda: "short" not in federation.coordinator.read_status()["sites"])
        # The same key, certified anew.
        admit(federation, "short", request)
        eventually(lambda: activated(connection))
        assert connection.pull() is None
    finally:
        connection.close()


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
    assert f"a refused: PolicyError: site a refuses the job stranger:\n  - {text}" in shown
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


# --- code that travels ---


def test_code_in_a_bundle_runs_at_a_stock_node_and_never_at_ours(federation: Federation, tmp_path: Path) -> None:
    # 1. So far our nodes answered jobs, and nobody asked for a bundle.
    log = federation.coordinator.superlink_log
    assert "[Fleet.GetFab]" not in log.read_text()
    # 2. Flower's own node joins under a key of its own.
    key, request = site_key("stock")
    admit(federation, "stock", request)
    pem = tmp_path / "stock.key"
    pem.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    pem.chmod(0o600)
    command = [
        str(Path(sys.executable).parent / "flower-supernode"),
        "--superlink", f"{HOST}:{federation.fleet_port}",
        "--root-certificates", str(federation.ca / "ca.crt"),
        "--auth-supernode-private-key", str(pem),
        "--isolation", "subprocess",
        "--port", str(free_port()),
    ]  # fmt: skip
    environment = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "FLWR_HOME": str(tmp_path / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    eventually(lambda: "stock" in federation.coordinator.read_status()["sites"])
    with (tmp_path / "stock.log").open("wb") as output:
        stock = subprocess.Popen(
            command, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    control = Control(federation.control_port, federation.coordinator.ca_certificate)
    try:

        def online() -> dict[str, int]:
            assert stock.poll() is None, (tmp_path / "stock.log").read_text()
            return {node.name: node.node_id for node in control.nodes() if node.online}

        eventually(lambda: online().keys() >= {"a", "b", "stock"})
        nodes = online()
        # 3. Somebody who reached the Control API starts a run whose bundle holds code.
        bundle = bundle_with_code("malicious_app", MALICIOUS, {"folder": ""})
        control.start_run(bundle, {"folder": str(tmp_path)})
        eventually((tmp_path / "replies.json").exists, timeout=150)
    finally:
        control.close()
        if stock.poll() is None:
            os.killpg(stock.pid, signal.SIGKILL)
        stock.wait()
    replies = {(r["site"], r["type"]): r for r in json.loads((tmp_path / "replies.json").read_text())}
    # 4. It ran at the stock node, and nowhere else.
    assert [path.name for path in tmp_path.glob("executed-at-*")] == [f"executed-at-{nodes['stock']}"]
    assert replies["stock", "query.steal"]["content"] == {"loot": {"text": "everything"}}
    assert "[Fleet.GetFab]" in log.read_text()
    # 5. Ours answered what they were sent with nothing but that there was one, and go on.
    for name in "ab":
        assert re.fullmatch(r"\w+", replies[name, "query.steal"]["error"])
        refusal = replies[name, "train"]["content"]["silotune"]
        assert refusal["kind"] == "refusal"
        assert (refusal["site"], refusal["code"], refusal["reason"]) == (name, "Withheld", "see the site's own log")
        assert federation.processes[name].poll() is None
        assert eventually(lambda name=name: read_status(federation.site(name))["healthy"])


# --- what listens ---


def foreign_addresses() -> list[str]:
    """Return the IPv4 addresses of this machine beyond loopback."""
    return [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]


def test_only_the_fleet_port_listens_beyond_loopback(federation: Federation, running: Submission) -> None:
    parent = psutil.Process(federation.processes["coordinator"].pid)
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for process in [parent, *parent.children(recursive=True)]
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {port for ip, port in listening if ip not in ("127.0.0.1", "::1")} == {federation.fleet_port}
    assert ("127.0.0.1", federation.control_port) in listening
    for name in "ab":  # a site listens nowhere
        node = psutil.Process(federation.processes[name].pid)
        for process in [node, *node.children(recursive=True)]:
            assert not [c for c in process.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]


@pytest.mark.skipif(not foreign_addresses(), reason="this machine has only loopback addresses")
def test_from_elsewhere_only_the_fleet_api_answers_and_only_over_tls(federation: Federation) -> None:
    context = ssl.create_default_context(cafile=str(federation.ca / "ca.crt"))
    context.set_alpn_protocols(["h2"])
    for address in foreign_addresses():
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, federation.control_port), timeout=5)
        with (
            socket.create_connection((address, federation.fleet_port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as wrapped,
        ):
            assert (wrapped.version(), wrapped.selected_alpn_protocol()) == ("TLSv1.3", "h2")
        with socket.create_connection((address, federation.fleet_port), timeout=10) as plain:
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
    assert CoordinatorConfig.model_fields.keys() == {"name", "hosts", "fleet_host", "fleet_port", "control_port"}
    for command in ("init", "install", "start", "submit"):
        shown = silotune("coordinator", command, "--help").out.lower()
        for word in ("insecure", "no-tls", "no-auth", "control-host", "plain"):
            assert word not in shown
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
    admit(federation, "impostor", request)
    connection = connection_of(federation, key)
    try:
        eventually(lambda: activated(connection))
        message = eventually(connection.pull)
        assert message.metadata.message_type == DESCRIBE
        assert unpack_describe(message.content) is not None
        description = SiteDescription(site="a", declared_records=32, version="1")
        connection.push(Message(pack_description(description), reply_to=message))
        reason = eventually(lambda: running.state().get("refused", {}).get("impostor"))
    finally:
        connection.close()
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
    eventually(lambda: "does not admit this site's key" in problem_of(federation, "c"))
    seconds = time.monotonic() - started
    assert seconds < 20  # two or three on a machine that is not busy
    (removed,) = eventually(lambda: removals(federation, "c"))
    assert removed.details["reason"].startswith("revoked: the certificate of c was revoked on ")
    assert "does not admit this site's key any more" in federation.log_of("c")
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
    eventually(lambda: "was revoked or has expired" in problem_of(federation, "c"))
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
