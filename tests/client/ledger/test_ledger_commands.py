"""`silotune site ledger`: what it shows, exports and imports, and what it says to a mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.ledger.ledger import Charge
from client.site.home import SiteHome, open_site
from shared.data.datasets import write_jsonl
from shared.epsilons import rounded_up
from shared.privacy.accounting import GaussianSteps
from shared.privacy.filter import filter_orders
from shared.privacy.ledger_export import load_export
from shared.trust.signing import SigningKey
from tests.conftest import Outcome

Command = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _no_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SILOTUNE_PASSPHRASE", "SILOTUNE_PASSPHRASE_FILE"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def site(silotune: Command, tmp_path: Path, records: list[dict[str, Any]]) -> Callable[..., Path]:
    """Return a maker of sites' folders."""

    def make(folder: str, *options: str, name: str = "north") -> Path:
        data = tmp_path / "notes.jsonl"
        write_jsonl(data, records)
        arguments = ["--name", name, "--coordinator", "127.0.0.1:9", "--data", data]
        arguments += ["--signer", f"consortium={SigningKey.generate().verify_key.text}", *options]
        columns = ["--column", "text=text", "--column", "label=label"]
        made = silotune("site", "init", tmp_path / folder, *arguments, *columns)
        assert made.status == 0, made.err
        return tmp_path / folder

    return make


def spend(home: Path, num: int) -> float:
    ledger = open_site(SiteHome(home), passphrase=None).ledger()
    mechanism = GaussianSteps(noise_multiplier=1.0, sample_rate=0.05, steps=num)
    ledger.reserve(Charge(job_id="d" * 64, round=1, request_sha256="a" * 64, mechanism=mechanism))
    return ledger.spent_epsilon()


def test_a_new_site_is_adaptive_and_says_so(silotune: Command, site: Callable[..., Path]) -> None:
    home = site("north")
    assert SiteHome(home).load_config().budget.composition == "adaptive"
    spent = spend(home, 20)
    shown = silotune("site", "ledger", home).out
    assert f"epsilon {rounded_up(spent, 4)} of 8 spent at delta 1e-05" in shown
    assert "composition adaptive: a Rényi filter of orders 3, 4" in shown
    assert "dddddddddddd" in shown
    said = json.loads(silotune("site", "ledger", home, "--json").out)
    assert (said["composition"], said["orders"], said["entries"]) == ("adaptive", [3, 4], 3)
    assert said["epsilon_spent"] == spent
    fixed = site("fixed", "--composition", "fixed")
    assert (
        "composition fixed: this holds only if the plans of all runs were fixed"
        in silotune("site", "ledger", fixed).out
    )


def test_an_account_moves_to_another_machine(silotune: Command, site: Callable[..., Path], tmp_path: Path) -> None:
    old, new = site("old"), site("new", "--epsilon", "4")
    file = tmp_path / "account.json"
    spent = spend(old, 20)
    wrote = silotune("site", "ledger", old, "--export", file)
    assert (wrote.status, "wrote 1 charges" in wrote.out) == (0, True), wrote.err
    export = load_export(file)
    assert (export.site, export.dataset, export.composition) == ("north", "north-records", "adaptive")
    assert (export.declared_records, export.orders) == (32, filter_orders(epsilon=8.0, delta=1e-5))
    assert export.rule.epsilon(export.mechanisms) == spent
    moved = silotune("site", "ledger", new, "--import", file)
    assert (moved.status, "took over 1 charges of site north" in moved.out) == (0, True), moved.err
    assert "Stop the other machine for good" in moved.out
    said = json.loads(silotune("site", "ledger", new, "--json").out)
    assert (said["epsilon_spent"], said["epsilon_budget"], said["orders"]) == (spent, 4.0, [3, 4])


def test_mistakes_are_explained(silotune: Command, site: Callable[..., Path], tmp_path: Path) -> None:
    old, other, file = site("old"), site("other", name="south"), tmp_path / "account.json"
    spend(old, 20)
    silotune("site", "ledger", old, "--export", file)
    for arguments, text in (
        ([old, "--import", file], "has 1 charges already"),
        ([other, "--import", file], "export is of the data set 'north-records', this account of 'south-records'"),
        ([other, "--import", tmp_path / "nothing.json"], "cannot be read"),
        ([other, "--import", tmp_path / "notes.jsonl"], "is not an export of a ledger"),
        ([other, "--from-dataset", "north-records"], "give the export with --import"),
    ):
        outcome = silotune("site", "ledger", *arguments)
        assert (outcome.status, text in outcome.err) == (1, True), outcome
        assert "Traceback" not in outcome.err
    named = silotune("site", "ledger", other, "--import", file, "--from-dataset", "north-records")
    assert named.status == 0, named.err
