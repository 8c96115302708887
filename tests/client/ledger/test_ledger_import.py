"""An account moves to another machine: every charge goes along, in full, once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from client.ledger.audit_mirror import AuditMirror, recount
from client.ledger.file import LedgerFile
from client.ledger.ledger import Budget, Charge, Ledger
from shared.errors import BudgetExceeded, LedgerError
from shared.privacy.accounting import GaussianSteps
from shared.privacy.filter import Composition, filter_orders
from shared.privacy.ledger_export import LedgerExport, load_export, save_export
from shared.trust.audit_log import AuditLog
from shared.trust.keystore import Seal
from shared.trust.signing import SigningKey

DELTA = 1e-5
STEPS = GaussianSteps(noise_multiplier=1.0, sample_rate=0.05, steps=20)


def charge(num: int = 20, *, job_id: str = "job") -> Charge:
    return Charge(job_id=job_id, round=3, request_sha256="a" * 64, mechanism=replace(STEPS, steps=num))


@contextmanager
def opened(
    path: Path, *, epsilon: float = 8.0, composition: Composition = "adaptive", dataset: str = "notes", **options: Any
) -> Iterator[Ledger]:
    budget = Budget(epsilon=epsilon, delta=DELTA, composition=composition)
    arguments = {"unit": "record", "cipher": Seal(bytes(32))} | options
    with closing(Ledger(path, dataset=dataset, budget=budget, **arguments)) as ledger:
        yield ledger


@pytest.fixture
def export(tmp_path: Path) -> LedgerExport:
    """An account with a committed round, one that is not, and one of another job; read back from its file."""
    with opened(tmp_path / "old.db", epsilon=3.0) as ledger:
        ledger.commit(ledger.reserve(charge()), executed_steps=15, release_sha256="b" * 64)
        ledger.reserve(charge(5))
        ledger.reserve(charge(1, job_id="other"))
        save_export(tmp_path / "export.json", ledger.export(site="north", declared_records=1024))
        return load_export(tmp_path / "export.json")


def test_an_export_holds_the_account_and_its_place_in_the_ledger(tmp_path: Path, export: LedgerExport) -> None:
    with opened(tmp_path / "old.db", epsilon=3.0) as ledger:
        assert list(export.mechanisms) == ledger.events()
        assert (export.num_entries, export.head_sha256) == (len(ledger.entries()), ledger.entries()[-1].entry_sha256)
        assert export.rule == ledger.rule
        assert export.rule.epsilon(export.mechanisms) == ledger.spent_epsilon()
    assert (export.site, export.dataset, export.unit, export.declared_records) == ("north", "notes", "record", 1024)
    assert [(c.job_id, c.round, c.steps, c.committed) for c in export.charges] == [
        ("job", 3, 15, True),
        ("job", 3, 5, False),
        ("other", 3, 1, False),
    ]


def test_an_import_takes_every_charge_in_full(tmp_path: Path, export: LedgerExport) -> None:
    with opened(tmp_path / "new.db", composition="fixed") as ledger:
        ledger.import_account(export)
        events, spent = ledger.events(), ledger.spent_epsilon()
        assert [event.steps for event in events] == [15, 5, 1]
        assert ledger.spent_epsilon("other") > 0
        kinds = [entry.kind for entry in ledger.entries()]
        assert kinds == ["open", "budget", "import", "imported", "imported", "imported", "budget"]
        account = {"dataset": "notes", "unit": "record"}
        assert ledger.entries()[2].payload == account | {
            "site": "north",
            "from_dataset": "notes",
            "num_charges": 3,
            "num_entries": export.num_entries,
            "head_sha256": export.head_sha256,
            "exported_at": export.exported_at,
        }
        assert [entry.payload for entry in ledger.entries()[3:6]] == [
            account
            | {
                "job_id": charged.job_id,
                "round": charged.round,
                "mechanism": asdict(charged.mechanism),
                "committed": charged.committed,
                "charged_at": charged.time,
            }
            for charged in export.charges
        ]
        for number in range(1, 8):  # what was reserved on the other machine can no longer be shortened here
            with pytest.raises(LedgerError, match=f"has no reservation {number}"):
                ledger.commit(number, executed_steps=0, release_sha256="b" * 64)
        assert ledger.spent_epsilon() == spent
    with opened(tmp_path / "new.db", epsilon=spent, composition="fixed") as ledger:
        assert ledger.events() == events
        with pytest.raises(BudgetExceeded):
            ledger.reserve(charge(1))
        onward = ledger.export(site="north", declared_records=1024)
        assert onward.charges == export.charges


def test_an_import_brings_its_orders(tmp_path: Path, export: LedgerExport) -> None:
    three, eight = (filter_orders(epsilon=epsilon, delta=DELTA) for epsilon in (3.0, 8.0))
    assert export.orders == three != eight
    for _ in range(2):
        with opened(tmp_path / "new.db") as ledger:
            if not ledger.events():
                assert ledger.rule.orders == eight
                ledger.import_account(export)
            assert ledger.rule.orders == three
            assert ledger.spent_epsilon() == export.rule.epsilon(export.mechanisms)


def test_an_account_with_charges_takes_no_import(tmp_path: Path, export: LedgerExport) -> None:
    with opened(tmp_path / "new.db") as ledger:
        ledger.reserve(charge(1))
        before = ledger.entries()
        with pytest.raises(LedgerError, match=r"has 1 charges already.*Nothing was changed"):
            ledger.import_account(export)
        assert ledger.entries() == before
    with opened(tmp_path / "twice.db") as ledger:
        ledger.import_account(export)
        with pytest.raises(LedgerError, match="has 3 charges already"):
            ledger.import_account(export)
    with opened(tmp_path / "new.db", dataset="letters") as ledger:  # another account of the same file is empty
        ledger.import_account(export, from_dataset="notes")


def test_an_export_of_something_else_is_refused_unless_named(tmp_path: Path, export: LedgerExport) -> None:
    with opened(tmp_path / "new.db", dataset="letters") as ledger:
        for named in (None, "films"):
            with pytest.raises(LedgerError, match=r"data set 'notes', this account of 'letters'.*--from-dataset"):
                ledger.import_account(export, from_dataset=named)
        other_unit = export.model_copy(update={"unit": "patient"})
        with pytest.raises(LedgerError, match="counts by the unit 'patient', this account by 'record'"):
            ledger.import_account(other_unit, from_dataset="notes")
        nameless = export.model_copy(update={"charges": (export.charges[0].model_copy(update={"job_id": " "}),)})
        with pytest.raises(LedgerError, match="job_id of a charge in the export is empty"):
            ledger.import_account(nameless, from_dataset="notes")
        assert ledger.events() == []
        ledger.import_account(export, from_dataset="notes")
        assert len(ledger.events()) == 3


def failing_after(num: int) -> Callable[..., Any]:
    """Return `LedgerFile.append`, cut off after `num` entries."""
    append, written = LedgerFile.append, 0

    def failing(self: LedgerFile, *arguments: Any) -> Any:
        nonlocal written
        if written == num:
            raise KeyboardInterrupt
        written += 1
        return append(self, *arguments)

    return failing


def test_an_import_is_taken_whole_or_not_at_all(
    tmp_path: Path, export: LedgerExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path / "new.db") as ledger:
        before = ledger.entries()
        for num in range(5):
            with monkeypatch.context() as patch:
                patch.setattr(LedgerFile, "append", failing_after(num))
                with pytest.raises(KeyboardInterrupt):
                    ledger.import_account(export)
            assert ledger.entries() == before
        ledger.import_account(export)
        assert len(ledger.events()) == 3


def test_a_recount_from_the_log_agrees_after_an_import(tmp_path: Path, export: LedgerExport) -> None:
    log = AuditLog(tmp_path / "audit", seal_head=SigningKey.from_bytes(bytes(range(32))))
    with opened(tmp_path / "new.db", mirror=AuditMirror(log)) as ledger:
        ledger.import_account(export)
        ledger.reserve(charge(2))
        for job_id in (None, "job", "other"):
            counted = recount(tmp_path / "audit", delta=DELTA, dataset="notes", unit="record", job_id=job_id)
            assert counted == ledger.spent_epsilon(job_id) > 0
