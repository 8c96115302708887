"""What two logs say of the same releases, held together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.errors import TrustError
from shared.tools.compare_logs import compare
from shared.trust import audit_log
from shared.trust.audit_log import AuditLog, Event
from shared.trust.certificates import pem_bytes, spki
from shared.trust.pki import approve, create_ca, make_request
from shared.trust.receipts import Receipt, Released, sign_release
from shared.trust.signing import SigningKey
from tests.conftest import Outcome

JOB = "a" * 64


class Books:
    """Two logs in a folder, signed by their owners, and what is written into them."""

    def __init__(self, folder: Path) -> None:
        self.site, self.coordinator = folder / "site", folder / "coordinator"
        self.keys = (SigningKey.generate(), SigningKey.generate())
        self._logs = (AuditLog(self.site, seal_head=self.keys[0]), AuditLog(self.coordinator, seal_head=self.keys[1]))

    def asked(self, number: int, adapter: str, *, received: str | None, sites: tuple[str, ...] = ("north",)) -> None:
        site, coordinator = self._logs
        if adapter:
            coordinator.append(Event.ROUND_ASKED, job=JOB, round=number, sites=list(sites), adapter_sha256=adapter)
        if received:
            site.append(Event.REQUEST_RECEIVED, job=JOB, round=number, adapter_sha256=received)

    def released(self, number: int, *, made: str | None, counted: str | None, as_round: int | None = None) -> None:
        site, coordinator = self._logs
        if made:
            site.append(Event.RELEASE_STORED, job=JOB, round=number, sha256=made)
        if counted:
            round_number = as_round or number
            coordinator.append(Event.UPDATE_ACCEPTED, job=JOB, round=round_number, site="north", sha256=counted)

    def differences(self) -> list[tuple[int, str, bool]]:
        found = compare(self.site, self.coordinator, site="north")
        return [(difference.round, difference.text, difference.contradicts) for difference in found]


@pytest.fixture
def books(tmp_path: Path) -> Books:
    made = Books(tmp_path)
    made.asked(1, "1" * 64, received="1" * 64)
    made.released(1, made="f" * 64, counted="f" * 64)
    return made


def test_logs_that_agree_show_no_difference(books: Books) -> None:
    books.asked(1, "1" * 64, received="1" * 64)  # asked again, answered with what was stored
    books.released(1, made=None, counted="f" * 64)
    books.asked(2, "2" * 64, received=None, sites=("south",))
    books._logs[0].append(Event.RELEASE_STORED, job=JOB, round=3, sha256="e" * 64)
    books._logs[1].append(Event.METRICS_ACCEPTED, job=JOB, site="north", sha256="e" * 64)
    assert books.differences() == []


def test_a_release_that_was_stored_and_noted_only_when_it_was_asked_for_again_is_the_sites(books: Books) -> None:
    """Its process died between storing and noting; nobody is to be accused of it."""
    books._logs[0].append(Event.RELEASE_REPEATED, job=JOB, round=2, sha256="b" * 64)
    books.released(2, made=None, counted="b" * 64)
    assert books.differences() == []


def test_receipts_say_which_of_two_logs_is_right(books: Books) -> None:
    books.released(2, made=None, counted="b" * 64)
    books.released(3, made="c" * 64, counted="c" * 64)

    def told(*proven: tuple[int, str]) -> list[tuple[int, str]]:
        signed = {(JOB, number, letter * 64) for number, letter in proven}
        found = compare(books.site, books.coordinator, site="north", proven=signed)
        assert all(difference.contradicts for difference in found)
        return [(difference.round, difference.text) for difference in found]

    assert told((1, "f"), (2, "b"), (3, "c")) == [
        (2, "the site's log lacks the release bbbbbbbbbbbb, which the site's key signed")
    ]
    assert told((1, "f"), (4, "c")) == [
        (2, "the coordinator counts the release bbbbbbbbbbbb, and no receipt by the site's key is for it"),
        (2, "the coordinator counts the release bbbbbbbbbbbb, which the site did not make"),
        (3, "the coordinator counts the release cccccccccccc, and no receipt by the site's key is for it"),
    ]


def test_a_job_of_another_run_accuses_nobody_for_its_receipts_lie_elsewhere(
    books: Books, tmp_path: Path, silotune: Callable[..., Outcome]
) -> None:
    """The coordinator's log tells of all jobs, a `receipts.jsonl` of one run."""
    site, coordinator = books._logs
    site.append(Event.RELEASE_STORED, job="b" * 64, round=1, sha256="d" * 64)
    coordinator.append(Event.UPDATE_ACCEPTED, job="b" * 64, round=1, site="north", sha256="d" * 64)
    create_ca(tmp_path / "ca", name="ca", passphrase=None)
    key, request = make_request(name="north", role="site")
    certificate = approve(tmp_path / "ca", request, role="site", passphrase=None)
    (tmp_path / "north.crt").write_bytes(pem_bytes(certificate))
    for name, job, release in (("one", JOB, "f" * 64), ("two", "b" * 64, "d" * 64)):
        what = Released(
            site="north",
            job_sha256=job,
            round=1,
            sent_at="",
            adapter_sha256="",
            release_sha256=release,
            declared_records=9,
        )
        receipt = Receipt(what, spki(key.public_key()), sign_release(key, what))
        (tmp_path / f"{name}.jsonl").write_text(receipt.line() + "\n")
    words: tuple[Any, ...] = ("audit-log", "compare", books.site, books.coordinator, "--site", "north")
    words = (*words, "--certificate", tmp_path / "north.crt", "--receipts", tmp_path / "one.jsonl")
    shown = silotune(*words)
    assert shown.status == 0
    assert shown.out.startswith("undecided: job bbbbbbbbbbbb: no receipt of this job is among those given")
    both = silotune(*words, "--receipts", tmp_path / "two.jsonl")
    assert (both.status, both.out) == (0, "both logs are unbroken and say the same of north\n")
    coordinator.append(Event.UPDATE_ACCEPTED, job=JOB, round=2, site="north", sha256="d" * 64)
    assert "no receipt by the site's key is for it" in silotune(*words).out


