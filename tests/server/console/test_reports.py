"""Reports from the console: made elsewhere, one at a time, given out as files to those who may have them."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from server.console.reports import Reports
from server.store.home import CoordinatorHome
from shared.trust.audit_log import Event, read
from shared.web.roles import Role
from tests.client.console.conftest import Browser, Serving
from tests.server.console.homes import go_on, job_of, make_home, submit

RUN = "/runs/0001-triage"
# Stands in for `silotune report write`: says what it was asked for in the file that it writes.
SCRIPT = """
import sys, time
from pathlib import Path
run, *options = sys.argv[1:]
kind = options[options.index("--format") + 1] if "--format" in options else None
if (Path(run) / "slow").exists(): time.sleep(30)
if (Path(run) / "broken").exists(): sys.exit("MARKER: a site said so")
name = f"compliance-report.{kind}" if kind else "report.html"
(Path(run) / name).write_text(f"<!doctype html> MARKER {options}")
if "--sign" in options: (Path(run) / f"{name}.sig.json").write_text("{}")
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorHome:
    home = make_home(tmp_path_factory.mktemp("federation"), ())
    go_on(submit(home, job_of(), 1, state="completed"), 8)
    return home


@pytest.fixture(scope="module")
def serving(serve: Callable[..., Serving], home: CoordinatorHome) -> Serving:
    serving = serve(home)
    serving.console.content.reports._command = (sys.executable, "-S", "-c", SCRIPT)
    return serving


@pytest.fixture
def browser(serving: Serving) -> Browser:
    return serving.signed_in("officer")


def made(serving: Serving) -> None:
    deadline = time.monotonic() + 20
    while serving.console.content.reports.is_busy and time.monotonic() < deadline:
        time.sleep(0.02)


def deeds(home: CoordinatorHome) -> list[dict[str, object]]:
    return [
        entry.details
        for entry in read(home.audit)
        if entry.event == Event.CONSOLE_ACTION and entry.details["action"] in ("report", "export")
    ]


def test_a_report_is_made_and_taken_away(browser: Browser, serving: Serving, home: CoordinatorHome) -> None:
    for path, kind, file in (
        ("reports", "run", "report.html"),
        ("reports", "html", "compliance-report.html"),
        ("reports/signed", "pdf", "compliance-report.pdf"),
    ):
        assert browser.post(f"{RUN}/{path}", kind=kind).status_code == 303
        made(serving)
        assert file in browser.get(f"{RUN}/reports").text
        answer = browser.get(f"{RUN}/reports/{file}")
        assert answer.status_code == 200
        assert answer.headers["content-disposition"] == f'attachment; filename="0001-triage-{file}"'
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "--sign" in answer.text
    assert str(home.path) in answer.text, "the coordinator's folder signs"
    assert browser.get(f"{RUN}/reports/compliance-report.pdf.sig.json").json() == {}
    told = [(one["action"], one.get("kind"), one.get("signed"), one.get("file")) for one in deeds(home)]
    assert ("report", "pdf", True, None) in told
    assert ("export", None, None, "compliance-report.pdf") in told
    assert "MARKER" not in browser.get(RUN).text + browser.get(f"{RUN}/reports").text


def test_one_at_a_time(browser: Browser, serving: Serving, home: CoordinatorHome) -> None:
    slow = home.jobs / "0001-triage" / "run" / "slow"
    slow.touch()
    reports = serving.console.content.reports
    release = threading.Event()
    reports._make, before = (lambda *_: release.wait(20)), reports._make  # type: ignore[method-assign]
    try:
        assert browser.post(f"{RUN}/reports", kind="run").status_code == 303
        page = browser.get(f"{RUN}/reports", headers={"hx-request": "true"})
        assert "is being made" in page.text
        answer = browser.post(f"{RUN}/reports", kind="pdf")
        assert (answer.status_code, "nothing was begun" in answer.text) == (409, True)
        assert len([one for one in deeds(home) if one["action"] == "report" and one["kind"] == "pdf"]) <= 1
    finally:
        release.set()
        reports._make, reports._busy = before, None  # type: ignore[method-assign]
        slow.unlink()


