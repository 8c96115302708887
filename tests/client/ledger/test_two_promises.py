"""Two caps of one account: what holds while secure aggregation does, and what holds if everything else is broken."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.ledger.account import Account, Budget, Charge
from client.ledger.audit_mirror import AuditMirror, recount
from client.ledger.file import Entry
from client.ledger.ledger import Ledger
from shared.errors import BudgetExceeded, LedgerError
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.filter import filter_epsilon, filter_orders
from shared.privacy.ledger_export import LedgerExport, load_export, save_export
from shared.trust.audit_log import AuditLog

REQUEST = "a" * 64
SHARE, SUM, RATE, DELTA = 0.7, 1.4, 0.125, 1e-5
JOB = "d" * 64


def steps(sigma: float, num: int = 1) -> GaussianSteps:
    return GaussianSteps(noise_multiplier=sigma, sample_rate=RATE, steps=num)


def masked(round_number: int = 1, attempt: int = 0, **changes: Any) -> Charge:
    """Return the charge of one masked input, which is four shares of the sum's noise by variance."""
    given: dict[str, Any] = {
        "job_id": JOB,
        "round": round_number,
        "request_sha256": REQUEST,
        "mechanism": steps(SHARE),
        "together": steps(SUM),
        "attempt": attempt,
    }
    return Charge(**given | changes)


def update(num: int = 4, *, round_number: int = 1, sigma: float = 1.0, job_id: str = "e" * 64) -> Charge:
    """Return the charge of an update that has all its noise."""
    return Charge(job_id=job_id, round=round_number, request_sha256=REQUEST, mechanism=steps(sigma, num))


def opened(path: Path, epsilon: float = 4.0, alone: float | None = 16.0, **options: Any) -> Ledger:
    composition = options.pop("composition", "fixed")
    budget = Budget(epsilon=epsilon, delta=DELTA, composition=composition, epsilon_alone=alone)
    return Ledger(path, dataset="north", unit="record", budget=budget, **options)


def charge_until_refused(ledger: Ledger) -> tuple[int, BudgetExceeded]:
    """Charge one masked input after the other; return how many fitted, and the refusal."""
    for number in range(500):
        try:
            ledger.reserve(masked(number))
        except BudgetExceeded as refused:
            return number, refused
    pytest.fail("500 rounds fitted")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


# --- what counts for which ---


def test_a_masked_input_counts_with_the_sum_s_noise_and_with_its_own(path: Path) -> None:
    with closing(opened(path)) as ledger:
        for round_number in range(1, 5):
            ledger.commit(ledger.reserve(masked(round_number)), executed_steps=1, release_sha256=REQUEST)
        ledger.reserve(update(3))
        assert ledger.spent_epsilon() == compose_epsilon([steps(SUM, 4), steps(1.0, 3)], DELTA)
        assert ledger.spent_epsilon(promise="alone") == compose_epsilon([steps(SHARE, 4), steps(1.0, 3)], DELTA)
        assert ledger.spent_epsilon(JOB) == compose_epsilon([steps(SUM, 4)], DELTA)
        assert ledger.spent_epsilon(JOB, promise="alone") == compose_epsilon([steps(SHARE, 4)], DELTA)
        assert ledger.events(JOB) == [steps(SUM)] * 4
        assert ledger.events(JOB, promise="alone") == [steps(SHARE)] * 4


def test_steps_that_did_not_run_are_given_back_in_both(path: Path) -> None:
    with closing(opened(path)) as ledger:
        both = masked(mechanism=steps(SHARE, 5), together=steps(SUM, 5))
        ledger.commit(ledger.reserve(both), executed_steps=2, release_sha256=REQUEST)
        assert (ledger.events(), ledger.events(promise="alone")) == ([steps(SUM, 2)], [steps(SHARE, 2)])


