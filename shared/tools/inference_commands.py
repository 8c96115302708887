"""`silotune predict` and `silotune generate`: what a run trained, on texts that are given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.errors import ConfigError
from shared.job.compute import ComputeConfig
from shared.options import (
    DelimiterOption,
    EncodingOption,
    ModelArgument,
    OptionalQuotingOption,
    PolicyOption,
    RegistryOption,
    TextColumnOption,
    how_to_read,
)
from shared.terminal import print_json, shown_text

if TYPE_CHECKING:
    from shared.data.text_stream import Skipped


def predict(
    model: ModelArgument,
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts or images to label; standard input, one a line, if none is given.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="Label the rows of this file: CSV, JSONL, Parquet, or one text a line."),
    ] = None,
    column: TextColumnOption = None,
    delimiter: DelimiterOption = None,
    encoding: EncodingOption = None,
    quoting: OptionalQuotingOption = None,
    others: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="MODEL",
            help="Another model, repeatable: average their outputs. Privacy is then the composition of all runs.",
        ),
    ] = None,
    registry: RegistryOption = None,
    policy: PolicyOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per text.")] = False,
) -> None:
    """Label texts or images (pixel values) with what a run trained; find entities, rate, match pairs (text, tab, text)."""
    from shared.data.text_stream import TextFormat, file_texts, given_texts
    from shared.job.job_file import load_job
    from shared.named_models import model_folder
    from shared.runtime.ensembles import Ensemble, Member
    from shared.runtime.inference import load_model
    from shared.runtime.inference import predict as label
    from shared.tasks import task_of

    run = model_folder(model, registry, policy)
    job = load_job(run)
    if file is not None and texts:
        raise ConfigError("--file and texts were both given; give one of them.")
    reading = how_to_read("--file", file, text=column, delimiter=delimiter, encoding=encoding, quoting=quoting)
    given = given_texts(texts, sys.stdin.buffer.read) if file is None else file_texts(file, TextFormat(**reading))
    folders = [run, *(model_folder(other, registry, policy) for other in others or [])]
    members = [Member(run=folder, job=load_job(folder)) for folder in folders]
    if others:
        predictions = Ensemble(members, ComputeConfig()).predict(given.texts)
    else:
        predictions = label(load_model(run, ComputeConfig()), given.texts)
    for row, prediction in zip(given.rows, predictions, strict=True):
        if as_json:
            print_json({"row": row, **prediction})
        else:
            typer.echo(shown_text(task_of(job).shown(prediction)))
    _tell_left_out(given.left_out)


def generate(
    model: ModelArgument,
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts to continue, or prompts; standard input, one a line, if none is given."),
    ] = None,
    num_sequences: Annotated[int, typer.Option("--num", help="Number of continuations.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 40,
    temperature: Annotated[float, typer.Option(help="0 is greedy; higher is more varied.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest tokens; 0 is all.")] = 50,
    top_p: Annotated[float, typer.Option(help="And among the likeliest with this probability together.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes the choice repeatable.")] = None,
    registry: RegistryOption = None,
    policy: PolicyOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per continuation.")] = False,
) -> None:
    """Continue texts, or answer prompts, with the GPT-2 adapter of a run; of several the share of different words is told."""
    from shared.data.text_stream import given_texts
    from shared.job.job_file import load_job
    from shared.named_models import model_folder
    from shared.runtime.inference import Decoding, distinct, generate_all, load_model
    from shared.tasks import task_of

    run = model_folder(model, registry, policy)
    job = load_job(run)
    decoding = Decoding(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        num_sequences=num_sequences,
        seed=seed,
    )
    given = given_texts(texts, sys.stdin.buffer.read)
    found = generate_all(load_model(run, ComputeConfig()), given.texts, decoding)
    for row, text, continuations in zip(given.rows, given.texts, found, strict=True):
        for continuation in continuations:
            prediction = {"text": text, "continuation": continuation}
            if as_json:
                print_json({"row": row, **prediction})
            else:
                typer.echo(shown_text(task_of(job).shown(prediction)))
    every = [continuation for continuations in found for continuation in continuations]
    if len(every) > 1:
        shares = ", ".join(f"distinct-{n} {distinct(every, n):.3f}" for n in (1, 2))
        typer.echo(f"{len(every)} continuations: {shares}", err=True)
    _tell_left_out(given.left_out)


def _tell_left_out(skipped: Skipped) -> None:
    """Say on standard error which lines have no answer."""
    from shared.data.text_stream import left_out

    for line in left_out(skipped):
        typer.echo(line, err=True)
