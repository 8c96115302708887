"""`silotune export`: a run, or a version of a registry, as a folder that others run without Silotune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from server.registry.commands import open_registry
from shared.options import JsonLineOption, ModelArgument, PolicyOption, RegistryOption
from shared.terminal import print_json


def export(
    model: ModelArgument,
    to: Annotated[
        Literal["merged", "onnx"],
        typer.Option(help="merged: for transformers, without PEFT. onnx: a graph for ONNX Runtime and others."),
    ],
    out: Annotated[Path, typer.Option("--out", help="New folder for the model.")],
    precision: Annotated[
        Literal["float32", "int8"], typer.Option(help="Of the weights; int8 is for onnx: smaller and faster.")
    ] = "float32",
    registry: RegistryOption = None,
    policy: PolicyOption = None,
    as_json: JsonLineOption = False,
) -> None:
    """Write a model for others: weights that transformers alone loads, or ONNX, with a model card.

    No record is read, so the privacy statement holds unchanged; it stands in the card. A version of a registry is verified first.
    """
    from server.registry.references import resolve_verified
    from shared.runtime.export.card import evaluated_on_private_records
    from shared.runtime.export.exporting import export as write
    from shared.runtime.export.folder import ModelFolder

    found = resolve_verified(open_registry(registry, policy), model)
    if found.version is not None:
        typer.echo(f"exporting {found.how}", err=True)
    made = write(ModelFolder.read(found.folder), out, to, precision)
    size = sum((made.path / name).stat().st_size for name in made.files)
    if evaluated_on_private_records(made.path):
        typer.echo(
            "evaluation.json in the folder holds metrics on records that count as private, as a file's do unless data.kind says "
            "otherwise: take it out before you give the folder away. The card does not have them.",
            err=True,
        )
    if as_json:
        print_json({"folder": str(made.path), "format": made.format, "precision": made.precision, "bytes": size})
        return
    typer.echo(f"{made.path}: {made.format}, {made.precision}, {size / 1e6:.1f} MB; README.md is its model card")