@pytest.mark.parametrize("composition", ["fixed", "adaptive"])
def test_both_caps_stop_exactly(path: Path, composition: str) -> None:
    """Rounds are charged until one cap would be crossed; the other one has room then, and the refusal names the right one."""

    def spend(orders_of: float, sigma: float, num: int) -> float:
        if composition == "fixed":
            return compose_epsilon([steps(sigma, num)], DELTA)
        return filter_epsilon([steps(sigma, num)], delta=DELTA, orders=filter_orders(epsilon=orders_of, delta=DELTA))

    for name, alone in (("first", 64.0), ("second", 6.0)):
        place = path.with_name(f"{name}.db")
        with closing(opened(place, alone=alone, composition=composition)) as ledger:
            charged, refused = charge_until_refused(ledger)
            assert ledger.spent_epsilon() == spend(4.0, SUM, charged) <= 4.0
            assert ledger.spent_epsilon(promise="alone") == spend(alone, SHARE, charged) <= alone
            over = spend(4.0, SUM, charged + 1) > 4.0, spend(alone, SHARE, charged + 1) > alone
            assert over == (name == "first", name == "second")
            assert refused.steps_affordable == 0
            assert ("cap is 4." if name == "first" else "cap for that (budget.epsilon_alone) is 6.") in str(refused)
            assert ("each masked input counted by itself" in str(refused)) == (name == "second")
            assert "at noise multiplier 0.7000 (the sum's: 1.4000)" in str(refused)


def test_without_a_second_cap_it_is_the_first(path: Path) -> None:
    """A site that knows nothing of sums promises what it always did, whatever jobs come."""
    with closing(opened(path, epsilon=6.0, alone=None)) as ledger:
        _, refused = charge_until_refused(ledger)
        assert "cap for that (budget.epsilon, as budget.epsilon_alone is not set) is 6." in str(refused)
        assert ledger.spent_epsilon() < 3.0 < ledger.spent_epsilon(promise="alone") <= 6.0


def test_the_steps_that_fit_are_those_of_the_tighter_cap(path: Path) -> None:
    with closing(opened(path, epsilon=4.0, alone=6.0)) as ledger:
        ledger.reserve(update(2))
        found = ledger.affordable_steps(noise_multiplier=SHARE, sample_rate=RATE, noise_together=SUM)
        fits = compose_epsilon([steps(1.0, 2), steps(SHARE, found)], DELTA)
        assert fits <= 6.0 < compose_epsilon([steps(1.0, 2), steps(SHARE, found + 1)], DELTA)
        with pytest.raises(BudgetExceeded) as refused:
            ledger.reserve(masked(mechanism=steps(SHARE, found + 3), together=steps(SUM, found + 3)))
        assert refused.value.steps_affordable == found
        before = ledger.entries()
        ledger.reserve(masked(mechanism=steps(SHARE, found), together=steps(SUM, found)))
        assert len(ledger.entries()) == len(before) + 1


CHARGES = st.lists(
    st.one_of(
        st.builds(masked, st.integers(1, 9), st.integers(0, 3)),
        st.builds(masked, st.integers(1, 9), planned_steps=st.sampled_from([None, 12])),
        st.builds(
            update, st.integers(1, 6), round_number=st.integers(1, 9), job_id=st.sampled_from(["f" * 64, "0" * 64])
        ),
    ),
    max_size=14,
)


