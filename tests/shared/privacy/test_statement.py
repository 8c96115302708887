"""The statement: recomputed from executed steps, silent where nothing can be promised."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import pld_privacy_accountant

from server.records.privacy import SiteRecord
from shared.errors import PrivacyError
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.shared_noise import SharedNoise
from shared.privacy.statement import (
    ACCOUNTANT,
    AS_REPORTED,
    NOT_COVERED,
    STOPPED_EARLY,
    SiteRelease,
    SitesEpsilon,
    Statement,
    not_covered,
    relation,
    run_statement,
    site_statement,
    without_uncovered,
)


def steps(num: int, sigma: float = 1.0) -> GaussianSteps:
    return GaussianSteps(noise_multiplier=sigma, sample_rate=0.05, steps=num)


RELEASE = SiteRelease(
    site="north",
    delta=1e-5,
    max_grad_norm=0.5,
    declared_records=1024,
    randomness="os",
    epsilon_budget=8.0,
    steps_planned=40,
    events=(steps(10), steps(20)),
    rounds=(1, 2),
)
UNPROTECTED = [replace(RELEASE, randomness="injected"), replace(RELEASE, private=False, events=())]


def privacy_record(release: SiteRelease, run: str, **how: bool) -> dict[str, Any]:
    """Return a site's `privacy.json` as it is read back."""
    return written(SiteRecord.of(release, run, **how))


def written(record: Any) -> dict[str, Any]:
    """Return what a record is as JSON."""
    fields = record.fields() if isinstance(record, SiteRecord) else asdict(record)
    found: dict[str, Any] = json.loads(json.dumps(fields, allow_nan=False))
    return found


def numbers_after_epsilon(text: str) -> list[str]:
    return re.findall(r"epsilon\D{0,20}\d", text) + re.findall(r"\(\d+\.\d+, ", text)


def at_least(epsilon: float) -> str:
    """Three decimals, written out apart from the product: the printed number must not be below the computed one."""
    text = f"{epsilon:.3f}"
    return text if float(text) >= epsilon else f"{float(text) + 0.001:.3f}"


def test_what_is_not_covered_is_left_out_only_where_the_reader_has_it() -> None:
    assert without_uncovered("It is private. Not covered: A. B.", ["A.", "B.", "C."]) == "It is private."
    kept = "It is private. Not covered: A. B."
    assert without_uncovered(kept, ["A."]) == kept
    assert without_uncovered("Nothing was released.", ["A."]) == "Nothing was released."
    assert without_uncovered("Not covered: A.", ["A."]) == "Not covered: A."
    # An item that stands twice is another one the second time.
    assert without_uncovered("It is. Not covered: A. A.", ["A."]) == "It is. Not covered: A. A."


def test_epsilon_follows_executed_steps() -> None:
    """What was executed counts, not what was planned, and not how it was cut into rounds."""
    assert RELEASE.steps == 30
    assert RELEASE.epsilon == compose_epsilon([steps(30)], 1e-5)
    fewer = replace(RELEASE, events=(steps(10),))
    more = replace(RELEASE, events=(steps(10), steps(20), steps(20)))
    assert 0 < fewer.epsilon < RELEASE.epsilon < more.epsilon
    assert replace(RELEASE, steps_planned=1).epsilon == RELEASE.epsilon
    for release in (fewer, RELEASE, more):
        epsilon = compose_epsilon(release.events, 1e-5)
        assert f"({at_least(epsilon)}, 1e-05)" in site_statement(release, "run")
        assert f"({at_least(epsilon)}, 1e-05)" in run_statement([release], "run").one_site
        record = privacy_record(release, "run")
        assert record["epsilon_spent"] == epsilon
        assert record["steps_executed"] == release.steps


def test_the_statement_says_everything_it_must() -> None:
    text = site_statement(RELEASE, "run-7")
    for part in (
        "site north", "run run-7", "differentially private", "add or remove one record", "sampling rate 0.05",
        "noise multiplier 1.0000", "10 executed steps", "20 executed steps", "clipping norm 0.5", "PLD",
        "observer of every update", "Several records of one person", "pre-trained",
        "The choice of settings", "sites reported as executed",
    ):  # fmt: skip
        assert part in text
    full = written(run_statement([RELEASE], "run-7"))
    assert all(item in full["text"] for item in NOT_COVERED)
    assert full["not_covered"] == list(NOT_COVERED)


