"""The report of a run: as it was written, or made by another process outside the runs; and how it is served."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from shared.errors import RunError
from shared.web.guarding import SANDBOXED
from simulations.console import reports
from simulations.console.reports import Reports
from simulations.console.runs import read_run
from tests.simulations.console.conftest import Serving, files_of
from tests.simulations.console.folders import make_run

HOSTILE = "<!doctype html><title>x</title><script>document.title = 'ran'</script><p>mine</p>"


def test_what_the_run_wrote_is_served_as_a_document(serve: Callable[[Path], Serving], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_sites=1)
    (run / "report.html").write_text(HOSTILE)
    serving = serve(tmp_path)
    (found,) = serving.console.content.index.now().runs
    answer = serving.signed_in().get(f"/runs/{found}/report")
    assert answer.text == HOSTILE
    policy = answer.headers["content-security-policy"]
    assert policy == SANDBOXED
    assert policy.endswith("sandbox"), "without scripts, forms, or this origin"
    assert "script-src" not in policy
    assert "default-src 'none'" in policy
    assert "cross-origin-opener-policy" not in answer.headers, "browsers refuse it with a sandbox"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert serving.browser().get(f"/runs/{found}/report").status_code == 303, "to sign in"


def test_one_is_made_once_outside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, place = make_run(tmp_path / "run", mechanism="none", num_rounds=2), tmp_path / "reports"
    place.mkdir()
    before = files_of(folder)
    run, made = read_run(folder, "run"), Reports(place)
    document = made.of(run)
    assert document.startswith(b"<!")
    assert b"Accuracy" in document
    assert files_of(folder) == before
    monkeypatch.setattr(reports, "_make", lambda *_: pytest.fail("it is made already"))
    assert made.of(run) == document


def test_a_run_that_changed_gets_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = make_run(tmp_path / "run", num_sites=1), list[Path]()

    def make(run: Path, path: Path) -> None:
        asked.append(run)
        path.write_text("<!")

    monkeypatch.setattr(reports, "_make", make)
    monkeypatch.setattr(reports, "_MOST_KEPT", 2)
    made = Reports(tmp_path)
    made.of(read_run(folder, "run"))
    (folder / "run.json").write_text((folder / "run.json").read_text() + "\n")
    made.of(read_run(folder, "run"))
    made.of(read_run(folder, "run"))
    assert len(asked) == 2
    for number in range(4):
        made.of(read_run(make_run(tmp_path / f"more-{number}", num_sites=0), f"more-{number}"))
    assert len(list(tmp_path.glob("*.html"))) == 2, "old ones are removed"


def test_no_report_is_made_over_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "_make", lambda *_: pytest.fail("a link would be followed"))
    (tmp_path / "secret.json").write_text("{}")
    plain = ("site_metrics.json", "adapter", "sites/site-1/privacy.json", "report.html")
    not_read = ("repeats", "folds", "sites/site-1/home", "sites/home", "sites/repeats", "adapter/home/x")
    for number, name in enumerate((*plain, *not_read)):
        run = make_run(tmp_path / str(number), num_sites=1)
        place = run / name
        place.parent.mkdir(exist_ok=True, parents=True)
        if place.exists():
            place.rename(tmp_path / f"{number}-as-it-was")
        place.symlink_to(tmp_path / "secret.json")
        with pytest.raises(RunError, match=f"{place.name} .*is a link"):
            Reports(tmp_path).of(read_run(run, str(number)))


def test_what_cannot_be_reported_is_told(
    serve: Callable[[Path], Serving], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", num_sites=1)
    serving = serve(tmp_path)
    (found,) = serving.console.content.index.now().runs
    failed = CompletedProcess([], 1, "", "error: statement.json is missing; <b>where</b> is it\x1b[2J?\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    answer = serving.signed_in().get(f"/runs/{found}/report")
    assert answer.status_code == 409
    assert "the report cannot be made: statement.json is missing; &lt;b&gt;where&lt;/b&gt; is it [2J?" in answer.text


def test_a_report_that_is_a_link_is_no_fault_of_the_console(serve: Callable[[Path], Serving], tmp_path: Path) -> None:
    (tmp_path / "elsewhere.html").write_text("<p>a secret</p>")
    run = make_run(tmp_path / "runs" / "run", num_sites=1)
    (run / "report.html").unlink(missing_ok=True)
    (run / "report.html").symlink_to(tmp_path / "elsewhere.html")
    serving = serve(tmp_path / "runs")
    (found,) = serving.console.content.index.now().runs
    answer = serving.signed_in().get(f"/runs/{found}/report")
    assert answer.status_code == 409
    assert "is a link" in answer.text
    assert "secret" not in answer.text
