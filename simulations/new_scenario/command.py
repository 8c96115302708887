"""`silotune new`: look at a file of records, choose settings by public counts, check them, write the scenario.

Guarantee (tests: tests/simulations/test_new_scenario.py): what is written is read by `silotune simulate` as
it is, and has passed the checks that a simulation makes before it starts. Nothing leaves this machine, and
nothing but the scenario is written (and, from a file of tagged words, their copy as JSONL beside it).
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from shared.atomic import write_text
from shared.datasets import PERSON_ROLE, Record
from shared.epsilons import as_set, noise_rounded_down, rate_rounded_up
from shared.errors import ConfigError, DataError
from shared.privacy.sizes import declared_size, default_delta
from simulations.demo_data import inseparable
from simulations.new_scenario.document import Draft, document
from simulations.new_scenario.iob import copy_as_jsonl, looks_like_iob
from simulations.new_scenario.lengths import Backbone, fitting_length, look_at_backbone
from simulations.new_scenario.looking import Findings, look
from simulations.new_scenario.question import SITE_ROLE, Question, check_question, kind_of
from simulations.new_scenario.rule import Counts, Settings, settings_for
from simulations.scenario import Scenario, build_scenario, persons_of

MOST_TEST = 2_000
TEST_SHARE = 0.2
RECORDS_OF_A_SITE = 1_000
"""Where no column names the sites, as many are made as have so many records each, from 2 to 8."""


def new_scenario(question: Question, *, force: bool, console: Console) -> Path:
    """Write the scenario that `question` asks for and say what to do with it.

    Raises:
        ConfigError, DataError, ModelError: saying what will not do; nothing was written then.
        RunError: if the disk does not take it.
    """
    question = _tagged_words(question, force=force)
    check_question(question)
    _check_target(question, force=force)
    kind = kind_of(question)
    if kind == "image_classification" and question.image_shape is None:
        raise ConfigError("images need --shape, their channels, height and width, such as 1,28,28.")
    backbone = (
        None
        if kind == "image_classification"
        else look_at_backbone(question.backbone or _usual_backbone(kind), question.revision)
    )
    records: list[dict[str, Any]] = []
    _check_family(kind, backbone)
    if question.declared_only:
        columns = _role_columns(question)
        found = Findings(kind=kind, columns=columns, labels=question.labels, value_range=question.value_range)
    else:
        found, records = look(question, kind)
    draft = _draft(question, found, records, backbone)
    text = document(draft)
    scenario = build_scenario(tomllib.loads(text), source="the new scenario", base=question.out.resolve().parent)
    if records:
        _check(scenario, question, backbone)
    write_text(question.out, text)
    _tell(draft, console)
    return question.out


def _draft(question: Question, found: Findings, records: Sequence[Record], backbone: Backbone | None) -> Draft:
    max_length, reason = _length(question, found, backbone)
    total = question.num_records or found.num_units
    num_test, left = None, total
    if question.test is None:
        num_test = _held_out(question, records) if records else min(MOST_TEST, int(total * TEST_SHARE))
        left = total - (min(MOST_TEST, int(total * TEST_SHARE)) if PERSON_ROLE in found.columns else num_test)
    num_sites = None
    if found.units_at_sites:
        sites = tuple(max(1, declared_size(int(size * left / total))) for size in found.units_at_sites)
    else:
        number = question.sites or min(max(left // RECORDS_OF_A_SITE, 2), 8)
        if left < 2 * number:
            raise DataError(f"{left:,} {question.unit or 'record'}s are too few for {number} sites; lower --sites.")
        num_sites = None if SITE_ROLE in found.columns else number
        sites = (declared_size(left // number),) * number
    delta = question.delta if question.delta is not None else default_delta(total)
    settings = settings_for(Counts(kind=found.kind, sites=sites, epsilon=question.epsilon, delta=delta))
    return Draft(
        question=question,
        found=dataclasses.replace(found, remarks=(*found.remarks, *_warnings(settings, sites, question))),
        settings=settings,
        backbone=backbone,
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", question.out.stem).strip("-._")[:64] or "scenario",
        delta=delta,
        max_length=max_length,
        length_reason=reason,
        num_test=num_test,
        num_sites=num_sites,
    )


def _length(question: Question, found: Findings, backbone: Backbone | None) -> tuple[int | None, str]:
    if backbone is None:
        return None, ""
    if question.max_length is not None:
        if question.max_length > backbone.positions:
            raise ConfigError(
                f"--max-length is {question.max_length}, but the backbone reads {backbone.positions} tokens."
            )
        return question.max_length, "declared; longer texts are cut"
    length, share = fitting_length(backbone, found.texts)
    return length, f"tokens; {share:.0%} of the texts fit, longer ones are cut"


def _held_out(question: Question, records: Sequence[Record]) -> int:
    """Return how many records to hold out, so that equal texts, or the records of a person, stay on one side."""
    most = min(MOST_TEST, int(len(records) * TEST_SHARE))
    persons = persons_of(records, question.unit or "record")
    number = 0
    for group in inseparable(records, seed=0, persons=persons):
        if number + len(group) <= most:
            number += len(group)
    if not number:
        raise DataError(
            "no records can be held out for evaluation: nearly all have one text, or are of one person. Give a "
            "file of its own by --test."
        )
    return number


def _warnings(settings: Settings, sites: Sequence[int], question: Question) -> list[str]:
    if settings.enough:
        return []
    return [
        f"{len(sites)} sites train on about {sum(sites):,} {question.unit or 'record'}s (what they declare, each rounded "
        f"down to a power of two): few for epsilon {as_set(question.epsilon)}, the noise will hide most of what they say. "
        f"More {question.unit or 'record'}s, fewer sites or a larger epsilon help; see docs/planning.md."
    ]


def _check(scenario: Scenario, question: Question, backbone: Backbone | None) -> None:
    """Let the simulation check the scenario, as it does before it starts.

    Raises:
        SilotuneError: what it would say.
    """
    from simulations.engine import check_arm, plan_arms

    train, test = scenario.load_data()
    arms = plan_arms(scenario, question.out.parent, train)
    if backbone is None or backbone.folder is not None:
        check_arm(scenario, arms[0], test)


def _check_family(kind: str, backbone: Backbone | None) -> None:
    """Raise `ConfigError` if the backbone reads in the other direction than the task needs."""
    if backbone is None:
        return
    writes, wanted = backbone.model_type == "gpt2", kind in ("causal_lm", "replies")
    if writes != wanted:
        raise ConfigError(
            f"--backbone {backbone.name!r} is of the family {backbone.model_type}, and {kind} needs "
            f"{'one that writes, such as GPT-2' if wanted else 'one that reads, such as BERT'}."
        )


def _check_target(question: Question, *, force: bool) -> None:
    """Raise `ConfigError` if the scenario would replace something."""
    sources = {path.resolve() for path in (question.data, question.test) if path is not None}
    if question.out.resolve() in sources:
        raise ConfigError(f"--out {question.out} is the data itself; name another file.")
    if question.out.exists() and not force:
        raise ConfigError(f"{question.out} is there already; --force replaces it, --out names another.")


def _tagged_words(question: Question, *, force: bool) -> Question:
    """Turn a file of tagged words, if it is one and no column was named, into JSONL beside the scenario."""
    if question.columns or not looks_like_iob(question.data):
        return question
    copies: dict[str, Any] = {"columns": {"tokens": "tokens", "tags": "tags"}}
    _check_target(question, force=force)
    for part in ("data", "test"):
        path = getattr(question, part)
        if path is None:
            continue
        target = question.out.with_name(f"{question.out.stem}.{part}.jsonl")
        if target.exists() and not force:
            raise ConfigError(f"{target} is there already; --force replaces it, --out names another scenario.")
        copy_as_jsonl(path, target)
        copies[part] = target
    return dataclasses.replace(question, **copies)


def _role_columns(question: Question) -> dict[str, str]:
    columns = dict(question.columns)
    if kind_of(question) == "regression" and "label" in columns:
        columns["score"] = columns.pop("label")
    return columns


def _usual_backbone(kind: str) -> str:
    return "cache:small-gpt2" if kind in ("causal_lm", "replies") else "embedded:all-minilm-l6-v2"


def _tell(draft: Draft, console: Console) -> None:
    question, settings, found = draft.question, draft.settings, draft.found
    sites = draft.num_sites or len(found.units_at_sites) or question.sites
    what = f"{len(found.labels)} labels" if found.labels else "no labels"
    console.print(
        f"{question.out}: {found.kind}, {what}, {sites} sites, epsilon {as_set(question.epsilon)} for each "
        f"{question.unit or 'record'}"
    )
    console.print(
        f"{settings.steps} steps a site at sampling rate {rate_rounded_up(settings.sample_rate)}, learning rate "
        f"{settings.learning_rate:g}, noise multiplier {noise_rounded_down(settings.noise_multiplier, 2)}; nothing "
        f"left this machine"
    )
    for remark in found.remarks:
        console.print(f"note: {remark}")
    console.print(f"next: silotune simulate {question.out}")
