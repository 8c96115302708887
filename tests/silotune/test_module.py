"""The public module is what the commands do: the same scenario, plan, run, promise and predictions, and it is light to import."""

from __future__ import annotations

import csv
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import SelfComposedDpEvent
from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant

import silotune as module
from server.registry.adding import add
from server.registry.registry import Registry
from server.rounds.observer import Observer
from simulations.running.engine import run_scenario
from tests.loading import HEAVY, ROOT
from tests.server.registry.keys import SIGNER
from tests.simulations.new_scenario.test_new_scenario import WORDS

REFERENCE = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
SMALL = {"baselines.arms": ["non-private"], "training.rounds": 2, "simulation.threads": 1}


def loaded_by(code: str) -> set[str]:
    """Return the modules that a process has loaded after `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 160 records with a name that HTML would take for markup in one of its labels."""
    path = tmp_path_factory.mktemp("records") / "reviews.csv"
    rows = [(f"{WORDS[i % 14]} {WORDS[i // 14]} {WORDS[7 * i % 13]}", ["bad", "<b>good"][i % 2]) for i in range(160)]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.fixture(scope="module")
def scenario(records: Path, tiny_bert: Path) -> module.Scenario:
    made = module.Scenario.from_csv(records, text="text", label="label", epsilon=3, backbone=str(tiny_bert))
    return made.with_settings(SMALL)


@pytest.fixture(scope="module")
def run(scenario: module.Scenario, tmp_path_factory: pytest.TempPathFactory) -> module.Run:
    """A finished run; tests must not change it."""
    return module.simulate(scenario, tmp_path_factory.mktemp("run") / "small", progress=False)


# What there is


def test_importing_loads_nothing_heavy() -> None:
    loaded = loaded_by("import silotune; dir(silotune); silotune.ConfigError; silotune.__version__")
    assert not loaded & {*HEAVY, "pydantic", "rich"}


def test_fault_a_heavy_import_at_the_top_is_seen() -> None:
    assert {"numpy"} <= loaded_by("import silotune; import numpy") & {*HEAVY}


def test_importing_calls_nobody() -> None:
    asked = "import os; os.environ['FLWR_TELEMETRY_ENABLED'] = '1'"
    loaded_by(f"{asked}; import silotune; assert os.environ['FLWR_TELEMETRY_ENABLED'] == '0'")


def public(name: str) -> Iterator[tuple[str, Any]]:
    """Yield a name of the module and, of a class, what it has of its own that is public."""
    found = getattr(module, name)
    yield name, found
    if inspect.isclass(found) and not issubclass(found, Exception):
        yield from ((f"{name}.{key}", value) for key, value in vars(found).items() if not key.startswith("_"))


@pytest.mark.parametrize("name", sorted({*module.__all__} - {"__version__"}))
def test_every_name_is_there_explained_and_in_the_reference(name: str) -> None:
    assert name in dir(module)
    assert re.search(rf"^\| `{name}` \| .+ \|", REFERENCE, flags=re.MULTILINE)
    for place, found in public(name):
        if place == "Scenario.model_config" or place.startswith("Scenario.model_"):
            continue
        assert inspect.getdoc(found), place


def test_the_reference_names_nothing_that_is_not_there() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", REFERENCE, flags=re.MULTILINE)
    assert sorted(rows) == sorted(module.__all__)
    attributes = re.findall(r"^\| `Run` \| (.*?) \|", REFERENCE, flags=re.MULTILINE)[0]
    own = {name.partition(".")[2] for name, _ in public("Run")} - {"", "exported", "finished", "job"}
    assert set(re.findall(r"`(\w+)(?:\(\))?`", attributes)) == own
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = module.no_such_name


def test_every_error_that_it_names_is_of_one_family() -> None:
    kinds = [getattr(module, name) for name in module.__all__ if name.endswith("Error")]
    assert len(kinds) > 8
    assert all(issubclass(kind, module.SilotuneError) for kind in kinds)


# Scenarios


