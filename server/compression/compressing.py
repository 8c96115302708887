"""`silotune compress`: a smaller model out of a run's, by public texts alone.

Formal guarantee: the privacy statement holds unchanged, byte for byte, for nothing is read but a released model and texts that
are no records of a site; `public_texts` refuses those that can be recognised as such
(tests: tests/server/compression/test_compressing.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from server.compression.cutting import importance, most_important, spread, width_of, with_layers, with_width
from server.compression.distillation import Place, Progress, Recipe, Teacher, distil
from server.compression.network import Network
from server.compression.public_texts import read_public_texts
from shared.data.text_stream import TextFormat
from shared.errors import ConfigError
from shared.job.compute import ComputeConfig
from shared.models.batches import collate
from shared.runtime.export.compression import Compression, compression_of, noted
from shared.runtime.export.exporting import Target, origin_of, read_model, write_model
from shared.runtime.export.folder import ModelFolder, check_new_model_folder, write_model_folder
from shared.runtime.export.merged import check_mergeable
from shared.runtime.export.onnx import GRAPHS, require_onnx
from shared.runtime.export.parts import Parts
from shared.runtime.runtime import choose_device, choose_dtype

_LOOKED_AT = 512
"""Texts from which it is learned what a neuron is worth."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How small a student is to be.

    Attributes:
        layers: to keep; None is half of them.
        intermediate: width of the feed-forward parts; None is as it was.
    """

    layers: int | None = None
    intermediate: int | None = None


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What was made.

    Attributes:
        compression: how.
        remarks: what whoever uses it should know.
    """

    folder: ModelFolder
    compression: Compression
    remarks: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its folder."""
        return sum((self.folder.path / name).stat().st_size for name in self.folder.files)


def compress(
    source: ModelFolder,
    file: Path,
    how: TextFormat,
    out: Path,
    size: Size,
    recipe: Recipe,
    *,
    told: Callable[[Progress], None] = lambda progress: None,
    compute: ComputeConfig | None = None,
) -> Compressed:
    """Write a smaller model than `source` into `out`.

    Args:
        source: of format `adapter` or `merged`.
        file: of public texts.
        out: new, or an empty folder.

    Raises:
        ConfigError: if the model cannot be made that small.
        DataError: see `read_public_texts`.
        RunError: if `out` cannot be written; then nothing is left of it.
    """
    check_new_model_folder(out)
    source.check()
    parts = _parts(source)
    layers, width = _sizes(parts, size)
    texts = read_public_texts(file, how, parts, source.path, seed=recipe.seed)
    compute = compute or ComputeConfig()
    device = choose_device(compute)
    place = Place(device, choose_dtype(compute, device))

    # 1. The teacher, and what is left of it.
    kept = spread(parts.num_layers, layers)
    network = Network(parts).to(device)
    cut = with_layers(parts, kept)
    if width < width_of(parts):
        chosen = [texts.training[i : i + 32] for i in range(0, min(_LOOKED_AT, len(texts.training)), 32)]
        worth = importance(network, (collate(examples).to(device) for examples in chosen), seed=recipe.seed)
        cut = with_width(cut, most_important([worth[layer] for layer in kept], width))

    # 2. What is left learns from it.
    student = Network(cut).to(device)
    teacher = Teacher(network, kept, place)
    steps, before, after = distil(student, teacher, texts.training, texts.held_out, recipe, place, told)

    # 3. A model folder.
    earlier = compression_of(source.record)
    compression = Compression(
        teacher_sha256=origin_of(source)[1],
        layers_kept=kept,
        layers_before=parts.num_layers,
        intermediate=width,
        intermediate_before=width_of(parts),
        public_texts=texts.number,
        public_texts_held_out=len(texts.held_out),
        public_texts_sha256=texts.sha256,
        steps=steps,
        recipe=asdict(recipe),
        agreement_before=before,
        agreement=after,
        earlier=None if earlier is None else asdict(earlier),
    )
    described = replace(source, record=replace(source.record, notes=noted(source.record, compression)))
    target = _target(parts)
    made = write_model_folder(out, source, lambda folder: write_model(folder, described, student.parts(), target))
    return Compressed(folder=made, compression=compression, remarks=texts.remarks)


def _parts(source: ModelFolder) -> Parts:
    """Return the teacher.

    Raises:
        ConfigError: if it is a graph or a network for images, or of a family that nothing here cuts.
    """
    if source.format == "onnx":
        raise ConfigError(
            f"{source.path} is a graph, whose weights may be rounded; compress the run, or the version that holds its adapter, "
            "and export the result."
        )
    parts = read_model(source)
    if not isinstance(parts, Parts):
        raise ConfigError("a network for images is small already; compression is for language models.")
    if not parts.architecture.has_graph or parts.output is not None:
        raise ConfigError(
            f"{parts.architecture.name} cannot be compressed here, {', '.join(GRAPHS)} with tied outputs can; serve the model "
            "as it is, or tune one of these."
        )
    _target(parts)
    return parts


def _target(parts: Parts) -> Target:
    """Return what the student is written as: a graph where transformers has no class for it; `ConfigError` if neither can be."""
    try:
        check_mergeable(parts.job.task.kind, parts.family)
    except ConfigError:
        require_onnx()
        return "onnx"
    return "merged"


def _sizes(parts: Parts, size: Size) -> tuple[int, int]:
    """Return layers and width, checked against the model's."""
    has, wide = parts.num_layers, width_of(parts)
    layers = size.layers if size.layers is not None else max(1, has // 2)
    width = size.intermediate if size.intermediate is not None else wide
    for option, value, most in (("--layers", layers, has), ("--intermediate", width, wide)):
        if not 1 <= value <= most:
            raise ConfigError(f"{option} is {value:,}; the model has {most:,}, so give 1 to {most:,}.")
    if (layers, width) == (has, wide):
        raise ConfigError(
            f"the model would stay as large as it is ({has} layers, feed-forward parts of {wide:,}); give a smaller number to "
            "--layers or --intermediate. Weights in int8 alone are made by: silotune export --to onnx --precision int8"
        )
    return layers, width
