"""`silotune new`: its options; what it does is in `simulations.new_scenario`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from shared import terminal
from shared.errors import ConfigError
from shared.numbers import read_number
from shared.options import DelimiterOption, OptionalQuotingOption

_Column = str | None


def new(
    data: Annotated[Path, typer.Argument(help="Records: CSV, TSV, JSONL, Parquet, or a file of tagged words (IOB).")],
    text: Annotated[_Column, typer.Option(metavar="COLUMN", help="Column of what a person wrote.")] = None,
    label: Annotated[_Column, typer.Option(metavar="COLUMN", help="Column of its label.")] = None,
    score: Annotated[_Column, typer.Option(metavar="COLUMN", help="Column of a number to predict.")] = None,
    pair: Annotated[_Column, typer.Option(metavar="COLUMN", help="Column of a second text: does it belong?")] = None,
    tokens: Annotated[_Column, typer.Option(metavar="COLUMN", help="Column of words, a list or with spaces.")] = None,
    tags: Annotated[_Column, typer.Option(metavar="COLUMN", help="Column of their IOB tags.")] = None,
    prompt: Annotated[_Column, typer.Option(metavar="COLUMN", help="Column of prompts (GPT-2).")] = None,
    response: Annotated[_Column, typer.Option(metavar="COLUMN", help="Column of responses (GPT-2).")] = None,
    pixels: Annotated[_Column, typer.Option(metavar="COLUMN", help="Column of images, as numbers.")] = None,
    site: Annotated[_Column, typer.Option(metavar="COLUMN", help="Column that says at which site a record is.")] = None,
    person: Annotated[
        _Column, typer.Option(metavar="COLUMN", help="Column that says whose record it is; persons are protected then.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="KIND", help="Kind of task, where the columns leave a choice.")
    ] = None,
    test: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Public evaluation records; by default some are held out.")
    ] = None,
    epsilon: Annotated[float, typer.Option(help="What each site promises for the whole run.")] = 8.0,
    delta: Annotated[float | None, typer.Option(help="By default below a tenth of 1 / number of records.")] = None,
    unit: Annotated[
        Literal["record", "patient", "customer"] | None,
        typer.Option(help="What is protected; by default each record, with --person each patient."),
    ] = None,
    sites: Annotated[
        int | None, typer.Option(min=2, max=1000, help="Number of sites, where no column says it.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="As model.backbone: embedded:NAME, a folder, a hub id.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of a hub id, 40 hexadecimal digits.")] = None,
    public: Annotated[bool, typer.Option("--public", help="The records are public.")] = False,
    synthetic: Annotated[bool, typer.Option("--synthetic", help="The records are nobody's.")] = False,
    delimiter: DelimiterOption = None,
    quoting: OptionalQuotingOption = None,
    encoding: Annotated[str | None, typer.Option(help="Of the files; UTF-8 if not given.")] = None,
    declared: Annotated[
        bool, typer.Option("--declared", help="Read no record: everything is declared by the options below.")
    ] = False,
    labels: Annotated[str | None, typer.Option(metavar="A,B", help="Labels, in the order of the logits.")] = None,
    value_range: Annotated[
        str | None, typer.Option("--range", metavar="LOW,HIGH", help="What scores, or pixel values, can be.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=2, max=8192, help="Tokens of a text.")] = None,
    records: Annotated[int | None, typer.Option(min=1, help="Number of records, or of persons with --person.")] = None,
    shape: Annotated[str | None, typer.Option(metavar="C,H,W", help="Channels, height and width of images.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Scenario file; by default NAME.toml here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the scenario file if it is there.")] = False,
) -> None:
    """Look at your own records, on this machine, and write a scenario for them that works.

    Name the columns: --text and --label to classify, --text and --score for a number, --text, --pair and --label for pairs,
    --tokens and --tags for entities, --text alone or --prompt and --response for GPT-2, --pixels and --label for images.
    """
    from simulations.new_scenario.question import SITE_ROLE, Question, kind_named, scenario_name, usual_unit
    from simulations.new_scenario.writing import new_scenario

    if public and synthetic:
        raise ConfigError(
            "--public and --synthetic contradict each other; give one of them, or none for private records."
        )
    given = {
        "text": text, "label": label, "score": score, "pair": pair, "tokens": tokens, "tags": tags, "prompt": prompt,
        "response": response, "pixels": pixels, SITE_ROLE: site, "person": person,
    }  # fmt: skip
    file_format = {"delimiter": delimiter, "quoting": quoting, "encoding": encoding}
    numbers = _numbers(value_range, "--range", 2)
    sizes = _numbers(shape, "--shape", 3)
    columns = {role: column for role, column in given.items() if column is not None}
    question = Question(
        data=data,
        out=out or Path(f"{scenario_name(data)}.toml"),
        columns=columns,
        test=test,
        kind=kind_named(task),
        backbone=backbone,
        revision=revision,
        epsilon=epsilon,
        delta=delta,
        unit=unit or usual_unit(columns),
        sites=sites,
        data_kind="public" if public else "synthetic" if synthetic else "private",
        file_format={key: value for key, value in file_format.items() if value is not None},
        labels=tuple(name.strip() for name in labels.split(",")) if labels else (),
        value_range=(numbers[0], numbers[1]) if numbers else None,
        max_length=max_length,
        num_records=records,
        image_shape=(int(sizes[0]), int(sizes[1]), int(sizes[2])) if sizes else None,
        declared_only=declared,
    )
    new_scenario(question, force=force, console=terminal.console(soft_wrap=True))


def _numbers(text: str | None, option: str, count: int) -> list[float]:
    """Return the numbers of an option such as "1,28,28"; [] if it was not given."""
    if text is None:
        return []
    try:
        found = [read_number(part) for part in text.split(",")]
    except ValueError:
        found = []
    if option == "--shape" and not all(number.is_integer() for number in found):
        found = []
    if len(found) != count or any(abs(number) > 1e12 for number in found):
        raise ConfigError(
            f"{option} is {text!r}; expected {count} numbers with commas between, such as "
            f"{'0,255' if count == 2 else '1,28,28'}."
        )
    return found