def test_from_csv_is_what_silotune_new_writes(
    records: Path, tiny_bert: Path, tmp_path: Path, silotune: Callable[..., Any]
) -> None:
    options = ("--text", "text", "--label", "label", "--epsilon", "3", "--backbone", tiny_bert)
    done = silotune("new", records, *options, "--out", tmp_path / "reviews.toml")
    assert done.status == 0, done.err
    written = module.Scenario.load(tmp_path / "reviews.toml")
    before = sorted(records.parent.iterdir())
    asked: dict[str, Any] = {"text": "text", "label": "label", "epsilon": 3, "backbone": str(tiny_bert)}
    made = module.Scenario.from_csv(records, **asked)
    assert sorted(records.parent.iterdir()) == before, "nothing is written"
    assert made.job == written.job
    assert [source.base / source.data.train.path for source in (made, written) if source.data.train] == [
        made.base / records.name,
        Path(written.base / written.data.train.path if written.data.train else ""),
    ]
    assert made.load_data() == written.load_data()
    assert any("few for epsilon 3" in remark for remark in made.remarks)
    assert "note: " in str(made)
    kept = module.Scenario.from_csv(records, **asked, out=tmp_path / "again.toml")
    assert (tmp_path / "again.toml").read_text() == (tmp_path / "reviews.toml").read_text().replace(
        '"reviews"', '"again"'
    )
    assert kept.remarks == made.remarks
    with pytest.raises(module.ConfigError, match="is there already"):
        module.Scenario.from_csv(records, **asked, out=tmp_path / "again.toml")


def test_settings_are_changed_and_checked_anew(scenario: module.Scenario) -> None:
    assert scenario.with_settings({}) == scenario
    assert scenario.with_settings({}).job.sha256 == scenario.job.sha256
    other = scenario.with_settings(
        {"training.rounds": 5, "privacy": {**scenario.job.privacy.model_dump(), "epsilon": 1}}
    )
    assert (other.job.training.rounds, other.job.privacy.epsilon) == (5, 1)
    assert (scenario.job.training.rounds, scenario.job.privacy.epsilon) == (2, 3)
    assert isinstance(other, module.Scenario)
    assert other.remarks == scenario.remarks
    for settings, said in (
        ({"training.round": 5}, "did you mean 'rounds'"),
        ({"training.rounds": 0}, "training.rounds"),
        ({"name.first": 1}, "'name' is a value, not a section"),
    ):
        with pytest.raises(module.ConfigError, match=re.escape(said)):
            scenario.with_settings(settings)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.Scenario.from_csv(None, text="a", label="b"), "path is None; expected a path"),
        (
            lambda m: m.Scenario.from_csv("a.csv", text="a", label="b", epsilon="three"),
            "epsilon is 'three'; expected a number",
        ),
        (lambda m: m.Scenario.from_csv("a.csv", text="a", label="b", test=3), "test is 3; expected a path"),
        (lambda m: m.Scenario.load(b"a.toml"), "path is b'a.toml'; expected a path"),
        (lambda m: m.simulate("claims.csv", "runs/x"), "expected a Scenario: Scenario.load(path) reads"),
        (lambda m: m.simulate(m.Scenario.builtin("demo"), None), "out is None; expected a path"),
        (lambda m: m.plan("claims.csv"), "expected a Scenario: Scenario.load(path) reads"),
        (lambda m: m.plan(m.Scenario.builtin("demo"), ledgers=[3]), "ledger 1 is 3; expected a path"),
        (lambda m: m.load(3), "reference is 3; expected a path"),
        (lambda m: m.load("films", registry=3), "registry is 3; expected a path"),
    ],
)
def test_what_is_of_another_type_is_told(call: Any, said: str) -> None:
    with pytest.raises(module.ConfigError, match=re.escape(said)):
        call(module)


def test_a_builtin_scenario_is_that_of_the_command() -> None:
    demo = module.Scenario.builtin("demo", {"partition.num_sites": 3})
    assert demo.partition.num_sites == 3
    assert "epsilon 8 for each record" in str(demo)
    with pytest.raises(module.ConfigError, match="demo"):
        module.Scenario.builtin("demos")


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"label": "verdict"}, module.DataError, "verdict"),
        ({"label": None, "pair": "label"}, module.ConfigError, "--label"),
        ({"epsilon": -1}, module.PrivacyError, "epsilon"),
        ({"task": "sorting"}, module.ConfigError, "sorting"),
        ({"declared": True}, module.ConfigError, "--records"),
        ({"backbone": "no/such/model"}, module.ModelError, "no/such/model"),
    ],
)
def test_a_mistake_in_from_csv_is_told(
    records: Path, tiny_bert: Path, change: dict[str, Any], kind: type[Exception], said: str
) -> None:
    asked: dict[str, Any] = {"text": "text", "label": "label", "backbone": str(tiny_bert), **change}
    with pytest.raises(kind, match=re.escape(said)):
        module.Scenario.from_csv(records, **asked)