@pytest.mark.parametrize("release", UNPROTECTED)
def test_injected_randomness_prints_no_epsilon(release: SiteRelease) -> None:
    """Neither for injected randomness nor for a release without noise, in no text, table or file, alone or among others."""
    assert release.epsilon == math.inf
    assert not release.protected
    word = "injected" if release.private else "WITHOUT noise"
    texts = [site_statement(release, "run")]
    for releases in ([release], [RELEASE, release], [release, RELEASE, RELEASE]):
        statement = run_statement(releases, "run")
        assert statement.up_to_m_sites == ()
        assert word in statement.one_site
        texts += [statement.one_site, statement.text]
    record = privacy_record(release, "run")
    assert record["epsilon_spent"] is None
    assert record["epsilon_spent_prv"] is None
    texts.append(record["statement"])
    spent = at_least(compose_epsilon(RELEASE.events, 1e-5))
    for text in texts:
        assert not numbers_after_epsilon(text)
        assert spent not in text
    json.dumps(record, allow_nan=False)
    assert numbers_after_epsilon(site_statement(RELEASE, "run"))  # the search itself finds one where there is one


def test_an_event_without_noise_cannot_be_stated() -> None:
    with pytest.raises(PrivacyError, match="noise_multiplier"):
        replace(RELEASE, events=(steps(10, sigma=0.0),))


def test_nothing_released() -> None:
    empty = replace(RELEASE, events=(), rounds=())
    assert "released nothing" in site_statement(empty, "run")
    assert empty.epsilon == 0.0
    assert "released nothing" in run_statement([], "run").one_site
    record = privacy_record(empty, "run")
    assert (record["epsilon_spent"], record["noise_multiplier"], record["steps_executed"]) == (0.0, None, 0)


def test_sites_compose_for_a_person_at_several() -> None:
    """Disjoint people: the largest epsilon. One person at m sites: the composition over the worst m."""
    weak, strong = replace(RELEASE, site="weak", events=(steps(40),)), replace(RELEASE, events=(steps(10),))
    statement = run_statement([strong, weak, RELEASE], "run")
    assert f"({at_least(weak.epsilon)}, " in statement.one_site
    assert "weak" in statement.one_site
    table = {row.sites: row.epsilon for row in statement.up_to_m_sites}
    assert table == {
        1: compose_epsilon([steps(40)], 1e-5),
        2: compose_epsilon([steps(70)], 1e-5),
        3: compose_epsilon([steps(80)], 1e-5),
    }
    assert f"1: {at_least(table[1])}, 2: {at_least(table[2])}, 3: {at_least(table[3])}" in statement.text


@pytest.mark.parametrize(
    ("sites", "rows"),
    [
        (1, [1]),
        (5, [1, 2, 3, 4, 5]),
        (6, [*range(1, 7)]),
        (10, [*range(1, 6), 10]),
        (23, [*range(1, 6), 10, 20, 23]),
    ],
)
def test_the_table_starts_at_one_site_and_ends_at_all(sites: int, rows: list[int]) -> None:
    table = run_statement([replace(RELEASE, events=(steps(1, sigma=5.0),))] * sites, "run").up_to_m_sites
    assert [row.sites for row in table] == rows
    epsilons = [row.epsilon for row in table]
    assert epsilons == sorted(epsilons)