@pytest.mark.parametrize("side", [0, 1], ids=["site", "coordinator"])
@pytest.mark.parametrize("details", [{}, {"job": JOB, "round": "x", "sha256": "", "site": "north"}], ids=str)
def test_an_entry_that_silotune_would_not_write_is_not_believed(
    books: Books, side: int, details: dict[str, Any]
) -> None:
    books._logs[side].append((Event.RELEASE_STORED, Event.UPDATE_ACCEPTED)[side], **details)
    with pytest.raises(TrustError, match=r"entry 3 \('.*'\) is not as Silotune writes it"):
        books.differences()


def test_every_difference_has_a_name(books: Books) -> None:
    books.asked(2, "2" * 64, received="3" * 64)  # equivocation
    books.released(2, made="b" * 64, counted="c" * 64)  # forged, or changed on the way
    books.asked(4, "4" * 64, received=None)
    books.released(5, made="d" * 64, counted="d" * 64, as_round=6)
    assert books.differences() == [
        (2, "the coordinator asked with the adapter 222222222222; the request never came to the site", False),
        (2, "the coordinator counts the release cccccccccccc, which the site did not make", True),
        (2, "the site made and charged the release bbbbbbbbbbbb, which the coordinator did not count", False),
        (2, "the site was asked with the adapter 333333333333; the coordinator's log names no such request", True),
        (4, "the coordinator asked with the adapter 444444444444; the request never came to the site", False),
        (6, "the release dddddddddddd of round 5 is counted for round 6", True),
    ]


def test_a_release_that_is_counted_twice_is_found(books: Books) -> None:
    books.released(1, made=None, counted="f" * 64, as_round=2)
    assert books.differences() == [(2, "the release ffffffffffff of round 1 is counted for round 2", True)]


def test_the_command_ends_with_1_where_the_logs_contradict_each_other(
    books: Books, silotune: Callable[..., Outcome]
) -> None:
    words: tuple[Any, ...] = ("audit-log", "compare", books.site, books.coordinator, "--site", "north")
    shown = silotune(*words)
    assert (shown.status, shown.out) == (0, "both logs are unbroken and say the same of north\n")
    books.asked(2, "2" * 64, received=None)
    shown = silotune(*words)
    assert shown.status == 0
    assert shown.out.startswith("lost on the way: job aaaaaaaaaaaa, round 2: the coordinator asked")
    books.released(2, made=None, counted="c" * 64)
    shown = silotune(*words)
    assert shown.status == 1
    assert "contradiction: job aaaaaaaaaaaa, round 2: the coordinator counts the release cccccccccccc" in shown.out


def test_a_log_that_is_broken_is_not_believed(books: Books) -> None:
    (file,) = books.coordinator.glob("audit-*.jsonl")
    file.write_text(file.read_text().replace("f" * 64, "e" * 64))
    with pytest.raises(TrustError):
        books.differences()


@pytest.mark.parametrize("side", [0, 1], ids=["site", "coordinator"])
def test_a_log_that_somebody_else_wrote_anew_is_not_believed_by_its_owners_key(
    books: Books, tmp_path: Path, silotune: Callable[..., Outcome], side: int
) -> None:
    """Its chain is unbroken; only the signature of its head tells."""
    folder, option = ((books.site, "--site-key"), (books.coordinator, "--coordinator-key"))[side]
    words: tuple[Any, ...] = ("audit-log", "compare", books.site, books.coordinator, "--site", "north")
    keys = ("--site-key", books.keys[0].verify_key.text, "--coordinator-key", books.keys[1].verify_key.text)
    agreed = silotune(*words, *keys)
    assert (agreed.status, agreed.out, agreed.err) == (0, "both logs are unbroken and say the same of north\n", "")
    entries = list(audit_log.read(folder))
    shutil.rmtree(folder)
    forged = AuditLog(folder, seal_head=SigningKey.generate())
    for entry in entries:
        forged.append(Event(entry.event), **entry.details)
    unasked = silotune(*words)
    assert unasked.status == 0
    for path, name in ((books.site, "--site-key"), (books.coordinator, "--coordinator-key")):
        assert (
            f"note: who signed the head of {path} was not checked; give its owner's public key with {name}"
            in unasked.err
        )
    refused = silotune(*words, *keys)
    assert refused.status == 1
    assert f"{folder}/head.json" in refused.err
    other = silotune(*words, *keys[2 * (1 - side) : 2 * (1 - side) + 2])
    assert (other.status, option in other.err) == (0, True)
