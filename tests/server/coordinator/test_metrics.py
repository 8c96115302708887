"""The coordinator's pages: what stands on `/metrics`, by the reader of Prometheus' own library, and on `/healthz`."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.coordinator import metrics
from server.coordinator.health import KINDS
from server.coordinator.run_file import RunSettings, submit
from server.store.home import CoordinatorHome
from server.store.submission import Submission
from shared.data.datasets import DataSource
from shared.job.job import Job
from shared.job.parsing import parse
from shared.service.page import Page
from shared.trust.signing import SigningKey, load_verify_key
from simulations.federation.processes import Federation

Samples = dict[tuple[str, ...], float]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorHome:
    federation = Federation(tmp_path_factory.mktemp("federation"))
    federation.found()
    return federation.coordinator


@pytest.fixture(scope="module")
def submitted(home: CoordinatorHome) -> Submission:
    raw = {
        "name": "demo",
        "task": {"kind": "sequence_classification", "labels": ["x", "y"]},
        "training": {"rounds": 3, "local_steps": 2},
        "privacy": {"noise_multiplier": 1.0},
    }
    settings = RunSettings(evaluation=DataSource(path="x.jsonl", columns={"text": "text", "label": "label"}))
    job, records = parse(Job, raw, source="test"), [{"text": "a film", "label": "x"}]
    key = load_verify_key(home.path / "round.pub")
    made = submit(home.jobs, job, settings, records, signer=SigningKey.generate(), coordinator=key)
    made.run_folder.mkdir()
    (made.run_folder / "metrics.jsonl").write_text("{}\n{}\n{}\n")
    made.note("running", waiting="1 of 2 sites take part")
    return made


def said(**changes: Any) -> dict[str, Any]:
    """Return what a coordinator says of itself."""
    now = datetime.now(UTC)
    seen = (now - timedelta(minutes=5)).isoformat(timespec="seconds")
    return {
        "pid": os.getpid(),
        "started": now.isoformat(timespec="seconds"),
        "updated": now.isoformat(timespec="seconds"),
        "state": "running",
        "sites": {
            "a": {"online": True, "until": str(now + timedelta(days=90)), "last_seen": now.isoformat()},
            "b": {"online": False, "until": str(now + timedelta(days=3)), "last_seen": seen},
            "c": {"online": False, "until": str(now + timedelta(days=90)), "last_seen": None},
        },
        "job": None,
        "certificate_until": (now + timedelta(days=90)).isoformat(),
        "link_restarts": 2,
        "descriptors": {"used": 40, "limit": 1024},
        "clock": {"set_by": 0.0, "set_at": None, "synchronized": None},
    } | changes


def page(home: CoordinatorHome, path: str, told: dict[str, Any]) -> Page:
    return metrics.pages(home, lambda: told)[path]()


def samples(made: Page) -> Samples:
    """Return name and values of labels -> value."""
    families = text_string_to_metric_families(made.body.decode())
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_the_numbers_are_those_of_status(home: CoordinatorHome, submitted: Submission) -> None:
    told = said(job=submitted.name)
    made = page(home, "/metrics", told)
    assert (made.status, made.content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
    found = samples(made)
    expected: Samples = {
        ("silotune_healthy",): 0,
        ("silotune_sites_admitted",): 3,
        ("silotune_sites_connected",): 1,
        ("silotune_site_connected", "a"): 1,
        ("silotune_site_connected", "b"): 0,
        ("silotune_jobs", "running"): 1,
        ("silotune_jobs", "completed"): 0,
        ("silotune_rounds_total",): 2,
        ("silotune_job_rounds", submitted.name): 2,
        ("silotune_job_rounds_planned", submitted.name): 3,
        ("silotune_job_waiting", submitted.name): 1,
        ("silotune_link_restarts_total",): 2,
        ("silotune_descriptors_used",): 40,
        ("silotune_descriptors_limit",): 1024,
        ("silotune_status_time_seconds",): datetime.fromisoformat(told["updated"]).timestamp(),
        ("silotune_site_last_seen_time_seconds", "b"): datetime.fromisoformat(
            told["sites"]["b"]["last_seen"]
        ).timestamp(),
    }
    assert {key: found.get(key) for key in expected} == expected
    assert ("silotune_site_last_seen_time_seconds", "c") not in found
    assert ("silotune_clock_synchronized",) not in found, "the kernel does not say"
    troubles = {key[1]: value for key, value in found.items() if key[0] == "silotune_trouble"}
    assert troubles == dict.fromkeys(KINDS, 0) | {"certificate": 1}
    days = {
        key[1:]: round((value - datetime.now(UTC).timestamp()) / 86_400)
        for key, value in found.items()
        if key[0] == "silotune_certificate_end_time_seconds"
    }
    assert {key: days[key] for key in [("server", ""), ("site", "b")]} == {("server", ""): 90, ("site", "b"): 3}
    assert min(days["ca", ""], days["crl", ""]) > 365


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"sites": {}}, "nobody_admitted", "no site is admitted"),
        (
            {"sites": {"c": {"online": False, "until": "x"}}},
            "nobody_connected",
            "a job is open and no site is connected",
        ),
        ({"state": "troubled", "problem": "No space left on device"}, "problem", "No space left"),
        ({"updated": "2026-01-01T00:00:00+00:00"}, "down", "it does not run"),
    ],
)
def test_healthz_says_what_is_wrong(
    home: CoordinatorHome, submitted: Submission, changes: dict[str, Any], kind: str, text: str
) -> None:
    told = said(**changes)
    told["sites"] = {name: site for name, site in told["sites"].items() if name != "b"}
    made = page(home, "/healthz", told)
    assert made.status == 503
    answer = json.loads(made.body)
    (trouble,) = answer["troubles"]
    assert (answer["healthy"], trouble["kind"]) == (False, kind)
    assert text in trouble["text"]
    assert samples(page(home, "/metrics", told))["silotune_trouble", kind] == 1


def test_a_coordinator_without_trouble_is_well(home: CoordinatorHome) -> None:
    told = said()
    del told["sites"]["b"]
    made = page(home, "/healthz", told)
    assert (made.status, json.loads(made.body)) == (200, {"healthy": True, "troubles": []})


def test_a_name_is_a_label_and_never_a_line(home: CoordinatorHome) -> None:
    name = 'x"} 1\nsilotune_healthy 1\n# \\'
    told = said(sites={name: {"online": True, "until": "", "last_seen": None}}, state="troubled")
    found = samples(page(home, "/metrics", told))
    assert found["silotune_site_connected", name] == 1
    assert found["silotune_healthy",] == 0


def test_a_job_whose_state_is_damaged_hides_no_other(home: CoordinatorHome, submitted: Submission) -> None:
    damaged = home.jobs / "0099-damaged"
    damaged.mkdir()
    (damaged / "state.json").write_text("{")
    try:
        assert samples(page(home, "/metrics", said()))["silotune_jobs", "running"] == 1
        assert page(home, "/healthz", said()).status == 503
    finally:
        (damaged / "state.json").unlink()
        damaged.rmdir()


def test_before_the_first_turn_the_page_is_there(home: CoordinatorHome) -> None:
    assert samples(page(home, "/metrics", {}))["silotune_trouble", "down"] == 1


def test_a_thousand_sites_are_one_page_of_bounded_size(home: CoordinatorHome) -> None:
    one = said()["sites"]["a"]
    made = page(home, "/metrics", said(sites={f"site-{i}": one for i in range(1000)}))
    assert len(samples(made)) < 3 * 1000 + 60
    assert len(made.body) < 400_000
