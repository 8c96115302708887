"""What must not reach a browser of the coordinator's console, and what must not act in one."""

from __future__ import annotations

import json
import re
import urllib.parse
from pathlib import Path

import pytest

from server.console.runs import SECRET_SECONDS, Runs
from server.store.home import CoordinatorHome
from shared.web.roles import Role
from tests.client.console.conftest import ROLES, Serving
from tests.server.console.homes import go_on, job_of, make_home, say, submit

MARKER = "MARKER-of-a-site"
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
RUN = "/runs/0001-triage"
PATHS = ("/runs", "/runs/listed", RUN, f"{RUN}/live", f"{RUN}/promises")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorHome:
    """A coordinator whose sites said, and released, what may not be shown."""
    home = make_home(tmp_path_factory.mktemp("federation"))
    job = job_of(task={"kind": "sequence_classification", "labels": [f"{MARKER} label", "other"]})
    submission = submit(home, job, 1, state="running")
    go_on(
        submission,
        3,
        failed={"north": f"PolicyError: {MARKER} reason", MARKER: MARKER},
        doubted={"charite": f"{MARKER} doubt"},
    )
    metrics = {"accuracy": 0.6, f"f1 {MARKER} label": 0.1}
    submission.note(
        metrics=metrics,
        waiting=f"1 of 3 sites ({MARKER} reason)",
        problem=f"RunError: {MARKER} reason",
        refused={
            "st-anna": f"PolicyError: {MARKER} reason",
            "charite": f"{MARKER}: {MARKER}",
            f"{MARKER} name": MARKER,
        },
        awaiting=["north", f"{MARKER} {EVIL}"],
        doubted={"charite": f"round 2: {MARKER}"},
        sites=["north", "charite", f"<b>{MARKER}</b>"],
    )
    run = submission.run_folder
    lines = (run / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    last["metrics"] = metrics
    last["sites"] = ["north", f"{MARKER} name"]
    (run / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    place = run / "sites" / "north"
    place.mkdir(parents=True)
    (place / "privacy.json").write_text(json.dumps({"site": MARKER}))
    (run / "site_metrics.json").write_text(json.dumps({"sites": {"north": {MARKER: [1.0]}}, "labels": [MARKER]}))
    codes = {"north": MARKER, f"{MARKER} x": "PolicyError"}
    say(
        home,
        job="0001-triage",
        trust_problem=MARKER,
        problem=MARKER,
        state="running",
        round={"round": 4, "sites": {"north": "refused", f"{EVIL}{MARKER}": "sent", "charite": MARKER}, "codes": codes},
    )
    return home


@pytest.mark.parametrize("role", ROLES)
def test_nothing_of_a_site_reaches_a_page(serving: Serving, role: Role) -> None:
    browser = serving.signed_in(role.value)
    more = [f"{RUN}/curve.json?metric={metric}" for metric in ("accuracy", "loss", "epsilon")]
    for path in (*PATHS, *more):
        for headers in ({}, {"hx-request": "true"}):
            answer = browser.get(path, headers=headers)
            assert answer.status_code == 200
            assert MARKER not in answer.text, path
    assert browser.get(f"{RUN}/curve.json", params={"metric": f"f1 {MARKER} label"}).status_code == 404


def test_codes_are_told(serving: Serving) -> None:
    page = serving.signed_in("viewer").get(RUN).text
    assert "<code>PolicyError</code>" in page
    assert "<code>other</code>" in page


def test_names_do_nothing(serving: Serving, home: CoordinatorHome) -> None:
    """A folder's name is the job's; one that somebody made by hand is not found, and shown as text where it is listed."""
    folder = home.jobs / f"0002-{EVIL.replace('/', '')}"
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    try:
        page = serving.signed_in("viewer").get("/runs").text
        assert "<script>alert" not in page
        assert "<img src" not in page
        assert "&lt;script&gt;alert(1)" in page
        assert serving.signed_in("viewer").get("/runs", params={"q": EVIL}).text.count("<script>alert") == 0
    finally:
        (folder / "state.json").unlink()
        folder.rmdir()


def test_a_name_that_leads_out_of_a_page_is_only_text(serving: Serving) -> None:
    page = serving.signed_in("viewer").get("/runs", params={"q": f"x{EVIL}", "state": EVIL[:20]}).text
    assert 'value="x&#34;&gt;&lt;script' in page


def test_no_answer_names_a_path_of_the_machine(serving: Serving, home: CoordinatorHome) -> None:
    browser = serving.signed_in("officer")
    for path in (*PATHS, "/runs/none", "/runs/..%2f"):
        assert str(home.path) not in browser.get(path).text


def test_the_files_are_as_they_were(serving: Serving, home: CoordinatorHome) -> None:
    """Reading changes nothing but the console's own files and the audit log, where sign-ins stand."""
    before = _files(home.path)
    browser = serving.signed_in("engineer")
    for path in PATHS:
        browser.get(path)
    assert _files(home.path) == before


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not {"console", "audit"} & {*path.parts}
    }


@pytest.mark.parametrize("role", [Role.ENGINEER, Role.OFFICER, Role.RESEARCHER])
def test_no_input_is_a_defect(serving: Serving, role: Role) -> None:
    """Every route of the console's own, with what no page would send."""
    browser = serving.signed_in(role.value)
    token = browser.token("/account")
    routes = [route for route in serving.app.routes if route.path.startswith(("/runs", "/sites", "/jobs"))]
    assert len(routes) >= 25
    fields = (
        "kind",
        "seen",
        "certificate",
        "revocations",
        "name",
        "training.rounds",
        "task.labels",
        "evaluation.columns",
    )
    for odd in ("", "0001-triage", EVIL, "a\x00b", "9" * 300, "=;,\n=", "\U0001f600" * 20, "../" * 9):
        for route in routes:
            path = re.sub(r"\{\w+\}", "0001-triage" if odd == "" else urllib.parse.quote(odd, safe=""), route.path)
            asked = {"q": odd, "state": odd[:20], "run": [odd, odd], "metric": odd[:60], "since": odd[:100]}
            if route.path.endswith("/events"):
                continue  # tests/server/console/test_live.py
            if "GET" in route.methods:
                answer = browser.get(path, params=asked)
            else:
                data = {"csrf_token": token} | dict.fromkeys(fields, odd)
                answer = browser.http.post(path, data=data, headers={"origin": serving.address})
            assert answer.status_code < 500, (route.path, odd, answer.text[:300])
            assert "<script>alert" not in answer.text


def test_an_error_s_text_is_in_the_log_alone(serving: Serving, home: CoordinatorHome) -> None:
    run = submit(home, job_of("torn"), 7, state="completed")
    go_on(run, 2)
    file = run.run_folder / "metrics.jsonl"
    first, *rest = file.read_text().splitlines()
    file.write_text("\n".join([first.replace('"metrics":{', f'"metrics":{{"f1 {MARKER}":"x",'), *rest]) + "\n")
    browser = serving.signed_in("officer")
    for path in ("/runs/0007-torn", "/runs/0007-torn/curve.json?metric=accuracy", "/runs"):
        answer = browser.get(path)
        assert (MARKER in answer.text, str(home.path) in answer.text) == (False, False), path


def test_rounds_under_central_dp_are_looked_up_seldom(home: CoordinatorHome) -> None:
    seconds = [0.0]
    central = {
        "mechanism": "central",
        "epsilon": 8.0,
        "sample_rate": 0.1,
        "unit": "site",
        "central": {"num_sites": 200},
    }
    job = job_of("trusted", privacy=central, training={"rounds": 8, "local_steps": 2}, federation={"min_sites": 100})
    submission = submit(home, job, 8, state="running")
    go_on(submission, 2)
    runs = Runs(home.jobs, now=lambda: seconds[0])

    def seen() -> tuple[int, str, list[int]]:
        run = runs.find("0008-trusted")
        assert run is not None
        return run.num_done, run.mark, runs.curves(run).rounds

    before = seen()
    go_on(submission, 3)
    seconds[0] = SECRET_SECONDS - 1
    assert seen() == before
    submission.request_stop()
    assert runs.find("0008-trusted").is_stopping  # type: ignore[union-attr]
    seconds[0] += 2
    assert seen()[0] == 3
    go_on(submission, 4)
    submission.note("completed")
    assert seen()[0] == 4
