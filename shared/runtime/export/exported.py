"""An exported model behind the same questions and answers as a run's: `silotune predict MODEL_FOLDER`.

Texts become records and outputs become answers by the run's own task (`shared.tasks`); only what computes the outputs differs,
and there is no PEFT and no backbone to look for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import ConfigError, ModelError, excerpt, model_errors
from shared.models.batches import Batch, Example, collate
from shared.models.families import ARCHITECTURES
from shared.models.images import PIXEL_STEPS
from shared.models.model_files import check_weights
from shared.models.tokenizers import load_tokenizer
from shared.runtime.export.folder import ModelFolder
from shared.runtime.export.merged import CLASSES, WEIGHTS_FILE
from shared.runtime.export.onnx import GRAPH_FILE, new_session
from shared.tasks import Task, task_of

_AT_ONCE = 32


@dataclass(frozen=True)
class Exported:
    """A model of format `merged` or `onnx`, loaded.

    Attributes:
        task, tokenizer, max_length: as those of `shared.runtime.runtime.Runtime`.
        compute: returns the outputs of one batch, [B, ...].
        session: of ONNX Runtime; None of other formats.
    """

    task: Task
    tokenizer: Any
    max_length: int
    compute: Callable[[Batch], Tensor]
    session: Any = None

    def encode(self, records: Sequence[Any]) -> list[Example]:
        """Encode records as the run did."""
        return self.task.encode(records, self.tokenizer, self.max_length)

    def outputs(self, examples: Sequence[Example]) -> list[Tensor]:
        """Return the head's output of every example, in order, as `shared.runtime.inference.head_outputs` does."""
        order = sorted(range(len(examples)), key=lambda index: examples[index].length)
        found: dict[int, Tensor] = {}
        for begin in range(0, len(order), _AT_ONCE):
            rows = order[begin : begin + _AT_ONCE]
            found |= zip(rows, self.compute(collate([examples[row] for row in rows])), strict=True)
        return [found[index] for index in range(len(examples))]


def load_exported(folder: ModelFolder, *, threads: int = 0) -> Exported:
    """Load a model of format `merged` or `onnx`.

    Args:
        threads: of ONNX Runtime for one batch; 0 is one for each core.

    Raises:
        ConfigError: if it is an adapter, or what runs it is not installed.
        ModelError: if a file was changed or cannot be loaded.
    """
    folder.check()
    job, task = folder.job, task_of(folder.job)
    if folder.format == "adapter":
        raise ConfigError(f"{folder.path} holds an adapter, which `shared.runtime.inference.load_tuned` loads.")
    with model_errors(f"the model in {folder.path} cannot be loaded"):
        session = _session(folder, threads) if folder.format == "onnx" else None
        compute = _transformer(folder) if session is None else _graph(folder, session)
        tokenizer = None if job.model.is_image_network else load_tokenizer(folder.path)
    if job.task.target_range is not None:
        compute = _in_head_units(compute, *job.task.target_range)
    return Exported(task, tokenizer, folder.record.max_length, compute, session)


def _transformer(folder: ModelFolder) -> Callable[[Batch], Tensor]:
    import transformers

    if WEIGHTS_FILE not in folder.files:  # an index of several files could name one outside the folder
        raise ModelError(f"{folder.path} lists no {WEIGHTS_FILE}, the weights as Silotune writes them; make it anew.")
    config = transformers.AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"{folder.path} holds a model of type {excerpt(config.model_type)}; merged ones are of type "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )
    kind = getattr(transformers, CLASSES[folder.record.task])
    check_weights(folder.path, lambda: kind.from_config(config, trust_remote_code=False))
    model, loading = kind.from_pretrained(
        folder.path,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    # transformers would draw what is missing or of another shape at random, and pass over what is too many.
    if wrong := sorted(
        {str(name) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in loading[key]}
    ):
        raise ModelError(
            f"{folder.path}: config.json describes another model than the weights are; {len(wrong)} tensors differ, first "
            f"{excerpt(wrong[0])}. Do not use the folder, make it anew."
        )
    model.eval()

    def compute(batch: Batch) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
        return found

    return compute


def _session(folder: ModelFolder, threads: int) -> Any:
    try:
        return new_session(folder.path / GRAPH_FILE, threads)
    except ModuleNotFoundError as error:
        raise ConfigError(f"a graph needs the package {error.name}: pip install 'silotune[export]'") from None


def _graph(folder: ModelFolder, session: Any) -> Callable[[Batch], Tensor]:
    caches = [one for one in folder.record.inputs if one.name.startswith("past_key_values")]
    pixel_range = folder.job.task.pixel_range

    def compute(batch: Batch) -> Tensor:
        feed: dict[str, NDArray[Any]]
        if pixel_range is not None:
            low, high = pixel_range
            feed = {"pixels": (low + batch.input_ids.double() / PIXEL_STEPS * (high - low)).float().numpy()}
        else:
            feed = {"input_ids": batch.input_ids.numpy(), "attention_mask": batch.attention_mask.long().numpy()}
        for one in caches:
            feed[one.name] = np.zeros((len(batch.input_ids), int(one.shape[1]), 0, int(one.shape[3])), np.float32)
        return torch.from_numpy(session.run(["logits"], feed)[0])

    return compute


def _in_head_units(compute: Callable[[Batch], Tensor], low: float, high: float) -> Callable[[Batch], Tensor]:
    """Return scores on the scale of the run's head, -1 to 1, which the task's answers expect."""
    return lambda batch: 2 * (compute(batch) - low) / (high - low) - 1
