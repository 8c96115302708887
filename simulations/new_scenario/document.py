"""The scenario file that `silotune new` writes: every setting with a comment that says why."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from shared.data.datasets import PERSON_ROLE
from shared.epsilons import noise_rounded_down
from shared.errors import printable
from shared.job.kinds import RULES
from simulations.new_scenario.lengths import Backbone
from simulations.new_scenario.looking import Findings
from simulations.new_scenario.question import SITE_ROLE, USUAL_EPSILON, Question
from simulations.new_scenario.rule import HEAD_OFFSET, Settings

_COMMENT_COLUMN = 38
_WIDTH = 110


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Everything that the file says.

    Attributes:
        name: of the run.
        max_length: tokens; None for images.
        length_reason: why.
        num_test: records held out for evaluation; None with a test file.
        num_sites: sites of the partition; None where a column names them.
    """

    question: Question
    found: Findings
    settings: Settings
    backbone: Backbone | None
    name: str
    delta: float
    max_length: int | None
    length_reason: str
    num_test: int | None
    num_sites: int | None


def document(draft: Draft, remarks: Iterable[str] = ()) -> str:
    """Return the TOML text, with `remarks` on its files in the header."""
    sections = [
        _head(draft, remarks),
        *_model(draft),
        _task(draft),
        _training(draft),
        _privacy(draft),
        _federation(draft),
        *_data(draft),
        _partition(draft),
        _simulation(draft),
    ]
    return "\n".join(sections)


def _head(draft: Draft, remarks: Iterable[str]) -> str:
    question = draft.question
    if question.declared_only:
        origin = "No record was read for it: labels, lengths and sizes are what was declared."
    else:
        origin = "Labels, lengths and sizes were looked up in the file, on this machine; no other setting looked at a record."
    said = [f"Written by `silotune new` from {printable(question.data.name, '?')}. {origin}"]
    if question.data_kind == "private" and not question.declared_only:
        said.append(
            "The records count as private, and what is looked up in private records is itself a release: rounded lengths and "
            "sizes tell little, but read [task] before this file leaves the house, or declare everything (`silotune new "
            "--declared`)."
        )
    said += [*remarks, *draft.found.remarks]
    comments = "".join(
        textwrap.fill(printable(one, "?"), _WIDTH, initial_indent="# ", subsequent_indent="# ") + "\n" for one in said
    )
    return comments + _lines([("name", draft.name, ""), ("seed", 0, "public: partition and first weights")])


def _model(draft: Draft) -> list[str]:
    if draft.backbone is None:
        return [_section("model", [("backbone", "cnn:small", "a small network for images; all of it is trained")])]
    backbone = draft.backbone
    model: list[tuple[str, Any, str]] = [("backbone", backbone.name, "")]
    model += [("revision", backbone.revision, "")] if backbone.revision else []
    model.append(("max_length", draft.max_length, draft.length_reason))
    # What a word is shows in the last layers more than what a text is about (docs/decisions/0018).
    of_words = draft.found.kind == "token_classification"
    deep = of_words or backbone.architecture.causal
    lora = [
        ("rank", 8, "more ranks learn more and gather more noise"),
        ("alpha", 16.0 if of_words else 8.0, "the update is scaled by alpha / rank"),
        ("target_modules", list(backbone.target_modules), ""),
        ("last_layers", 2 if deep else 1, "what lies below is frozen and computed once"),
        ("train", "b", 'FFA-LoRA: exact averages; "none": the head alone, much faster'),
    ]
    return [_section("model", model), _section("lora", lora)]


def _task(draft: Draft) -> str:
    found, question = draft.found, draft.question
    rows: list[tuple[str, Any, str]] = [("kind", found.kind, "")]
    if found.labels:
        why = "declared" if question.labels else "found in the file"
        rows.append(("labels", list(found.labels), f"{why}; public from here on, for every site gets them"))
    keys = RULES[found.kind].keys
    if "target_range" in keys:
        why = "declared" if question.value_range else "lowest and highest in the file"
        rows.append(("target_range", _range(found), f"{why}; what lies outside is clipped"))
        rows.append(("head_offset", HEAD_OFFSET, "a larger bias: the scores' own mean is found sooner"))
    if "image_shape" in keys:
        rows.append(("image_shape", list(question.image_shape or ()), "channels, height, width"))
        rows.append(("pixel_range", _range(found), "of the format, not of these images"))
    return _section("task", rows)


def _training(draft: Draft) -> str:
    settings = draft.settings
    why, why_rate = "", "steps of AdamW do not grow with the noise"
    if settings.optimizer == "sgd":
        why = "averages over sites better than Adam under noise"
        why_rate = f"fits the noise: {settings.noise_on_a_step:.2g} on a weight in a step, over all sites"
    why_steps = "one between two averages: sites with other labels do not walk apart"
    if settings.local_steps > 1:
        why_steps = "steps between two averages"
    passes = f"{settings.steps} noisy steps a site, about {settings.epochs:g} passes over its records"
    rows = [
        ("rounds", settings.rounds, passes),
        ("local_steps", settings.local_steps, why_steps),
        ("optimizer", settings.optimizer, why),
        ("momentum", settings.momentum, ""),
        ("learning_rate", settings.learning_rate, why_rate),
        ("schedule", settings.schedule, "falls to 0: the last steps' noise weighs least"),
    ]
    return _section("training", rows)


