"""Both reports of noise that sites share: what they say is true of it, and where records and job differ the job counts."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from server.reports.compliance import reading
from server.reports.compliance.content import compose_document
from server.reports.compliance.facts import Facts
from server.reports.compliance.html import render_html
from server.reports.compliance.reading import read_facts
from server.reports.run import write_report
from server.rounds.observer import Observer
from shared.epsilons import rounded_up
from shared.privacy.accountant.cross_check import prv_cross_check
from shared.privacy.accounting import GaussianSteps, compose_epsilon, merged, noise_of_sum
from simulations.running.accounts import simulated_accounts
from simulations.running.engine import run_scenario
from simulations.scenario import load_scenario

NOW = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)
# Two rounds and two spare attempts of three sites, of which two are counted on.
ALONE = (GaussianSteps(noise_multiplier=1.0, sample_rate=0.25, steps=4),)
SUMMED = (replace(ALONE[0], noise_multiplier=noise_of_sum(1.0, 2)),)
MADE = (replace(SUMMED[0], steps=2),)
SHARES: dict[str, Any] = {
    "training": {"rounds": 2, "local_steps": 1, "optimizer": "sgd", "learning_rate": 0.5},
    "privacy": {"mechanism": "distributed", "max_colluding": 0, "spare_attempts": 2},
    "federation": {"min_sites": 2},
}


@pytest.fixture(scope="module")
def honest_run(write_scenario: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run of three sites that share the noise; tests must not change it."""
    folder = tmp_path_factory.mktemp("shares")
    run_scenario(load_scenario(write_scenario(folder, **SHARES)), folder / "run", observer=lambda arm: Observer())
    return folder / "run"


@pytest.fixture
def run(honest_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest_run, tmp_path / "run"))


def forge(run: Path, **changes: Any) -> None:
    """Change every site's record."""
    for path in run.glob("sites/*/privacy.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def page(facts: Facts) -> str:
    """Return the text of the report, a blank between cells."""
    document = compose_document(facts, now=NOW, signer=None, file_name="report.html")
    return text_of(render_html(document, NOW).decode())


def text_of(written: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", written)).split())


def stated(facts: Facts) -> tuple[Any, ...]:
    headline = facts.headline
    assert headline is not None
    return (
        headline.epsilon,
        facts.epsilon_alone,
        facts.guarantees[0].statement,
        [site.statement for site in facts.sites],
    )


def test_an_honest_run_has_no_discrepancy(honest_run: Path) -> None:
    facts = read_facts(honest_run)
    assert facts.discrepancies == ()
    assert facts.epsilon_alone is not None
    assert facts.headline is not None
    assert facts.headline.epsilon < facts.epsilon_alone


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shared": {"honest": 7, "colluding": 0}}, "noise that 7 honest sites share"),
        ({"shared": {"honest": 2, "colluding": 5}}, "against the coordinator and up to 5 sites that work with it"),
        ({"shared": None, "epsilon_alone": None}, "recorded with all its noise at each site"),
        ({"steps_planned": 2}, "recorded with 2 planned steps, the job plans 4"),
        ({"epsilon_alone": 0.5}, "recorded epsilon 0.5000 for what it sends by itself"),
        ({"epsilon_planned": 0.5}, "recorded epsilon 0.5000 for its whole plan"),
        ({"epsilon_planned": None}, "recorded epsilon none for its whole plan"),
    ],
)
def test_what_a_record_promises_beyond_the_job_is_never_repeated(
    run: Path, honest_run: Path, changes: dict[str, Any], said: str
) -> None:
    forge(run, **changes)
    facts = read_facts(run)
    assert sum(said in problem for problem in facts.discrepancies) == 3
    assert stated(facts) == stated(read_facts(honest_run))


