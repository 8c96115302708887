"""Every file of a site, a coordinator and a CA, damaged in every way: whoever reads it gets a message, never a traceback."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import cli
from client.site.home import SiteHome, open_site
from client.site.outbox import Outbox
from server.coordinator.run_file import evaluation_records, settings_of
from server.store.home import CoordinatorHome
from server.store.submission import Submission
from shared.data.datasets import write_jsonl
from shared.errors import SilotuneError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.models.backbones import backbone_sha256
from shared.runtime.runtime import load_runtime
from shared.tensors.adapters import encode
from shared.trust.keystore import Seal, load_secret
from shared.trust.signed_folder import sign_folder
from shared.trust.signed_job import round_fields
from shared.trust.signing import Purpose, load_signing_key
from shared.wire.messages import Order, TrainReply, TrainRequest
from simulations.federation.processes import change_toml
from tests.integration.conftest import site_records
from tests.integration.damage import changed, places_of
from tests.integration.disk import small_files

Silotune = Callable[..., Any]
WRONG: list[Any] = [[], {}, "text", -1, 10**400, 1.5, True, [[[]]], "2026-99-99", "\udc00"]
DAMAGES_EACH = int(os.environ.get("SILOTUNE_DAMAGES", "9"))
"""Of each file, drawn with a fixed seed; 100 are all."""


@dataclass(frozen=True)
class Read:
    """A file and the commands that read it."""

    name: str
    commands: Sequence[str]


CHECK, LEDGER = "site check W/site --offline --json", "site ledger W/site --export W/new.json"
INSTALL, ADMIT = "site install W/site --certificate W/north.crt", "coordinator install W/hub --site W/north.crt"
SIGN, STATUS = "report sign W/report.html", "coordinator status W/hub"
SUBMIT = "coordinator submit W/hub W/run.toml --signer W/signer.key --set seed=7"
SHOW, APPROVE = "pki show W/hub/trust", "pki approve W/ca W/site/north.csr --role site --out W/again.crt"
REQUEST = "site request W/site test --json"
VERIFY, SHOW_LOG = "audit-log verify W/site/audit", "audit-log show W/site/audit"
JOB = "hub/jobs/0001-test"
READS = [
    Read("site/site.toml", [CHECK, LEDGER, "site rotate W/site", f"{SIGN} W/site"]),
    Read("site/policy.toml", [CHECK, "site policy W/site"]),
    Read("site/ca.crt", [CHECK, INSTALL]),
    Read("site/site.crt", [CHECK]),
    Read("site/keys/site.key", [CHECK, INSTALL]),
    Read("site/keys/storage.key", [CHECK, LEDGER]),
    Read("site/keys/log.key", [CHECK, LEDGER, f"{SIGN} W/site"]),
    Read("site/log.pub", [CHECK, f"{VERIFY} --key W/site/log.pub"]),
    Read("site/ledger.db", [CHECK, LEDGER]),
    Read("site/records.sealed", [CHECK, f"{CHECK} --job W/run.toml"]),
    Read("site/declared.json", [CHECK, LEDGER, REQUEST]),
    Read("site/approvals.sealed", [CHECK, "site requests W/site", REQUEST, "site approve W/site test --by ada"]),
    Read("site/audit/head.json", [CHECK, LEDGER, VERIFY, f"{SHOW_LOG} --last 3"]),
    Read("site/audit/audit-00001.jsonl", [CHECK, LEDGER, VERIFY, f"{SHOW_LOG} --json"]),
    Read("site/node.json", ["site status W/site", "site status W/site --json"]),
    Read("notes.jsonl", [CHECK, LEDGER]),
    Read("public.jsonl", [f"{CHECK} --public W/public.jsonl"]),
    Read("north.crt", [INSTALL, ADMIT, "pki install W/hub/trust W/north.crt"]),
    Read("site/north.csr", [APPROVE]),
    Read("ledger.json", ["plan --job W/run.toml --ledger W/ledger.json", "site ledger W/site --import W/ledger.json"]),
    Read("report.html.sig.json", ["report verify W/report.html"]),
    Read("signer.key", [SUBMIT]),
    Read("signer.pub", ["site init W/o --name o --coordinator h:1 --data n --column text=t --signer c=W/signer.pub"]),
    Read("run.toml", ["plan --job W/run.toml", SUBMIT, f"{CHECK} --job W/run.toml"]),
    Read("hub/coordinator.toml", [STATUS, ADMIT, f"{SIGN} W/hub"]),
    Read("hub/coordinator.json", [STATUS, f"{STATUS} --json"]),
    Read("hub/keys/server.key", ["coordinator install W/hub --certificate W/server.crt"]),
    Read("hub/keys/round.key", [f"{SIGN} W/hub"]),
    Read("hub/round.pub", [SUBMIT]),
    Read(
        "adapter/signature.json", ["coordinator verify W/adapter --key W/hub/round.pub", "coordinator verify W/adapter"]
    ),
    Read("hub/trust/ca.crt", [ADMIT, SHOW, "pki publish W/ca W/hub/trust"]),
    Read("hub/trust/crl.pem", [ADMIT, f"{SHOW} --json"]),
    Read("hub/trust/crl.number", [ADMIT, SHOW, "pki publish W/ca W/hub/trust"]),
    Read("hub/trust/sites/north.crt", [SHOW, f"{SHOW} --json"]),
    Read(f"{JOB}/state.json", [STATUS, f"{STATUS} --json", "coordinator stop W/hub --job 1", SUBMIT]),
    Read(f"{JOB}/signed_job.json", [f"plan --job W/{JOB}/signed_job.json", f"{CHECK} --job W/{JOB}/signed_job.json"]),
    Read(f"{JOB}/log.txt", ["coordinator logs W/hub"]),
    Read(f"{JOB}/run/metrics.jsonl", [STATUS, f"{STATUS} --json"]),
    Read("ca/ca.key", [APPROVE, "pki revoke W/ca north"]),
    Read("ca/ca.crt", ["pki show W/ca", APPROVE, "pki publish W/ca W/hub/trust"]),
    Read("ca/crl.pem", ["pki revoke W/ca north", "pki publish W/ca W/hub/trust"]),
    Read("ca/issued/north.crt", ["pki show W/ca", "pki revoke W/ca north", APPROVE]),
]


def ended(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    assert not stop.value.code


@pytest.fixture(scope="module")
def world(tiny_bert: Path, federation_job: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a site, a coordinator (`hub`) and a CA after one round, and the files that went between them."""
    world = tmp_path_factory.mktemp("homes")
    site, hub, ca = SiteHome(world / "site"), CoordinatorHome(world / "hub"), world / "ca"
    write_jsonl(world / "notes.jsonl", site_records(0))
    write_jsonl(world / "public.jsonl", site_records(7, 20))
    ended("pki", "init", ca, "--name", "Consortium")
    ended("pki", "signer", world / "signer")
    about = ["--data", world / "notes.jsonl", "--epsilon", 50, "--column", "text=text", "--column", "label=label"]
    about += ["--coordinator", "127.0.0.1:9", "--signer", f"consortium={world / 'signer.pub'}"]
    ended("site", "init", site.path, "--name", "north", *about)
    ended("coordinator", "init", hub.path, "--host", "localhost")
    ended("pki", "approve", ca, site.path / "north.csr", "--role", "site", "--out", world / "north.crt")
    as_server = ["--role", "server", "--host", "localhost"]
    ended("pki", "approve", ca, hub.path / "server.csr", *as_server, "--out", world / "server.crt")
    ended("site", "install", site.path, "--certificate", world / "north.crt", "--ca", ca / "ca.crt")
    lists = ["--ca", ca / "ca.crt", "--crl", ca / "crl.pem", "--site", world / "north.crt"]
    ended("coordinator", "install", hub.path, "--certificate", world / "server.crt", *lists)
    for folder in (hub.trust / "sites", ca / "issued"):  # the names hold a serial
        next(folder.glob("north-*.crt")).rename(folder / "north.crt")
    change_toml(site.policy, backbones={str(tiny_bert): backbone_sha256(tiny_bert)})
    change_toml(site.config, compute={"device": "cpu", "precision": "float32"})
    _submit(world, federation_job(), hub)
    _train(site, hub)
    _ask(site, hub)
    ended("site", "ledger", site.path, "--export", world / "ledger.json")
    (world / "report.html").write_text("<p>a report</p>")
    ended("report", "sign", world / "report.html", site.path)
    (world / "adapter").mkdir()
    (world / "adapter" / "README.md").write_text("an adapter")
    sign_folder(world / "adapter", load_signing_key(hub.round_key, None))
    status = {"pid": os.getpid(), "updated": datetime.now(UTC).isoformat(), "state": "connected"}
    site.status.write_text(json.dumps(status))
    hub.status.write_text(json.dumps(status | {"sites": {"north": {"online": True, "until": "2027-01-01"}}}))
    return world


