"""A version comes into the registry whole, verified and with its run's records, or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from server.registry.adding import add
from server.registry.promotion import promote
from server.registry.registry import Registry
from server.registry.showing import claim
from server.registry.verification import verify
from server.reports.run.reading import read_run
from server.rounds.observer import Observer
from server.runs.folder import load_job
from shared.epsilons import rounded_up
from shared.errors import ConfigError, ModelError, RunError, SilotuneError, TrustError
from shared.runtime.export.folder import ModelFolder, ModelRecord, write_model_folder
from shared.trust.signed_folder import sign_folder
from shared.trust.signed_job import sign_job
from simulations.running.engine import run_scenario
from simulations.scenario import load_scenario
from tests.server.registry.keys import OFFICER, SIGNER, STRANGER

FIXTURES = Path(__file__).parents[2] / "fixtures"
NOW = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def exported(source: Path, out: Path, *, change: Callable[[Path], None] = lambda folder: None) -> Path:
    """Make a model folder from another, as `silotune export` does; the weights are made up."""
    folder = ModelFolder.read(source)

    def make(place: Path) -> ModelRecord:
        save_file({"weight": torch.zeros(2)}, place / "model.safetensors")
        change(place)
        record = folder.record
        return replace(record, format="merged", made_from_sha256=folder.hashes()[record.made_from])

    return write_model_folder(out, folder, make).path


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_version_has_what_its_run_recorded(filled: Path, small_run: Path) -> None:
    registry = Registry(filled)
    version = registry.version("films", 1)
    examined = verify(version)
    statement = read_run(small_run).statement
    summary = version.manifest.summary
    assert statement is not None
    assert summary.epsilon is not None
    assert f"({rounded_up(summary.epsilon)}, 1e-05)-differentially private" in statement.one_site
    assert (summary.job_sha256, summary.sites, summary.data) == (
        load_job(small_run).sha256,
        ["site-1", "site-2"],
        "train.csv",
    )
    assert examined.facts.data.statement == statement
    assert (version.signer, version.manifest.note, registry.numbers("films")) == ("sam", "the first", [1, 2])
    assert (version.model / "adapter" / "adapter_model.safetensors").exists()


def test_only_what_is_needed_is_copied(filled: Path, small_run: Path) -> None:
    copied, source = names(filled / "films" / "versions" / "1" / "model"), names(small_run)
    assert copied < source
    assert {"checkpoint.safetensors", ".lock"} <= source
    assert any(name.startswith("sites/site-1/home/") for name in source)
    kinds = {name if "/" not in name else name.split("/")[0] + "/" + name.split("/")[-1] for name in copied}
    assert {name for name in kinds if not name.startswith("adapter/")} == {
        *("job.json", "run.json", "metrics.jsonl", "statement.json", "evaluation.json", "sites/privacy.json"),
    }


def test_the_first_version_makes_a_registry_with_a_key_of_its_own(run: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "new")
    version = add(registry, run, "films", now=NOW)
    assert version.signer == "this-registry"
    assert registry.own_key.stat().st_mode & 0o777 == 0o600
    promote(registry, version, "champion", registry.who(None))
    assert verify(Registry(tmp_path / "new").version("films", 1)).summary == version.manifest.summary


OLD_RUNS = {
    "federation/coordinator/jobs/0001-golden/run": ("record", "2.271", ["clinic", "practice"]),
    "persons/run": ("patient", "5.598", ["site-1", "site-2", "site-3"]),
    "images/run": ("record", "1.357", ["site-1", "site-2", "site-3"]),
    "central/run": ("site", "0.450", []),
}


def test_runs_of_every_kind_and_of_older_versions_are_taken(tmp_path: Path) -> None:
    with tarfile.open(FIXTURES / "before_rooms.tar.xz") as archive:
        archive.extractall(tmp_path / "old", filter="data")
    registry = Registry(tmp_path / "new")
    for number, (place, expected) in enumerate(OLD_RUNS.items(), start=1):
        version = add(registry, tmp_path / "old" / place, "old", signer=("sam", SIGNER))
        summary = verify(version).summary
        assert summary.epsilon is not None
        assert (summary.unit, rounded_up(summary.epsilon), summary.sites) == expected
        assert (version.number, summary.job_signer is not None) == (number, "federation" in place)


def test_of_a_run_without_privacy_nothing_is_claimed(
    write_scenario: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    privacy = {"mechanism": "none", "noise_multiplier": "none"}
    path = write_scenario(tmp_path, training={"rounds": 1}, partition={"num_sites": 2}, privacy=privacy)
    run_scenario(load_scenario(path), tmp_path / "open", observer=lambda arm: Observer())
    version = add(registry, tmp_path / "open", "films", signer=("sam", SIGNER))
    summary = verify(version).summary
    assert (summary.epsilon, summary.delta, summary.unit) == (None, None, None)
    assert claim(summary) == "not private"
    promote(registry, version, "champion", OFFICER)


def test_a_registry_under_a_policy_elsewhere(small_run: Path, filled: Path, tmp_path: Path) -> None:
    policy = Registry(filled).policy_file
    registry = Registry(tmp_path / "new", policy)
    with pytest.raises(TrustError, match="has no key of its own"):
        add(registry, small_run, "films")
    with pytest.raises(TrustError, match="does not name it"):
        add(registry, small_run, "films", signer=("stan", STRANGER))
    for _ in range(2):
        add(registry, small_run, "films", signer=("sam", SIGNER))
    assert registry.numbers("films") == [1, 2]
    assert registry.policy_file.read_text() == policy.read_text()


def spoil_statement(run: Path) -> None:
    path = run / "statement.json"
    path.write_text(path.read_text().replace("(3.333, 1e-05)", "(0.333, 1e-05)"))


def spoil_epsilon(run: Path) -> None:
    edit(run / "sites" / "site-1" / "privacy.json", epsilon_spent=0.5, epsilon_bound=0.5)


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "a statement that claims more": (
        spoil_statement,
        r"claims \(0.333, 1e-05\) in its words; recomputed it is \(3.333",
    ),
    "a smaller epsilon": (spoil_epsilon, "recomputed from the executed steps it is 3.33"),
    "no record of a site": (lambda run: (run / "sites" / "site-2" / "privacy.json").unlink(), "has no privacy record"),
    "another job": (lambda run: edit(run / "job.json", name="other"), "not the job that run.json names"),
    "an interrupted run": (lambda run: edit(run / "run.json", status="running"), "running, not completed"),
    "no rounds": (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_does_not_verify_is_not_added(case: str, registry: Registry, run: Path) -> None:
    spoil, message = SPOILT[case]
    spoil(run)
    before = names(run)
    with pytest.raises(SilotuneError, match=message) as caught:
        add(registry, run, "films", signer=("sam", SIGNER))
    assert ".draft-" not in str(caught.value)
    assert registry.numbers("films") == [1, 2]
    assert {path.name for path in (registry.path / "films" / "versions").iterdir()} == {"1", "2"}
    assert names(run) == before


def test_a_key_that_is_not_trusted_adds_nothing(registry: Registry, run: Path) -> None:
    with pytest.raises(TrustError, match=r"does not name it below \[signers\]"):
        add(registry, run, "films", signer=("stan", STRANGER))
    with pytest.raises(TrustError, match="has no key of its own"):
        add(registry, run, "films")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 65, "ümlaut", "a b", "a\n"])
def test_a_name_leads_nowhere_else(name: str, registry: Registry, run: Path) -> None:
    with pytest.raises(ConfigError, match="no name of a model"):
        add(registry, run, name, signer=("sam", SIGNER))


def test_names_that_look_alike_are_refused(registry: Registry, run: Path) -> None:
    with pytest.raises(ConfigError, match="'films' but for case"):
        add(registry, run, "Films", signer=("sam", SIGNER))
    with pytest.raises(ConfigError, match="a file of the registry itself"):
        add(registry, run, "keys", signer=("sam", SIGNER))
    with pytest.raises(ConfigError, match="the note has"):
        add(registry, run, "films", signer=("sam", SIGNER), note="two\nlines")


def test_the_name_of_a_key_file_may_be_anything(run: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "new")
    assert add(registry, run, "films", signer=('my "key"\n[officers]', SIGNER)).signer == "first-signer"


def test_a_foreign_folder_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty and holds no registry of models"):
        add(Registry(tmp_path / "full"), run, "films")
    assert names(tmp_path / "full") == {"letter.txt"}


def test_an_export_is_the_child_of_what_it_was_made_from(registry: Registry, small_run: Path, tmp_path: Path) -> None:
    folder = exported(small_run, tmp_path / "merged")
    version = add(registry, folder, "films", signer=("sam", SIGNER))
    parent = version.manifest.parent
    assert parent is not None
    assert (parent.reference, version.number) == ("films:2", 3)
    assert parent.manifest_sha256 == registry.version("films", 2).manifest_sha256
    assert version.manifest.summary.format == "merged"
    assert version.manifest.summary.epsilon == registry.version("films", 2).manifest.summary.epsilon
    verify(version)


def test_an_export_needs_its_origin(small_run: Path, tmp_path: Path, run: Path) -> None:
    folder = exported(small_run, tmp_path / "merged")
    elsewhere = Registry(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"not in this registry.*--parent RUN"):
        add(elsewhere, folder, "films")
    version = add(elsewhere, folder, "films", parent=small_run)
    assert version.manifest.parent is not None
    assert version.manifest.parent.reference is None
    verify(version)
    edit(run / "sites" / "site-1" / "privacy.json", declared_records=1)
    with pytest.raises(ModelError, match="records carry over"):
        add(elsewhere, folder, "films", parent=run)
    with pytest.raises(ConfigError, match="leave out --parent"):
        add(elsewhere, small_run, "films", parent=version)


def test_a_statement_carries_over_unchanged(registry: Registry, small_run: Path, tmp_path: Path) -> None:
    folder = exported(small_run, tmp_path / "merged", change=spoil_statement)
    with pytest.raises(ModelError, match=r"statement\.json is not what .* has"):
        add(registry, folder, "films", signer=("sam", SIGNER))


def test_a_job_keeps_its_signature(run: Path, registry: Registry, tmp_path: Path) -> None:
    coordinator = tmp_path / "coordinator"
    place = coordinator / "jobs" / "0001-small"
    place.mkdir(parents=True)
    (coordinator / "coordinator.toml").write_text('name = "consortium"\n')
    signed = sign_job(
        load_job(run), signer=SIGNER, coordinator=OFFICER.verify_key, issued=NOW, not_after=NOW + timedelta(days=1)
    )
    (place / "signed_job.json").write_text(signed.to_json())
    sign_folder(run / "adapter", OFFICER)
    shutil.move(run, place / "run")
    version = add(registry, place / "run", "films", signer=("sam", SIGNER))
    examined = verify(version)
    assert examined.signed is not None
    assert version.manifest.summary.job_signer == SIGNER.verify_key.text
    # The coordinator of the signed job signed the adapter; another's signature is none.
    sign_folder(place / "run" / "adapter", STRANGER)
    with pytest.raises(TrustError, match="signed by"):
        add(registry, place / "run", "films", signer=("sam", SIGNER))


# --- kills and races ---


def killed_after(lines: int, act: Callable[[], object]) -> Callable[[], None]:
    """Return `act` in a process that dies after so many executed lines of the registry's code; -1: counts them."""
    counted = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal counted
        file = frame.f_code.co_filename
        if "/server/registry/" not in file and not file.endswith("/files/atomic.py"):
            return None
        if event == "line":
            counted += 1
            if counted == lines:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def run() -> None:
        sys.settrace(trace)
        act()
        sys.settrace(None)
        if lines < 0:
            Path(os.environ["COUNTED"]).write_text(str(counted))

    return run


