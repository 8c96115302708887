"""`silotune compress`: a smaller and faster model out of a run's, by public texts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from server.registry.commands import open_registry
from shared.options import (
    DelimiterOption,
    EncodingOption,
    JsonAtEndOption,
    ModelArgument,
    OptionalQuotingOption,
    PolicyOption,
    RegistryOption,
    TextColumnOption,
)
from shared.terminal import console, print_json


def compress(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", help="New folder for the model.")],
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            help="Public texts of the kind that it will read, a few thousand, no labels: CSV, JSONL, Parquet, or one a line.",
        ),
    ] = None,
    column: TextColumnOption = None,
    delimiter: DelimiterOption = None,
    encoding: EncodingOption = None,
    quoting: OptionalQuotingOption = None,
    layers: Annotated[int | None, typer.Option(help="Layers to keep; by default half of them.")] = None,
    intermediate: Annotated[
        int | None, typer.Option(help="Width to keep of the feed-forward parts; by default all of it.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the texts, at most.")] = 12,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Makes the result repeatable.")] = 0,
    registry: RegistryOption = None,
    policy: PolicyOption = None,
    as_json: JsonAtEndOption = False,
) -> None:
    """Make a smaller, faster model: fewer layers or narrower ones, which learn from it what it says of public texts.

    No record of a site is read, so the privacy statement holds unchanged. The result is a model folder, for export, predict,
    serve and models add; weights in int8 are made of it by export.
    """
    from server.compression.compressing import Size
    from server.compression.compressing import compress as make
    from server.compression.distillation import Recipe
    from server.compression.progress import Bar
    from server.compression.public_texts import WHAT
    from server.registry.references import resolve_verified
    from shared.data.text_stream import TextFormat
    from shared.errors import ConfigError, model_errors
    from shared.options import how_to_read
    from shared.runtime.export.folder import ModelFolder

    if file is None:
        raise ConfigError(f"a smaller model learns from texts, and a run keeps none. Give --file with {WHAT}.")
    reading = how_to_read("--file", file, text=column, delimiter=delimiter, encoding=encoding, quoting=quoting)
    found = resolve_verified(open_registry(registry, policy), model)
    told = console(as_json=True, soft_wrap=True)  # people read standard error
    told.print(f"compressing {found.how}")
    with Bar(told) as bar, model_errors(f"{found.how} cannot be compressed", OSError):
        made = make(
            ModelFolder.read(found.folder),
            file,
            TextFormat(**reading),
            out,
            Size(layers=layers, intermediate=intermediate),
            Recipe(epochs=epochs, seed=seed),
            told=bar.show,
        )
    note = made.compression
    for remark in made.remarks:
        told.print(remark)
    if as_json:
        folder = made.folder
        print_json({"folder": str(folder.path), "format": folder.format, "bytes": made.num_bytes, **asdict(note)})
        return
    typer.echo(
        f"{made.folder.path}: {made.folder.format}, {made.num_bytes / 1e6:.1f} MB, {len(note.layers_kept)} of "
        f"{note.layers_before} layers, feed-forward parts of {note.intermediate:,} of {note.intermediate_before:,}"
    )
    typer.echo(f"read: {note.public_texts:,} texts of {file.name}, no record of a site; the statement holds unchanged")
    typer.echo(
        f"like its teacher on {note.public_texts_held_out:,} of them, held out: {note.agreement}; before it learned: "
        f"{note.agreement_before}"
    )