def _submit(world: Path, job: Job, hub: CoordinatorHome) -> None:
    evaluation = {"path": "public.jsonl", "columns": {"text": "text", "label": "label"}}
    raw = job.model_dump(mode="json", exclude_unset=True)
    (world / "run.toml").write_text(tomli_w.dumps(raw | {"evaluation": evaluation}))
    ended("coordinator", "submit", hub.path, world / "run.toml", "--signer", world / "signer.key")
    submitted = Submission(hub.jobs / "0001-test")
    submitted.log.write_text("began\n")
    submitted.run_folder.mkdir()
    (submitted.run_folder / "metrics.jsonl").write_text('{"round": 0}\n{"round": 1}\n')


def _train(site: SiteHome, hub: CoordinatorHome) -> None:
    signed = Submission(hub.jobs / "0001-test").signed_job()
    job, sent_at = signed.job, datetime.now(UTC).isoformat(timespec="milliseconds")
    adapter = encode(load_runtime(job, ComputeConfig(device="cpu", precision="float32")).initial)
    key = load_signing_key(hub.round_key, None)
    signature = key.sign(
        Purpose.ROUND, round_fields(job_sha256=job.sha256, round_number=1, adapter=adapter, sent_at=sent_at)
    )
    order = Order(signed_job=signed, sent_at=sent_at, signature=signature)
    reply = open_site(site, passphrase=None).answer(TrainRequest(job=job, round_number=1, adapter=adapter, order=order))
    assert isinstance(reply, TrainReply), reply