@settings(max_examples=25, deadline=None)
@given(charges=CHARGES, caps=st.sampled_from([(2.0, None), (2.0, 8.0), (3.0, 5.0)]), adaptive=st.booleans())
def test_both_caps_hold_whatever_is_charged(
    tmp_path_factory: pytest.TempPathFactory, charges: list[Charge], caps: tuple[float, float | None], adaptive: bool
) -> None:
    folder = tmp_path_factory.mktemp("caps")
    composition = "adaptive" if adaptive else "fixed"
    log = AuditLog(folder / "audit")
    with closing(opened(folder / "ledger.db", *caps, composition=composition, mirror=AuditMirror(log))) as ledger:
        for charge in charges:
            before = ledger.entries()
            try:
                ledger.reserve(charge)
            except BudgetExceeded:
                assert ledger.entries() == before
        for promise, cap in (("together", caps[0]), ("alone", caps[1] or caps[0])):
            spent = ledger.spent_epsilon(promise=promise)
            assert spent <= cap
            assert recount(folder / "audit", delta=DELTA, dataset="north", unit="record", promise=promise) == spent
        summed, by_itself = ledger.events(), ledger.events(promise="alone")
        assert all(one.noise_multiplier >= other.noise_multiplier for one, other in zip(summed, by_itself, strict=True))
        assert compose_epsilon(summed, DELTA) <= compose_epsilon(by_itself, DELTA) + 1e-9


# --- plans that may take fewer steps than they hold ---


def test_attempts_are_part_of_the_plan(path: Path) -> None:
    """How often a round is repeated may depend on what was released, so under "fixed" the whole plan counts at once."""
    with closing(opened(path)) as ledger:
        whole = {
            "together": compose_epsilon([steps(SUM, 12)], DELTA),
            "alone": compose_epsilon([steps(SHARE, 12)], DELTA),
        }
        for round_number, attempt in ((1, 0), (2, 0), (2, 1), (2, 2), (3, 0)):
            ledger.reserve(masked(round_number, attempt, planned_steps=12))
            assert {promise: ledger.spent_epsilon(promise=promise) for promise in whole} == whole  # type: ignore[arg-type]
        (held,) = ledger.export(site="north", declared_records=8).held_back
        assert (held.mechanism, held.together, held.round) == (steps(SHARE, 7), steps(SUM, 7), 0)
        # A round without attempts that is charged twice is beyond its plan, as it always was.
        for _ in range(2):
            ledger.reserve(update(1, job_id="f" * 64, sigma=4.0))
    adaptive = path.with_name("adaptive.db")
    with closing(opened(adaptive, composition="adaptive")) as ledger:
        ledger.reserve(masked(planned_steps=12))
        assert ledger.events() == [steps(SUM)]
        assert ledger.export(site="north", declared_records=8).held_back == ()