def test_tagged_words_want_a_place_for_their_copy(tmp_path: Path, tiny_bert: Path) -> None:
    tagged = tmp_path / "words.iob"
    tagged.write_text("".join(f"film\tB-A\nplot{i}\tO\n\n" for i in range(120)))
    with pytest.raises(module.ConfigError, match="copy"):
        module.Scenario.from_csv(tagged, backbone=str(tiny_bert))
    made = module.Scenario.from_csv(tagged, backbone=str(tiny_bert), out=tmp_path / "words.toml")
    assert made.job.task.kind == "token_classification"
    assert (tmp_path / "words.data.jsonl").exists()


# Plans


def test_a_plan_is_that_of_the_command(
    scenario_file: Callable[..., Path], silotune: Callable[..., Any], run: module.Run
) -> None:
    path = scenario_file()
    found = module.plan(module.Scenario.load(path), records=1000)
    assert json.loads(silotune("plan", "--job", path, "--records", 1000, "--json").out) == found.to_dict()
    assert silotune("plan", "--job", path, "--records", 1000).out.split() == str(found).split()
    numbers = ("--records", 10000, "--batch-size", 512, "--epochs", 10, "--sweep", "epsilon=1,3")
    found = module.plan(records=10000, batch_size=512, epochs=10, sweep="epsilon=1,3")
    assert json.loads(silotune("plan", *numbers, "--json").out) == found.to_dict()
    assert found.epsilon == max(setting.epsilon for setting in found.settings)
    shares = module.plan(
        sites=8, colluding=2, epsilon=1, epsilon_alone=8, records=2048, batch_size=256, steps=16, delta=1e-5
    )
    assert shares.epsilon == pytest.approx(1, abs=1e-3)
    assert shares.settings[0].epsilon > 4


def test_a_plan_tells_whether_the_sites_can_afford_it(
    scenario: module.Scenario, run: module.Run, tmp_path: Path
) -> None:
    exports = run.ledgers()
    found = module.plan(scenario, ledgers=exports)
    assert [site.num_runs for site in found.sites] == [0] * len(exports), "the budget is spent by the run"
    assert all(site.epsilon_now == pytest.approx(3, abs=1e-3) for site in found.sites)
    file = tmp_path / "site.json"
    file.write_text(exports[0].model_dump_json())
    assert module.plan(scenario, ledgers=[file]).sites == found.sites[:1]
    file.write_text("{}")
    with pytest.raises(module.LedgerError, match=r"site\.json"):
        module.plan(scenario, ledgers=[file])


@pytest.mark.parametrize(
    "options", [{"epsilon": 1}, {"sweep": "epsilon=1,3"}, {"sites": 3, "colluding": 1}, {"unit": "record"}]
)
def test_what_a_job_says_itself_is_not_asked_again(scenario: module.Scenario, options: dict[str, Any]) -> None:
    with pytest.raises(module.ConfigError):
        module.plan(scenario, **options)
    with pytest.raises(module.ConfigError, match="speak of a job"):
        module.plan(records=100, batch_size=10, epochs=1, epsilon=1, site_sizes={"a": 3})


# Runs


def independent_epsilon(record: dict[str, Any]) -> float:
    """Recompute the epsilon of a `privacy.json` with dp-accounting alone."""
    accountant = PLDAccountant()
    for event in record["events"]:
        one = PoissonSampledDpEvent(event["sample_rate"], GaussianDpEvent(event["noise_multiplier"]))
        accountant.compose(SelfComposedDpEvent(one, event["steps"]))
    return float(accountant.get_epsilon(record["delta"]))