def _ask(site: SiteHome, hub: CoordinatorHome) -> None:
    """Leave a job that waits for people of the site."""
    change_toml(site.policy, approval="required")
    answer = open_site(site, passphrase=None).accept(Submission(hub.jobs / "0001-test").signed_job())
    assert getattr(answer, "reason", "") == "waiting for approval"
    assert site.approvals.exists()


# --- damage ---


def damages(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """Yield (what, damaged content); None is a folder in the file's place."""
    content = path.read_bytes()
    yield "a folder", None
    yield "empty", b""
    yield "cut", content[: len(content) // 2]
    yield "invalid UTF-8", content[:-2] + b"\xff\xfe" + content[-2:]
    yield "half a character", content[: len(content) // 3] + b"\xed\xa0\x80" + content[len(content) // 3 :]
    yield "NUL", content[: len(content) // 2] + bytes(9) + content[len(content) // 2 :]
    yield "all NUL", bytes(len(content))
    yield "other bytes", bytes(range(256)) * 4
    for text in ("[]", "{}", "null", "3", '"text"', "text", '{"a": 1, "a": 2}', "[" * 100_000, "a = " + "[" * 50_000):
        yield text[:12], text.encode()
    chance = random.Random(path.name)
    for read, write in ((json.loads, json.dumps), (tomllib.loads, tomli_w.dumps)):
        try:
            raw = read(content.decode().strip())
        except ValueError:
            continue
        places = list(places_of(raw))
        for value in WRONG * 2 if places else ():
            place = chance.choice(places)
            try:
                yield f"{place} = {str(value)[:10]!r}", write(changed(raw, place, value)).encode()
            except (UnicodeEncodeError, TypeError, ValueError):  # TOML cannot say it
                continue


def harm(path: Path, content: bytes | None) -> None:
    mode = path.stat().st_mode
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
        path.chmod(mode)


@pytest.fixture
def copied(world: Path, tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """Return a maker of fresh copies of the world, always at the same place."""
    aside = world.with_name("aside")
    shutil.copytree(world, aside)

    def copy() -> Path:
        shutil.rmtree(world)
        shutil.copytree(aside, world)
        return world

    yield copy
    copy()
    shutil.rmtree(aside)


def chosen(path: Path) -> list[tuple[str, bytes | None]]:
    every = list(damages(path))
    return random.Random(f"{path.name} chosen").sample(every, min(DAMAGES_EACH, len(every)))


def said(outcome: Any) -> str:
    """Return what a command complained of; nothing if all is well."""
    if outcome.out.startswith("[{"):
        return "\n".join(found["text"] for found in json.loads(outcome.out) if found["outcome"] == "failed")
    return str(outcome.err).rpartition("error: ")[2] if "error: " in outcome.err else ""


@pytest.mark.parametrize("read", READS, ids=lambda read: read.name)
def test_damage_ends_with_a_message(read: Read, copied: Callable[[], Path], silotune: Silotune) -> None:
    commands = itertools.cycle(read.commands)
    world = copied()
    for what, content in chosen(world / read.name):
        for command in read.commands if DAMAGES_EACH >= 100 else [next(commands)]:
            copied()
            harm(world / read.name, content)
            # An exception that is no message ends the test here.
            outcome = silotune(*command.replace("W/", f"{world}/").split())
            assert "Traceback" not in outcome.out + outcome.err, (what, command)
            if outcome.status and " status " not in command:  # which ends with 1 where nothing runs
                assert 0 < len(said(outcome)) < 3_000, (what, command, outcome)


@pytest.mark.parametrize("pid", [-1, 0, 1, 2**40, "12", True, None, [], 1.5])
def test_no_signal_goes_to_a_number_that_a_damaged_file_names(pid: object, tmp_path: Path, silotune: Silotune) -> None:
    said = {"pid": pid, "updated": datetime.now(UTC).isoformat(), "state": "running", "sites": {}}
    CoordinatorHome(tmp_path).status.write_text(json.dumps(said))
    outcome = silotune("coordinator", "stop", tmp_path)
    assert outcome.status == 1
    assert "no coordinator runs in" in outcome.err


def test_an_older_revocation_list_is_not_installed_over_a_newer_one(
    copied: Callable[[], Path], silotune: Silotune
) -> None:
    world = copied()
    older = (world / "ca" / "crl.pem").read_bytes()
    assert silotune("pki", "revoke", world / "ca", "north").status == 0
    assert silotune("coordinator", "install", world / "hub", "--crl", world / "ca" / "crl.pem").status == 0
    (world / "older.pem").write_bytes(older)
    outcome = silotune("coordinator", "install", world / "hub", "--crl", world / "older.pem")
    assert outcome.status == 1
    assert "the revocation list is number 1, but number 2 was seen before" in outcome.err
    assert (world / "hub/trust/crl.pem").read_bytes() == (world / "ca" / "crl.pem").read_bytes()


def test_no_signal_goes_to_a_process_that_is_no_coordinator_of_the_folder(tmp_path: Path, silotune: Silotune) -> None:
    """Its number may have been given to another process since, or written there by somebody else."""
    home = CoordinatorHome(tmp_path)
    other = subprocess.Popen(["sleep", "60"])
    try:
        said = {"pid": other.pid, "updated": datetime.now(UTC).isoformat(), "state": "running", "sites": {}}
        home.status.write_text(json.dumps(said))
        with home.locked():  # by this very process, so a coordinator runs, but not that one
            outcome = silotune("coordinator", "stop", tmp_path)
            assert home.works_there(os.getpid())
        assert outcome.status == 1
        assert (
            f"names process {other.pid}, which is no coordinator of this folder as far as you may see, so it gets no signal"
            in outcome.err
        )
        assert other.poll() is None
        assert not home.works_there(os.getpid())
        assert not home.works_there(2**30)
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("name", ["round-00001.safetensors", "settings.json", "evaluation.jsonl", "signed_job.json"])
def test_damage_that_only_the_running_node_or_coordinator_meets(name: str, copied: Callable[[], Path]) -> None:
    world = copied()
    (path,) = world.glob(f"**/{name}")
    submission = Submission(world / JOB)
    job, outbox = submission.signed_job().job, Outbox(world / "site" / "rounds", seal=_seal(world))

    def read() -> None:
        if name == "round-00001.safetensors":
            outbox.stored_round(job.sha256, 1, request_sha256="another")
            outbox.kept("optimizer", job.sha256, 2)
        else:
            evaluation_records(submission, submission.signed_job().job)
            settings_of(submission)

    read()
    messages = []
    for _, content in damages(path):
        copied()
        harm(path, content)
        try:
            read()
        except SilotuneError as error:
            messages.append(str(error))
    assert len(messages) > 5
    assert [message for message in messages if path.name not in message] == []


def _seal(world: Path) -> Seal:
    return Seal(load_secret(world / "site" / "keys" / "storage.key", passphrase=None))


def test_an_account_is_not_exported_to_a_full_disk(copied: Callable[[], Path], silotune: Silotune) -> None:
    world = copied()
    with small_files(0):
        outcome = silotune(*LEDGER.replace("W/", f"{world}/").split())
    assert outcome.status == 1
    assert "File too large" in said(outcome), outcome
    assert not (world / "new.json").exists()
    assert silotune(*LEDGER.replace("W/", f"{world}/").split()).status == 0
