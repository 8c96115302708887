"""Simulations whose unit is a person: nobody is split over sites or into the evaluation data, and the statement says so."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.ledger.ledger import Budget, Ledger
from server.rounds.observer import Observer
from shared.errors import ConfigError, DataError, PrivacyError, RunError, SilotuneError
from shared.privacy.persons import Persons
from simulations.audit.models import audit_shadow_models, audit_text_canaries
from simulations.audit.run import audit_run_mechanism, open_run
from simulations.data.demo_data import split_public_test
from simulations.data.partitions import PartitionConfig, partition
from simulations.running.engine import run_scenario
from simulations.scenario import load_scenario

MARKER = "zyxomma"
COLUMNS = {"text": "review", "label": "verdict", "person": "mrn"}
SIZES = [1, 2, 3, 4, 5, 6, 1, 2, 8, 12, 3, 4, 2, 1, 5, 3, 6, 2, 4, 6]


def owned(sizes: list[int] = SIZES) -> list[dict[str, Any]]:
    """Return records of `len(sizes)` persons, mixed, most of a person's with one label."""
    rows = [
        {
            "text": f"note {person} {number}",
            "label": ["good", "bad"][(person + (number % 4 == 3)) % 2],
            "person": person,
        }
        for person, size in enumerate(sizes)
        for number in range(size)
    ]
    return rows[::2] + rows[1::2]


def persons_in(records: list[dict[str, Any]]) -> Persons:
    return Persons.from_ids([record["person"] for record in records])


# --- who is where ---


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "quantity"])
@pytest.mark.parametrize("seed", range(3))
def test_a_partition_keeps_a_person_at_one_site(kind: str, seed: int) -> None:
    records = owned()
    config = PartitionConfig(kind=kind, num_sites=4, alpha=1.0, min_records=2)  # type: ignore[arg-type]
    parts = partition(records, config, seed=seed, persons=persons_in(records))
    assert sorted(row for rows in parts.values() for row in rows) == list(range(len(records)))
    at = [{records[row]["person"] for row in rows} for rows in parts.values()]
    assert sum(map(len, at)) == len(SIZES)
    assert min(map(len, at)) >= 2
    assert all(rows == sorted(rows) for rows in parts.values())


def test_without_persons_a_partition_splits_them() -> None:
    records = owned()
    parts = partition(records, PartitionConfig(num_sites=4), seed=0)
    assert sum(len({records[row]["person"] for row in rows}) for rows in parts.values()) > len(SIZES)


def test_a_label_skew_goes_by_the_usual_label_of_a_person() -> None:
    records = owned([4] * 40)
    parts = partition(
        records, PartitionConfig(kind="dirichlet", num_sites=2, alpha=0.05), seed=1, persons=persons_in(records)
    )
    shares = [sum(records[row]["label"] == "good" for row in rows) / len(rows) for rows in parts.values()]
    assert abs(shares[0] - shares[1]) > 0.3


def test_a_partition_by_column_refuses_persons_at_two_sites() -> None:
    records = [record | {"ward": "a" if record["person"] < 9 else "b"} for record in owned()]
    config = PartitionConfig(kind="column", column="ward")
    parts = partition(records, config, seed=0, persons=persons_in(records))
    assert {name: {records[row]["person"] for row in rows} for name, rows in parts.items()} == {
        "a": set(range(9)),
        "b": set(range(9, 20)),
    }
    moved = [record | {"ward": "b"} if record["text"] in ("note 4 0", "note 8 1") else record for record in records]
    with pytest.raises(DataError, match="2 of 20 persons have records at more than one site by 'ward'"):
        partition(moved, config, seed=0, persons=persons_in(moved))
    with pytest.raises(DataError, match="the sites would be called by the ids of persons"):
        partition(records, PartitionConfig(kind="column", column="person"), seed=0, persons=persons_in(records))
    with pytest.raises(DataError, match="20 persons cannot give 11 sites at least 2 each"):
        partition(records, PartitionConfig(num_sites=11, min_records=2), seed=0, persons=persons_in(records))


def test_evaluation_data_are_whole_persons_whatever_the_order() -> None:
    records = owned()
    train, test = split_public_test(records, num_test=11, seed=3, persons=persons_in(records))
    assert len(test) == 11
    assert not {r["person"] for r in train} & {r["person"] for r in test}
    back = records[::-1]
    _, again = split_public_test(back, num_test=11, seed=3, persons=persons_in(back))
    assert {r["text"] for r in again} == {r["text"] for r in test}
    _, other = split_public_test(records, num_test=11, seed=4, persons=persons_in(records))
    assert {r["text"] for r in other} != {r["text"] for r in test}
    pairs = owned([2] * 6)
    with pytest.raises(DataError, match="without parting the records of a person; 4 can"):
        split_public_test(pairs, num_test=5, seed=0, persons=persons_in(pairs))


# --- a whole run ---


@pytest.fixture
def person_scenario(scenario_file: Callable[..., Path]) -> Callable[..., Path]:
    """Return a writer of a small scenario of 20 patients with 1 to 12 records; keyword arguments replace keys."""

    def write(**sections: Any) -> Path:
        privacy = {"unit": "patient", "records_per_person": 3, **sections.pop("privacy", {})}
        data = {"train": {"path": "train.csv", "columns": COLUMNS}, "num_test": 12, **sections.pop("data", {})}
        path = scenario_file(privacy=privacy, data=data, **sections)
        with (path.parent / "train.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                [
                    ("review", "verdict", "mrn"),
                    *((r["text"], r["label"], f"{MARKER}-{r['person']}") for r in owned()),
                ]
            )
        return path

    return write


