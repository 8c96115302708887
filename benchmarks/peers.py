"""What we are compared with: transformers and PEFT alone, and the same under Opacus as its examples use it.

Peers and we train the same parameters of the same backbone behind the same head, without dropout, so that only the way of
computing differs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from client.training.trainer import LocalRound, LocalWork, train_local_rounds
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.model import ModelConfig
from shared.job.parsing import parse
from shared.models.backbones import backbone_folder
from shared.models.batches import Example
from shared.models.heads import PooledClassifier, init_linear
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime.runtime import Runtime, load_runtime

Train = Literal["b", "both"]
Precision = Literal["float32", "bfloat16"]
OwnPrecision = Literal["auto", "float32", "bfloat16"]
MODES = ("hooks", "functorch", "ghost")
"""Opacus' ways to per-example gradients or norms."""

LABELS = ("negative", "positive")
RANK = 8
TARGETS = ("query", "value")
LEARNING_RATE = 1e-3


class Classifier(nn.Module):
    """A PEFT model and a linear head, as a user of transformers and PEFT would write it."""

    def __init__(self, *, last_layers: int | None = None, train: Train = "b") -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModel

        super().__init__()
        folder = backbone_folder(ModelConfig())
        # Without the pooler, which nothing uses: a plain step need not pay for it.
        settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "add_pooling_layer": False}
        backbone = AutoModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True, **settings
        )
        depth = backbone.config.num_hidden_layers
        layers = list(range(depth - (last_layers or depth), depth))
        config = LoraConfig(
            r=RANK,
            lora_alpha=RANK,
            target_modules=list(TARGETS),
            layers_to_transform=layers,
            layers_pattern="layer",
            lora_dropout=0.0,
            bias="none",
        )
        self.peft_model = get_peft_model(backbone, config)
        self.head = PooledClassifier(backbone.config.hidden_size, len(LABELS), "mean")
        init_linear(self.head.linear, seed=0, name="head.linear")
        if train == "b":
            for name, parameter in self.named_parameters():
                if "lora_A" in name:
                    parameter.requires_grad_(False)
        self.train()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits [B, labels]."""
        hidden = self.peft_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(hidden, attention_mask)  # type: ignore[no-any-return]

    def trainable(self) -> list[nn.Parameter]:
        """Return what is trained."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def plain_step(model: Classifier, precision: Precision, data: tuple[Tensor, Tensor, Tensor]) -> Callable[[], None]:
    """Return a training step without privacy on one batch: the limit of what a private step can reach."""
    optimizer = torch.optim.AdamW(model.trainable(), lr=LEARNING_RATE)
    ids, mask, labels = data

    def step() -> None:
        optimizer.zero_grad()
        with autocast(precision):
            logits = model(ids, mask)
        nn.functional.cross_entropy(logits.float(), labels, reduction="none").mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def opacus_step(
    model: Classifier, precision: Precision, data: tuple[Tensor, Tensor, Tensor], mode: str
) -> Callable[[], None]:
    """Return Opacus' step with `grad_sample_mode` on one batch that holds all records."""
    private = OpacusTraining(model, data, mode=mode, batch_size=len(data[0]), poisson=False, noise_multiplier=1.0)
    return lambda: private.step(data, precision)


class OpacusTraining:
    """Model, optimiser, loss and loader after `PrivacyEngine.make_private`.

    Attributes:
        loader: yields (token ids, attention mask, labels); with `poisson` it draws Poisson samples.
        model: wrapped by Opacus.
    """

    def __init__(
        self,
        model: Classifier,
        data: tuple[Tensor, Tensor, Tensor],
        *,
        mode: str,
        batch_size: int,
        poisson: bool,
        noise_multiplier: float | None = None,
        epsilon: float | None = None,
        epochs: int = 1,
        optimizer: torch.optim.Optimizer | None = None,
        collate: Any = None,
    ) -> None:
        from opacus import PrivacyEngine

        optimizer = optimizer or torch.optim.AdamW(model.trainable(), lr=LEARNING_RATE)
        loader = DataLoader(TensorDataset(*data), batch_size=batch_size, collate_fn=collate)
        engine: Any = PrivacyEngine()
        common = {
            "module": model,
            "optimizer": optimizer,
            "data_loader": loader,
            "criterion": nn.CrossEntropyLoss(),
            "max_grad_norm": 1.0,
            "grad_sample_mode": mode,
            "poisson_sampling": poisson,
        }
        if epsilon is None:
            made = engine.make_private(noise_multiplier=noise_multiplier, **common)
        else:
            made = engine.make_private_with_epsilon(target_epsilon=epsilon, target_delta=1e-5, epochs=epochs, **common)
        self.criterion: Any = made[2] if mode == "ghost" else nn.CrossEntropyLoss()
        self.model, self.optimizer, self.loader = made[0], made[1], made[-1]

    def step(self, batch: tuple[Tensor, Tensor, Tensor], precision: Precision = "float32") -> None:
        """Take one DP step."""
        ids, mask, labels = batch
        with quiet_hooks():
            self.optimizer.zero_grad()
            with autocast(precision):
                logits = self.model(ids, mask)
            self.criterion(logits.float(), labels).backward()
            self.optimizer.step()


