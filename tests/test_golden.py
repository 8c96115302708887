"""The golden runs themselves: what is repeatable, what a record holds, and that a comparison finds every planted difference."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.golden import __main__ as command_line
from tests.golden.compare import compare
from tests.golden.record import CHECKOUT, record
from tests.golden.recorder.gather import gather
from tests.golden.recorder.stillness import RandomBytes
from tests.golden.recorder.wire import note_messages

RANDOM_THINGS = """
import datetime, os, secrets, sys, time, uuid
from pydantic import TypeAdapter
from tests.golden.recorder.stillness import be_still
be_still(sys.argv[1])
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256
key = ec.generate_private_key(ec.SECP256R1())
name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
now = datetime.datetime.now(datetime.UTC)
made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now)
certificate = made.sign(key, SHA256())
certificate.verify_directly_issued_by(certificate)
assert TypeAdapter(datetime.datetime | None).validate_json('"2026-11-02T08:00:00Z"') == now
before = time.monotonic()
time.sleep(1000)
print(os.urandom(5), secrets.token_bytes(32), secrets.randbelow(1000), uuid.uuid4(), now)
print(time.monotonic() - before, isinstance(now, datetime.datetime))
print(ed25519.Ed25519PrivateKey.generate().private_bytes_raw(), certificate.fingerprint(SHA256()))
print(key.sign(b"x", ec.ECDSA(SHA256())))
import numpy, safetensors, safetensors.numpy
packed = safetensors.numpy.save({"a": numpy.arange(3)}, {letter: "1" for letter in "hgfedcba"})
assert safetensors.numpy.load(packed)["a"].tolist() == [0, 1, 2]
print(packed)
"""


def random_things(label: str) -> list[str]:
    """Return what a new process draws under a label."""
    ended = subprocess.run(
        [sys.executable, "-c", RANDOM_THINGS, label],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    )
    return ended.stdout.splitlines()


def test_random_bytes_keys_signatures_and_times_are_those_of_the_label() -> None:
    first = random_things("a")
    assert random_things("a") == first
    other = random_things("b")
    assert "2026-11-02 08:00:00+00:00" in first[0]
    assert first[1] == other[1] == "1000.0 True"
    assert all(one != another for one, another in zip(first[:4:2], other[:4:2], strict=True))
    assert first[3] != other[3]
    assert first[4] == other[4]
    assert '"__metadata__":{"a":"1","b":"1","c":"1"' in first[4]


def test_one_more_draw_of_another_length_changes_no_key() -> None:
    plain, disturbed = RandomBytes("a"), RandomBytes("a")
    disturbed(16)
    assert plain(32) == disturbed(32)
    assert plain(32) != plain(32)
    assert plain(16) != disturbed(16)


# --- what a record holds ---


@pytest.fixture(scope="module")
def small_record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Help texts and the founding of a consortium; tests must not change it."""
    folder = tmp_path_factory.mktemp("golden") / "record"
    record(folder, cases=["help", "consortium"])
    return folder


