"""One loaded backbone with adapters, tokenizer, task and cache of frozen activations, shared by all who need it.

A site node loads it once; in a simulation all clients of a process share it, which is what keeps memory flat.
It is not safe to train two clients at the same time on one runtime.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from shared.errors import ConfigError, ModelError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.model import LoraConfig, ModelConfig, TaskConfig
from shared.job.training import AdversarialConfig
from shared.models.backbones import backbone_folder, load_backbone, output_weight, usable_positions
from shared.models.batches import Batch, Example, collate, micro_batches_of_groups
from shared.models.eight_bits import in_eight_bits
from shared.models.frozen_cache import FrozenCache, Told, shared_cache
from shared.models.heads import OwnLanguageHead, TiedLanguageHead
from shared.models.images import PIXEL_STEPS, ImageModel, build_features
from shared.models.tokenizers import load_tokenizer
from shared.models.tunable import RESIDUAL, TrainedModel, TunableModel, attach_adapters, check_forward
from shared.runtime.label_names import learn_from_names
from shared.tasks import TASKS, Evaluation, Task
from shared.tensors import adapters


@dataclass
class Runtime:
    """Everything needed to train or evaluate one kind of model on one device.

    Attributes:
        model: backbone, adapters and head, or a network for images; the trainable values are whatever was loaded last.
        task: the job's task.
        tokenizer: the backbone's own (public) tokenizer; None of images.
        max_length: most tokens, or all pixel values, of an example.
        compute: speed settings.
        autocast_dtype: torch.bfloat16 or None for float32.
        initial: trainable values as drawn from the job's public seed, float32 on the CPU.
        cache: activations below the first adapted layer, shared by all models on the same backbone.
        proven: set by the site once `client.training.proof` has passed.
        settled_threads: for how many threads `client.training.independence` has settled what shares a pass; 0 before.
        settled_stacks: whether it has done so for sites side by side.
        tried_adapter: SHA-256 of the global adapter that the site tried out last.
        adversarial: what training adds to each record's loss; part of what `client.training` proves and tries out.
        temperature: outputs are divided by it (`shared.runtime.calibration`); 1 but where a run's calibrated model is used.
    """

    model: TrainedModel
    task: Task
    tokenizer: Any
    max_length: int
    compute: ComputeConfig
    autocast_dtype: torch.dtype | None
    initial: dict[str, Tensor]
    cache: FrozenCache
    proven: bool = False
    settled_threads: int = 0
    settled_stacks: bool = False
    tried_adapter: str = ""
    adversarial: AdversarialConfig | None = None
    temperature: float = 1.0

    @property
    def num_values(self) -> int:
        """How many different numbers `input_ids` can hold: tokens of the vocabulary, or steps of a pixel value."""
        return PIXEL_STEPS + 1 if self.tokenizer is None else int(self.tokenizer.vocab_size)

    @property
    def machine(self) -> dict[str, str]:
        """What the model computes on, and in which numbers, in words."""
        device = self.model.device
        name = f"{device.type} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
        return {"device": name, "precision": str(self.autocast_dtype or torch.float32).removeprefix("torch.")}

    def encode(self, records: Sequence[Any]) -> list[Example]:
        """Encode records with the job's task and the backbone's tokenizer."""
        return self.task.encode(records, self.tokenizer, self.max_length)

    def load(self, state: Mapping[str, Tensor], *, temperature: float = 1.0) -> None:
        """Put a global adapter into the model: trainable values, and residuals of an exact aggregation if there are."""
        self.temperature = temperature
        trainable = self.model.trainable()
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(state[name])
        residuals = {n.removesuffix(RESIDUAL): t for n, t in state.items() if n.endswith(RESIDUAL)}
        self.model.set_residuals(residuals)

    def global_shapes(self, exact: bool) -> dict[str, torch.Size]:
        """Return the shapes of a global adapter; with `exact` aggregation it also holds residuals [out, in]."""
        shapes = adapters.shapes_of(self.initial)
        if exact:
            for name, (factor_a, factor_b) in self.model.lora_factors().items():
                shapes[name + RESIDUAL] = torch.Size([factor_b.shape[0], factor_a.shape[1]])
        return shapes

    def initial_global(self, exact: bool) -> dict[str, Tensor]:
        """Return the global adapter before the first round: initial values, and zero residuals if `exact`."""
        shapes = self.global_shapes(exact)
        return {name: self.initial[name] if name in self.initial else torch.zeros(s) for name, s in shapes.items()}

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which forward passes run."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.model.device.type, dtype=self.autocast_dtype)

    def batches(self, examples: Sequence[Example], indices: Sequence[int]) -> Iterator[Batch]:
        """Yield the micro-batches of one logical batch on the model's device, with cached activations if there are."""
        for _, batch in self.grouped_batches(examples, [[index] for index in indices]):
            yield batch

    def grouped_batches(
        self, examples: Sequence[Example], groups: Sequence[Sequence[int]], max_examples: int = sys.maxsize
    ) -> Iterator[tuple[list[int], Batch]]:
        """Yield (records in increasing order, micro-batch) of one logical batch; see `micro_batches_of_groups`."""
        lengths = {index: examples[index].length for group in groups for index in group}
        for unordered in micro_batches_of_groups(lengths, groups, self.compute.micro_batch_tokens, max_examples):
            rows = sorted(unordered)
            chosen = [examples[index] for index in rows]
            yield rows, collate(chosen, self.cache.get(chosen)).to(self.model.device)

    def warm_cache(self, examples: Sequence[Example], told: Told = lambda done, of: None) -> None:
        """Compute what is frozen of each example once, as far as the bounds on memory and file allow.

        Args:
            told: how many of the texts that were missing are done, and how many they are.
        """
        model = self.model
        if not self.compute.cache_frozen_layers or not isinstance(model, TunableModel) or model.first_adapted == 0:
            return

        def compute(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            device = model.device
            with self.autocast():
                return model.frozen(input_ids.to(device), attention_mask.to(device))

        self.cache.fill(
            examples,
            compute,
            max_tokens=self.compute.micro_batch_tokens,
            max_bytes=self.compute.cache_megabytes * 2**20,
            max_file_bytes=self.compute.cache_file_megabytes * 2**20,
            folder=self.compute.cache_file_folder,
            told=told,
        )

    def evaluate(self, examples: Sequence[Example]) -> Evaluation:
        """Return the task's metrics of the current model on public examples."""
        return self.task.evaluate(self.outputs(examples))

    def outputs(self, examples: Sequence[Example]) -> Iterator[tuple[Tensor, Batch]]:
        """Yield (outputs over the temperature, batch) over `examples`, sorted by length, without gradients."""
        for batch in self.batches(examples, range(len(examples))):
            with torch.no_grad(), self.autocast():
                outputs = self.model(batch)
            yield outputs if self.temperature == 1 else outputs.float() / self.temperature, batch


def on_cpu(parts: Iterable[tuple[Tensor, Batch]]) -> Iterator[tuple[Tensor, Batch]]:
    """Yield the outputs and what a task reads of their batches; cached activations are not kept."""
    for output, batch in parts:
        yield output.float().cpu(), replace(batch, hidden=None).to(torch.device("cpu"))


def load_runtime(job: Job, compute: ComputeConfig) -> Runtime:
    """Return the runtime of `job`, loading it at most once per process for the same model, adapters, task, seed and loss."""
    return _load_runtime(job.model, job.lora, job.task, job.seed, compute, job.training.adversarial)


def load_own_runtime(job: Job, compute: ComputeConfig) -> Runtime:
    """Return a runtime of `job` that nobody else has, so that two versions of a model can stand side by side."""
    return _load_runtime.__wrapped__(job.model, job.lora, job.task, job.seed, compute, job.training.adversarial)


@lru_cache(maxsize=2)
def _load_runtime(
    model: ModelConfig,
    lora: LoraConfig,
    task: TaskConfig,
    seed: int,
    compute: ComputeConfig,
    adversarial: AdversarialConfig | None,
) -> Runtime:
    asked = TASKS[task.kind](task, model)
    if model.is_image_network:
        return _image_runtime(asked, seed, compute)
    return replace(_language_runtime(asked, lora, seed, compute), adversarial=adversarial)


_PIXELS_PER_TOKEN = 16
"""Pixel values that take the time and memory of one token, about: 16 and 32 numbers at a place instead of hundreds."""


def _image_runtime(task: Task, seed: int, compute: ComputeConfig) -> Runtime:
    device = choose_device(compute)
    features, num_features = build_features(task.model, task.config, seed=seed)
    head = task.build_head(features, num_features, seed=seed)
    assert task.config.image_shape is not None  # noqa: S101 (checked by Job)
    model = ImageModel(features, head, task.config.image_shape).to(device)
    return Runtime(
        model=model,
        task=task,
        tokenizer=None,
        max_length=task.config.num_pixels,
        compute=compute.model_copy(update={"micro_batch_tokens": compute.micro_batch_tokens * _PIXELS_PER_TOKEN}),
        autocast_dtype=choose_dtype(compute, device),
        initial={name: parameter.detach().cpu().clone() for name, parameter in model.trainable().items()},
        cache=FrozenCache(),  # nothing is frozen
    )


def _language_runtime(task: Task, lora: LoraConfig, seed: int, compute: ComputeConfig) -> Runtime:
    device = choose_device(compute)
    folder = backbone_folder(task.model)
    backbone, architecture, config = load_backbone(folder)
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"the tokenizer in {folder} knows {len(tokenizer):,} tokens, the backbone only {config.vocab_size:,}; they do not "
            "belong together."
        )
    limit = usable_positions(backbone, architecture)
    if task.model.max_length > limit:
        raise ConfigError(
            f"model.max_length is {task.model.max_length}, but the backbone has {limit} positions for tokens; use at most that."
        )
    if task.model.backbone_bits == 8:
        in_eight_bits(backbone, architecture.layers, architecture.embedding)
    head = task.build_head(backbone, getattr(config, architecture.width), seed=seed)
    if isinstance(head, TiedLanguageHead) and not config.tie_word_embeddings:
        head = OwnLanguageHead(output_weight(folder), bits=task.model.backbone_bits)
    peft_model, first = attach_adapters(backbone, architecture, lora, seed=seed)
    model = TunableModel(peft_model, architecture, lora, first, head)
    learn_from_names(model, task, tokenizer)
    # To the device first: hooks that are registered before a move keep the old parameters and train nothing.
    model = model.to(device)
    model.train_mode()
    check_forward(model, task.model.max_length)
    model.recompute = compute.gradient_checkpointing
    dtype = choose_dtype(compute, device)
    if dtype is not None:
        model.prepare_autocast(dtype)
    initial = {name: parameter.detach().cpu().clone() for name, parameter in model.trainable().items()}
    return Runtime(
        model=model,
        task=task,
        tokenizer=tokenizer,
        max_length=task.model.max_length,
        compute=compute,
        autocast_dtype=dtype,
        initial=initial,
        cache=shared_cache(
            f"{folder} in {task.model.backbone_bits} bits",
            f"{task.model.pooling} pooled" if model.pools_frozen else first,
            device.type,
            str(dtype),
        ),
    )


def choose_device(compute: ComputeConfig) -> torch.device:
    """Return the device that the settings ask for; "auto" takes CUDA where there is one."""
    if compute.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("compute.device is 'cuda', but no CUDA device is visible; use 'auto' or mend the driver.")
    if compute.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(compute.device)


def choose_dtype(compute: ComputeConfig, device: torch.device) -> torch.dtype | None:
    """Return bfloat16 where asked for, or where "auto" finds it in hardware; None means float32."""
    if compute.precision == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
        # Emulated bfloat16 is many times slower than float32.
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None
    return torch.bfloat16 if compute.precision == "bfloat16" else None