def test_anticipating_charges_nothing_and_saves_the_accounting(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(opened(path)) as ledger:
        ledger.reserve(masked(1))
        before = ledger.entries()
        ledger.anticipate(steps(SHARE), steps(SUM))
        assert ledger.entries() == before
        found: list[Any] = []
        monkeypatch.setattr("shared.privacy.accounting.composed_epsilon", lambda *key: found.append(key) or 0.0)
        ledger.reserve(masked(2))
        assert found == [], "the accountant was asked for something new"


# --- orders, old files, copies ---


def test_orders_of_each_cap_are_fixed_before_the_first_charge(path: Path) -> None:
    def orders(epsilon: float) -> list[int]:
        return list(filter_orders(epsilon=epsilon, delta=DELTA))

    def latest(alone: float | None, epsilon: float = 4.0) -> dict[str, Any]:
        with closing(opened(path, epsilon, alone, composition="adaptive")) as ledger:
            return [entry.payload for entry in ledger.entries() if entry.kind == "budget"][-1]

    assert orders(4.0) != orders(16.0) != orders(64.0)
    assert latest(16.0)["orders_alone"] == orders(16.0)
    assert latest(64.0)["orders_alone"] == orders(64.0)
    unset = latest(None)
    assert (unset["orders"], unset["orders_alone"], "epsilon_alone" in unset) == (orders(4.0), orders(4.0), False)
    with closing(opened(path, alone=None, composition="adaptive")) as ledger:
        ledger.reserve(masked(mechanism=steps(2.0), together=steps(4.0)))
    for alone in (64.0, None, 16.0):
        changed = latest(alone)
        assert (changed["orders"], changed["orders_alone"]) == (orders(4.0), orders(4.0))
    assert latest(32.0, 8.0)["orders"] == orders(4.0)


def test_a_ledger_that_knew_one_cap_keeps_its_orders_for_both(path: Path) -> None:
    with closing(opened(path, alone=None, composition="adaptive")) as ledger:
        ledger.reserve(update(1, sigma=3.0))
    with closing(opened(path, alone=64.0, composition="adaptive")) as ledger:
        rule = ledger.export(site="north", declared_records=8).rule_alone
        assert rule.orders == filter_orders(epsilon=4.0, delta=DELTA)
        spent = filter_epsilon([steps(3.0, 1)], delta=DELTA, orders=rule.orders)
        assert ledger.spent_epsilon() == ledger.spent_epsilon(promise="alone") == spent


def test_opening_an_old_ledger_writes_nothing(path: Path) -> None:
    """Entries as an older version wrote them are the same as those of a site that sets no second cap."""
    with closing(opened(path, alone=None)) as ledger:
        ledger.reserve(update())
        entries = ledger.entries()
    assert [set(entry.payload) for entry in entries] == [
        {"dataset", "unit", "schema_version"},
        {"dataset", "unit", "epsilon", "delta", "composition", "orders"},
        {"dataset", "unit", "job_id", "round", "request_sha256", "mechanism"},
    ]
    with closing(opened(path, alone=None)) as ledger:
        assert ledger.entries() == entries


def test_an_account_moves_with_both_caps(path: Path, tmp_path: Path) -> None:
    for composition in ("fixed", "adaptive"):
        old, new = (path.with_name(f"{composition}-{which}.db") for which in ("old", "new"))
        with closing(opened(old, composition=composition)) as ledger:
            ledger.reserve(masked(1, planned_steps=6))
            ledger.commit(ledger.reserve(masked(1, 1, planned_steps=6)), executed_steps=1, release_sha256=REQUEST)
            ledger.reserve(update(2))
            export = ledger.export(site="north", declared_records=8)
            spent = ledger.spent_epsilon(), ledger.spent_epsilon(promise="alone")
        save_export(tmp_path / "export.json", export)
        again = load_export(tmp_path / "export.json")
        assert again == export
        assert (export.cap_alone, export.rule_alone.orders) == (16.0, filter_orders(epsilon=16.0, delta=DELTA))
        assert export.rule.epsilon(export.mechanisms) == spent[0]
        assert export.rule_alone.epsilon(export.mechanisms_alone) == spent[1]
        with closing(opened(new, epsilon=3.0, alone=None, composition=composition)) as ledger:
            ledger.import_account(again)
            assert (ledger.spent_epsilon(), ledger.spent_epsilon(promise="alone")) == spent
            assert [charged.attempt for charged in ledger.charges(JOB)] == [0, 1]
            moved = ledger.export(site="north", declared_records=8)
            assert [(c.mechanism, c.together, c.attempt, c.planned_steps) for c in moved.charges] == [
                (c.mechanism, c.together, c.attempt, c.planned_steps) for c in export.charges
            ]


def test_an_export_of_one_cap_is_what_it_was(path: Path) -> None:
    with closing(opened(path, alone=None)) as ledger:
        ledger.reserve(update())
        raw = ledger.export(site="north", declared_records=8).model_dump(mode="json")
    assert not {"epsilon_alone", "orders_alone"} & set(raw)
    assert not {"noise_together", "attempt"} & set(raw["charges"][0])
    export = LedgerExport.model_validate(raw)
    assert (export.cap_alone, export.rule_alone, export.mechanisms_alone) == (4.0, export.rule, export.mechanisms)
    raw["charges"][0]["noise_together"] = 0.9
    with pytest.raises(ValueError, match=r"noise_together is 0\.9, below noise_multiplier 1\.0"):
        LedgerExport.model_validate(raw)


# --- what no account takes ---


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"together": steps(SHARE / 2)}, "at least as much noise"),
        ({"together": steps(SUM, 2)}, "the same steps"),
        ({"together": replace(steps(SUM), sample_rate=0.5)}, "the same steps"),
        ({"attempt": -1}, "attempt is -1; expected 0 or more"),
    ],
)
def test_charges_that_are_no_share_of_a_sum_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(LedgerError, match=told):
        masked(**changes)


