"""`silotune explain`: which words moved a prediction of a tuned model."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from shared import terminal
from shared.data.cells import value_fault
from shared.data.text_lines import LineReader
from shared.errors import ConfigError, DataError, model_errors
from shared.files.atomic import write_bytes
from shared.files.outputs import HTML_MARK, check_file
from shared.job.compute import ComputeConfig
from shared.options import ModelArgument, OnlyJsonOption, PolicyOption, RegistryOption


def explain(
    model: ModelArgument,
    text: Annotated[
        str | None,
        typer.Argument(help="The text; standard input if it is left out. Of a pair, both with a tab between."),
    ] = None,
    label: Annotated[str | None, typer.Option(help="Explain this label; by default the predicted one.")] = None,
    word: Annotated[
        int | None,
        typer.Option(min=1, help="Of token classification: number of the word; by default of the first entity."),
    ] = None,
    baseline: Annotated[
        Literal["pad", "mask"],
        typer.Option(help="The token that stands for an absent word, where the tokenizer has it."),
    ] = "pad",
    steps: Annotated[int, typer.Option(help="Of the integration, to begin with; doubled until the sum is right.")] = 32,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page that stands alone; it holds the text.")
    ] = None,
    registry: RegistryOption = None,
    policy: PolicyOption = None,
    as_json: OnlyJsonOption = False,
) -> None:
    """Show which words moved a prediction, by integrated gradients; whatever they add up to is printed and checked.

    Without TEXT standard input is read: an argument can be seen in the machine's list of processes. A pair has a tab between.
    """

    from shared.job.job_file import load_job
    from shared.named_models import model_folder
    from shared.runtime.attributions import explain as attribute
    from shared.runtime.export.folder import MODEL_FILE
    from shared.runtime.inference import load_tuned
    from shared.tools.explain.report import as_json as content
    from shared.tools.explain.report import print_explanation, render_html

    if html is not None:
        check_file(html, HTML_MARK)
    run = model_folder(model, registry, policy)
    if os.path.lexists(run / MODEL_FILE):
        raise ConfigError(
            f"{run} holds an exported model, through which no gradients run; give the run, or a version that holds its adapter."
        )
    job = load_job(run)
    given = _whole_input() if text is None else text
    if not given.strip():
        raise DataError("there is no text to explain; give it as an argument or on standard input.")
    if (fault := value_fault("text", given)) is not None:
        raise DataError(f"the text holds {fault}; give it in UTF-8.")
    # Gradients along the path are small differences: bfloat16 would be too coarse for the sum to be right.
    runtime = load_tuned(run, job, ComputeConfig(precision="float32"))
    with model_errors("the model cannot explain this text"):
        found = attribute(runtime, given, label=label, word=word, baseline=baseline, steps=steps)
    console = terminal.console(120)
    if html is not None:
        write_bytes(html, render_html(found, job.name))
    if as_json:
        terminal.print_json(content(found, job.name))
        return
    print_explanation(console, found)
    if html is not None:
        console.print(f"written: {html}", soft_wrap=True)


def _whole_input() -> str:
    """Return standard input as one text; `DataError` if it is not UTF-8."""
    reader = LineReader("standard input", "utf-8")
    lines = [*reader.feed(sys.stdin.buffer.read()), *reader.finish()]
    for line in lines:
        if line.fault is not None:
            raise DataError(f"standard input, line {line.number}: {line.fault.detail}")
    return "".join(line.text + line.end for line in lines).rstrip("\n")
