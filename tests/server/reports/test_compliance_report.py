"""The compliance report: it states what was executed, says first what does not fit together, and every byte of it is signed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typst

from server.reports.compliance import Account, checks, load_account, write_compliance_report
from server.reports.compliance.content import compose_document
from server.reports.compliance.document import Document, Notice
from server.reports.compliance.facts import CentralFacts, Facts
from server.reports.compliance.html import render_html
from server.reports.compliance.ledgers import ledger_facts
from server.reports.compliance.log import JudgedUpdate, LogFacts
from server.reports.compliance.pdf import render_pdf
from server.reports.compliance.reading import central_guarantee, read_central, read_facts
from server.reports.run.reading import read_run
from server.rounds.observer import Observer
from server.runs.folder import load_job
from server.store.home import CoordinatorHome
from shared import fonts
from shared.epsilons import rounded_up
from shared.errors import LedgerError, RunError
from shared.job.job import Job
from shared.job.parsing import parse
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.ledger_export import LedgerExport, save_export
from shared.privacy.statement import without_uncovered
from shared.trust import audit_log
from shared.trust.audit_log import Event
from shared.trust.signed_file import Signer, signature_file
from shared.trust.signed_folder import sign_folder
from shared.trust.signed_job import sign_job
from shared.trust.signing import SigningKey, save_signing_key
from simulations.running.accounts import simulated_accounts
from simulations.running.engine import run_scenario
from simulations.scenario import load_scenario

NOW = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)
# Two rounds of two steps at the noise and rate of the fixture's job.
EVENTS = (GaussianSteps(noise_multiplier=1.0, sample_rate=0.25, steps=4),)
EPSILON = compose_epsilon(EVENTS, 1e-5)


@pytest.fixture(scope="session")
def small_run(write_scenario: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run of three sites, with randomness of the operating system; tests must not change it."""
    folder = tmp_path_factory.mktemp("compliance")
    scenario = load_scenario(write_scenario(folder, training={"rounds": 2}))
    run_scenario(scenario, folder / "run", observer=lambda arm: Observer())
    return folder / "run"


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(small_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def facts(small_run: Path) -> Facts:
    return read_facts(small_run, simulated_accounts(small_run))


@pytest.fixture
def coordinator(run: Path, tmp_path: Path) -> CoordinatorHome:
    """A coordinator's folder that the run was made in: signed job, audit log, keys."""
    home = CoordinatorHome(tmp_path / "coordinator")
    key = SigningKey.from_bytes(bytes(range(32)))
    place = home.jobs / "0001-small"
    place.mkdir(parents=True)
    home.config.write_text('name = "consortium"\n')
    save_signing_key(home.round_key, key, None)
    (home.path / "round.pub").write_text(key.verify_key.text + "\n")
    job = load_job(run)
    signed = sign_job(
        job,
        signer=SigningKey.from_bytes(bytes([7]) * 32),
        coordinator=key.verify_key,
        issued=NOW,
        not_after=NOW + timedelta(days=1),
    )
    (place / "signed_job.json").write_text(signed.to_json())
    log = home.open_log(key)
    for path in sorted(run.glob("sites/*/privacy.json")):
        record = json.loads(path.read_text())
        for number, sha256 in zip(record["rounds"], record["update_sha256"], strict=True):
            details = {"job": job.sha256, "round": number, "site": record["site"], "sha256": sha256, "bytes": 1234}
            log.append(Event.UPDATE_ACCEPTED, **details)
    shutil.move(run, place / "run")
    return home


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_sites(run: Path, **changes: Any) -> None:
    for path in run.glob("sites/*/privacy.json"):
        edit(path, **changes)


def compose(facts: Facts, signer: Signer | None = None) -> Document:
    return compose_document(facts, now=NOW, signer=signer, file_name="report.pdf")


def text_of(page: bytes) -> str:
    """Return the text that a reader sees."""

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.parts: list[str] = []
            self.hidden = False

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.hidden = tag == "style"

        def handle_data(self, data: str) -> None:
            if not self.hidden:
                self.parts.append(data)

    reader = Reader()
    reader.feed(page.decode())
    return " ".join(" ".join(reader.parts).split())


def page_of(run: Path, *accounts: Account) -> str:
    return text_of(render_html(compose(read_facts(run, accounts)), NOW))


# What it states


def test_epsilon_is_recomputed_from_what_was_executed(facts: Facts) -> None:
    assert [site.epsilon for site in facts.sites] == [pytest.approx(EPSILON)] * 3
    assert [site.epsilon_prv for site in facts.sites] == [pytest.approx(EPSILON, abs=0.03)] * 3
    (guarantee,) = facts.guarantees
    assert guarantee.unit == "record"
    assert [row.sites for row in guarantee.composed] == [1, 2, 3]
    assert guarantee.composed[2].epsilon == pytest.approx(compose_epsilon(EVENTS * 3, 1e-5))
    assert facts.discrepancies == ()


def test_the_report_has_every_part(facts: Facts) -> None:
    page = text_of(render_html(compose(facts), NOW))
    titles = [
        "What was trained",
        "By whom",
        "On what kind of data",
        "The guarantee",
        "The sites' ledgers before and after",
        "Every release",
        "Accountants compared",
        "Audits",
        "Versions and hashes",
        "Limits of the guarantee, in plain words",
        "Signatures",
    ]
    places = [page.index(f"{number}. {title}") for number, title in enumerate(titles, start=2)]
    assert places == sorted(places)
    for site in facts.sites:
        assert without_uncovered(site.statement, facts.not_covered) in page
        assert all(sha256 in page for sha256 in site.release.updates)
    for limit in facts.guarantees[0].statement.not_covered:
        assert limit in page
    assert facts.guarantees[0].statement.one_site in page
    assert facts.job.sha256 in page


def test_ledgers_before_and_after(facts: Facts) -> None:
    assert len(facts.ledgers) == 3
    for ledger in facts.ledgers:
        assert (ledger.before, ledger.charges, ledger.steps) == (0.0, 2, 4)
        assert ledger.after == ledger.now == pytest.approx(EPSILON)
        assert ledger.account.from_ledger


def test_an_account_with_earlier_and_later_jobs(facts: Facts, tmp_path: Path) -> None:
    export = facts.ledgers[0].export
    other = export.charges[0].model_copy(update={"job_id": "another"})
    more = export.model_copy(update={"charges": (other, export.charges[0], other, export.charges[1], other)})
    save_export(tmp_path / "export.json", more)
    account = load_account(tmp_path / "export.json")
    found = ledger_facts(account, facts.job.sha256, [site.release for site in facts.sites])
    steps = [
        compose_epsilon([EVENTS[0].__class__(noise_multiplier=1.0, sample_rate=0.25, steps=n)], 1e-5)
        for n in (2, 8, 10)
    ]
    assert [found.before, found.after, found.now] == pytest.approx(steps)
    assert (found.others_between, found.account.from_ledger) == (1, False)


def test_requests_never_answered_count_as_executed(run: Path) -> None:
    edit(run / "sites" / "site-1" / "privacy.json", rounds_unanswered=[2], rounds=[1], update_sha256=["ab" * 32])
    edit(run / "sites" / "site-1" / "privacy.json", events=[{"noise_multiplier": 1.0, "sample_rate": 0.25, "steps": 2}])
    site = read_facts(run).sites[0]
    assert site.epsilon == pytest.approx(EPSILON)
    assert site.epsilon_arrived is not None
    assert site.epsilon_arrived < EPSILON
    assert "counted as executed" in page_of(run)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"events": [{"noise_multiplier": 1.0, "sample_rate": 0.25, "steps": 1}]},
            "1 steps are recorded for 2 updates",
        ),
        ({"events": [{"noise_multiplier": 5.0, "sample_rate": 0.25, "steps": 4}]}, "did not add the noise"),
        ({"events": [{"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 4}]}, "did not sample at the job's rate"),
        ({"delta": 1e-2}, "recorded at delta 0.01"),
    ],
)
def test_a_record_that_is_not_the_plan_s_is_a_discrepancy(run: Path, changes: dict[str, Any], problem: str) -> None:
    # Whoever edits a record can make its epsilons fit.
    edit_sites(run, **changes)
    for site in read_facts(run).sites:
        edit(run / "sites" / site.release.site / "privacy.json", epsilon_spent=site.epsilon, epsilon_bound=site.epsilon)
    assert any(problem in found for found in read_facts(run).discrepancies)


def test_metrics_that_no_record_counts_are_a_discrepancy(run: Path) -> None:
    (run / "site_metrics.json").write_text('{"noise_multiplier": 2.0, "sites": {"site-1": {"accuracy": [1.0, 2.0]}}}')
    assert any("its privacy record does not count them" in found for found in read_facts(run).discrepancies)


METRIC = {"noise_multiplier": 2.0, "sample_rate": 1.0, "steps": 1}


@pytest.mark.parametrize("arrived", [True, False])
def test_released_metrics_are_composed(run: Path, arrived: bool) -> None:
    events = [dataclasses.asdict(event) for event in EVENTS] + ([METRIC] if arrived else [])
    edit_sites(run, events=events, metrics={"names": ["accuracy"], **METRIC, "sha256": "cd" * 32 if arrived else None})
    facts = read_facts(run)
    metric = GaussianSteps(**METRIC)
    assert facts.sites[0].epsilon == pytest.approx(compose_epsilon([*EVENTS, metric], 1e-5))
    assert (facts.sites[0].epsilon == facts.sites[0].epsilon_arrived) == arrived
    assert all(site.accountants_agree for site in facts.sites)
    assert any("recorded epsilon" in problem for problem in facts.discrepancies)
    assert not any("did not add" in problem or "did not sample" in problem for problem in facts.discrepancies)
    assert "one release of counts (accuracy)" in page_of(run)


@pytest.mark.parametrize(
    "metrics", [{"names": ["accuracy"], "sha256": "cd" * 32}, METRIC | {"names": [], "sha256": "cd"}]
)
def test_metrics_that_are_not_accounted_for_stop_the_report(run: Path, metrics: dict[str, object]) -> None:
    edit_sites(run, metrics=metrics)
    with pytest.raises(RunError, match=r"no report is made|is damaged"):
        read_facts(run)


def test_keys_of_later_versions_change_nothing(run: Path, facts: Facts) -> None:
    event = {"noise_multiplier": 1.0, "sample_rate": 0.25, "steps": 4, "later": {"a": 1}}
    edit_sites(run, records_per_person=None, central={"clients": 100}, events=[event])
    edit(run / "statement.json", central={"epsilon": 1.0})
    edit(run / "run.json", later=[1])
    later = read_facts(run, simulated_accounts(run))
    assert later.sites == facts.sites
    assert later.discrepancies == ()


# What it must not state


def test_a_recorded_epsilon_that_differs_is_a_discrepancy(run: Path) -> None:
    edit(run / "sites" / "site-2" / "privacy.json", epsilon_spent=0.1234, epsilon_bound=0.1234)
    facts = read_facts(run)
    assert facts.sites[1].epsilon == pytest.approx(EPSILON)
    document = compose(facts)
    first = document.lead[0]
    assert isinstance(first, Notice)
    assert first.level == "danger"
    assert "site-2" in first.items[0]
    # It stands where it is compared, and nowhere else.
    page = text_of(render_html(document, NOW))
    assert page.count("0.1234") == 2
    assert "Nothing was found that does not fit" not in page


@pytest.mark.parametrize(
    "changes", [{"private": False, "events": []}, {"randomness": "injected"}], ids=["no noise", "injected"]
)
def test_without_privacy_no_epsilon_is_printed(run: Path, changes: dict[str, Any]) -> None:
    edit_sites(run, epsilon_spent=None, epsilon_bound=None, **changes)
    noise = "after"
    if not changes.get("private", True):
        job = json.loads((run / "job.json").read_text())
        edit(run / "job.json", privacy=job["privacy"] | {"mechanism": "none"})
        noise = "without"
    page = page_of(run)
    assert f"Each update is the trained adapter {noise} clipping and noise, and is named" in page
    assert "No privacy guarantee holds for this run." in page
    assert not re.search(r"epsilon \d", page.replace("statement.json states epsilon", ""))
    assert not re.search(r"\(\d+\.\d+, ", page)


def test_steps_that_cannot_be_accounted_for_stop_the_report(run: Path) -> None:
    edit_sites(run, events=[])
    with pytest.raises(RunError, match="no noisy step is recorded"):
        read_facts(run)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"events": [{"noise_multiplier": 0.7, "sample_rate": 0.25, "steps": 4}]},
            "did not add the noise that the job says",
        ),
        (
            {"events": [{"noise_multiplier": 1.0, "sample_rate": 0.5, "steps": 4}]},
            "did not sample at the job's rate, 0.25",
        ),
        ({"epsilon_budget": 0.5}, "more in this run than its cap of 0.5"),
        ({"unit": "patient", "records_per_person": 4}, "the job's unit is record"),
        (
            {"rounds": [1], "update_sha256": ["ab" * 32]},
            "aggregated in round 2, which its privacy record does not count",
        ),
    ],
)
def test_what_does_not_fit_is_said(run: Path, changes: dict[str, Any], said: str) -> None:
    edit(run / "sites" / "site-1" / "privacy.json", **changes)
    assert any(said in problem for problem in read_facts(run).discrepancies)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rounds": [1, 2], "update_sha256": ["ab" * 32]}, "2 rounds and 1 hashes of updates"),
        ({"events": []}, "no noisy step is recorded"),
        ({"delta": 0.0}, "delta is 0"),
        ({"events": [{"noise_multiplier": 0.2, "sample_rate": 1.0, "steps": 10**7}]}, "its epsilon cannot be bounded"),
    ],
)
def test_no_report_is_made_of_what_cannot_be_accounted_for(run: Path, changes: dict[str, Any], reason: str) -> None:
    edit(run / "sites" / "site-1" / "privacy.json", **changes)
    with pytest.raises(RunError, match=rf"privacy\.json cannot be accounted for: .*{reason}.*no report is made of it"):
        read_facts(run)