def test_noise_that_no_job_shares_is_not_divided_among_sites(
    write_scenario: Callable[..., Path], tmp_path: Path
) -> None:
    run_scenario(
        load_scenario(write_scenario(tmp_path, training={"rounds": 1})),
        tmp_path / "run",
        observer=lambda arm: Observer(),
    )
    before = stated(read_facts(tmp_path / "run"))
    forge(tmp_path / "run", shared={"honest": 100, "colluding": 0}, steps_planned=1)
    facts = read_facts(tmp_path / "run")
    assert stated(facts) == before
    assert any("noise that 100 honest sites share" in problem for problem in facts.discrepancies)
    assert any("1 planned steps, the job plans 2" in problem for problem in facts.discrepancies)


def test_what_left_a_site_is_described_as_it_was(honest_run: Path) -> None:
    told = page(read_facts(honest_run))
    assert (
        "In each round the coordinator sent the adapter out. Each site clipped every record's part of the gradient, added its "
        "share of the noise to their sum, and sent the result under masks, which cancel only in the sum over all sites. The "
        "coordinator took the optimiser's step with that sum. No record left a site."
    ) in told
    assert (
        "Each update is the site's sum of clipped gradients with its share of the noise, under the masks of one attempt; it is "
        "named by the SHA-256 of the message of these masked words. If the masks fail, it keeps to the second promise."
    ) in told
    assert "2 rounds of one step of the coordinator, and 2 spare attempts" in told
    for wrong in ("sites improved it", "trained adapter after clipping", "steps at each site", "1 step at each site"):
        assert wrong not in told


def test_both_promises_and_what_was_spent_have_a_second_accountant(honest_run: Path) -> None:
    facts = read_facts(honest_run)
    told, site = page(facts), facts.sites[0]
    assert [(one.epsilon, one.epsilon_prv) for one in (*site.promises, site)] == [
        (compose_epsilon(events, 1e-5), prv_cross_check(events, 1e-5).epsilon) for events in (SUMMED, ALONE, MADE)
    ]
    assert [one.recorded for one in site.promises] == [site.record.epsilon_planned, site.record.epsilon_alone]
    for name in ("site-1", "site-2", "site-3"):
        for title, events in (
            ("first promise, planned", SUMMED),
            ("second promise, planned", ALONE),
            ("first promise, attempts made", MADE),
        ):
            prv = prv_cross_check(events, 1e-5).epsilon
            assert prv is not None
            found = rounded_up(compose_epsilon(events, 1e-5), 4)
            assert f"{name} {title} {found} {rounded_up(prv, 4)} {found} yes" in told
    assert (
        "Two accountants of different construction agree within their error, on both promises of every site and on what was "
        "spent. The epsilons of a person at several sites are by one of them alone."
    ) in told
    assert "both promises from all planned attempts, what was spent from those that were made." in told
    assert "every epsilon was computed anew from what was executed" not in told


def test_of_a_person_in_one_sum_several_times_there_is_one_accountant(honest_run: Path) -> None:
    facts = read_facts(honest_run)
    rows = facts.guarantees[0].composed
    assert [row.sites for row in rows] == [1, 2, 3]
    assert [row.epsilon_prv for row in rows] == [prv_cross_check(SUMMED, 1e-5).epsilon, None, None]
    told = page(facts)
    assert "the second accountant, which has no number for whoever is in one sum several times." in told
    assert f"2 {rounded_up(rows[1].epsilon)} none not compared" in told


