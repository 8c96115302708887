"""What a sweep varies: a scenario, axes, seeds, and how settings are searched; everything is checked before a trial runs.

A sweep file is TOML with the key `scenario`; a scenario file with axes from the command line does as well. A *setting* is one
value for every axis, a *trial* is one setting under one seed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from shared.errors import ConfigError
from shared.files.json_files import canonical_json
from shared.job.parsing import Section, apply_overrides, nearest, parse, toml_value
from shared.job.privacy import OF_SHARES
from shared.job.values import Name
from shared.numbers import read_number, read_whole
from simulations.scenario import Scenario, build_scenario, load_scenario_file, scenario_path

Search = Literal["grid", "optuna"]
Setting = dict[str, Any]
"""Dotted key of the scenario -> value, in the order of the axes; JSON values only, no budget at all is "inf"."""

EPSILON = "privacy.epsilon"
NO_BUDGET = "inf"
MAX_SETTINGS = 10_000
_SECTIONS = ("model", "lora", "training", "privacy", "aggregation", "federation", "partition")
_OF_TRAINING = ("label_smoothing", "class_weights", "thresholds", "head_start", "head_centre")
"""Keys of the task that say how its model is trained, and leave what is asked of it as it is."""
_SINGLE_KEYS = ("simulation.dropout_probability", *(f"task.{key}" for key in _OF_TRAINING))
_REFUSED = {
    "seed": "repeat every setting under several seeds with --seeds (`seeds` in a sweep file)",
    "privacy.delta": "epsilons at different deltas cannot stand on one frontier; change it for all trials with --set",
    "privacy.mechanism": "write inf among the values of privacy.epsilon for trials without noise and clipping",
    "privacy.unit": "epsilons for different units cannot stand on one frontier",
}
_EXAMPLE = "for example training.learning_rate=1e-3,3e-3"


class Range(Section):
    """Every number between two ends; only for the search by Optuna."""

    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    log: bool = False
    """Search on a logarithmic scale; needs `low` above 0."""
    integer: bool = False
    """Only whole numbers."""

    @model_validator(mode="after")
    def _check_ends(self) -> Self:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(
                f"the range {self.low:g} to {self.high:g} is empty, or logarithmic with an end at or below 0"
            )
        if self.integer and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(f"the range {self.low:g} to {self.high:g} is of whole numbers and ends in a fraction")
        return self

    def number(self, value: float) -> float | int:
        """Return a number of this range as the scenario wants it."""
        return int(value) if self.integer else float(value)


class SweepConfig(Section):
    """Everything that `silotune sweep` reads besides the scenario."""

    scenario: str
    """Path of the scenario file; relative to the sweep file."""
    axes: dict[str, tuple[Any, ...] | Range] = Field(min_length=1)
    """Dotted key of the scenario -> the values to try, or {low, high, log} for Optuna."""
    fixed: dict[str, Any] = Field(default_factory=dict)
    """Dotted key -> value that every trial has, like `--set`."""
    seeds: tuple[int, ...] | None = None
    """Public seeds under which every setting is repeated; None: the scenario's own seed and its repeats."""
    search: Search = "grid"
    """`grid` runs every combination; `optuna` searches by TPE, separately for every budget."""
    trials: int | None = Field(default=None, ge=1, le=MAX_SETTINGS)
    """Settings that Optuna asks for at each budget; each is repeated under all seeds."""
    name: Name | None = None
    """Name of the sweep; None is the scenario's."""

    @field_validator("axes", mode="before")
    @classmethod
    def _plain_values(cls, axes: Any) -> Any:
        if not isinstance(axes, Mapping):
            return axes
        return {
            key: [_plain(v) for v in values] if isinstance(values, list) else values for key, values in axes.items()
        }

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, values in self.axes.items():
            _check_axis(key)
            if isinstance(values, Range):
                if self.search == "grid":
                    raise ValueError(f"axis {key!r} is a range, which only search = 'optuna' takes; name its values")
                if key == EPSILON:
                    raise ValueError(
                        "privacy.epsilon takes values, not a range: the best setting is sought at each budget"
                    )
                continue
            _check_values(key, values)
        for key, value in self.fixed.items():
            _check_json(f"fixed {key!r}", _plain(value))
        if self.search == "optuna" and self.trials is None:
            raise ValueError("search by optuna needs `trials`, the number of settings to ask for at each budget")
        if self.search == "grid" and self.trials is not None:
            raise ValueError("`trials` is for search = 'optuna'; a grid runs every combination")
        if self.search == "optuna" and set(self.axes) == {EPSILON}:
            raise ValueError(
                "search by optuna needs an axis besides privacy.epsilon: budgets are not searched, all are run"
            )
        seeds = self.seeds
        if seeds is not None and (not seeds or len(set(seeds)) < len(seeds) or not all(0 <= s < 2**63 for s in seeds)):
            raise ValueError("seeds must be distinct whole numbers from 0, at least one")
        if EPSILON in self.axes and {"privacy.noise_multiplier"} & {*self.axes, *self.fixed}:
            raise ValueError(
                "privacy.noise_multiplier decides the noise, so privacy.epsilon cannot be varied beside it"
            )
        return self

    def first(self) -> Setting:
        """Return one setting: the first value of every axis, or the low end of its range."""
        return {k: v.number(v.low) if isinstance(v, Range) else v[0] for k, v in self.axes.items()}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep whose every part was checked.

    Attributes:
        config: what was asked.
        name: of the sweep.
        seeds: under which every setting is repeated.
        raw: content of the scenario file with what is fixed, without baselines: a sweep compares settings.
        source: name of that file, for errors.
        base: folder that its paths start from.
    """

    config: SweepConfig
    name: str
    seeds: tuple[int, ...]
    raw: dict[str, Any]
    source: str
    base: Path

    def scenario(self, setting: Setting, seed: int) -> Scenario:
        """Return the scenario of one trial.

        Raises:
            ConfigError: naming the setting, if one of its values is not valid.
        """
        raw = _with_setting(apply_overrides(self.raw, [f"seed={seed}"]), setting)
        return build_scenario(raw, source=f"{self.source} with {describe(setting)}", base=self.base)

    def grid(self) -> list[Setting]:
        """Return every combination of the axes' values, the last axis varying fastest."""
        keys = list(self.config.axes)
        values = [() if isinstance(axis, Range) else axis for axis in self.config.axes.values()]
        return [dict(zip(keys, chosen, strict=True)) for chosen in itertools.product(*values)]

    def settings(self, data_sha256: str | None) -> dict[str, Any]:
        """Return everything that decides the trials' results, as plain JSON: what a resumed sweep must agree with.

        Settings that change only speed may change on the way, and so may the number of settings that Optuna asks for.
        """
        scenario = self.scenario(self.first(), self.seeds[0]).model_dump(mode="json")
        for axis in self.config.axes:
            section, _, key = axis.partition(".")
            (scenario["job"].get(section) or scenario[section]).pop(key, None)
        for speed in ("backend", "num_actors", "threads"):
            scenario["simulation"].pop(speed)
        kept = {
            key: value for key, value in scenario.items() if key not in ("compute", "base", "baselines", "seed", "name")
        }
        kept["job"] = {key: value for key, value in kept["job"].items() if key not in ("seed", "name")}
        if EPSILON in self.config.axes:  # set by the values of that axis
            kept["job"]["privacy"].pop("mechanism")
        axes = self.config.model_dump(mode="json")["axes"]
        return {
            **kept,
            "name": self.name,
            "axes": axes,
            "seeds": list(self.seeds),
            "search": self.config.search,
            "data_sha256": data_sha256,
        }

    def first(self) -> Setting:
        """Return `SweepConfig.first`."""
        return self.config.first()

    def key(self, setting: Setting, seed: int) -> str:
        """Return the identity of a trial within this sweep: 16 hexadecimal digits."""
        return hashlib.sha256(canonical_json({"setting": setting, "seed": seed}).encode()).hexdigest()[:16]