def test_privacy_record_can_be_recomputed_with_dp_accounting_alone() -> None:
    """Read back as JSON, with another library, another cell width and none of our code."""
    mixed = replace(RELEASE, events=(steps(10), steps(20, sigma=1.4)))
    record = privacy_record(mixed, "run")
    assert record["relation"] == "add or remove one record"
    accountant = pld_privacy_accountant.PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-4
    )
    for event in record["events"]:
        gaussian = dp_accounting.GaussianDpEvent(event["noise_multiplier"])
        accountant.compose(dp_accounting.PoissonSampledDpEvent(event["sample_rate"], gaussian), event["steps"])
    assert record["epsilon_spent"] == pytest.approx(accountant.get_epsilon(record["delta"]), abs=2e-3)
    assert record["epsilon_spent_prv"] == pytest.approx(record["epsilon_spent"], rel=0.03)
    assert record["steps_executed"] == sum(event["steps"] for event in record["events"])


def test_a_record_is_written_although_the_second_accountant_has_no_answer() -> None:
    """At delta 1e-14 PRV raises: once that happened after the budget was spent, and no record was written."""
    record = privacy_record(replace(RELEASE, delta=1e-14), "run")
    assert record["epsilon_spent"] == compose_epsilon(RELEASE.events, 1e-14)
    assert record["epsilon_spent_prv"] is None
    assert "rounding" in record["epsilon_spent_prv_missing"]
    assert privacy_record(RELEASE, "run")["epsilon_spent_prv_missing"] is None


def test_a_run_that_ended_early_promises_what_was_planned() -> None:
    """30 of 40 steps were executed: the first number is that of 40, everywhere; that of 30 stands beside it."""
    planned, executed = (compose_epsilon([steps(count)], 1e-5) for count in (40, 30))
    assert RELEASE.epsilon_promised == planned > executed
    record = privacy_record(RELEASE, "run", stopped_early=True)
    assert (record["epsilon_planned"], record["epsilon_spent"]) == (planned, executed)
    run = run_statement([RELEASE, replace(RELEASE, site="south")], "run", stopped_early=True)
    for text in (record["statement"], run.one_site):
        assert f"({at_least(planned)}, 1e-05)" in text
        assert f"of the executed ones it is {at_least(executed)}" in text
    assert [row.epsilon for row in run.up_to_m_sites] == [planned, compose_epsilon([steps(80)], 1e-5)]
    assert privacy_record(RELEASE, "run")["epsilon_planned"] is None
    # Rounds that were asked for twice count beyond the plan; nothing is promised below what was spent.
    more = replace(RELEASE, events=(steps(50),))
    assert more.epsilon_promised == more.epsilon_bound


@pytest.mark.parametrize("unit", ["record", "patient"])
@pytest.mark.parametrize("pretrained", [True, False])
def test_every_text_lists_all_that_is_not_covered(unit: str, pretrained: bool) -> None:
    """One list for the run's statement and each site's; a network for images was trained on nothing before."""
    release = replace(RELEASE, unit=unit, records_per_person=2 if unit == "patient" else None)
    uncovered = not_covered(unit, pretrained=pretrained)
    record = privacy_record(release, "run", pretrained=pretrained)
    whole = written(run_statement([release], "run", pretrained=pretrained))
    assert record["not_covered"] == whole["not_covered"] == list(uncovered)
    for text in (record["statement"], whole["text"]):
        assert all(item in text for item in uncovered)
        assert "The choice of settings" in text
        assert ("pre-trained" in text) == pretrained


def test_each_epsilon_is_of_its_own_delta() -> None:
    """Of what arrived, of the bound and of the table: none of them composed at another delta."""
    events = (steps(10), steps(20))
    for delta in (1e-3, 1e-7, 1e-12):
        waiting = replace(RELEASE, delta=delta, unanswered=(3,), per_round=steps(10))
        record = privacy_record(waiting, "run")
        assert record["epsilon_spent"] == compose_epsilon(events, delta)
        assert record["epsilon_bound"] == compose_epsilon([*events, steps(10)], delta)
        table = run_statement([waiting, replace(waiting, site="south")], "run").up_to_m_sites
        assert [row.epsilon for row in table] == [compose_epsilon([steps(40 * count)], delta) for count in (1, 2)]


def test_an_empty_statement_has_a_text() -> None:
    assert Statement.of("x").text.startswith("x\n\nNot covered: ")


# --- requests that were never answered ---

UNSURE = replace(RELEASE, unanswered=(3, 5), per_round=steps(4))


