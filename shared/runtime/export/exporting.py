"""`silotune export`: from a finished run to a model folder that others run without Silotune."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from shared.errors import ConfigError, model_errors
from shared.files.atomic import disk_errors
from shared.job.compute import ComputeConfig
from shared.models.images import ImageModel
from shared.runtime.export.card import model_card
from shared.runtime.export.folder import (
    ADAPTER_FOLDER,
    CARD_FILE,
    ModelFolder,
    ModelRecord,
    Precision,
    TensorSpec,
    check_new_model_folder,
    versions,
    write_model_folder,
)
from shared.runtime.export.merged import WEIGHTS_FILE, check_mergeable, read_merged, save_tokenizer, write_merged
from shared.runtime.export.onnx import OPSET, require_onnx, write_graph, write_image_graph
from shared.runtime.export.parts import Parts, parts_of_runtime
from shared.runtime.export.peft import load_state
from shared.runtime.runtime import load_own_runtime

Target = Literal["merged", "onnx"]
_CARRIED = ("task", "labels", "max_length", "pooling", "name", "job_sha256", "temperature", "notes")
_PLAIN = ComputeConfig(device="cpu", precision="float32")


def export(source: ModelFolder, out: Path, to: Target, precision: Precision = "float32") -> ModelFolder:
    """Write the model of a finished run into `out`; nothing is trained and no record is read, so the statement holds unchanged.

    Args:
        source: of format `adapter`, whose backbone is loaded, or for ONNX `merged`.
        out: new, or an empty folder.

    Raises:
        ConfigError: if the model cannot be had in this form, saying which one it can.
        RunError: if `out` cannot be written; then nothing is left of it.
        ModelError, AdapterError: if backbone or adapter cannot be used.
    """
    check_new_model_folder(out)
    _check(source, to, precision)
    source.check()
    model = read_model(source)

    def make(folder: Path) -> ModelRecord:
        with model_errors(f"the model in {source.path} cannot be had as {to}", OSError):
            return write_model(folder, source, model, to, precision)

    return write_model_folder(out, source, make)


def read_model(source: ModelFolder) -> Parts | ImageModel:
    """Return the model of a folder of format `adapter` or `merged`; errors as in `export`."""
    with model_errors(f"the model in {source.path} cannot be loaded"):
        if source.format == "merged":
            return read_merged(source)
        runtime = load_own_runtime(source.job, _PLAIN)  # what others have loaded stays as it is
        runtime.load(load_state(source.path / ADAPTER_FOLDER, runtime, source.job))
        return runtime.model if isinstance(runtime.model, ImageModel) else parts_of_runtime(runtime, source.job)


def _check(source: ModelFolder, to: Target, precision: Precision) -> None:
    if source.format == "onnx" or source.format == to:
        raise ConfigError(
            f"{source.path} is a model of format {source.format} already; export from the run, or from the version that holds "
            "its adapter."
        )
    if to == "onnx":
        require_onnx()
        if precision == "int8" and source.job.model.is_image_network:
            raise ConfigError("a network for images has few weights, so int8 saves nothing; use --precision float32.")
    elif precision != "float32":
        raise ConfigError("merged weights are float32; --precision int8 goes with --to onnx.")
    else:
        check_mergeable(source.record.task)


def origin_of(source: ModelFolder) -> tuple[str, str]:
    """Return the file that holds what is made into something else, by its place in `source`, and its SHA-256."""
    made_from = source.record.made_from if source.format == "adapter" else WEIGHTS_FILE
    return made_from, source.record.files.get(made_from, source.record.made_from_sha256)


@disk_errors()
def write_model(
    folder: Path, source: ModelFolder, model: Parts | ImageModel, to: Target, precision: Precision = "float32"
) -> ModelRecord:
    """Write the model's files and card into `folder`; return what describes them.

    Args:
        source: what `model` was made from; its temperature, notes and records hold for it.
    """
    temperature, tokenizer = source.record.temperature, None
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    if isinstance(model, ImageModel):
        inputs, outputs = write_image_graph(folder, model, source.job, temperature)
    else:
        tokenizer = model.tokenizer
        if to == "onnx":
            inputs, outputs = write_graph(folder, model, temperature, precision)
            save_tokenizer(folder, model)
        else:
            write_merged(folder, model, temperature)
    made_from, sha256 = origin_of(source)
    record = ModelRecord(
        **{key: getattr(source.record, key) for key in _CARRIED},
        made_from=made_from,
        made_from_sha256=sha256,
        format=to,
        precision=precision,
        made_by=versions("torch", "transformers", *(("onnx", "onnxruntime") if to == "onnx" else ())),
        opset=OPSET if to == "onnx" else None,
        inputs=inputs,
        outputs=outputs,
    )
    (folder / CARD_FILE).write_text(model_card(source, record, tokenizer), encoding="utf-8")
    return record
