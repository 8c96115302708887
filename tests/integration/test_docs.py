"""What the documents promise is there: commands, settings, the example scenario, the accountant snippet."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
from typer.main import get_command

from cli.commands import app
from server.records.privacy import SiteRecord
from shared.data.datasets import DataSource
from shared.data.deidentify.config import DeidentifyConfig
from shared.files.atomic import write_json
from shared.privacy.accounting import GaussianSteps
from shared.privacy.shared_noise import SharedNoise
from shared.privacy.statement import SiteRelease
from simulations.running.settings import settings_table
from simulations.scenario import Scenario, load_scenario

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    """Return the fenced code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


def commands() -> list[list[str]]:
    """Return every silotune command line in a code block of a document."""
    found = []
    for path in DOCUMENTS:
        fences = path.read_text().split("```")[1::2]
        joined = [re.sub(r"\\\n\s*", " ", fence) for fence in fences]
        lines = [line for fence in joined if fence.startswith("\n") for line in fence.splitlines()]
        found += [line for line in lines if re.match(r"(\.venv/bin/)?silotune ", line)]
    return [shlex.split(line.split("  #")[0])[1:] for line in found]


def test_settings_table_is_what_the_command_prints() -> None:
    assert (ROOT / "docs" / "settings.md").read_text().rstrip() == settings_table().rstrip()


def test_every_setting_is_explained() -> None:
    unexplained = [line for line in settings_table().splitlines() if re.search(r"\|\s*\|$", line)]
    assert unexplained == []


def test_there_are_commands_in_the_documents() -> None:
    assert len(commands()) >= 5


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_documented_commands_parse(arguments: list[str]) -> None:
    command, name, rest = get_command(app), "", arguments
    while isinstance(command, click.Group):
        default = getattr(command, "default_command", None)  # `report RUN` is `report write RUN`
        name, *rest = rest if rest[0] in command.commands or default is None else [default, *rest]
        found = command.get_command(click.Context(command), name)
        assert found is not None, name
        command = found
    with command.make_context(name, rest, resilient_parsing=False) as context:
        for item in context.params.get("overrides") or []:
            assert "=" in item


def test_documented_overrides_are_valid() -> None:
    for arguments in commands():
        if arguments[0] == "coordinator":
            continue  # its run file has no scenario
        overrides = [value for flag, value in pairwise(arguments) if flag == "--set"]
        if overrides:
            load_scenario(ROOT / "simulations" / "demo.toml", overrides)


def write_notes(path: Path, count: int = 3_000) -> None:
    """The made-up notes of docs/simulation.md."""
    openings = ("Seen in clinic today", "Called the ward at night", "Reviewed after surgery", "Admitted from home")
    findings = ("chest pain on exertion", "a mild cough for three days", "fever and confusion", "a sprained ankle")
    plans = (
        "observe and repeat bloods",
        "discharge with advice",
        "transfer for imaging",
        "start antibiotics",
        "see again",
    )
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["note", "triage", "ward"])
        for i in range(count):
            text = f"{openings[i % 4]}: {findings[i // 4 % 4]}, day {i // 16 % 200}, {plans[i * 7 % 5]}."
            writer.writerow([text, ["routine", "urgent"][i // 4 % 2], ["east", "north", "west"][i % 3]])


def test_example_scenario_is_what_the_command_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silotune: Callable[..., Any]
) -> None:
    (example,) = blocks(ROOT / "docs" / "simulation.md", "toml")
    (command,) = [arguments for arguments in commands() if arguments[0] == "new" and "wards.toml" in arguments]
    monkeypatch.chdir(tmp_path)
    write_notes(tmp_path / "notes.csv")
    done = silotune(*command)
    assert done.status == 0, done.err
    assert (tmp_path / "wards.toml").read_text(encoding="utf-8") == example
    scenario = load_scenario(tmp_path / "wards.toml")
    assert isinstance(scenario, Scenario)
    assert scenario.partition.kind == "column"
    assert tomllib.loads(example)["name"] == scenario.name


def test_deidentification_settings_are_valid() -> None:
    short, full = (tomllib.loads(block)["data"] for block in blocks(ROOT / "docs" / "de-identification.md", "toml"))
    assert DataSource.model_validate(short).deidentify == DeidentifyConfig()
    asked = DataSource.model_validate({**short, **full}).deidentify
    assert asked is not None
    assert asked.kinds == DeidentifyConfig().kinds
    assert asked.models


@pytest.mark.parametrize(("shared", "metrics"), [(None, False), (SharedNoise(honest=4, colluding=1), True)])
def test_accountant_snippet_gives_every_recorded_epsilon(
    tmp_path: Path, shared: SharedNoise | None, metrics: bool
) -> None:
    (snippet,) = blocks(ROOT / "docs" / "privacy.md", "python")
    release = SiteRelease(
        site="site-1",
        delta=1e-5,
        max_grad_norm=1.0,
        declared_records=1024,
        randomness="os",
        epsilon_budget=8.0,
        steps_planned=30 if shared else 24,  # spare attempts, which were not needed
        events=(GaussianSteps(noise_multiplier=0.9, sample_rate=0.1, steps=24),),
        metrics=("accuracy",) if metrics else (),
        metrics_mechanism=GaussianSteps(noise_multiplier=2.0, sample_rate=1.0, steps=1) if metrics else None,
        metrics_sha256="0" * 64 if metrics else None,
        shared=shared,
    )
    record = tmp_path / "sites" / "site-1" / "privacy.json"
    write_json(record, SiteRecord.of(release, "docs"))
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300
    )
    told = {name: (float(found), float(stated)) for name, found, stated in map(str.split, done.stdout.splitlines())}
    written = SiteRecord.of(release, "docs").fields()
    names = ("epsilon_spent", "epsilon_planned", "epsilon_alone") if shared else ("epsilon_spent",)
    assert told.keys() == {*names}
    for name, (independent, recorded) in told.items():
        assert recorded == written[name]
        assert independent == pytest.approx(recorded, abs=2e-3), name
    if shared:
        assert told["epsilon_spent"][1] < told["epsilon_planned"][1] < told["epsilon_alone"][1]


def test_links_between_documents_lead_somewhere() -> None:
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_makefile_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", (ROOT / "README.md").read_text())) <= targets