def test_a_request_that_was_never_answered_is_counted_as_executed() -> None:
    assert UNSURE.epsilon == RELEASE.epsilon
    assert pytest.approx(compose_epsilon([steps(38)], 1e-5), rel=1e-12) == UNSURE.epsilon_bound
    assert UNSURE.epsilon_bound > UNSURE.epsilon
    text = site_statement(UNSURE, "run")
    assert f"({at_least(UNSURE.epsilon_bound)}," in text
    assert "the requests of round 3, 5, which were never answered here" in text
    record = privacy_record(UNSURE, "run")
    assert record["rounds_unanswered"] == [3, 5]
    assert record["epsilon_spent"] == UNSURE.epsilon
    assert record["epsilon_bound"] == UNSURE.epsilon_bound


def test_a_site_that_never_answered_is_not_said_to_have_released_nothing() -> None:
    silent = replace(RELEASE, events=(), rounds=(), unanswered=(1,), per_round=steps(4))
    assert "released nothing" not in site_statement(silent, "run")
    assert f"({at_least(compose_epsilon([steps(4)], 1e-5))}," in site_statement(silent, "run")


def test_the_run_states_the_site_that_may_have_spent_most() -> None:
    sure = replace(RELEASE, site="sure", events=(steps(31),))
    assert UNSURE.epsilon < sure.epsilon < UNSURE.epsilon_bound
    statement = run_statement([sure, UNSURE], "run")
    assert at_least(UNSURE.epsilon_bound) in statement.one_site
    assert "counted as executed" in statement.one_site
    assert statement.up_to_m_sites[0].epsilon == UNSURE.epsilon_bound
    both = compose_epsilon([steps(31), steps(38)], 1e-5)
    assert statement.up_to_m_sites[1].epsilon == pytest.approx(both, rel=1e-12)


def test_without_protection_there_is_no_bound_either() -> None:
    assert math.isinf(replace(UNSURE, randomness="injected").epsilon_bound)
    assert privacy_record(replace(UNSURE, private=False, events=()), "run")["epsilon_bound"] is None


# --- persons as the unit ---

PATIENTS = replace(RELEASE, unit="patient", records_per_person=4)


@pytest.mark.parametrize("unit", ["patient", "customer"])
def test_a_statement_by_the_person_says_so(unit: str) -> None:
    release = replace(PATIENTS, unit=unit)
    text = site_statement(release, "run")
    for part in (
        f"({at_least(RELEASE.epsilon)}, 1e-05)", f"under add or remove one {unit} with all their records",
        f"Each {unit} enters a step by one coin, with at most 4 records of theirs, drawn anew each time",
        f"Epsilon holds for a {unit} with any number of records", f"A {unit} under several ids",
    ):  # fmt: skip
        assert part in text
    whole = written(run_statement([release, replace(release, site="south")], "run"))
    assert f"A {unit} whose records are all at one site" in whole["one_site"]
    assert f"A {unit} with records at each of m sites" in whole["text"]
    assert f"A {unit} under several ids" in " ".join(whole["not_covered"])
    for said in (text, whole["text"]):
        assert "one record" not in said
        assert "several records of one person" not in said.lower()
    assert len(whole["not_covered"]) == len(NOT_COVERED)
    record = privacy_record(release, "run")
    assert (record["unit"], record["records_per_person"]) == (unit, 4)
    assert record["relation"] == f"add or remove one {unit} with all their records"
    assert "with at most 1 record of theirs" in site_statement(replace(release, records_per_person=1), "run")


def test_units_are_never_mixed() -> None:
    """No number by the record stands where persons are spoken of: it would be false for everybody with two records."""
    with pytest.raises(PrivacyError, match=r"different units .patient, record.; none is stated"):
        run_statement([RELEASE, replace(PATIENTS, site="south")], "run")
    with pytest.raises(PrivacyError, match="how many records of each enter a step is not known"):
        site_statement(replace(PATIENTS, records_per_person=None), "run")
    for state in (site_statement, privacy_record):
        with pytest.raises(PrivacyError, match="no guarantee can be stated for the unit of privacy 'household'"):
            state(replace(RELEASE, unit="household"), "run")
    for text in (site_statement(RELEASE, "run"), run_statement([RELEASE], "run").text):
        assert "patient" not in text
        assert "customer" not in text
        assert "several records of one person" in text.lower()


