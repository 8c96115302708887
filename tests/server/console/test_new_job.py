"""The page on which a job is made: every setting, findings at their fields, numbers of the planner, a file that is the job."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from client.policy.policy import Policy
from server.console.job_form import BY_KEY, ENTRIES, FIRST, filled, run_file
from server.console.promises import promises_of
from server.coordinator.run_file import read_run_settings
from server.store.home import CoordinatorHome
from shared.data.datasets import write_jsonl
from shared.job.job import Job
from shared.trust.signed_job import SignedJob
from shared.trust.signing import SigningKey, save_signing_key
from shared.web.roles import Role
from tests.client.console.conftest import Browser, Serving, text_of
from tests.conftest import Outcome
from tests.server.console.homes import SIGNER

LEAST = {
    "name": "study",
    "task.kind": "sequence_classification",
    "task.labels": "routine\r\nurgent",
    "training.rounds": "4",
    "privacy.noise_multiplier": "2",
    "federation.min_sites": "3",
}


@pytest.fixture
def browser(serving: Serving) -> Browser:
    return serving.signed_in("researcher")


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    schema = model.model_json_schema()

    def walk(node: dict[str, Any], prefix: str) -> Iterator[str]:
        for name, one in node["properties"].items():
            found = [one, *one.get("anyOf", []), *one.get("allOf", [])]
            refs = [option["$ref"].rpartition("/")[2] for option in found if "$ref" in option]
            if refs:
                yield from walk(schema["$defs"][refs[0]], f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    yield from walk(schema, prefix)


def test_every_setting_has_a_field(browser: Browser) -> None:
    assert {*BY_KEY} == {*settings(Job)} - {"schema_version"}
    page = browser.get("/jobs/new").text
    assert {*re.findall(r' name="([a-z_]+(?:\.[a-z_]+)*)"', page)} >= {*BY_KEY}
    assert {*FIRST} <= {*BY_KEY}
    assert all(entry.about for entry in ENTRIES)


def test_the_form_begins_with_what_sites_accept(browser: Browser) -> None:
    page = browser.get("/jobs/new").text
    assert 'name="federation.min_sites" value="2"' in page
    least = Policy.model_fields["min_sites"].default
    assert int(BY_KEY["federation.min_sites"].offered) >= least, "as every policy of the template wants it"
    typed = browser.post("/jobs/new", page="/jobs/new", **{"federation.min_sites": "1"}).text
    assert 'name="federation.min_sites" value="1"' in typed


def test_what_is_not_typed_is_the_default() -> None:
    typed = {entry.key: entry.default for entry in ENTRIES} | LEAST
    job, least = filled(typed).job, filled(LEAST).job
    assert job is not None
    assert job == least
    assert job == Job.model_validate(
        {
            "name": "study",
            "task": {"kind": "sequence_classification", "labels": ["routine", "urgent"]},
            "training": {"rounds": 4},
            "privacy": {"noise_multiplier": 2.0},
            "federation": {"min_sites": 3},
        }
    )


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"privacy.noise_multiplier": "", "privacy.epsilon": "4", "training.early_stopping.patience": "3"},
        {
            "privacy.mechanism": "distributed",
            "privacy.epsilon_alone": "16",
            "privacy.max_colluding": "1",
            "privacy.noise_multiplier": "none",
            "training.local_steps": "1",
        },
        {
            "privacy.mechanism": "central",
            "privacy.unit": "site",
            "privacy.central.num_sites": "200",
            "federation.min_sites": "100",
        },
        {"task.kind": "regression", "task.labels": "", "task.target_range": "0, 10", "lora.last_layers": "none"},
        {"privacy.mechanism": "none", "lora.target_modules": "query, key\nvalue", "seed": "17"},
    ],
)
def test_the_file_is_the_job(more: dict[str, str], tmp_path: Path) -> None:
    form = filled(LEAST | more)
    assert form.job is not None, form.errors
    path = tmp_path / "study.toml"
    path.write_text(run_file(form), encoding="utf-8")
    assert read_run_settings(path)[0] == form.job


def test_the_numbers_are_the_planners(browser: Browser) -> None:
    job = filled(LEAST).job
    assert job is not None
    promised = promises_of(job)
    assert promised is not None
    page = browser.post("/jobs/new", page="/jobs/new", **LEAST)
    assert page.status_code == 200
    assert f'title="{promised.epsilon!r}"' in page.text
    part = browser.post("/jobs/new", page="/jobs/new", headers={"hx-request": "true"}, **LEAST)
    assert "<html" not in part.text
    assert f'title="{promised.epsilon!r}"' in part.text


@pytest.mark.parametrize(
    ("more", "field", "text"),
    [
        ({"name": "no good name"}, "name", "letters"),
        ({"training.rounds": "many"}, "training-rounds", "whole number"),
        ({"training.rounds": ""}, "training-rounds", "is missing"),
        ({"privacy.delta": "2"}, "privacy-delta", "less than 1"),
        ({"task.kind": "elsewhere"}, "task-kind", "found"),
        ({"task.labels": "<script>alert(1)</script>"}, "task-kind", "labels"),
    ],
)
def test_a_finding_stands_at_its_field(browser: Browser, more: dict[str, str], field: str, text: str) -> None:
    page = browser.post("/jobs/new", page="/jobs/new", **(LEAST | more))
    assert page.status_code == 422
    assert text in text_of(page.text)
    assert "<script>alert" not in page.text
    if field != "task-kind" or "task.kind" in more:
        assert re.search(rf'id="{field}"[^>]*aria-invalid="true"', page.text)


@pytest.mark.parametrize("number", ["9" * 400, "1e999", "nan", "-1", "0x10", "٣", "none"])
def test_no_number_is_a_defect(browser: Browser, number: str) -> None:
    for key in ("training.rounds", "privacy.epsilon", "privacy.sample_rate", "federation.min_sites", "seed"):
        answer = browser.post("/jobs/new", page="/jobs/new", **(LEAST | {key: number}))
        assert answer.status_code in (200, 422), (key, answer.status_code)


def test_a_plan_that_would_take_for_ever_is_not_computed(browser: Browser) -> None:
    more = {"training.rounds": "100000", "training.local_steps": "20"}
    answer = browser.post("/jobs/new", page="/jobs/new", **(LEAST | more))
    assert (answer.status_code, "silotune plan" in answer.text) == (422, True)


def test_the_file_is_given_out_and_noted(browser: Browser, serving: Serving) -> None:
    answer = browser.post("/jobs/file", page="/jobs/new", **LEAST, **{"evaluation.columns": "text=review"})
    assert answer.headers["content-disposition"] == 'attachment; filename="study.toml"'
    found = tomllib.loads(answer.text)
    assert found["evaluation"] == {"path": "public.jsonl", "columns": {"text": "review", "label": "label"}}
    assert found["training"] == {"rounds": 4}
    log = (serving.home.path / "audit" / "audit-00001.jsonl").read_text()
    assert '"action":"make job"' in log
    assert browser.post("/jobs/file", page="/jobs/new", name="x").status_code == 422


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.RESEARCHER])
def test_nobody_else_makes_jobs(serving: Serving, role: Role) -> None:
    browser = serving.signed_in(role.value)
    assert browser.get("/jobs/new").status_code == 403
    assert browser.post("/jobs/new", **LEAST).status_code == 403
    assert browser.post("/jobs/file", **LEAST).status_code == 403


def test_it_is_signed_where_the_key_is_and_submitted_without_it(
    home: CoordinatorHome, silotune: Callable[..., Outcome], tmp_path: Path
) -> None:
    path = tmp_path / "study.toml"
    path.write_text(run_file(filled(LEAST | {"name": "signed-elsewhere"})))
    save_signing_key(tmp_path / "lead.key", SIGNER, None)
    signed = path.with_suffix(".signed.json")
    public = home.path / "round.pub"
    told = silotune("coordinator", "sign", path, "--signer", tmp_path / "lead.key", "--coordinator", public)
    assert told.status == 0, told.err
    assert SignedJob.from_json(signed.read_text(), source="it").job.name == "signed-elsewhere"
    (tmp_path / "lead.key").unlink()
    write_jsonl(tmp_path / "public.jsonl", [{"text": "a", "label": "routine"}, {"text": "b", "label": "urgent"}])
    told = silotune("coordinator", "submit", home.path, path, "--signed", signed)
    assert told.status == 0, told.err
    assert "submitted" in told.out
    told = silotune("coordinator", "submit", home.path, path, "--signed", signed)
    assert (told.status, "submitted before" in told.err) == (1, True)
    for options, text in (
        (["--signed", signed, "--set", "training.rounds=5"], "another job"),
        ([], "either --signer"),
        (["--signed", signed, "--signer", signed], "either --signer"),
        (["--signed", tmp_path / "none.json", "--set", "seed=3"], "cannot be read"),
    ):
        told = silotune("coordinator", "submit", home.path, path, *options)
        assert told.status != 0
        assert text in told.err
    other = SigningKey.generate().verify_key.text
    foreign = tmp_path / "foreign.json"
    save_signing_key(tmp_path / "lead.key", SIGNER, None)
    options = ["--signer", tmp_path / "lead.key", "--coordinator", other, "--out", foreign, "--set", "seed=9"]
    assert silotune("coordinator", "sign", path, *options).status == 0
    told = silotune("coordinator", "submit", home.path, path, "--signed", foreign, "--set", "seed=9")
    assert (told.status, "another coordinator" in told.err) == (1, True)
    assert json.loads(foreign.read_text())["coordinator"] == other