def test_what_fails_is_told_without_its_words(browser: Browser, serving: Serving, home: CoordinatorHome) -> None:
    broken = home.jobs / "0001-triage" / "run" / "broken"
    broken.touch()
    assert browser.post(f"{RUN}/reports", kind="run").status_code == 303
    made(serving)
    broken.unlink()
    page = browser.get(f"{RUN}/reports").text
    assert "could not be made" in page
    assert "MARKER" not in page


def test_only_reports_are_given_out(browser: Browser, home: CoordinatorHome) -> None:
    run = home.jobs / "0001-triage" / "run"
    for name in (
        "job.json",
        "metrics.jsonl",
        "..%2fsigned_job.json",
        "..%2f..%2f..%2fkeys%2fround.key",
        "%00",
        "report.HTML",
    ):
        assert browser.get(f"{RUN}/reports/{name}").status_code == 404
    link = run / "compliance-report.html.sig.json"
    link.unlink(missing_ok=True)
    link.symlink_to(home.path / "coordinator.toml")
    assert browser.get(f"{RUN}/reports/compliance-report.html.sig.json").status_code == 404
    link.unlink()


@pytest.mark.parametrize("kind", ["", "exe", "run --sign x", "../run"])
def test_no_other_kind(browser: Browser, kind: str) -> None:
    assert browser.post(f"{RUN}/reports", kind=kind).status_code == 422
    assert browser.post(f"{RUN}/reports/signed", kind=kind or "run").status_code == 422


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.OFFICER])
def test_nobody_else_has_them(serving: Serving, role: Role) -> None:
    browser = serving.signed_in(role.value)
    assert browser.get(f"{RUN}/reports").status_code == 403
    assert browser.get(f"{RUN}/reports/report.html").status_code == 403
    assert browser.post(f"{RUN}/reports", kind="run").status_code == 403
    assert browser.post(f"{RUN}/reports/signed", kind="pdf").status_code == 403
    assert "Reports" not in browser.get(RUN).text


def test_what_cannot_be_noted_is_not_made(home: CoordinatorHome, tmp_path: Path) -> None:
    reports = Reports(home, (sys.executable, "-S", "-c", SCRIPT))
    from server.console.runs import Runs

    run = Runs(home.jobs).find("0001-triage")
    assert run is not None

    def full() -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        reports.begin(run, "run", signed=False, first=full)
    assert not reports.is_busy


def test_runs_side_by_side(serve: Callable[..., Serving], tmp_path: Path) -> None:
    home = make_home(tmp_path, ())
    go_on(submit(home, job_of("a"), 1, state="completed"), 8)
    labels = {"kind": "sequence_classification", "labels": ["MARKER", "other"]}
    go_on(submit(home, job_of("b", task=labels, training={"rounds": 4, "local_steps": 2}), 2, state="completed"), 4)
    browser = serve(home).signed_in("viewer")
    page = browser.get("/runs/compare?run=0001-a&run=0002-b").text
    assert "<code>training.rounds</code>" in page
    assert "<code>training.local_steps</code>" not in page, "the same in both"
    assert "MARKER" not in page
    told = browser.get("/runs/compare/curve.json?run=0001-a&run=0002-b&metric=loss").json()
    assert told["rounds"] == list(range(9))
    assert [line["label"] for line in told["series"]] == ["0001-a", "0002-b"]
    assert told["series"][1]["values"][5:] == [None] * 4
    assert browser.get("/runs/compare?run=0001-a").status_code == 422
    assert browser.get("/runs/compare?run=0001-a&run=0009-none").status_code == 404
    assert browser.get("/runs/compare/curve.json?metric=loss").json()["series"] == []