def test_a_run_tells_what_its_folder_holds(run: module.Run) -> None:
    assert run.finished
    assert not run.exported
    assert run.report == run.folder / "report.html"
    evaluation = json.loads((run.folder / "evaluation.json").read_text())
    assert run.metrics == evaluation["metrics"]
    assert [record.round for record in run.rounds] == [0, 1, 2]
    assert {*run.baselines} == {"non-private"}
    assert run.statement == json.loads((run.folder / "statement.json").read_text())["text"]
    assert [site.site for site in run.sites] == ["site-1", "site-2"]
    (audit,) = run.audits
    assert audit.verdict in ("consistent", "inconclusive")
    assert module.load(run.folder).metrics == run.metrics


def promises(run: module.Run) -> bool:
    """Return whether epsilon is an upper bound for every recorded site, by another accountant."""
    paths = sorted(run.folder.glob("sites/*/privacy.json"))
    found = [independent_epsilon(json.loads(path.read_text())) for path in paths]
    assert found
    return (
        run.epsilon is not None
        and max(found) - 1e-3 <= run.epsilon
        and max(site.epsilon_stated or 0 for site in run.sites) <= run.epsilon
    )


def test_epsilon_is_an_upper_bound_for_what_was_executed(run: module.Run) -> None:
    assert promises(run)
    assert run.epsilon == pytest.approx(3, abs=2e-3)
    assert run.delta == run.job.privacy.delta