def run(path: Path, folder: Path, **options: Any) -> Path:
    run_scenario(load_scenario(path), folder, observer=lambda arm: Observer(), **options)
    return folder


def test_a_run_by_the_patient(person_scenario: Callable[..., Path], tmp_path: Path) -> None:
    """End to end: sites, ledger, statement, report, tier 1 and text canaries; baselines by the patient too."""
    path = person_scenario(baselines={"arms": ["central-dp", "non-private"]}, training={"rounds": 2})
    folder = run(path, tmp_path / "run", stop_after=1)
    run(path, folder, resume=True)
    seen: set[str] = set()
    for number in (1, 2, 3):
        home = folder / "sites" / f"site-{number}" / "home"
        rows = [json.loads(line) for line in (home / "data.jsonl").read_text().splitlines()]
        ids = {row["person"] for row in rows}
        assert not ids & seen
        seen |= ids
        record = json.loads((folder / "sites" / f"site-{number}" / "privacy.json").read_text())
        assert record["declared_records"] == 1 << (len(ids).bit_length() - 1) < len(rows)
        assert (record["unit"], record["records_per_person"]) == ("patient", 3)
        assert record["relation"] == "add or remove one patient with all their records"
        ledger = Ledger(
            home / "ledger.db", dataset=f"small-site-{number}", unit="patient", budget=Budget(epsilon=99, delta=1e-5)
        )
        assert sum(event.steps for event in ledger.events()) == 4
        assert record["epsilon_spent"] == pytest.approx(ledger.spent_epsilon(), rel=1e-9)
    statement = json.loads((folder / "statement.json").read_text())
    assert "A patient whose records are all at one site" in statement["one_site"]
    assert "under add or remove one patient with all their records" in statement["one_site"]
    assert "A patient with records at each of m sites" in statement["text"]
    assert "one record" not in statement["text"]
    report = (folder / "report.html").read_text()
    assert "unit: patient" in report
    assert "Declared patients" in report
    for arm in ("central-dp", "non-private"):
        (record,) = [json.loads(p.read_text()) for p in (folder / "baselines" / arm).glob("sites/*/privacy.json")]
        assert record["unit"] == "patient"
    # No id in anything but the sites' own data.
    kept = [p for p in folder.rglob("*") if p.is_file() and not p.is_relative_to(folder / "baselines")]
    assert not [p for p in kept if MARKER.encode() in p.read_bytes() and p.name != "data.jsonl"]
    # The audit runs the persons' path of the trainer.
    audited = audit_run_mechanism(folder)
    assert audited.verdict == "consistent", audited.text()
    assert "unit patient" in json.loads((folder / "audit" / "tier1.json").read_text())["audited"]
    result, _ = audit_text_canaries(open_run(folder), num_canaries=32, trainings=1)
    assert result.verdict in ("consistent", "inconclusive")
    with pytest.raises(RunError, match="tier 3 attacks single records"):
        audit_shadow_models(open_run(folder))


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"privacy": {"records_per_person": None}}, ConfigError, "records_per_person must say how many records"),
        (
            {"data": {"train": {"path": "train.csv", "columns": {"text": "review", "label": "verdict"}}}},
            DataError,
            "privacy.unit is 'patient', but the data has no id column",
        ),
        ({"partition": {"num_sites": 18}}, DataError, "persons cannot give 18 sites"),
        ({"privacy": {"delta": 0.3}}, PrivacyError, "patients it must be below 1/n"),
        (
            {"baselines": {"arms": ["central-dp"], "central_dp": {"privacy": {"unit": "customer"}}}},
            ConfigError,
            "baseline central-dp has another privacy.unit",
        ),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(
    person_scenario: Callable[..., Path],
    tmp_path: Path,
    sections: dict[str, Any],
    error: type[SilotuneError],
    message: str,
) -> None:
    if sections.get("privacy") == {"records_per_person": None}:
        path = person_scenario()
        path.write_text(path.read_text().replace("records_per_person = 3\n", ""))
    else:
        path = person_scenario(**sections)
    with pytest.raises(error) as refused:
        run(path, tmp_path / "run")
    assert message in str(refused.value)
    assert MARKER not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_persons_of_the_evaluation_file_must_be_others(person_scenario: Callable[..., Path], tmp_path: Path) -> None:
    path = person_scenario(data={"test": {"path": "test.csv", "columns": COLUMNS}})
    rows = ["review,verdict,mrn", "fine,good,other-1", "dull,bad,other-2"]
    (tmp_path / "test.csv").write_text("\n".join(rows))
    _, test = load_scenario(path).load_data()
    assert [set(record) for record in test] == [{"text", "label"}] * 2
    (tmp_path / "test.csv").write_text("\n".join([*rows, f"dull,bad,{MARKER}-3"]))
    with pytest.raises(DataError, match="1 persons of the evaluation data also have records") as refused:
        load_scenario(path).load_data()
    assert MARKER not in str(refused.value)
