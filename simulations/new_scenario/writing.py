"""`silotune new`: look at a file of records, choose settings by public counts, check them, write the scenario.

Guarantee (tests: tests/simulations/new_scenario/test_new_scenario.py): what is written is read by `silotune simulate` as
it is, and has passed the checks that a simulation makes before it starts. Nothing leaves this machine, and
nothing but the scenario is written (and, from a file of tagged words, their copy as JSONL beside it).
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from shared.data.datasets import PERSON_ROLE, Record
from shared.epsilons import as_set, noise_rounded_down, rate_rounded_up
from shared.errors import ConfigError, DataError
from shared.files.atomic import write_text
from shared.files.outputs import check_parent
from shared.job.kinds import RULES, TaskKind
from shared.privacy.sizes import declared_size, default_delta
from shared.tasks import TASKS
from simulations.data.demo_data import inseparable
from simulations.new_scenario.document import Draft, document
from simulations.new_scenario.iob import copied_words, looks_like_iob
from simulations.new_scenario.lengths import Backbone, Measured, fitting_length, look_at_backbone, measure
from simulations.new_scenario.looking import Findings, look
from simulations.new_scenario.question import SITE_ROLE, Question, check_question, columns_of, kind_of
from simulations.new_scenario.rule import Counts, Settings, settings_for
from simulations.new_scenario.vocabulary import MOST_UNKNOWN
from simulations.scenario import Scenario, build_scenario, persons_of

MOST_TEST = 2_000
TEST_SHARE = 0.2
RECORDS_OF_A_SITE = 1_000
"""Where no column names the sites, as many are made as have so many records each, from 2 to 8."""
LEAST_WHOLE = 0.5
"""Share of the texts that fit below which a note says how to read more of them."""


def new_scenario(question: Question, *, force: bool, console: Console) -> Draft:
    """Write the scenario that `question` asks for and say what to do with it.

    Returns:
        Everything that the file says.

    Raises:
        ConfigError, DataError, ModelError: saying what will not do; nothing was written then.
        RunError: if the disk does not take it.
    """
    with copied_words(question, force=force) as (asked, copies):
        check_question(asked)
        _check_target(asked, force=force)
        draft, text, _ = _drafted(asked, copies.remarks)
        copies.publish()
        write_text(question.out, copies.settled(text))
    _tell(draft, console, copies.told)
    return draft


def unwritten_scenario(question: Question) -> tuple[Draft, Scenario]:
    """Return the scenario that `new_scenario` would write; nothing is written.

    Raises:
        ConfigError, DataError, ModelError: saying what will not do.
    """
    if not question.columns and looks_like_iob(question.data):
        raise ConfigError(
            f"{question.data} is a file of tagged words, of which a scenario reads a copy; say by --out where scenario and copy "
            "are to be."
        )
    check_question(question)
    draft, _, scenario = _drafted(question)
    return draft, scenario


def _drafted(question: Question, remarks: Sequence[str] = ()) -> tuple[Draft, str, Scenario]:
    """Return the scenario that `question` asks for, its text with these `remarks` first, and how it was read and checked."""
    kind = kind_of(question)
    backbone = None
    if "image_shape" not in RULES[kind].keys:
        backbone = look_at_backbone(question.backbone or _usual_backbone(kind), question.revision)
        _check_family(kind, backbone)
    elif question.image_shape is None:
        raise ConfigError("images need --shape, their channels, height and width, such as 1,28,28.")
    records: list[dict[str, Any]] = []
    if question.declared_only:
        columns = columns_of(kind, question.columns)
        found = Findings(kind=kind, columns=columns, labels=question.labels, value_range=question.value_range)
    else:
        found, records = look(question, kind)
    draft = _draft(question, found, records, backbone)
    text = document(draft, remarks)
    base = question.out.resolve().parent
    scenario = build_scenario(_with_whole_paths(tomllib.loads(text), base), source="the new scenario", base=base)
    if records:
        _check(scenario, question, backbone)
    return draft, text, scenario


def _with_whole_paths(raw: dict[str, Any], base: Path) -> dict[str, Any]:
    """Return a scenario whose files can be read although the folder that it is to be in may not be there yet."""
    for name in {"train", "test"} & raw["data"].keys():
        raw["data"][name]["path"] = os.path.normpath(base / raw["data"][name]["path"])
    return raw


def _draft(question: Question, found: Findings, records: Sequence[Record], backbone: Backbone | None) -> Draft:
    measured = measure(backbone, found.texts) if backbone is not None and found.texts else None
    max_length, reason = _length(question, measured, backbone)
    remarks = (*found.remarks, *_unknown_language(measured, backbone), *_long_texts(question, measured, backbone))
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
        found=dataclasses.replace(found, remarks=(*remarks, *_warnings(settings, sites, question))),
        settings=settings,
        backbone=backbone,
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", question.out.stem).strip("-._")[:64] or "scenario",
        delta=delta,
        max_length=max_length,
        length_reason=reason,
        num_test=num_test,
        num_sites=num_sites,
    )


def _length(question: Question, measured: Measured | None, backbone: Backbone | None) -> tuple[int | None, str]:
    if backbone is None:
        return None, ""
    if question.max_length is not None:
        if question.max_length > backbone.positions:
            raise ConfigError(
                f"--max-length is {question.max_length}, but the backbone reads {backbone.positions} tokens."
            )
        return question.max_length, "declared; longer texts are cut"
    assert measured is not None  # noqa: S101 - without texts the length was declared
    length, share = fitting_length(backbone, measured.lengths)
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


def _unknown_language(measured: Measured | None, backbone: Backbone | None) -> list[str]:
    """Return a warning if the backbone does not know the language of the texts; rounded, so that it tells little of them."""
    if measured is None or backbone is None or measured.unknown <= MOST_UNKNOWN:
        return []
    share = round(100 * measured.unknown, -1)
    return [
        f"the backbone {backbone.name} does not know the language of these texts: about {share:.0f} % of their letters "
        "stand in words that its tokenizer calls unknown or spells letter by letter. Little will be learned. Name a backbone "
        "that was trained on this language by --backbone: a folder, or a hub id with --revision."
    ]


def _long_texts(question: Question, measured: Measured | None, backbone: Backbone | None) -> list[str]:
    """Return a note if most texts are cut and the backbone could read more of them; the share is rounded."""
    if measured is None or backbone is None or question.max_length is not None:
        return []
    length, share = fitting_length(backbone, measured.lengths)
    if share >= LEAST_WHOLE or length >= backbone.positions:
        return []
    return [
        f"about {round(100 * share, -1):.0f} % of the texts fit into {length} tokens; of the others only the beginning is read. "
        f"--max-length, up to {backbone.positions}, reads more, in more time; a smaller one is faster."
    ]


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
    from simulations.running.engine import check_arm, plan_arms

    train, test = scenario.load_data()
    arms = plan_arms(scenario, question.out.parent, train)
    if backbone is None or backbone.folder is not None:
        check_arm(scenario, arms[0], test)


def _check_family(kind: TaskKind, backbone: Backbone) -> None:
    """Raise `ConfigError` if the task is to write and the backbone only reads; every family labels texts."""
    if TASKS[kind].causal_lm and not backbone.architecture.causal:
        raise ConfigError(
            f"--backbone {backbone.name!r} is of the family {backbone.model_type}, and {kind} needs one that writes, such as "
            "GPT-2 or Qwen."
        )


def _check_target(question: Question, *, force: bool) -> None:
    """Raise `ConfigError` if the scenario would replace something."""
    sources = {path.resolve() for path in (question.data, question.test) if path is not None}
    if question.out.resolve() in sources:
        raise ConfigError(f"--out {question.out} is the data itself; name another file.")
    if question.out.exists() and not force:
        raise ConfigError(f"{question.out} is there already; --force replaces it, --out names another.")
    check_parent(question.out)


def _usual_backbone(kind: TaskKind) -> str:
    return "cache:small-gpt2" if TASKS[kind].causal_lm else "embedded:all-minilm-l6-v2"


def _tell(draft: Draft, console: Console, copies: Sequence[str]) -> None:
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
    for copy in copies:
        console.print(copy, highlight=False, markup=False)
    for remark in found.remarks:
        console.print(f"note: {remark}")
    console.print(f"next: silotune simulate {question.out}")