# --- whole texts, to the letter: nothing may be missing from what a reader relies on ---

FULL = replace(
    RELEASE,
    unit="patient",
    records_per_person=3,
    events=(steps(10), steps(8, sigma=2.0)),
    updates=("a" * 64, "b" * 64),
    unanswered=(3, 5),
    per_round=steps(4),
    metrics=("accuracy", "loss"),
    metrics_mechanism=GaussianSteps(noise_multiplier=30.0, sample_rate=1.0, steps=2),
    metrics_sha256="c" * 64,
)
POSSIBLE = [*FULL.events, FULL.metrics_mechanism, steps(8)]


def test_the_events_of_a_release() -> None:
    assert FULL.steps == 18
    assert list(FULL.arrived_events) == POSSIBLE[:3]
    assert list(FULL.possible_events) == POSSIBLE
    assert list(FULL.planned_events) == [*POSSIBLE, steps(40 - 18 - 8)]
    assert replace(FULL, metrics_sha256=None).arrived_events == FULL.events
    # Without what a round executes, the last event stands for the steps that are left; unanswered rounds cannot count.
    assert list(replace(FULL, per_round=None).planned_events) == [*POSSIBLE[:3], steps(22, sigma=2.0)]
    for planned in (26, 25):
        assert list(replace(FULL, steps_planned=planned).planned_events) == POSSIBLE
    assert list(replace(FULL, steps_planned=27).planned_events) == [*POSSIBLE, steps(1)]


def test_the_whole_statement_of_a_site() -> None:
    planned, possible = (at_least(compose_epsilon(e, 1e-5)) for e in (FULL.planned_events, POSSIBLE))
    mechanisms = (
        "Poisson sampling rate 0.05, noise multiplier 1.0000, 10 executed steps; Poisson sampling rate 0.05, noise multiplier "
        "2.0000, 8 executed steps (and, counted as executed, the requests of round 3, 5, which were never answered here; the "
        "site's own ledger knows); and one release of counts (accuracy, loss) with noise of standard deviation 30.0000"
    )
    coins = (
        "Each patient enters a step by one coin, with at most 3 records of theirs, drawn anew each time; the mean of their "
        "gradients is clipped. Over a run more of them may be used. Epsilon holds for a patient with any number of records. "
    )
    uncovered = "Not covered: " + " ".join(not_covered("patient"))
    begin, end = "Everything site north released in run r is", "-differentially private under add or remove one patient"
    rest = "clipping norm 0.5, by PLD accounting, against an observer of every update."
    assert site_statement(FULL, "r") == (
        f"{begin} ({possible}, 1e-05){end} with all their records, for {mechanisms}, {rest} {AS_REPORTED} {coins}{uncovered}"
    )
    promised = (
        "That is the epsilon of all 40 planned steps, which is what was promised; of the executed ones it is "
        f"{possible}. "
    )
    lost = replace(FULL, metrics_sha256=None, records_per_person=1)
    assert site_statement(lost, "r", stopped_early=True) == (
        f"{begin} ({planned}, 1e-05){end} with all their records, for {mechanisms}, which was asked for and never arrived "
        f"here, {rest} {promised}{AS_REPORTED} {coins.replace('3 records', '1 record')}{uncovered}"
    )
    nothing = replace(FULL, events=(), metrics_mechanism=None)
    assert "for no update that arrived (and, counted as executed, the requests" in site_statement(nothing, "r")