def settings_sha256(settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 of `Sweep.settings`, hexadecimal."""
    return hashlib.sha256(canonical_json(dict(settings)).encode()).hexdigest()


def describe(setting: Setting) -> str:
    """Return a setting in words: `privacy.epsilon 3, training.learning_rate 0.001`."""
    return ", ".join(f"{key} {shown(value)}" for key, value in setting.items())


def shown(value: Any) -> str:
    """Return one value of a setting as people write it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def load_sweep(
    path: Path,
    *,
    axes: Sequence[str] = (),
    seeds: str | None = None,
    search: str | None = None,
    trials: int | None = None,
    overrides: Sequence[str] = (),
) -> Sweep:
    """Read a sweep file, or a scenario file with axes from the command line, and check every setting's form.

    Args:
        path: TOML; a sweep file is one with the key `scenario`.
        axes: `KEY=V,W,...`, or `KEY=LOW:HIGH`, `:log` or `:int` after it, for Optuna; they replace axes of the same key.
        seeds: numbers with commas.
        search, trials: replace those of the file.
        overrides: `KEY=VALUE` for every trial.

    Raises:
        ConfigError: naming every bad key.
    """
    path = scenario_path(path)
    found = load_scenario_file(path)
    raw: dict[str, Any] = found if "scenario" in found else {"scenario": path.name}
    given = {"search": search, "trials": trials, "seeds": None if seeds is None else _parse_seeds(seeds)}
    raw = {**raw, **{key: value for key, value in given.items() if value is not None}}
    own_axes = raw.get("axes", {})
    if axes:
        raw["axes"] = {**(own_axes if isinstance(own_axes, dict) else {}), **_parse_axes(axes)}
    if not raw.get("axes"):
        raise ConfigError(f"{path} names no axes: add --axis KEY=VALUES, {_EXAMPLE}, or [axes] in a sweep file.")
    config = parse(SweepConfig, raw, source=str(path))
    return _resolve(config, path.resolve().parent / config.scenario, overrides)


def _resolve(config: SweepConfig, path: Path, overrides: Sequence[str]) -> Sweep:
    fixed = [f"{key}={json.dumps(_plain(value), ensure_ascii=False)}" for key, value in config.fixed.items()]
    raw = apply_overrides(load_scenario_file(path), [*fixed, *overrides])
    base = path.resolve().parent
    # An axis may complete what the scenario only begins, such as the required key of a table.
    first = config.first()
    plain = build_scenario(_with_setting(raw, first), source=f"{path} with {describe(first)}", base=base)
    if EPSILON in config.axes and plain.job.privacy.noise_multiplier is not None:
        raise ConfigError(
            f"{path} sets privacy.noise_multiplier, which decides the noise, so privacy.epsilon cannot be varied; remove it, or "
            "vary privacy.noise_multiplier."
        )
    if plain.simulation.folds is not None:
        raise ConfigError(
            f"{path} sets simulation.folds, but a trial of a sweep is one run; remove it, and cross-validate the setting that "
            "the sweep finds."
        )
    seeds = config.seeds or tuple(range(plain.seed, plain.seed + plain.simulation.repeats))
    raw = {key: value for key, value in raw.items() if key != "baselines"}
    raw = apply_overrides(raw, ["simulation.repeats=1"])
    sweep = Sweep(config=config, name=config.name or plain.name, seeds=seeds, raw=raw, source=str(path), base=base)
    if config.search == "grid":
        number = math.prod(len(axis) for axis in config.axes.values() if not isinstance(axis, Range))
        if number > MAX_SETTINGS:
            raise ConfigError(f"the grid has {number:,} settings; at most {MAX_SETTINGS:,} are run. Name fewer values.")
        for setting in sweep.grid():
            sweep.scenario(setting, seeds[0])
    else:
        sweep.scenario(sweep.first(), seeds[0])
    return sweep


def _parse_axes(items: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, values in map(parse_axis, items):
        if key in found:
            raise ConfigError(f"--axis names {key!r} twice; give all its values to one, {_EXAMPLE}.")
        found[key] = values
    return found


def parse_axis(text: str) -> tuple[str, Any]:
    """Return the key and the values of `KEY=V,W,...` or the range of `KEY=LOW:HIGH`, with `:log` or `:int` after it.

    Raises:
        ConfigError: if the text is not of that form.
    """
    key, separator, spec = text.partition("=")
    if not separator or not key.strip() or not spec.strip():
        raise ConfigError(f"--axis {text!r} is not of the form KEY=VALUES, {_EXAMPLE}.")
    parts = spec.split(":")
    if len(parts) in (2, 3) and (ends := _numbers(parts[:2])) is not None:
        kind = parts[2] if len(parts) == 3 else ""
        if kind not in ("", "log", "int"):
            raise ConfigError(f"--axis {text!r} ends with {kind!r}; a range is LOW:HIGH, LOW:HIGH:log or LOW:HIGH:int.")
        return key.strip(), {"low": ends[0], "high": ends[1], "log": kind == "log", "integer": kind == "int"}
    listed = toml_value(f"[{spec}]")
    if isinstance(listed, list):
        return key.strip(), listed
    return key.strip(), [toml_value(part.strip()) for part in spec.split(",")]  # plain words, such as adamw,sgd


def _numbers(parts: Sequence[str]) -> list[float] | None:
    try:
        return [read_number(part) for part in parts]
    except ValueError:
        return None


def _parse_seeds(text: str) -> list[int]:
    try:
        return [read_whole(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {text!r} is not a list of whole numbers, for example 0,1,2.") from None


def _plain(value: Any) -> Any:
    """Return `value` with infinity, which JSON cannot hold, as "inf"."""
    return NO_BUDGET if isinstance(value, float) and math.isinf(value) and value > 0 else value


def _check_axis(key: str) -> None:
    if reason := _REFUSED.get(key):
        raise ValueError(f"{key!r} cannot be an axis: {reason}")
    section, _, rest = key.partition(".")
    if key in _SINGLE_KEYS or (section in _SECTIONS and rest):
        return
    if section in ("data", "task"):
        besides = f"; of the task {', '.join(_OF_TRAINING)} can" if section == "task" else ""
        raise ValueError(
            f"{key!r} cannot be an axis: scores on other data or of another task cannot be compared{besides}"
        )
    known = ", ".join([*(f"{name}.*" for name in _SECTIONS), *_SINGLE_KEYS])
    hint = f"; {nearest(section, _SECTIONS)}" if section not in _SECTIONS else ""
    raise ValueError(f"{key!r} cannot be an axis{hint}; axes are keys of {known}")


def _check_values(key: str, values: Sequence[Any]) -> None:
    if not values:
        raise ValueError(f"axis {key!r} has no values")
    for value in values:
        _check_json(f"axis {key!r}", value)
    if len({canonical_json(_as_number(value)) for value in values}) < len(values):
        raise ValueError(f"axis {key!r} holds a value twice")
    if NO_BUDGET in values and key != EPSILON:
        raise ValueError(f"axis {key!r} holds infinity, which only privacy.epsilon takes: a trial without noise")
    if key == EPSILON:
        for value in values:
            if value != NO_BUDGET and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"axis 'privacy.epsilon' holds {value!r}; expected numbers above 0, or inf")


def _check_json(where: str, value: Any) -> None:
    try:
        canonical_json(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{where} holds {value!r}; expected finite numbers, texts, booleans or lists of these"
        ) from None


def _as_number(value: Any) -> Any:
    """Return whole numbers as floats: 1 and 1.0 are one setting."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _with_setting(raw: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """Return the content of a scenario file with a setting."""
    changes = _expanded(setting, raw)
    return apply_overrides(raw, [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changes.items()])


def _expanded(setting: Setting, raw: Mapping[str, Any]) -> Setting:
    """Return the keys of the scenario `raw` that a setting changes: a budget decides the mechanism too."""
    if EPSILON not in setting:
        return setting
    changed = {key: value for key, value in setting.items() if key != EPSILON}
    privacy = raw.get("privacy", {})
    shared = privacy.get("mechanism") == "distributed"
    if setting[EPSILON] != NO_BUDGET:
        return {**changed, "privacy.mechanism": "distributed" if shared else "dp-sgd", EPSILON: setting[EPSILON]}
    # Without noise there are no shares of any.
    no_shares = {f"privacy.{key}": "none" for key in OF_SHARES if key in privacy}
    return {**changed, "privacy.mechanism": "none", **no_shares}