def adds(registry: Registry, run: Path) -> None:
    add(registry, run, "films", signer=("sam", SIGNER))


def promotes(registry: Registry, run: Path) -> None:
    promote(registry, registry.version("films", 2), "champion", OFFICER)


@pytest.mark.parametrize("act", [adds, promotes])
def test_a_kill_leaves_the_old_state_or_the_new_one(
    act: Callable[[Registry, Path], None],
    registry: Registry,
    small_run: Path,
    in_child: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    promote(registry, registry.version("films", 1), "champion", OFFICER)
    monkeypatch.setenv("COUNTED", str(tmp_path / "counted"))

    def copied(place: object) -> Registry:
        return Registry(Path(shutil.copytree(registry.path, tmp_path / f"copy-{place}")))

    assert in_child(killed_after(-1, lambda: act(copied("whole"), small_run)))() == 0
    total = int((tmp_path / "counted").read_text())
    assert total > 100
    outcomes, abandoned = set(), []
    for lines in [*range(1, total - 60, total // 8), *range(total - 60, total, 5)]:
        copy = copied(lines)
        assert in_child(killed_after(lines, lambda: act(copy, small_run)))() == signal.SIGKILL  # noqa: B023
        numbers, entries = copy.numbers("films"), copy.history("films").entries
        assert numbers == [1, 2, 3][: len(numbers)]
        outcomes.add((len(numbers), len(entries)))
        verify(copy.version("films", numbers[-1]))
        if any(copy.path.glob("films/versions/.draft-*")):
            abandoned.append(copy)
    old = (2, 1)
    assert outcomes == {old, (3, 1) if act is adds else (2, 2)}
    if act is adds:
        add(abandoned[-1], small_run, "films", signer=("sam", SIGNER))
        assert not list(abandoned[-1].path.glob("films/versions/.draft-*"))


def test_two_processes_add_at_the_same_time(registry: Registry, small_run: Path, in_child: Any) -> None:
    def adds_some() -> None:
        for _ in range(4):
            adds(registry, small_run)

    def promotes_some() -> None:
        for number in (1, 2) * 4:
            with contextlib.suppress(ConfigError):  # the other one was faster: it names that version already
                promote(registry, registry.version("films", number), "champion", OFFICER)

    waiting = [in_child(act) for act in (adds_some, adds_some, promotes_some, promotes_some)]
    assert [wait() for wait in waiting] == [0, 0, 0, 0]
    assert registry.numbers("films") == list(range(1, 11))
    for number in registry.numbers("films"):
        assert registry.version("films", number).manifest.version == number
    entries = registry.history("films").entries
    assert len(entries) >= 8
    assert [entry.former for entry in entries[1:]] == [entry.version for entry in entries[:-1]]