def test_the_whole_statements_of_what_is_not_protected() -> None:
    assert site_statement(replace(FULL, private=False), "r") == (
        "Site north released updates of run r WITHOUT noise. Nothing about its records is protected."
    )
    assert site_statement(replace(FULL, randomness="injected"), "r") == (
        "NOT PRIVATE: the randomness of site north in run r was injected for a test. Whoever knows the seed can remove the "
        "noise, so no epsilon is stated."
    )
    empty = replace(FULL, events=(), unanswered=(), metrics_mechanism=None)
    assert site_statement(empty, "r") == "Site north released nothing in run r."
    assert run_statement([], "r").one_site == "Run r released nothing yet."
    found = run_statement([FULL, replace(FULL, randomness="injected")], "r", pretrained=False)
    assert found.not_covered == not_covered("patient", pretrained=False)


def test_the_whole_record_of_a_site() -> None:
    found = privacy_record(FULL, "r", stopped_early=True, pretrained=False)
    events = [asdict(event) for event in FULL.arrived_events]
    assert found.pop("epsilon_spent_prv") == pytest.approx(compose_epsilon(FULL.arrived_events, 1e-5), rel=0.02)
    assert found == {
        "site": "north",
        "run": "r",
        "unit": "patient",
        "records_per_person": 3,
        "relation": "add or remove one patient with all their records",
        "delta": 1e-5,
        "sample_rate": 0.05,
        "noise_multiplier": 2.0,
        "max_grad_norm": 0.5,
        "steps_planned": 40,
        "steps_executed": 18,
        "epsilon_budget": 8.0,
        "epsilon_spent": compose_epsilon(FULL.arrived_events, 1e-5),
        "epsilon_spent_prv_missing": None,
        "epsilon_bound": compose_epsilon(POSSIBLE, 1e-5),
        "epsilon_planned": compose_epsilon(FULL.planned_events, 1e-5),
        "rounds_unanswered": [3, 5],
        "update_sha256": ["a" * 64, "b" * 64],
        "accountant": ACCOUNTANT,
        "randomness": "os",
        "private": True,
        "declared_records": 1024,
        "rounds": [1, 2],
        "events": events,
        "metrics": {"names": ["accuracy", "loss"], **asdict(FULL.metrics_mechanism), "sha256": "c" * 64},  # type: ignore[call-overload]
        "statement": site_statement(FULL, "r", stopped_early=True, pretrained=False),
        "not_covered": list(not_covered("patient", pretrained=False)),
    }
    bare = privacy_record(replace(RELEASE, epsilon_budget=0.0), "r")
    assert [bare[name] for name in ("epsilon_budget", "epsilon_planned", "metrics")] == [None, None, None]
    assert bare["not_covered"] == list(not_covered("record"))


@pytest.mark.parametrize("stopped_early", [False, True])
def test_the_whole_statement_of_a_run(stopped_early: bool) -> None:
    other = replace(FULL, site="south", events=(steps(30),), unanswered=(), metrics_mechanism=None)
    events = [release.planned_events if stopped_early else release.possible_events for release in (FULL, other)]
    first, second = sorted((FULL, other), key=lambda r: -(r.epsilon_promised if stopped_early else r.epsilon_bound))
    worst = max(compose_epsilon(e, 1e-5) for e in events)
    both = compose_epsilon([*events[0], *events[1]], 1e-5)
    found = run_statement([FULL, other], "r", stopped_early=stopped_early)
    bound = at_least(max(FULL.epsilon_bound, other.epsilon_bound))
    early = (
        f" The run ended early: this is the epsilon of all 40 planned steps, which is what was promised; of the executed ones it "
        f"is {bound}."
    )
    assert found.one_site == (
        "Run r, 2 sites. A patient whose records are all at one site: everything released about them is "
        f"({at_least(worst)}, 1e-05)-differentially private under add or remove one patient with all their records, by PLD "
        f"accounting, against an observer of every update of every site; the largest epsilon of a site, {first.site}. "
        f"{AS_REPORTED}{early if stopped_early else ''} Requests that were never answered here are counted as executed."
    )
    assert first.site != second.site
    assert found.up_to_m_sites == (SitesEpsilon(sites=1, epsilon=worst), SitesEpsilon(sites=2, epsilon=both))
    assert found.not_covered == (*not_covered("patient"), *([STOPPED_EARLY] if stopped_early else []))
    assert written(found) == {
        "one_site": found.one_site,
        "up_to_m_sites": [{"sites": 1, "epsilon": worst}, {"sites": 2, "epsilon": both}],
        "not_covered": list(found.not_covered),
        "text": f"{found.one_site}\n\nA patient with records at each of m sites is protected with epsilon (m: epsilon) 1: "
        f"{at_least(worst)}, 2: {at_least(both)}.\n\nNot covered: {' '.join(found.not_covered)}",
    }