def _privacy(draft: Draft) -> str:
    settings, question = draft.settings, draft.question
    unit = question.unit or "record"
    why_delta = f"below 1 / (10 x number of {unit}s)" if question.delta is None else "asked for (--delta)"
    # True of whoever asks for the default, too.
    why_epsilon = "the default; --epsilon" if question.epsilon == USUAL_EPSILON else "asked for (--epsilon)"
    noise = f"clipping bound; noise multiplier {noise_rounded_down(settings.noise_multiplier, 2)} follows"
    why_sample = f"large samples: the same noise for more {unit}s"
    if settings.sample_rate == 1:
        why_sample = f"all {unit}s in every step: the same noise for more of them"
    rows: list[tuple[str, Any, str]] = [
        ("epsilon", question.epsilon, f"{why_epsilon}; each site's promise for the whole run"),
        ("delta", draft.delta, why_delta),
        ("unit", unit, "what the promise protects"),
    ]
    if question.protects_persons:
        rows.append(("records_per_person", 4, "of one person, at most so many enter a step"))
    rows += [
        ("sample_rate", settings.sample_rate, why_sample),
        ("max_grad_norm", settings.max_grad_norm, noise),
    ]
    return _section("privacy", rows)


def _federation(draft: Draft) -> str:
    sites = draft.num_sites or len(draft.found.units_at_sites)
    rows = [
        ("min_sites", max(1, sites // 2), "a round with fewer answers does not count"),
        ("update_dtype", "int8" if draft.backbone else "float32", "numbers in which updates travel"),
    ]
    return _section("federation", rows)


def _data(draft: Draft) -> list[str]:
    question, found = draft.question, draft.found
    declared = "what the records are declared to be; a sweep tunes on public and synthetic ones only"
    rows: list[tuple[str, Any, str]] = [("kind", question.data_kind, declared)]
    if draft.num_test is not None:
        note = "held out of training; figures on them are published, so they stand for public ones"
        if question.data_kind == "private":
            note = "held out of training; the report's figures on them are not protected: keep it in the house"
        if PERSON_ROLE in found.columns:
            who = f"{question.unit}s"
            note += (
                f"; settings take 80 % of the {who} to train: if far more do, hold out a file yourself (--test FILE)"
            )
        rows.append(("num_test", draft.num_test, note))
    if question.test is not None and question.data_kind == "private":
        note = 'that is what --test says; "private" if they are not: nothing is then decided by them'
        rows.append(("test_kind", "public", note))
    parts = [_section("data", rows), _source("train", question.data, found.columns, question)]
    if question.test is not None:
        columns = {role: name for role, name in found.columns.items() if role not in (SITE_ROLE, PERSON_ROLE)}
        parts.append(_source("test", question.test, columns, question))
    return parts


def _source(part: str, path: Path, columns: dict[str, str], question: Question) -> str:
    rows = [("path", _relative(path, question.out), "relative to this file")]
    rows += [(key, value, f"asked for (--{key})") for key, value in question.file_format.items()]
    body = _section(f"data.{part}", rows)
    return body + "columns = { " + ", ".join(f"{role} = {_value(name)}" for role, name in columns.items()) + " }\n"


def _partition(draft: Draft) -> str:
    if draft.num_sites is None:
        value = f"a site for each value of {printable(draft.question.columns[SITE_ROLE], '?')!r}, as in reality"
        return _section("partition", [("kind", "column", ""), ("column", SITE_ROLE, value)])
    why = "no column says which site has a record (--site); real sites differ: try dirichlet"
    why_many = "asked for (--sites)" if draft.question.sites else "so that each has enough records"
    return _section("partition", [("kind", "iid", why), ("num_sites", draft.num_sites, why_many)])


def _simulation(draft: Draft) -> str:
    arms = ("arms", ["central-dp", "non-private"], "the same budget, and none, with all records at one place")
    simulation = _section("simulation", [("evaluate_every", max(1, draft.settings.rounds // 4), "rounds")])
    return f"{simulation}\n{_section('baselines', [arms])}"


# --- TOML ---


def _section(title: str, rows: Iterable[tuple[str, Any, str]]) -> str:
    return f"[{title}]\n" + _lines(rows)


def _lines(rows: Iterable[tuple[str, Any, str]]) -> str:
    text = ""
    for key, value, why in rows:
        line = f"{key} = {_value(value)}"
        if not why:
            text += f"{line}\n"
        elif "\n" in line or len(line) > 60 or max(len(line), _COMMENT_COLUMN) + len(why) + 4 > _WIDTH:
            text += textwrap.fill(why, _WIDTH, initial_indent="# ", subsequent_indent="# ") + f"\n{line}\n"
        else:
            text += f"{line:<{_COMMENT_COLUMN}}  # {why}\n"
    return text


def _value(value: Any) -> str:
    if isinstance(value, list):
        inner = ", ".join(map(_value, value))
        return f"[{inner}]" if len(inner) <= 100 else "[\n" + _wrapped(list(map(_value, value))) + "\n]"
    return tomli_w.dumps({"x": value}).partition("=")[2].strip()


def _wrapped(items: list[str]) -> str:
    lines = [""]
    for item in items:
        if lines[-1] and len(lines[-1]) + len(item) > 100:
            lines.append("")
        lines[-1] += f"{item}, "
    return "\n".join(f"    {line.rstrip()}" for line in lines)


def _range(found: Findings) -> list[float]:
    return [int(end) if float(end).is_integer() else float(end) for end in found.value_range or ()]


def _relative(path: Path, out: Path) -> str:
    """Return the path from the scenario's folder, or the whole one if they have little in common."""
    relative = os.path.relpath(path.resolve(), out.resolve().parent)
    return relative if not relative.startswith(os.path.join("..", "..", "..")) else str(path.resolve())