def test_where_the_second_accountant_has_no_number_the_report_says_so(
    honest_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_alone(events: Iterable[GaussianSteps], delta: float) -> float | None:
        return None if merged(events) == ALONE else prv_cross_check(events, delta).epsilon

    monkeypatch.setattr(reading, "_prv", none_alone)
    facts = read_facts(honest_run)
    assert facts.discrepancies == ()
    told, found = page(facts), rounded_up(compose_epsilon(ALONE, 1e-5), 4)
    assert f"site-1 second promise, planned {found} none {found} not compared" in told
    assert "and on what was spent, wherever the second gives a number." in told


def test_a_promise_that_the_second_accountant_contradicts_is_a_discrepancy(
    honest_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_prv", lambda events, delta: 9.0 if merged(events) == ALONE else None)
    facts = read_facts(honest_run)
    assert [problem.partition(": the acc")[0] for problem in facts.discrepancies] == [
        f"Site site-{number}, second promise, planned" for number in (1, 2, 3)
    ]
    assert "9.0000" in page(facts)


def test_promises_that_are_alike_are_of_no_single_site(honest_run: Path) -> None:
    first, second = (rounded_up(compose_epsilon(events, 1e-5)) for events in (SUMMED, ALONE))
    told = page(read_facts(honest_run))
    assert (
        f"epsilon {first} at delta 1e-5 for one record at one honest site, against the coordinator; {second} against everybody "
        "else together, if secure aggregation fails completely; both promises are the same at every site"
    ) in told
    assert "for a record at one honest site; both promises are the same at every site. First promise" in told
    assert "at site site-" not in told
    assert "the largest of" not in told


def test_accounts_have_a_column_for_what_counts_by_itself(honest_run: Path) -> None:
    facts = read_facts(honest_run, simulated_accounts(honest_run))
    told = page(facts)
    assert "At export By itself Its cap Charged steps" in told
    assert told.count("with each of them by itself, as if secure aggregation had failed") == 1
    for ledger in facts.ledgers:
        assert f"{rounded_up(ledger.now)} {rounded_up(ledger.now_alone)} {ledger.export.cap_alone:.15g} 2 1e-5" in told


def test_the_odds_are_told_of_the_second_promise_too(honest_run: Path) -> None:
    epsilon = rounded_up(compose_epsilon(ALONE, 1e-5))
    told = page(read_facts(honest_run))
    assert f"if secure aggregation fails completely, epsilon is {epsilon} and the factor at most " in told


# --- the run report ---


def test_the_run_report_tells_what_was_promised_and_what_was_spent(run: Path) -> None:
    """Of a site that was killed in the first round: what it spent, its check beside it, and both promises with their limits."""
    path = run / "sites" / "site-1" / "privacy.json"
    record = json.loads(path.read_text())
    killed = {"steps_executed": 1, "epsilon_spent": 0.2345, "epsilon_bound": 0.2345, "epsilon_spent_prv": 0.2456}
    path.write_text(json.dumps(record | killed))
    written = write_report(run).read_text()
    told = text_of(written)
    first, second = (rounded_up(compose_epsilon(events, 1e-5), 2) for events in (SUMMED, ALONE))
    budget = record["epsilon_budget"]
    assert (
        "What each site declared, promised and spent, at delta 1e-5 Site Declared records Sample rate Noise of a share Attempts, "
        "of planned Promised, of the budget Spent (PRV check) Alone, of the job's limit site-1 "
        f"{record['declared_records']} 0.25 1.0000 1 of 4 {first} of {budget:.15g} 0.24 (0.25) {second} of not set site-2"
    ) in told
    assert "Epsilon spent (filled) and promised (line) against the site's budget (light)." in told
    assert f"0.24 of {budget:.15g}" in told.split("Epsilon spent (filled)")[0]
    assert f"{first} of {budget:.15g}" not in told.split("Epsilon spent (filled)")[0]
    assert "Bar plot of epsilon spent and promised against the budget" in written
    assert "It stands beside what was spent, and is of the same attempts." in told
    assert "the epsilon before it of all that were planned" not in told


def test_the_run_report_names_no_weights_of_a_sum(run: Path) -> None:
    """All of different sizes: each brings the same noise, and none is told to mend it by weights."""
    for number in (1, 2, 3):
        path = run / "sites" / f"site-{number}" / "privacy.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"declared_records": 4**number}))
    told = text_of(write_report(run).read_text())
    assert told.count("33.3 % of the noise") == 3
    assert "each adds an equal share, however many records it declares" in told
    assert "All settings in job.json, but for weights of sites, which a sum does not have" in told
    for wrong in ("Weight ", "aggregation.weights", "largest_share", "weights declared", "far above the share"):
        assert wrong not in told
    assert "server_learning_rate" in told


def test_epsilon_so_far_is_what_was_spent(run: Path) -> None:
    spent = rounded_up(compose_epsilon(MADE, 1e-5), 2)
    assert f"Epsilon, largest of all sites, so far: {spent}, budget" in write_report(run).read_text()