@contextmanager
def quiet_hooks() -> Iterator[None]:
    """Silence what PyTorch says of modules whose input needs no gradient."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def autocast(precision: Precision) -> Any:
    """Return the context of a forward pass."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()


def same_job(
    *,
    last_layers: int | None = None,
    train: Train = "b",
    max_length: int = 128,
    training: dict[str, Any] | None = None,
    privacy: dict[str, Any] | None = None,
    federation: dict[str, Any] | None = None,
    rounds: int = 1,
) -> Job:
    """Return our job for what the peers train."""
    raw = {
        "name": "benchmark",
        "model": {"max_length": max_length},
        "lora": {
            "rank": RANK,
            "alpha": float(RANK),
            "target_modules": TARGETS,
            "last_layers": last_layers,
            "train": train,
        },
        "task": {"kind": "sequence_classification", "labels": LABELS},
        "training": {"rounds": rounds, "local_steps": 1, "learning_rate": LEARNING_RATE, **(training or {})},
        "privacy": {"sample_rate": 1.0, "noise_multiplier": 1.0, **(privacy or {})},
        "federation": federation or {},
    }
    return parse(Job, raw, source="the benchmark")


def same_runtime(job: Job, *, precision: OwnPrecision = "float32", cached: bool = True, **compute: Any) -> Runtime:
    """Return our runtime of `job` on the processor, with default settings but `compute`."""
    config = ComputeConfig(device="cpu", precision=precision, cache_frozen_layers=cached, **compute)
    return load_runtime(job, config)


def local_round(runtime: Runtime, job: Job, examples: list[Example]) -> LocalRound:
    """Return one local round of ours at one place."""
    return train_local_rounds(
        runtime,
        [LocalWork(examples=examples, declared_records=len(examples), randomness=SiteRandomness.from_os())],
        runtime.initial,
        training=job.training,
        plan=PrivacyPlan.from_job(job),
        round_number=1,
    )[0]


def require_same_size(model: Classifier, runtime: Runtime) -> None:
    """Raise unless both train equally many parameters: otherwise there is nothing to compare."""
    theirs = sum(parameter.numel() for parameter in model.trainable())
    ours = sum(tensor.numel() for tensor in runtime.initial.values())
    if theirs != ours:
        raise RuntimeError(f"the peer trains {theirs:,} parameters, we train {ours:,}")


def random_examples(count: int, length: int) -> list[Example]:
    """Return records of `length` random tokens each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20_000, (count, length), generator=generator)
    return [Example(row, index % len(LABELS)) for index, row in enumerate(ids)]


def padded(examples: list[Example], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids [N, T], attention mask [N, T] and labels [N], padded to `length` tokens."""
    ids = torch.zeros(len(examples), length, dtype=torch.int64)
    mask = torch.zeros(len(examples), length, dtype=torch.int64)
    for row, example in enumerate(examples):
        ids[row, : example.length] = example.input_ids
        mask[row, : example.length] = 1
    return ids, mask, torch.tensor([example.target for example in examples])


def longest_of_batch(rows: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Collate padded rows and cut them to the longest of them."""
    ids, mask, labels = (torch.stack(column) for column in zip(*rows, strict=True))
    length = int(mask.sum(dim=1).max())
    return ids[:, :length], mask[:, :length], labels