def test_an_update_shorter_than_its_noise_is_a_discrepancy(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[2]["doubted"] = {"site-1": "its update is 0.8 long"}
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    said = "would make it in 1 of its rounds, first in round 2; it seems to add too little noise"
    assert any(said in problem for problem in read_facts(run).discrepancies)


def test_a_statement_that_differs_is_a_discrepancy(run: Path) -> None:
    edit(run / "statement.json", up_to_m_sites=[{"sites": 1, "epsilon": 0.5}])
    assert any("statement.json states epsilon 0.5000" in problem for problem in read_facts(run).discrepancies)


def test_another_job_is_a_discrepancy(run: Path) -> None:
    edit(run / "run.json", job_sha256="0" * 64)
    assert "job.json is not the job that run.json names by its hash." in read_facts(run).discrepancies


def test_a_run_that_does_not_name_its_job_is_not_said_to_agree(facts: Facts, run: Path) -> None:
    agree, unknown = "the one that the run names by its hash", "Not checked: whether the job"
    assert agree in text_of(render_html(compose(facts), NOW))
    edit(run / "run.json", job_sha256=None)
    text = text_of(render_html(compose(read_facts(run)), NOW))
    assert agree not in text
    assert unknown in text


def test_audits_are_shown_and_a_violated_one_comes_first(run: Path) -> None:
    audit = {
        "tier": 1,
        "audited": "the mechanism",
        "claim": 3.0,
        "delta": 1e-5,
        "alpha": 0.001,
        "lower_bound": 2.5,
        "ceiling": 7.0,
        "verdict": "consistent",
        "reasons": ["noise as declared"],
        "job_sha256": load_job(run).sha256,
    }
    (run / "audit").mkdir(exist_ok=True)
    (run / "audit" / "tier1.json").write_text(json.dumps(audit))
    page = page_of(run)
    assert "noise as declared" in page
    assert "tier 1 consistent" in page
    (run / "audit" / "tier1.json").write_text(json.dumps(audit | {"verdict": "violated", "job_sha256": "1" * 64}))
    facts = read_facts(run)
    assert len(facts.discrepancies) == 2
    assert "The audit of tier 1 says: violated" in facts.discrepancies[0]


def test_a_ledger_that_does_not_cover_the_releases(facts: Facts) -> None:
    export = facts.ledgers[0].export
    for changes, said in (
        ({"charges": export.charges[:1]}, "2 of 4 executed steps"),
        ({"unit": "patient"}, "counts the unit patient"),
        ({"declared_records": 4096}, "declares the size 4,096"),
        ({"epsilon": 0.5}, "above its cap of 0.5"),
        ({"site": "stranger"}, "no record of a site of this name"),
    ):
        account = Account(file=Path("export.json"), export=_changed(export, **changes))
        found = ledger_facts(account, facts.job.sha256, [site.release for site in facts.sites])
        assert any(said in problem for problem in found.problems), (said, found.problems)


def _changed(export: LedgerExport, **changes: Any) -> LedgerExport:
    return export.model_copy(update=changes)


# With a trusted coordinator


CENTRAL_JOB = parse(
    Job,
    {
        "name": "many",
        "task": {"kind": "sequence_classification", "labels": ["x", "y"]},
        "training": {"rounds": 3},
        "privacy": {
            "mechanism": "central",
            "unit": "site",
            "delta": 1e-4,
            "noise_multiplier": 1.5,
            "central": {"num_sites": 200, "site_sample_rate": 0.3, "clip_norm": 0.1},
        },
        "federation": {"min_sites": 100},
    },
    source="test",
)


def central_record(path: Path, **changes: Any) -> CentralFacts:
    """Write and read the record of a run under central DP."""
    event = {"noise_multiplier": 1.5, "sample_rate": 0.3, "steps": 3}
    mechanism = GaussianSteps(**event)  # type: ignore[arg-type]
    record = {
        "unit": "site",
        "delta": 1e-4,
        "num_sites_declared": 200,
        "randomness": "os",
        "epsilon_spent": compose_epsilon([mechanism], 1e-4),
        "events": [event],
        "rounds": [1, 2, 2],
        "clip_norm_first": 0.1,
        "update_noise_multiplier": 1.6,
        "count_noise": 4.0,
        "steps_planned": 3,
        "statement": "It is (0.001, 1e-9)-differentially private.",
        "trusts": ["coordinator"],
    }
    path.write_text(json.dumps(record | changes))
    return read_central(path)


def central_page(facts: Facts, central: CentralFacts) -> str:
    guarantee = central_guarantee(central, CENTRAL_JOB)
    problems = tuple(checks.central_discrepancies(central, CENTRAL_JOB))
    changed = dataclasses.replace(
        facts, central=central, sites=(), ledgers=(), releases=(), guarantees=(guarantee,), discrepancies=problems
    )
    return text_of(render_html(compose(changed), NOW))


def test_central_privacy_is_stated_for_sites_and_names_whom_it_trusts(facts: Facts, tmp_path: Path) -> None:
    central = central_record(tmp_path / "privacy.json")
    page = central_page(facts, central)
    assert "TRUSTED COORDINATOR" in page
    assert "0.001" not in page, "a recorded sentence was repeated"
    assert f"epsilon {rounded_up(central.epsilon or 0)} at delta 0.0001 for one site over 200 declared sites" in page
    assert "Unit: one site with everything that it holds." in page
    assert "after these rounds: 1, 2, 2." in page
    assert "No record left a site" not in page
    assert "Nothing was found that does not fit" in page
    assert "The recorded epsilon of the coordinator is the one recomputed from the executed rounds" in page
    assert "events in the run's privacy.json" in page
    assert "each site's privacy.json" not in page
    assert "every site executed the noise" not in page


def test_a_central_epsilon_that_differs_is_not_repeated(facts: Facts, tmp_path: Path) -> None:
    statement = "Everything is (0.100, 0.0001)-differentially private."
    central = central_record(tmp_path / "privacy.json", epsilon_spent=0.1, statement=statement)
    page = central_page(facts, central)
    assert statement not in page
    assert "The coordinator recorded epsilon 0.1001" in page  # the float 0.1 lies above 1/10
    injected = central_record(
        tmp_path / "privacy.json", randomness="injected", epsilon_spent=None, statement="NOT PRIVATE"
    )
    page = central_page(facts, injected)
    assert "No privacy guarantee holds for this run." in page
    assert not re.search(r"epsilon \d", page)


@pytest.mark.parametrize(
    "changes",
    [
        {"events": []},
        {"delta": 0.0},
        {"events": [{"noise_multiplier": 0.2, "sample_rate": 1.0, "steps": 10**7}]},
    ],
)
def test_no_report_is_made_of_a_central_record_that_cannot_be_accounted_for(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(RunError, match=r"privacy\.json cannot be accounted for: .*no report is made of it"):
        central_record(tmp_path / "privacy.json", **changes)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"events": [{"noise_multiplier": 3.0, "sample_rate": 0.3, "steps": 3}]}, "the job's plan 1.5000 at 0.3"),
        ({"events": [{"noise_multiplier": 1.5, "sample_rate": 0.1, "steps": 3}]}, "the job's plan 1.5000 at 0.3"),
        (
            {"events": [{"noise_multiplier": 1.5, "sample_rate": 0.3, "steps": 2}]},
            "names 3 rounds, but 2 are accounted for",
        ),
        ({"delta": 1e-2}, "is at delta 0.01, the job's is 0.0001"),
        ({"steps_planned": 2}, "has 2 planned rounds, the job plans 3"),
        ({"epsilon_budget": 0.25}, "promises epsilon 0.2500 for all planned rounds"),
    ],
)
def test_a_central_record_that_is_not_the_plan_s_is_a_discrepancy(
    facts: Facts, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    assert problem in central_page(facts, central_record(tmp_path / "privacy.json", **changes))


def test_a_stray_central_record_decides_nothing(run: Path) -> None:
    before = read_facts(run)
    central_record(run / "privacy.json")
    assert read_facts(run).guarantees == before.guarantees


def test_a_central_record_without_noise_stops_the_report(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no report is made"):
        central_record(tmp_path / "privacy.json", events=[])


# At a coordinator


def test_a_coordinators_run_names_its_keys_and_compares_its_log(coordinator: CoordinatorHome) -> None:
    facts = read_facts(coordinator.jobs / "0001-small" / "run")
    assert facts.discrepancies == ()
    assert facts.coordinator == "consortium"
    assert facts.log is not None
    assert (facts.log.job_entries, facts.log.signature_checked) == (6, True)
    assert {release.num_bytes for release in facts.releases} == {1234}
    page = text_of(render_html(compose(facts), NOW))
    assert facts.signed_job is not None
    assert facts.signed_job.signer.text in page


def test_an_adapter_that_another_key_signed_is_a_discrepancy(coordinator: CoordinatorHome) -> None:
    run = coordinator.jobs / "0001-small" / "run"
    sign_folder(run / "adapter", coordinator.load_round_key(None))
    assert read_facts(run).discrepancies == ()
    assert read_facts(run).adapter_signer == coordinator.load_round_key(None).verify_key.text
    sign_folder(run / "adapter", SigningKey.generate())  # whoever changed the adapter can sign it anew
    facts = read_facts(run)
    assert facts.adapter_signer is None
    assert [text for text in facts.discrepancies if "signature of the adapter does not hold" in text]


def test_a_report_under_central_privacy_does_not_tell_who_was_drawn(coordinator: CoordinatorHome) -> None:
    """Coins are secret, or the sampling rate of its epsilon is a lie; the coordinator's own log knows who came."""
    run = coordinator.jobs / "0001-small" / "run"
    (run / "job.json").write_text(CENTRAL_JOB.canonical_json())
    shutil.rmtree(run / "sites")
    central_record(run / "privacy.json")
    log = coordinator.open_log(SigningKey.from_bytes(bytes(range(32))))
    drawn = {"job": CENTRAL_JOB.sha256, "round": 1, "site": "drawn-in-secret"}
    log.append(Event.ROUND_ASKED, job=CENTRAL_JOB.sha256, round=1, sites=["drawn-in-secret"])
    log.append(Event.UPDATE_ACCEPTED, **drawn, sha256="a" * 64, bytes=1234)
    log.append(Event.UPDATE_REFUSED, **drawn, reason="another reason")
    facts = read_facts(run)
    assert facts.log is not None
    assert facts.log.signature_checked
    assert not any("accepted the update" in problem for problem in facts.discrepancies)
    page = text_of(render_html(compose(facts), NOW))
    assert "how many entries it has would tell" in page
    assert "drawn-in-secret" not in page
    assert "entries of this job" not in page
    assert "sum of the clipped updates with noise, divided by a declared number" in page
    assert "mean of the sites' updates" not in page


def test_a_broken_log_and_an_unsigned_job_are_discrepancies(coordinator: CoordinatorHome) -> None:
    place = coordinator.jobs / "0001-small"
    log = next(coordinator.audit.glob("audit-*.jsonl"))
    log.write_bytes(log.read_bytes().replace(b'"round":2', b'"round":3', 1))
    signed = place / "signed_job.json"
    signed.write_text(signed.read_text().replace("2026-03-02", "2026-03-01"))
    facts = read_facts(place / "run")
    assert any("audit log does not hold" in problem for problem in facts.discrepancies)
    assert any("signature of the job does not hold" in problem for problem in facts.discrepancies)


def test_updates_that_only_one_side_knows_are_discrepancies(facts: Facts) -> None:
    site = facts.sites[0].release
    counted = [
        JudgedUpdate(round=n, site=s.release.site, sha256=sha256, num_bytes=1, accepted=True, reason="")
        for s in facts.sites
        for n, sha256 in zip(s.release.rounds, s.release.updates, strict=True)
    ]
    lost = JudgedUpdate(round=1, site=site.site, sha256="f" * 64, num_bytes=1, accepted=True, reason="")

    def found(updates: list[JudgedUpdate]) -> list[str]:
        log = LogFacts(sha256="", signature_checked=True, job_entries=9, updates=tuple(updates))
        return list(checks.log_discrepancies(log, facts.sites, facts.job))

    assert found(counted) == []
    assert "not in the coordinator's audit log" in found(counted[1:])[0]
    assert "which is not counted" in found([*counted, lost])[0]


def test_a_request_that_the_account_forgot_is_a_discrepancy(facts: Facts) -> None:
    log = LogFacts(sha256="", signature_checked=True, job_entries=9, updates=(), asked=frozenset({(5, "a"), (9, "a")}))
    job = facts.job.model_copy(update={"training": facts.job.training.model_copy(update={"rounds": 8})})
    # Round 9 is that of site metrics.
    (told,) = checks.log_discrepancies(log, [], job)
    assert told.startswith("Site a, round 5: by the audit log it was asked")


def test_a_run_that_goes_on_has_a_round_at_hand(coordinator: CoordinatorHome) -> None:
    """What sites were asked for and sent in it is in no record yet, and is no finding; of a run that is over it is one."""
    place = coordinator.jobs / "0001-small"
    job = load_job(place / "run")
    last = read_run(place / "run").federated.rounds[-1].round
    log = coordinator.open_log(SigningKey.from_bytes(bytes(range(32))))
    log.append(Event.ROUND_ASKED, job=job.sha256, round=last + 1, sites=["a", "b"])
    log.append(Event.UPDATE_ACCEPTED, job=job.sha256, round=last + 1, site="a", sha256="a" * 64, bytes=1234)
    state = place / "state.json"
    state.write_text(json.dumps({"state": "running", "job_sha256": job.sha256, "since": NOW.isoformat()}))
    facts = read_facts(place / "run")
    assert (facts.at_hand, facts.discrepancies) == (last + 1, ())
    page = text_of(render_html(compose(facts), NOW))
    assert "not counted" not in page
    edit(state, state="failed")
    over = read_facts(place / "run")
    assert over.at_hand is None
    assert any("which is not counted" in problem for problem in over.discrepancies)
    assert {one.outcome for one in facts.releases if one.round > last} == {"round at hand"}
    assert {one.outcome for one in over.releases if one.round > last} == {"not counted"}


# How it looks


def test_html_is_accessible_and_loads_nothing(facts: Facts) -> None:
    page = render_html(compose(facts), NOW).decode()
    assert page.count("<h1>") == 1
    assert '<html lang="en">' in page
    assert page.count("<table>") == page.count("<caption>") == page.count("<thead>") > 5
    assert not re.search(r"<th(?! scope=)[ >]", page)
    assert not re.search(r"<script|<link|<img|\ssrc=|url\(|https?://", page)
    headings = [int(level) for level in re.findall(r"<h(\d)", page)]
    assert all(later - earlier <= 1 for earlier, later in pairwise(headings))
    assert re.findall(r'href="#([^"]+)"', page) == re.findall(r'<h2 id="([^"]+)"', page)


def test_pdf_is_tagged_and_says_the_same(facts: Facts) -> None:
    document = compose(facts)
    content = render_pdf(document, NOW)
    assert content.startswith(b"%PDF-1.7")
    for mark in (b"/StructTreeRoot", b"/Lang", b"pdfuaid", b"Compliance report: small"):
        assert mark in content
    if shutil.which("pdftotext"):
        done = subprocess.run(["pdftotext", "-raw", "-", "-"], input=content, capture_output=True, check=True)
        told = re.sub(r"[\s\u200b-]", "", done.stdout.decode())
        # A statement may go on over the foot of a page.
        told = re.sub(r"Compliancereport:small,madeon[\d:]+UTCPage\d+of\d+", "", told)
        for section in document.sections:
            assert re.sub(r"[\s-]", "", section.title) in told
        for site in facts.sites:
            assert re.sub(r"[\s-]", "", without_uncovered(site.statement, facts.not_covered)) in told
            assert all(sha256 in told for sha256 in site.release.updates)


HOSTILE = '<script>alert(1)</script> #panic("x") $x$ *b* _i_ \\u{41} `r` @a // </style>'


def test_texts_of_a_run_are_never_read_as_code(run: Path) -> None:
    info = json.loads((run / "run.json").read_text())
    edit(run / "run.json", dataset=info["dataset"] | {"name": HOSTILE})
    document = compose(read_facts(run))
    page = render_html(document, NOW)
    assert b"<script>" not in page
    assert " ".join(HOSTILE.split()) in text_of(page)
    content = render_pdf(document, NOW)
    if shutil.which("pdftotext"):
        done = subprocess.run(["pdftotext", "-raw", "-", "-"], input=content, capture_output=True, check=True)
        assert "#panic(" in done.stdout.decode().replace("\u200b", "")


def test_a_report_that_cannot_be_laid_out_is_an_error_with_a_way_out(
    facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def refuse(*_: object, ignore_system_fonts: bool, **__: object) -> bytes:
        tried.append(ignore_system_fonts)
        error = typst.TypstError("no such letter", "")
        error.message = "no such letter"
        raise error

    monkeypatch.setattr(typst, "compile", refuse)
    with pytest.raises(RunError, match=r"no such letter.*--format html"):
        render_pdf(compose(facts), NOW)
    assert tried == [True, False, True], "without the machine's fonts, with them, with code points"


@pytest.mark.parametrize("extra", [True, False])
def test_a_pdf_shows_every_script_or_its_code_points(run: Path, monkeypatch: pytest.MonkeyPatch, extra: bool) -> None:
    if extra:
        pytest.importorskip(fonts.CJK_PACKAGE)
    else:
        monkeypatch.setattr("server.reports.compliance.pdf.packaged_cjk_font", lambda: None)
        monkeypatch.setattr(fonts, "packaged_cjk_font", lambda: None)
    real = typst.compile

    def alone(*arguments: Any, **settings: Any) -> Any:
        return real(*arguments, **settings | {"ignore_system_fonts": True})  # as on a machine without fonts

    monkeypatch.setattr(typst, "compile", alone)
    info = json.loads((run / "run.json").read_text())
    edit(run / "run.json", dataset=info["dataset"] | {"name": "紧急 ひらがな 한국어 \U0001f600"})
    content = render_pdf(compose(read_facts(run)), NOW)
    assert content.startswith(b"%PDF-")
    assert (b"NotoSansCJK" in content) == extra
    if shutil.which("pdftotext"):
        done = subprocess.run(["pdftotext", "-raw", "-", "-"], input=content, capture_output=True, check=True)
        text = done.stdout.decode().replace("\u200b", "")
        assert ("紧急 ひらがな 한국어" in text) == extra
        assert ("U+7D27 U+6025" in text) == (not extra)
        assert "U+1F600" in text
        assert "silotune[cjk]" in text


@pytest.mark.parametrize("name", ["html", "pdf"])
def test_the_same_facts_give_the_same_bytes(facts: Facts, name: str) -> None:
    render = render_html if name == "html" else render_pdf
    assert render(compose(facts), NOW) == render(compose(facts), NOW)


def test_the_run_folder_is_only_read(run: Path, tmp_path: Path) -> None:
    def state() -> dict[str, str]:
        return {
            path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in run.rglob("*")
            if path.is_file()
        }

    before = state()
    accounts = simulated_accounts(run)
    write_compliance_report(run, "html", out=tmp_path / "report.html", accounts=accounts)
    assert state() == before


# The signature


@pytest.mark.parametrize("name", ["html", "pdf"])
def test_a_changed_byte_is_detected(coordinator: CoordinatorHome, silotune: Callable[..., Any], name: str) -> None:
    run = coordinator.jobs / "0001-small" / "run"
    outcome = silotune("report", run, "--format", name, "--sign", coordinator.path)
    assert outcome.status == 0, outcome.err
    file = run / f"compliance-report.{name}"
    assert outcome.out.strip() == str(file)
    said = silotune("report", "verify", file, "--key", coordinator.path / "round.pub")
    assert (said.status, "unchanged since consortium (coordinator) signed it" in said.out) == (0, True)
    assert "was not checked" in silotune("report", "verify", file).out

    content, signature = file.read_bytes(), signature_file(file).read_bytes()
    step = len(content) // 7
    for place in (0, *range(step, len(content), step), len(content) - 1):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        failed = silotune("report", "verify", file)
        assert (failed.status, "was changed after it was signed" in failed.err) == (1, True)
    file.write_bytes(content)
    signature_file(file).write_bytes(signature.replace(b"consortium", b"consortiun"))
    assert silotune("report", "verify", file).status == 1
    signature_file(file).unlink()
    assert silotune("report", "verify", file).status == 1


def test_the_signer_stands_in_the_report(facts: Facts) -> None:
    signer = Signer(role="coordinator", name="consortium", key=SigningKey.from_bytes(bytes(32)))
    page = text_of(render_html(compose(facts, signer), NOW))
    assert f"silotune report verify report.pdf --key {signer.verify_key.text}" in page
    assert "When this report was made it was not signed" in text_of(render_html(compose(facts), NOW))


def test_a_site_signs_where_its_key_is(small_run: Path, tmp_path: Path, silotune: Callable[..., Any]) -> None:
    site = tmp_path / "hospital"
    (site / "keys").mkdir(parents=True)
    shutil.copy(small_run / "sites" / "site-1" / "home" / "site.toml", site / "site.toml")
    key = SigningKey.generate()
    save_signing_key(site / "keys" / "log.key", key, None)
    file = write_compliance_report(small_run, "html", out=tmp_path / "report.html", now=NOW)
    assert silotune("report", "sign", file, site).status == 0
    said = json.loads(silotune("report", "verify", file, "--key", key.verify_key.text, "--json").out)
    assert (said["role"], said["name"], said["key_checked"]) == ("site", "site-1", True)
    assert silotune("report", "verify", file, "--key", SigningKey.generate().verify_key.text).status == 1

    # Another's signature is not replaced, and a report that is written anew loses it.
    save_signing_key(tmp_path / "officer.key", SigningKey.generate(), None)
    assert "another's signature" in silotune("report", "sign", file, tmp_path / "officer.key").err
    write_compliance_report(small_run, "html", out=file, now=NOW)
    assert not signature_file(file).exists()
    assert silotune("report", "sign", file, tmp_path / "officer.key").status == 0
    assert "officer (key holder)" in silotune("report", "verify", file).out


# The command


def test_mistakes_end_with_a_message(small_run: Path, tmp_path: Path, silotune: Callable[..., Any]) -> None:
    for arguments, said in (
        (("report", small_run, "--format", "docx"), "expected html or pdf"),
        (("report", small_run, "--sign", tmp_path), "add --format"),
        (("report", tmp_path / "nowhere", "--format", "pdf"), "is not there; expected the folder of a run"),
        (("report", small_run, "--format", "html", "--sign", tmp_path), "no folder of a coordinator or a site"),
        (("report", small_run, "--format", "html", "--ledger", small_run / "run.json"), "is not an export"),
        (("report", small_run, "--format", "html", "--out", "/proc/no/report.html"), "could not write"),
        (("report", "verify", tmp_path / "none.pdf"), "cannot be read"),
    ):
        outcome = silotune(*arguments)
        assert outcome.status != 0
        assert said in outcome.err
        assert "Traceback" not in outcome.err


def test_a_simulated_runs_ledgers_are_found(run: Path, tmp_path: Path, silotune: Callable[..., Any]) -> None:
    file = tmp_path / "report.html"
    outcome = silotune("report", run, "--format", "html", "--out", file)
    assert outcome.status == 0, outcome.err
    assert "Not given" not in text_of(file.read_bytes())
    (run / "sites" / "site-1" / "home" / "ledger.db").unlink()
    silotune("report", run, "--format", "html", "--out", file)
    assert "Not given: the ledger of site-1." in text_of(file.read_bytes())


def test_a_broken_ledger_is_refused(run: Path) -> None:
    file = run / "sites" / "site-1" / "home" / "ledger.db"
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"steps":2', b'"steps":1'))
    assert file.read_bytes() != content
    with pytest.raises(LedgerError):
        simulated_accounts(run)


def test_the_audit_log_is_only_read(coordinator: CoordinatorHome) -> None:
    before = audit_log.verify(coordinator.audit)
    read_facts(coordinator.jobs / "0001-small" / "run")
    assert audit_log.verify(coordinator.audit) == before


def test_sites_are_called_by_their_names_in_the_data(run: Path) -> None:
    dataset = json.loads((run / "run.json").read_text())["dataset"]
    edit(run / "run.json", dataset=dataset | {"site_names": {"site-1": "北京协和医院", "site-2": "Ελλάδα"}})
    edit(run / "sites" / "site-2" / "privacy.json", epsilon_spent=1.0, epsilon_bound=1.0)
    page = page_of(run, *simulated_accounts(run))
    paths = r"sites/site-\d|small-site-\d"
    assert not re.search(r"(?<!\()\bsite-[12]\b", re.sub(paths, "", page)), (
        "a folder's name where a site's should stand"
    )
    assert "Site Ελλάδα (site-2): the run recorded epsilon" in page
    assert "Everything site 北京协和医院 (site-1) released" in page


def test_what_is_not_covered_stands_once(facts: Facts) -> None:
    page = text_of(render_html(compose(facts), NOW))
    assert facts.not_covered
    assert [page.count(item) for item in facts.not_covered] == [1] * len(facts.not_covered)


def test_the_run_tells_what_it_computed_on(small_run: Path) -> None:
    machine = json.loads((small_run / "run.json").read_text())["machine"]
    assert machine["device"] == "cpu"
    assert machine["precision"] in ("float32", "bfloat16")
    assert f"cpu, {machine['precision']}" in page_of(small_run)


def test_evaluation_records_are_called_what_they_were_declared(run: Path) -> None:
    """Records held out of private ones are private: their figures have no noise."""
    info = json.loads((run / "run.json").read_text())
    edit(run / "run.json", dataset=info["dataset"] | {"test_kind": "private"})
    page = page_of(run)
    assert "private evaluation records; this figure has no noise, and no epsilon covers it" in page
    assert "public evaluation records" not in page
    edit(run / "run.json", dataset=info["dataset"] | {"test_kind": "public"})
    assert "public evaluation records" in page_of(run)
