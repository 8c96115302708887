"""The table of commands: every line leads to a command, and none of their files loads what is heavy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from typer.main import get_command

from cli.commands import PLACES, app, told_of
from tests.loading import HEAVY, run_and_list


def test_every_line_leads_to_a_command_of_that_name() -> None:
    group = get_command(app)
    assert isinstance(group, click.Group)
    context = click.Context(group)
    assert group.list_commands(context) == list(PLACES), "a full installation has them all, in this order"
    for name in PLACES:
        found = group.get_command(context, name)
        assert found is not None
        assert found.name == name
        assert found.help


@pytest.mark.parametrize("name", PLACES)
def test_what_is_told_of_a_command_is_its_own_help(name: str) -> None:
    """For `silotune --help`, which runs no command's module: 0.3 s of processor time in the place of 0.8."""
    group = get_command(app)
    assert isinstance(group, click.Group)
    found = group.get_command(click.Context(group), name)
    assert found is not None
    assert click.Command(name, help=told_of(PLACES[name])).get_short_help_str(200) == found.get_short_help_str(200)


def test_the_list_of_commands_loads_none_of_them() -> None:
    _, loaded = run_and_list("--help")
    assert not {"pydantic", "cryptography", "numpy", "jinja2"} & {name.partition(".")[0] for name in loaded}


@pytest.mark.parametrize(
    "arguments",
    [
        ("predict", "a film"),
        ("generate", "a film"),
        ("explain", "a film"),
        ("audit",),
        ("monitor", __file__),
        ("report",),
        ("report", "--format", "html"),
    ],
    ids=" ".join,
)
def test_what_is_no_run_folder_is_told_what_one_is(
    silotune: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "notes.csv").write_text("note\n")
    for place, found in (("nowhere", "is not there"), ("notes.csv", "is a file"), (".", "holds no job.json")):
        outcome = silotune(arguments[0], tmp_path / place, *arguments[1:])
        assert outcome.status == 1
        assert f"{found}; expected the folder of a run, with job.json and run.json in it" in outcome.err
        assert "runs/NAME-DATE, or what --out named." in outcome.err
    # What `silotune federation --out` named, a coordinator's folder, and that of a submitted job.
    run = tmp_path / "coordinator" / "jobs" / "0001-secure" / "run"
    run.mkdir(parents=True)
    (run / "job.json").write_text("{}")
    for given in (tmp_path, tmp_path / "coordinator", run.parent):
        outcome = silotune(arguments[0], given, *arguments[1:])
        assert outcome.status == 1
        assert f"The run is in {run}: give that folder." in outcome.err.replace("\n", "")
    second = tmp_path / "coordinator" / "jobs" / "0002-secure" / "run"
    second.mkdir(parents=True)
    (second / "job.json").write_text("{}")
    outcome = silotune(arguments[0], tmp_path, *arguments[1:])
    assert f"The runs are in {run}, {second}: give one of these folders." in outcome.err.replace("\n", "")


@pytest.mark.parametrize("command", [("simulate",), ("federation",), ("sweep", "--axis", "privacy.epsilon=1,3")])
def test_what_is_no_scenario_is_told_what_one_is(
    silotune: Callable[..., Any], tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "notes.csv").write_text("note,triage\na pain,low\n")
    outcome = silotune(command[0], tmp_path / "notes.csv", *command[1:])
    assert outcome.status == 2
    assert "notes.csv is no TOML file; expected a scenario" in outcome.err
    assert "silotune new" in outcome.err


def test_help_of_report_names_its_options(silotune: Callable[..., Any]) -> None:
    told = silotune("report", "--help").out
    for option in ("--format html", "--out", "--ledger", "--sign", "report write --help"):
        assert option in " ".join(told.replace("│", " ").split()), option


def test_help_of_everything_loads_nothing_heavy() -> None:
    out, loaded = run_and_list("--help")
    assert "Usage:" in out
    assert not loaded & {*HEAVY}


def test_a_command_loads_no_other_command_s_file() -> None:
    _, loaded = run_and_list("version")
    assert "cli.commands" in loaded
    assert not {name for name in loaded if name.startswith(("client", "server", "simulations", "shared.tools"))}


def test_a_name_that_nobody_knows_is_compared_with_all(silotune: Callable[..., Any]) -> None:
    outcome = silotune("moniter")
    assert outcome.status == 2
    assert "No such command 'moniter'. Did you mean 'monitor'?" in " ".join(outcome.err.replace("│", " ").split())


@pytest.mark.parametrize(("typed", "meant"), [("nwe", "new"), ("site inti", "init"), ("pki aprove", "approve")])
def test_a_slip_is_told_once(typed: str, meant: str, silotune: Callable[..., Any]) -> None:
    outcome = silotune(*typed.split())
    assert outcome.status == 2
    assert (outcome.out + outcome.err).count(f"'{meant}'") == 1


def test_control_characters_in_an_error_do_not_reach_the_terminal(silotune: Callable[..., Any], tmp_path: Path) -> None:
    outcome = silotune("report", tmp_path / "\x1b[2Jrun")
    assert outcome.status == 1
    assert "\x1b" not in outcome.err
    assert "\N{REPLACEMENT CHARACTER}[2Jrun" in outcome.err
