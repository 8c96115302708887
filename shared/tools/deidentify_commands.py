"""`silotune deidentify`: mask a file into another, and say how much was masked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from shared import terminal
from shared.data.datasets import DataSource
from shared.data.deidentify.config import DeidentifyConfig
from shared.data.deidentify.spans import placeholder
from shared.errors import ConfigError
from shared.files import atomic
from shared.files.outputs import JSON_MARK, check_file
from shared.job.parsing import parse
from shared.options import QuotingOption, named_once

if TYPE_CHECKING:
    from shared.data.deidentify.report import MaskTally

_SECONDS_BETWEEN_FIGURES = 0.5


def deidentify(
    path: Annotated[Path, typer.Argument(help="CSV, TSV, JSONL (each also .gz), Parquet or plain text.")],
    out: Annotated[Path, typer.Option("--out", metavar="OUT", help="The masked file, in the same format; never IN.")],
    columns: Annotated[
        list[str] | None, typer.Option("--column", metavar="NAME", help="A column that holds text. Repeatable.")
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--kind", metavar="KIND", help="Mask only this: name, date, phone, ... Repeatable; all by default."
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="rules; presidio: rules and Presidio's names; auto: Presidio where it can be used.")
    ] = "auto",
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model", metavar="LANGUAGE=NAME", help="spaCy model of Presidio: en=PACKAGE or en=FOLDER, zh=..."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the counts as JSON; it holds no text of any record.")
    ] = None,
    delimiter: Annotated[str | None, typer.Option(help="Between CSV cells; by default a comma, or a tab.")] = None,
    encoding: Annotated[str, typer.Option(help="Of CSV, JSONL and text.")] = "utf-8",
    quoting: QuotingOption = "checked",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out and --report if they exist.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as one JSON line and nothing else.")
    ] = False,
) -> None:
    """Mask names, dates and numbers in the text of a file, and count them; complements differential privacy, replaces nothing."""
    from shared.data.deidentify.engine import open_deidentifier
    from shared.data.deidentify.files import deidentify_file, require_another

    asked = {"engine": engine, "models": named_once(models or [], "--model", "LANGUAGE=NAME")}
    config = parse(DeidentifyConfig, asked | ({"kinds": kinds} if kinds else {}), source="what was asked for")
    # The same checks as for a data source in site.toml.
    source = {"path": str(path), "columns": {"text": "text"}, "delimiter": delimiter, "encoding": encoding}
    source |= {"quoting": quoting}
    parse(DataSource, source, source="what was asked for")
    require_another(path, out)
    if report is not None:
        require_another(path, report)
        if report.resolve() == out.resolve():
            raise ConfigError(f"--report and --out are both {out}; name another file for the report.")
    if not overwrite:
        way_out = "choose another file, or add --overwrite"
        check_file(out, None, way_out=way_out)
        if report is not None:
            check_file(report, JSON_MARK, way_out=way_out)
    deidentifier = open_deidentifier(config)
    with _progress() as told:
        tally = deidentify_file(
            path, out, columns or [], deidentifier, delimiter=delimiter, encoding=encoding, quoting=quoting, told=told
        )
    if report is not None:
        atomic.write_json(report, tally.document())
    if as_json:
        terminal.print_json(tally.document())
    else:
        _show(tally, out)


@contextmanager
def _progress() -> Iterator[Callable[[int], None]]:
    """Yield what shows on a terminal how many records are done; elsewhere nothing is shown."""
    begun = shown = time.monotonic()
    with Console(stderr=True, highlight=False).status("reading") as status:

        def told(records: int) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown > _SECONDS_BETWEEN_FIGURES:
                shown = now
                status.update(
                    f"{records:,} records masked, {records / (now - begun):,.0f} a second; Ctrl-C writes nothing"
                )

        yield told


def _show(tally: MaskTally, out: Path) -> None:
    from shared.data.deidentify.report import CAVEAT

    console = terminal.console(soft_wrap=True)
    console.print(f"wrote {out}; masked by {tally.by()} in {tally.touched:,} of {tally.records:,} records.")
    table = Table("masked", "places", "records", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for kind in tally.kinds:
        table.add_row(placeholder(kind), f"{tally.places[kind]:,}", f"{tally.records_by_kind[kind]:,}")
    console.print(table)
    if tally.without_presidio is not None:
        console.print(f"Without Presidio, which finds more names: {tally.without_presidio}")
    console.print(CAVEAT)