def test_promises_of_shares_are_the_largest_of_any_site() -> None:
    """And of the attempts that were made, in which sites differ, the most."""
    shared = replace(RELEASE, unanswered=(), shared=SharedNoise(honest=4, colluding=1))
    killed = replace(shared, site="south", events=(steps(2),), rounds=(1,))
    for releases in ([shared, killed], [killed, shared]):
        told = run_statement(releases, "r").one_site
        assert told.startswith(
            "Run r, 2 sites, secure aggregation with shared noise, for a record at one honest site; both promises are the same "
            "at every site. First promise, against the coordinator and up to 1 site that works with it: what they learn is "
            f"({at_least(shared.epsilon_promised)}, 1e-05)"
        )
        assert (
            f"of those that were made the first is at most {at_least(shared.epsilon_bound)}. Assumed honest but for 1"
            in told
        )
    assert f"the first is {at_least(killed.epsilon_bound)}. Executed" in site_statement(killed, "r")
    # One that released metrics besides promises less.
    metrics = GaussianSteps(noise_multiplier=5.0, sample_rate=1.0, steps=1)
    louder = replace(shared, site="west", metrics=("loss",), metrics_mechanism=metrics, metrics_sha256="c" * 64)
    told = run_statement([shared, louder], "r").one_site
    assert "at one honest site; both promises are the largest of a site, west. First promise" in told
    assert f"({at_least(louder.epsilon_promised)}, 1e-05)" in told
    assert f"({at_least(louder.epsilon_alone or 0)}, 1e-05)" in told


def test_units_without_a_relation_are_refused_by_name() -> None:
    with pytest.raises(PrivacyError, match="unit of privacy 'word'; known: record, site, patient, customer"):
        relation("word")
    assert relation("site") == "add or remove one site"
    other = replace(RELEASE, unit="customer", records_per_person=1)
    with pytest.raises(PrivacyError, match=r"releases of run r are by different units \(customer, record\); none"):
        run_statement([RELEASE, other], "r")
    with pytest.raises(PrivacyError, match="the unit is the customer, but how many records of each enter a step"):
        site_statement(replace(other, records_per_person=None), "r")


def test_how_records_enter_a_step_is_told_of_persons_and_in_the_right_number() -> None:
    """And of records nothing: the whole of what stands between the promise and what it does not cover."""
    told = site_statement(RELEASE, "r")
    assert told.split(AS_REPORTED)[1].startswith(" Not covered")
    for most, words in ((1, "at most 1 record of theirs"), (2, "at most 2 records of theirs")):
        release = replace(RELEASE, unit="patient", records_per_person=most)
        assert words in site_statement(release, "r")


@pytest.mark.parametrize("release", UNPROTECTED)
def test_the_run_of_a_site_without_protection_keeps_unit_and_what_is_not_covered(release: SiteRelease) -> None:
    by_patient = replace(release, unit="patient", records_per_person=1)
    found = run_statement([by_patient], "r", pretrained=False)
    assert found.one_site == site_statement(by_patient, "r", pretrained=False)
    assert found.not_covered == not_covered("patient", pretrained=False)


def test_what_is_not_covered_stands_sentence_by_sentence() -> None:
    shared = replace(RELEASE, unanswered=(), shared=SharedNoise(honest=4, colluding=1))
    for release in (RELEASE, shared):
        told = site_statement(release, "r").partition("Not covered: ")[2]
        sentences = re.split(r"(?<=[.]) ", told)
        assert len(sentences) > 3
        assert all(one[0].isalnum() and one.endswith(".") for one in sentences), sentences
