"""Configuration: unknown keys, ranges, canonical form, overrides."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from pydantic.fields import FieldInfo

from shared.errors import ConfigError
from shared.files.json_files import finite_or_none
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.model import ModelConfig
from shared.job.parsing import Section, apply_overrides, load_toml, nearest, parse

RAW: dict[str, Any] = {
    "name": "a",
    "task": {"kind": "sequence_classification", "labels": ["x", "y"]},
    "training": {"rounds": 2},
}


def job(**changes: Any) -> Job:
    return parse(Job, {**RAW, **changes}, source="job.toml")


@pytest.mark.parametrize(
    ("changes", "found", "hint"),
    [
        ({"lorra": {}}, "unknown key 'lorra'", "did you mean 'lora'?"),
        ({"rounds": 3}, "unknown key 'rounds'", "did you mean 'training.rounds'?"),
        ({"privacy": {"epsilonn": 1}}, "unknown key 'privacy.epsilonn'", "did you mean 'epsilon'?"),
        ({"training": {"rounds": 1, "zzz": 1}}, "unknown key 'training.zzz'", "known: "),
        (
            {"training": {"rounds": 1, "adversarial": {"radiu": 1}}},
            "unknown key 'training.adversarial.radiu'",
            "did you mean 'radius'?",
        ),
        ({"model": {"seed": 1}}, "seed stands below [model]", "belongs above the first [section]"),
        ({"model": {"training": {}}}, "unknown key 'model.training'", ""),
        ({"training": {"rounds": 16**5000}}, "training.rounds", "thousands of digits"),
        ({"name": "n" * 5000}, "name", "(5,002 characters)"),
        ({"name": "../evil"}, "name", "found '../evil'"),
        ({"training": {}}, "training.rounds is missing", ""),
        ({"privacy": {"epsilon": 0}}, "privacy.epsilon", "found 0"),
        ({"privacy": {"epsilon": -1.5}}, "privacy.epsilon", "found -1.5"),
        ({"privacy": {"epsilon": math.nan}}, "privacy.epsilon", "finite"),
        ({"privacy": {"epsilon": math.inf}}, "privacy.epsilon", "finite"),
        ({"privacy": {"epsilon": 1e6}}, "privacy.epsilon", "less than or equal to 1000"),
        ({"privacy": {"epsilon": 1e-9}}, "privacy.epsilon", "greater than or equal to 1e-06"),
        ({"privacy": {"delta": 1e-31}}, "privacy.delta", "greater than or equal to 1e-30"),
        ({"privacy": {"sample_rate": 1e-10}}, "privacy.sample_rate", "greater than or equal to 1e-09"),
        ({"training": {"rounds": 100_000, "local_steps": 100_000}}, "10,000,000,000", "at most 16,777,216"),
        ({"federation": {"min_sites": 10**9}}, "federation.min_sites", "less than or equal to 10000000"),
        ({"privacy": {"delta": 1.0}}, "privacy.delta", "found 1.0"),
        ({"privacy": {"sample_rate": 0.0}}, "privacy.sample_rate", "found 0.0"),
        ({"privacy": {"sample_rate": 1.1}}, "privacy.sample_rate", "found 1.1"),
        ({"privacy": {"noise_multiplier": 0.0}}, "privacy.noise_multiplier", "found 0.0"),
        ({"privacy": {"unit": "person"}}, "privacy.unit", "record"),
        ({"privacy": {"unit": "patient"}}, "records_per_person must say", "of each patient enter a step"),
        ({"privacy": {"records_per_person": 3}}, "for the units 'patient' and 'customer'", "set the unit"),
        ({"privacy": {"unit": "customer", "records_per_person": 0}}, "privacy.records_per_person", "found 0"),
        ({"privacy": {"unit": "customer", "records_per_person": 1001}}, "privacy.records_per_person", "found 1001"),
        ({"training": {"rounds": 2, "learning_rate": 1e38}}, "training.learning_rate", "less than or equal to 1000"),
        ({"training": {"rounds": 2, "head_learning_rate_factor": 1e38}}, "head_learning_rate_factor", "equal to 1000"),
        ({"training": {"rounds": 2, "weight_decay": 1e38}}, "training.weight_decay", "less than or equal to 1000"),
        (
            {"training": {"rounds": 2, "weight_decay": 0.5, "learning_rate": 3.0}},
            "times the learning rate 3 is above 1",
            "Lower one",
        ),
        ({"aggregation": {"server_learning_rate": 1e38}}, "aggregation.server_learning_rate", "equal to 1000"),
        ({"federation": {"round_timeout_seconds": 1e300}}, "federation.round_timeout_seconds", "equal to 31622400"),
        ({"lora": {"alpha": 1e38}}, "lora.alpha", "less than or equal to 100000"),
        ({"site_metrics": {"largest_loss": 1e300}}, "site_metrics.largest_loss", "less than or equal to 1000000"),
        ({"task": {"kind": "regression", "target_range": [-1e308, 1e308]}}, "task.target_range", "or equal to -1"),
        ({"seed": -1}, "seed", "found -1"),
        ({"schema_version": 2}, "schema_version", "found 2"),
        (
            {"task": {"kind": "sequence_classification", "labels": "[x,y]"}},
            'task.labels: expected a list, such as ["a", "b"]',
            "in single quotes, since the shell removes double ones (found '[x,y]')",
        ),
        ({"lora": {"target_modules": "query"}}, "lora.target_modules: expected a list", "\"b\"] (found 'query')"),
        ({"lora": {"target_modules": []}}, "lora.target_modules", ""),
        ({"task": {"kind": "sequence_classification", "labels": ["x"]}}, "1 labels", "at least two"),
        ({"task": {"kind": "sequence_classification", "labels": ["x", "x"]}}, "twice", "unique"),
        ({"task": {"kind": "causal_lm", "labels": ["x", "y"]}}, "takes no labels", "remove task.labels"),
        ({"task": {"kind": "causal_lm"}, "lora": {"train": "none"}}, "has no head that is trained", "set it to 'b'"),
        ({"federation": {"min_sites": 3, "sites_per_round": 2}}, "sites_per_round is 2", "min_sites 3"),
        ({"lora": {"train": "both"}, "aggregation": {"server_optimizer": "adam"}}, "server_optimizer", "'none'"),
    ],
)
def test_a_bad_job_is_refused_by_key_value_and_advice(changes: dict[str, Any], found: str, hint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        job(**changes)
    assert str(refused.value).startswith("job.toml is not valid:")
    assert found in str(refused.value)
    assert hint in str(refused.value)


def test_a_fault_between_sections_is_told_by_their_names_alone() -> None:
    with pytest.raises(ConfigError) as refused:
        job(federation={"min_sites": 3, "sites_per_round": 2})
    assert str(refused.value).splitlines()[1].startswith("  - federation.sites_per_round is 2")


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        job(privacy={"epsilon": 0, "delta": 2}, training={"rounds": 0})
    assert [key in str(refused.value) for key in ("privacy.epsilon", "privacy.delta", "training.rounds")] == [True] * 3


def test_a_job_cannot_be_changed_after_construction() -> None:
    with pytest.raises(ValueError, match="frozen"):
        job().training.rounds = 5


def test_canonical_json_does_not_depend_on_the_order_or_on_written_defaults() -> None:
    shuffled = dict(reversed(list(RAW.items())))
    written = parse(Job, {**shuffled, "seed": 0, "model": ModelConfig().model_dump()}, source="x")
    assert written.canonical_json() == job().canonical_json()
    assert written.sha256 == job().sha256
    assert json.loads(job().canonical_json())["privacy"]["sample_rate"] == 0.05  # defaults are written out


def test_the_hash_sees_every_change() -> None:
    hashes = {
        job().sha256,
        job(seed=1).sha256,
        job(training={"rounds": 3}).sha256,
        job(privacy={"epsilon": 7.999}).sha256,
        job(task={"kind": "sequence_classification", "labels": ["y", "x"]}).sha256,
    }
    assert len(hashes) == 5


def test_canonical_json_survives_a_round_trip(classification_job: Callable[..., Job]) -> None:
    original = classification_job(aggregation={"weights": "declared"})
    again = parse(Job, json.loads(original.canonical_json()), source="x")
    assert again == original


def test_overrides_are_read_as_toml_and_else_as_text() -> None:
    changed = apply_overrides(
        RAW,
        ["training.rounds=10", "privacy.sample_rate = 0.5", "lora.train=both", 'name="b"', "task.labels=['p','q','r']"],
    )
    assert changed["training"]["rounds"] == 10
    assert changed["privacy"]["sample_rate"] == 0.5
    assert changed["lora"]["train"] == "both"
    assert changed["name"] == "b"
    assert changed["task"]["labels"] == ["p", "q", "r"]
    assert RAW["training"] == {"rounds": 2}, "the original must stay as it was"


def test_an_override_holds_one_value() -> None:
    assert apply_overrides({}, ["a=1\nb = 2", "c=" + "9" * 5000]) == {"a": "1\nb = 2", "c": "9" * 5000}


@pytest.mark.parametrize("item", ["training.rounds", "=3", "name.first=3"])
def test_a_malformed_override_is_refused(item: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        apply_overrides(RAW, [item])


def test_toml_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_toml(tmp_path / "none.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("name = \n")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        load_toml(bad)
    bad.write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        load_toml(bad)


def test_nearest_and_finite() -> None:
    assert nearest("quary", ["query", "value"]) == "did you mean 'query'?"
    assert nearest("zzz", ["query", "value"]) == "known: query, value"
    assert [finite_or_none(x) for x in (1.5, math.inf, math.nan)] == [1.5, None, None]


def test_the_unit_is_part_of_a_job_and_older_jobs_keep_their_hash() -> None:
    by_record, by_patient = job(), job(privacy={"unit": "patient", "records_per_person": 4})
    assert "records_per_person" not in by_record.canonical_json()
    assert '"records_per_person":4' in by_patient.canonical_json()
    assert job(privacy={"unit": "patient", "records_per_person": 5}).sha256 != by_patient.sha256
    assert by_record.sha256 != by_patient.sha256


def test_a_cache_folder_is_absolute(tmp_path: Path) -> None:
    raw = {"cache_file_megabytes": 8, "cache_file_folder": str(tmp_path)}
    assert parse(ComputeConfig, raw, source="site.toml").cache_file_folder == tmp_path
    with pytest.raises(ConfigError, match=r"cache_file_folder.*absolute path"):
        parse(ComputeConfig, {"cache_file_folder": "scratch"}, source="site.toml")


def test_older_jobs_keep_their_hash_and_send_float32() -> None:
    plain = job()
    assert plain.federation.update_dtype == "float32"
    assert "update_dtype" not in plain.canonical_json()
    assert job(federation={"update_dtype": "float32"}).sha256 == plain.sha256
    compressed = job(federation={"update_dtype": "int8"})
    assert '"update_dtype":"int8"' in compressed.canonical_json()
    assert parse(Job, json.loads(compressed.canonical_json()), source="job.json") == compressed
    assert compressed.sha256 != plain.sha256


def test_a_job_of_an_older_version_keeps_its_bytes() -> None:
    """Signatures, ledgers and resumed runs name a job by the hash of this text; a new key stands in it only where it is set."""
    older = (
        '{"aggregation":{"server_learning_rate":1.0,"server_momentum":0.9,"server_optimizer":"none","weights":"equal"},'
        '"federation":{"min_sites":1,"round_timeout_seconds":3600.0,"sites_per_round":null},'
        '"lora":{"alpha":16.0,"last_layers":1,"rank":8,"target_modules":["query","value"],"train":"b"},'
        '"model":{"backbone":"embedded:all-minilm-l6-v2","max_length":64,"pooling":"mean","revision":null},"name":"a",'
        '"privacy":{"delta":1e-05,"epsilon":8.0,"max_grad_norm":1.0,"mechanism":"dp-sgd","noise_multiplier":null,'
        '"sample_rate":0.05,"unit":"record"},"schema_version":1,"seed":0,'
        '"task":{"kind":"sequence_classification","labels":["x","y"]},'
        '"training":{"head_learning_rate_factor":1.0,"learning_rate":0.003,"local_steps":4,"momentum":0.9,"optimizer":"adamw",'
        '"rounds":2,"schedule":"constant","weight_decay":0.0}}'
    )
    assert parse(Job, json.loads(older), source="job.json").canonical_json() == older


def test_every_number_of_a_job_has_two_bounds() -> None:
    """A number without one is charged for and then overflows; annotations of nested types count."""

    def unbounded(name: str, annotation: Any, metadata: Iterable[Any]) -> list[str]:
        metadata = [part for m in metadata for part in (m.metadata if isinstance(m, FieldInfo) else [m])]
        if get_origin(annotation) is Annotated:
            inner, *further = get_args(annotation)
            return unbounded(name, inner, [*metadata, *further])
        if annotation is float:
            low, high = (any(hasattr(m, a) or hasattr(m, b) for m in metadata) for a, b in (("ge", "gt"), ("le", "lt")))
            return [] if low and high else [name]
        if isinstance(annotation, type) and issubclass(annotation, Section):
            return of_section(annotation, f"{name}.")
        return [found for part in get_args(annotation) for found in unbounded(name, part, metadata)]

    def of_section(section: type[Section], prefix: str) -> list[str]:
        fields = section.model_fields.items()
        return [found for key, f in fields for found in unbounded(prefix + key, f.annotation, f.metadata)]

    assert of_section(Job, "") == []