def test_a_second_cap_below_the_first_is_refused() -> None:
    with pytest.raises(LedgerError, match=r"epsilon_alone is 3\.0; expected a finite number from epsilon 4\.0 up"):
        Budget(epsilon=4.0, delta=DELTA, epsilon_alone=3.0)
    assert Budget(epsilon=4.0, delta=DELTA, epsilon_alone=4.0).cap("alone") == 4.0


def test_an_entry_that_was_changed_is_found(path: Path) -> None:
    """Such as one whose masked input is said to have more noise."""
    with closing(opened(path)) as ledger:
        ledger.reserve(masked())
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TRIGGER no_update")
        connection.execute("UPDATE entries SET payload = replace(payload, '1.4', '9.4') WHERE kind = 'reserve'")
        connection.commit()
    with pytest.raises(LedgerError, match="entry 3 was changed after it was written"):
        opened(path)


def test_an_older_version_counts_a_masked_input_by_itself() -> None:
    """It knows the mechanism alone, so it counts more than it has to, never less."""
    names = {"dataset": "north", "unit": "record"}
    payload = {name: value for name, value in asdict(masked()).items() if value is not None} | names
    cap = {"epsilon": 4.0, "delta": DELTA} | names
    entries = [Entry(1, "budget", "", cap, "", ""), Entry(2, "reserve", "", payload, "", "")]
    assert json.loads(json.dumps(payload))["mechanism"] == asdict(steps(SHARE))
    assert Account.read(entries, **names).events(promise="alone") == [steps(SHARE)]


# --- a process that dies ---

CHARGE_ON = """
    import sys
    from pathlib import Path
    from tests.client.ledger.test_two_promises import AuditLog, AuditMirror, masked, opened

    folder = Path(sys.argv[1])
    log = AuditLog(folder / "audit")
    ledger = opened(folder / "ledger.db", epsilon=1000.0, alone=1000.0, mirror=AuditMirror(log))
    for round_number in range(1, 10_000):
        for attempt in range(2):
            reservation = ledger.reserve(masked(round_number, attempt))
            print(round_number, attempt, flush=True)
            ledger.commit(reservation, executed_steps=1, release_sha256="b" * 64)
"""


def test_a_kill_at_any_moment_loses_no_attempt(tmp_path: Path) -> None:
    """What was told before the kill was charged, in both accounts and in the log, with its attempt."""
    rng = random.Random(7)
    for life in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CHARGE_ON), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        told = [process.stdout.readline().split() for _ in range(rng.randint(1, 6))]
        process.kill()
        told += [line.split() for line in process.stdout.read().splitlines() if len(line.split()) == 2]
        process.wait()
        process.stdout.close()
        log = AuditLog(tmp_path / "audit")
        with closing(opened(tmp_path / "ledger.db", epsilon=1000.0, alone=1000.0, mirror=AuditMirror(log))) as ledger:
            charged = ledger.charges(JOB)
            latest = [(str(c.round), str(c.attempt)) for c in charged][-len(told) - 1 :]
            assert [tuple(pair) for pair in told] in (latest[1:], latest[:-1], latest), f"life {life}"
            for promise, sigma in (("together", SUM), ("alone", SHARE)):
                spent = ledger.spent_epsilon(promise=promise)
                assert spent == compose_epsilon([steps(sigma, len(charged))], DELTA)
                again = recount(tmp_path / "audit", delta=DELTA, dataset="north", unit="record", promise=promise)
                assert again == spent
