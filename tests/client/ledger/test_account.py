"""What a ledger's entries mean for one account, read without any file."""

from __future__ import annotations

from typing import Any

import pytest

from client.ledger.account import Account, Budget, Charge, Charged, check_name, check_sha256, dataset_key
from client.ledger.file import Entry
from shared.errors import LedgerError, PrivacyError
from shared.privacy.accounting import GaussianSteps
from shared.privacy.filter import filter_orders

MECHANISM = {"noise_multiplier": 1.5, "sample_rate": 0.1, "steps": 12}
STEPS = GaussianSteps(**MECHANISM)  # type: ignore[arg-type]
OURS = {"dataset": "notes", "unit": "record"}
CAP = {"epsilon": 3.0, "delta": 1e-5, "composition": "adaptive", "orders": [2, 3]}


def account(*entries: tuple[str, dict[str, Any]]) -> Account:
    """The account of `OURS` after entries 1, 2, ... of these kinds and payloads, entry n at time "n"."""
    read = Account(**OURS)
    for sequence, (kind, payload) in enumerate(entries, start=1):
        read.take(sequence, kind, str(sequence), OURS | payload)
    return read


RESERVE = ("reserve", {"job_id": "a", "round": 4, "request_sha256": "0" * 64, "mechanism": MECHANISM})
IMPORTED = ("imported", {"job_id": "b", "round": 5, "mechanism": MECHANISM, "committed": True, "charged_at": "then"})


def test_each_kind_of_entry_means_what_it_says() -> None:
    commit = ("commit", {"reservation": 3, "executed_steps": 7})
    read = account(("open", {}), ("budget", CAP), RESERVE, ("import", {}), IMPORTED, ("migrate", {}), RESERVE, commit)
    fewer = GaussianSteps(noise_multiplier=1.5, sample_rate=0.1, steps=7)
    of_a: dict[str, Any] = {"job_id": "a", "round": 4, "imported": False, "request_sha256": "0" * 64}
    assert read.charges == {
        3: Charged(**of_a, mechanism=fewer, committed=True, time="3"),
        5: Charged(job_id="b", round=5, mechanism=STEPS, committed=True, time="then", imported=True),
        7: Charged(**of_a, mechanism=STEPS, committed=False, time="7"),
    }
    assert read.caps == [CAP]
    assert read.events() == [fewer, STEPS, STEPS]
    assert read.events("a") == [fewer, STEPS]
    assert (read.events("b"), read.events("c")) == ([STEPS], [])


def test_the_entries_of_a_file_are_taken_in_their_order() -> None:
    commit = ("commit", {"reservation": 2, "executed_steps": 7})
    written = [("budget", CAP), RESERVE, commit]
    entries = [
        Entry(sequence, kind, str(sequence), OURS | payload, "", "")
        for sequence, (kind, payload) in enumerate(written, start=1)
    ]
    assert Account.read(entries, **OURS) == account(*written) != account(*written[:2])


def test_an_imported_round_that_was_not_over_counts_in_full() -> None:
    kind, payload = IMPORTED
    (charged,) = account((kind, payload | {"committed": False})).charges.values()
    assert (charged.committed, charged.mechanism) == (False, STEPS)


@pytest.mark.parametrize("other", [{"dataset": "letters"}, {"unit": "patient"}])
def test_entries_of_other_accounts_change_nothing(other: dict[str, str]) -> None:
    kind, payload = RESERVE
    assert account((kind, payload | other), ("budget", CAP | other), ("unheard of", other)) == Account(**OURS)


def test_an_entry_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(LedgerError, match="ledger entry 2 is of the unknown kind 'refund'"):
        account(("open", {}), ("refund", {}))


def test_orders_are_those_recorded_last_or_those_of_the_first_cap() -> None:
    later = CAP | {"orders": [5, 7], "epsilon": 9.0}
    assert account(("budget", CAP), ("budget", later), ("budget", {"epsilon": 1.0, "delta": 1e-5})).orders_of(
        "together"
    ) == (5, 7)
    old = account(("budget", {"epsilon": 2.0, "delta": 1e-6}), ("budget", {"epsilon": 8.0, "delta": 1e-5}))
    assert old.orders_of("together") == filter_orders(epsilon=2.0, delta=1e-6) != filter_orders(epsilon=8.0, delta=1e-5)