def test_fault_an_epsilon_rounded_down_is_seen(run: module.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("silotune.runs.rounded_up", lambda value, digits: f"{int(value * 100) / 100 - 0.01:.2f}")
    assert not promises(run)


def test_no_epsilon_is_told_where_none_may_be_stated(scenario: module.Scenario, tmp_path: Path) -> None:
    """Of noise from an injected seed, and of a run in which one site states none."""
    run_scenario(scenario, tmp_path / "run", observer=lambda arm: Observer(), injected_seed="test", report=False)
    found = module.load(tmp_path / "run")
    assert found.sites
    assert found.epsilon is None


def test_predictions_are_those_of_the_command(run: module.Run, silotune: Callable[..., Any]) -> None:
    texts = ["warm film", "dull plot"]
    printed = [json.loads(line) for line in silotune("predict", run.folder, *texts, "--json").out.splitlines()]
    found = run.predict(texts)
    assert [{"row": row, **one} for row, one in enumerate(found, start=1)] == printed
    assert run.predict("warm film") == found[:1], "one text is no sequence of letters"
    with pytest.raises(module.DataError, match="text 2 is blank"):
        run.predict(["warm film", " "])
    with pytest.raises(module.ConfigError, match="silotune predict"):
        run.generate(["warm"])


def test_runs_of_one_backbone_do_not_answer_for_each_other(run: module.Run) -> None:
    """They share a runtime in memory, into which the adapter of whoever is asked has to be put."""
    other = module.load(run.folder / "baselines" / "non-private")
    first, second = run.predict(["warm film"]), other.predict(["warm film"])
    assert first != second
    assert (run.predict(["warm film"]), other.predict(["warm film"])) == (first, second)


def test_figures_are_those_of_the_report(run: module.Run, tmp_path: Path) -> None:
    page = run.report.read_text(encoding="utf-8")
    figures = run.figures()
    assert {"rounds", "spent", "sites"} <= figures.keys()
    for figure in figures.values():
        (html,) = figure._repr_mimebundle_().values()
        assert html.replace(' xmlns="http://www.w3.org/2000/svg"', "") in page
    assert figures["rounds"].save(tmp_path / "rounds.svg").read_bytes() == figures["rounds"].data
    png = module.plan(records=10000, batch_size=512, epochs=10, epsilon=3).figure()
    assert png.data.startswith(b"\x89PNG")
    assert {*png._repr_mimebundle_()} == {"image/png"}


def test_print_and_notebooks_show_the_same_and_escape_names(run: module.Run, scenario: module.Scenario) -> None:
    assert "Federated DP" in str(run)
    assert "Non-private" in run._repr_html_()
    assert "1 of 2" not in str(run)
    named = scenario.with_settings({"task.labels": ["bad", "<b>good"]})
    hostile = module.Scenario._of(named, ["<script>alert(1)</script>"])
    assert "<script>" in str(hostile)
    assert "<script>" not in hostile._repr_html_()
    assert repr(run).startswith("Run(")


def test_a_run_that_was_stopped_goes_on(scenario: module.Scenario, run: module.Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    out = StringIO()
    with redirect_stdout(out):
        stopped = module.simulate(scenario, folder, stop_after=1)
    assert "federated: round 1/2" in out.getvalue()
    assert not stopped.finished
    with pytest.raises(module.RunError, match="resume"):
        module.simulate(scenario, folder, progress=False)
    with pytest.raises(module.RunError, match="stop_after"):
        module.simulate(scenario, folder, stop_after=0)
    with redirect_stdout(StringIO()) as silent:
        resumed = module.simulate(scenario, folder, resume=True, progress=False)
    assert silent.getvalue() == ""
    assert resumed.finished
    assert resumed.epsilon == run.epsilon


def test_what_is_not_ours_is_left_as_it_was(scenario: module.Scenario, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(module.RunError):
        module.simulate(scenario, tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(module.RunError, match="expected the folder of a run"):
            module.load(place)


def test_a_run_without_privacy_promises_nothing(scenario: module.Scenario, run: module.Run) -> None:
    baseline = module.load(run.folder / "baselines" / "non-private")
    assert baseline.epsilon is None
    assert "WITHOUT noise" in baseline.statement
    assert baseline.metrics == run.baselines["non-private"]


def test_an_exported_model_predicts_and_says_what_it_lacks(
    run: module.Run, tmp_path: Path, silotune: Callable[..., Any]
) -> None:
    done = silotune("export", run.folder, "--to", "merged", "--out", tmp_path / "model")
    assert done.status == 0, done.err
    model = module.load(tmp_path / "model")
    assert model.exported
    assert (model.metrics, model.epsilon, model.statement) == (run.metrics, run.epsilon, run.statement)
    (exact,), (found,) = run.predict(["warm film"]), model.predict(["warm film"])
    assert found["probability"] == pytest.approx(exact["probability"], abs=1e-3)
    assert "exported from a run" in str(model)
    for part in ("report", "rounds", "baselines"):
        with pytest.raises(module.RunError, match=f"which has no {part}"):
            getattr(model, part)
    for method in (model.figures, model.table, model.ledgers):
        with pytest.raises(module.RunError, match="which has no"):
            method()


def test_a_name_of_a_registry_is_verified_and_loaded(run: module.Run, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "models")
    version = add(registry, run.folder, "films", signer=("sam", SIGNER), note="")
    found = module.load("films", registry=registry.path)
    assert found.folder == version.model
    assert (found.metrics, found.epsilon, found.statement) == (run.metrics, run.epsilon, run.statement)
    assert found.predict(["warm film"]) == run.predict(["warm film"])
    assert found.finished
    assert "Federated DP" in str(found)
    with pytest.raises(module.ConfigError, match="films"):
        module.load("films:9", registry=registry.path)
    path = found.folder / "statement.json"
    path.chmod(0o600)
    path.write_text(path.read_text().replace("3.000", "1.000"))
    with pytest.raises(module.TrustError):
        module.load("films", registry=registry.path)


def test_fault_a_second_path_is_seen(
    monkeypatch: pytest.MonkeyPatch, scenario: module.Scenario, tmp_path: Path
) -> None:
    """What the command's function refuses, the module refuses: it has no code of its own that would go on."""

    def refuse(*_: object, **__: object) -> None:
        raise module.RunError("asked the command's own function")

    monkeypatch.setattr("simulations.simulating.run_repeats", refuse)
    monkeypatch.setattr("silotune.planning.plan_job", refuse)
    monkeypatch.setattr("simulations.new_scenario.writing._drafted", refuse)
    for ask in (
        lambda: module.simulate(scenario, tmp_path / "run", progress=False),
        lambda: module.plan(scenario),
        lambda: module.Scenario.from_csv(tmp_path / "x.csv", text="a", label="b"),
    ):
        with pytest.raises(module.RunError, match="asked the command"):
            ask()
    assert importlib.import_module("simulations.commands")