@pytest.mark.endurance
def test_a_record_holds_helps_outputs_homes_ledgers_and_logs(small_record: Path) -> None:
    helps = {path.stem for path in (small_record / "help" / "commands").iterdir()}
    assert {"silotune", "simulate", "site ledger", "audit-log verify", "report write"} <= helps
    assert "--stop-after" in (small_record / "help" / "commands" / "simulate.txt").read_text()
    commands = sorted((small_record / "consortium" / "commands").iterdir())
    failed = [path.stem for path in commands if "\nstatus 0\n" not in path.read_text()]
    # A policy as it is begun accepts no job of one site, which this one is.
    assert failed == ["12 site", "14 site", "17 coordinator"], "that check, and the status of what does not run"
    files = small_record / "consortium" / "files"
    rows = [json.loads(line) for line in (files / "clinic" / "ledger.db.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows if row.get("table") == "entries"} == {"sealed"}
    entries = (files / "clinic" / "audit" / "audit-00001.jsonl").read_text().splitlines()
    assert [json.loads(entry)["event"] for entry in entries] == ["ledger.entry", "ledger.entry"]
    assert "-rw------- clinic/keys/log.key\n" in (files / "files.txt").read_text()


def test_a_run_folder_becomes_text(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder, into = tmp_path / "run", tmp_path / "record"
    (folder / "backbone").mkdir(parents=True)
    (folder / "empty").mkdir()
    (folder / "note.txt").write_text("ä\n")
    save_file({"a": torch.arange(6.0).reshape(2, 3)}, folder / "adapter.safetensors", {"salt": "x"})
    (folder / "adapter.bin").write_bytes(b"MARK" + (folder / "adapter.safetensors").read_bytes())
    (folder / "figure.png").write_bytes(b"\x89PNG\xff")
    database = sqlite3.connect(folder / "ledger.db")
    database.executescript("CREATE TABLE entries (kind TEXT, data BLOB); INSERT INTO entries VALUES ('open', x'ff')")
    database.close()
    gather(folder, into, without=("backbone",))
    assert (into / "note.txt").read_text() == "ä\n"
    for name in ("adapter.safetensors", "adapter.bin"):
        facts = json.loads((into / f"{name}.json").read_text())
        assert facts["metadata"] == {"salt": "x"}
        assert facts["tensors"]["a"]["shape"] == [2, 3]
    assert json.loads((into / "figure.png.json").read_text())["bytes"] == 5
    assert '{"table": "entries", "kind": "open", "data": "ff"}' in (into / "ledger.db.jsonl").read_text()
    listed = [line.split()[1] for line in (into / "files.txt").read_text().splitlines()]
    assert listed == ["adapter.bin", "adapter.safetensors", "empty", "figure.png", "ledger.db", "note.txt"]


def test_a_message_is_noted_with_all_of_its_content(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.app import ConfigRecord, Message, RecordDict
    from safetensors.numpy import save

    from shared.link.envelope import request

    monkeypatch.setattr(Message, "__init__", Message.__init__)  # put back afterwards
    notes: list[dict[str, Any]] = []
    note_messages(notes)
    content = {"kind": "train", "round": 2, "adapter": b"MARK" + save({}, {"salt": "s"}), "job": '{"name": "x"}'}
    record = RecordDict({"silotune": ConfigRecord(content)})
    asked = request(record, run_id=1, message_id="1", message_type="train", node=3, group_id="2")
    Message(RecordDict({"silotune": ConfigRecord({"kind": "update", "delta": 1e-5})}), reply_to=asked)
    assert [(note["type"], note["to"], note["group"]) for note in notes] == [("train", 3, "2"), ("train", 1, "2")]
    noted = notes[0]["content"]["silotune"]
    assert noted["round"] == 2
    assert noted["job"]["json"] == {"name": "x"}
    assert noted["adapter"]["metadata"] == {"salt": "s"}
    assert notes[1]["content"]["silotune"]["delta"] == 1e-5
    assert notes[0]["sha256"] != notes[1]["sha256"]


# --- what a comparison finds ---


@pytest.fixture
def changed(small_record: Path, tmp_path: Path) -> Path:
    """A copy of the record for a test to change."""
    return Path(shutil.copytree(small_record, tmp_path / "changed"))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1))


@pytest.mark.endurance
def test_equal_records_are_equal(small_record: Path, changed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(small_record, changed) == []
    assert command_line.main(["compare", str(small_record), str(changed)]) == 0
    assert capsys.readouterr().out == "equal byte for byte\n"


@pytest.mark.endurance
def test_every_planted_difference_is_found(
    small_record: Path, changed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = changed / "consortium" / "files"
    replace(files / "account.json", '"epsilon": 8.0', '"epsilon": 8.000000000000002')
    replace(files / "clinic" / "audit" / "audit-00001.jsonl", '"sequence":2', '"sequence":3')
    replace(changed / "help" / "commands" / "simulate.txt", "Run folder", "Run  folder")
    (changed / "help" / "commands" / "sweep.txt").unlink()
    (files / "clinic" / "new.txt").write_text("")
    told = compare(small_record, changed)
    assert "consortium/files/account.json: 1 differences" in told
    assert "  epsilon: 8.0 -> 8.000000000000002" in told
    assert any(line.startswith("  line 2.details.sequence: 2 -> 3") for line in told)
    assert any(line.startswith("  +") and "Run  folder" in line for line in told)
    assert "help/commands/sweep.txt: only before" in told
    assert "consortium/files/clinic/new.txt: only after" in told
    assert command_line.main(["compare", str(small_record), str(changed)]) == 1
    assert capsys.readouterr().out.splitlines() == told
    wanted = ["--ignore", "help/*", "--ignore", "consortium/*"]
    assert command_line.main(["compare", str(small_record), str(changed), *wanted]) == 0


@pytest.mark.endurance
def test_other_bytes_of_the_same_content_are_a_difference(small_record: Path, changed: Path) -> None:
    path = changed / "consortium" / "files" / "account.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert compare(small_record, changed) == [
        "consortium/files/account.json: 1 differences",
        "  the same content in other bytes: order of keys, spacing, or how a number is written",
    ]


def test_what_is_no_record_is_not_called_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert command_line.main(["compare", str(tmp_path / "empty"), str(tmp_path / "missing")]) == 2
    assert "empty is no record; make it with" in capsys.readouterr().err