def test_orders_follow_the_cap_until_the_first_charge() -> None:
    budget = Budget(epsilon=8.0, delta=1e-6)
    assert account(("budget", CAP)).orders_for(budget) == filter_orders(epsilon=8.0, delta=1e-6)
    assert account(("budget", CAP), RESERVE).orders_for(budget) == (2, 3)


def test_the_rule_is_the_composition_that_was_recorded_last() -> None:
    fixed = CAP | {"composition": "fixed"}
    for caps, expected in (([CAP, fixed], "fixed"), ([fixed, CAP, CAP], "adaptive"), ([fixed, fixed, CAP], "adaptive")):
        rule = account(*(("budget", cap) for cap in caps)).rule(delta=1e-7)
        assert (rule.composition, rule.delta, rule.orders) == (expected, 1e-7, (2, 3))
    assert account(("budget", CAP)).rule(delta=1e-7, composition="fixed").composition == "fixed"
    assert account(("budget", {"epsilon": 2.0, "delta": 1e-6})).rule(delta=1e-6).composition == "fixed"


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan"), float("inf")])
def test_a_cap_that_is_no_number_above_zero_is_refused(epsilon: float) -> None:
    with pytest.raises(LedgerError, match="budget's epsilon is"):
        Budget(epsilon=epsilon, delta=1e-5)


def test_caps_and_charges_at_their_limits() -> None:
    assert Budget(epsilon=1e-9, delta=1e-5).composition == "fixed"
    assert Budget(epsilon=1.0, delta=1e-5, composition="adaptive").composition == "adaptive"
    with pytest.raises(PrivacyError, match="delta"):
        Budget(epsilon=1.0, delta=1.0)
    with pytest.raises(LedgerError, match="composition is 'none'; expected 'adaptive' or 'fixed'"):
        Budget(epsilon=1.0, delta=1e-5, composition="none")  # type: ignore[arg-type]
    one = GaussianSteps(noise_multiplier=1.0, sample_rate=0.1, steps=1)
    none = GaussianSteps(noise_multiplier=1.0, sample_rate=0.1, steps=0)
    good = {"job_id": "j" * 500, "round": 0, "request_sha256": "0123456789abcdef" * 4, "mechanism": one}
    Charge(**good, planned_steps=1)  # type: ignore[arg-type]
    for change, reason in (
        ({"job_id": "j" * 501}, "job_id has 501 characters; expected at most 500"),
        ({"job_id": " "}, "job_id is empty"),
        ({"round": -1}, "round is -1"),
        ({"request_sha256": "0" * 63}, "request_sha256 is"),
        ({"mechanism": none}, "charge is 0 steps"),
        ({"planned_steps": 0}, "plans 0 steps"),
    ):
        with pytest.raises(LedgerError, match=reason):
            Charge(**(good | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["", "0" * 63, "0" * 65, "0" * 63 + "g", "A" * 64, "0" * 64 + "\n"])
def test_what_is_no_sha256_is_refused(value: str) -> None:
    check_sha256("x", "f" * 64)
    with pytest.raises(LedgerError, match=r"x is .*; expected a SHA-256"):
        check_sha256("x", value)


def test_names() -> None:
    check_name("x", " a ")
    for value in ("", " ", "\n\t"):
        with pytest.raises(LedgerError, match="x is empty"):
            check_name("x", value)


def test_a_data_set_is_told_apart_by_what_can_be_seen_of_its_name() -> None:
    """No letter is parted from its accent, and none that looks like one is lost with what nobody sees."""
    for name, others in {
        "notes": [
            "NOTES",
            " notes ",
            "no\u200btes\ufeff",
            "no\u00adtes",
            "\u202anotes\u202c",
            "\uff4e\uff4f\uff54\uff45\uff53",
        ],
        "cafe\u0301 files": ["caf\u00e9  files", "CAFE\u0301\u00a0\ufb01les"],
        "stra\u00dfe": ["STRASSE"],
    }.items():
        assert {dataset_key(other) for other in others} == {dataset_key(name)}
    different = ["notes", "no tes", "note", "n\u043etes", "cafe", "caf\u00e9", "no~tes"]
    assert len({dataset_key(name) for name in different}) == len(different)
