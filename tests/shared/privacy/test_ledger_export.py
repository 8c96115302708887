"""The export of an account: what it says, and what a file that is none is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from shared.errors import LedgerError, RunError
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.filter import filter_epsilon, filter_orders
from shared.privacy.ledger_export import ChargedSteps, LedgerExport, load_export, save_export

CHARGES = tuple(
    ChargedSteps(
        job_id="job", round=number, noise_multiplier=1.0, sample_rate=0.05, steps=20, committed=True, time="2026-03-02"
    )
    for number in range(2)
)


def export(**changes: Any) -> LedgerExport:
    fields: dict[str, Any] = {
        "site": "north",
        "dataset": "notes",
        "unit": "record",
        "declared_records": 1024,
        "epsilon": 8.0,
        "delta": 1e-5,
        "composition": "adaptive",
        "charges": CHARGES,
        "num_entries": 6,
        "head_sha256": "c" * 64,
        "exported_at": "2026-03-02T09:00:00+00:00",
    }
    return LedgerExport(**fields | changes)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "account.json"
    for saved in (export(), export(orders=(5, 8)), export(composition="fixed", charges=())):
        save_export(path, saved)
        assert load_export(path) == saved


def test_it_is_measured_by_its_own_rule() -> None:
    mechanisms = [GaussianSteps(noise_multiplier=1.0, sample_rate=0.05, steps=20)] * 2
    assert list(export().mechanisms) == mechanisms
    assert export(composition="fixed").rule.epsilon(mechanisms) == compose_epsilon(mechanisms, 1e-5)
    for orders in ((5, 8), ()):
        expected = orders or filter_orders(epsilon=8.0, delta=1e-5)
        assert export(orders=orders).rule.epsilon(mechanisms) == filter_epsilon(mechanisms, delta=1e-5, orders=expected)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": "silotune-ledger/9"}, "format"),
        ({"orders": [3, 3]}, "ascending whole numbers from 2"),
        ({"composition": "none"}, "composition"),
        ({"extra": 1}, "extra"),
        ({"charges": [CHARGES[0].model_dump() | {"steps": -1}]}, r"charges\.0\.steps"),
        ({"charges": [CHARGES[0].model_dump() | {"noise_multiplier": 0}]}, r"charges\.0\.noise_multiplier"),
        ({"charges": [CHARGES[0].model_dump() | {"sample_rate": float("nan")}]}, r"charges\.0\.sample_rate"),
        ({"charges": [CHARGES[0].model_dump() | {"steps": 10**400}]}, r"charges\.0\.steps"),
        ({"charges": 2 * [CHARGES[0].model_dump() | {"steps": 2**53 - 1}]}, r"below 2\^53"),
        ({"declared_records": 2**53}, "declared_records"),
        ({"delta": 1e-40}, "delta is 1e-40; expected a number from 1e-30"),
    ],
)
def test_a_file_that_is_no_export_is_explained(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    path = tmp_path / "account.json"
    path.write_text(json.dumps(export().model_dump(mode="json") | changes))
    with pytest.raises(LedgerError, match=rf"is not an export of a ledger \(.*{problem}.*--export"):
        load_export(path)


@pytest.mark.parametrize("composition", ["adaptive", "fixed"])
def test_noise_without_end_is_measured(composition: str) -> None:
    drowned = CHARGES[0].model_copy(update={"noise_multiplier": 1e308})
    found = export(charges=(drowned,), composition=composition)
    nearly = export(charges=(drowned.model_copy(update={"noise_multiplier": 1e100}),), composition=composition)
    assert found.rule.epsilon(found.mechanisms) == nearly.rule.epsilon(nearly.mechanisms) < math.inf


def test_paths_that_cannot_be_used_are_explained(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot be read"):
        load_export(tmp_path / "missing.json")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="could not write"):
        save_export(tmp_path / "file" / "account.json", export())
    (tmp_path / "half.json").write_text('{"format": ')
    with pytest.raises(LedgerError, match="is not an export of a ledger"):
        load_export(tmp_path / "half.json")
