"""A student learns from its teacher what it says of public texts: its outputs, and what it thinks before it answers.

Sources: outputs as soft answers at a temperature, Hinton, Vinyals and Dean 2015; a student that starts from some of its teacher's
layers, DistilBERT (Sanh et al. 2019); hidden states layer by layer, PKD (Sun et al. 2019) and TinyBERT (Jiao et al. 2020).

Guarantees (tests: tests/server/compression/test_distillation.py)
    * No label is read, and no text but those that are given.
    * Held-out texts choose when to stop and which weights to keep, and are never trained on.
    * The same texts, settings and machine give the same student.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from server.compression.cutting import answering_places
from server.compression.network import Network
from shared.job.job import Job
from shared.models.batches import Batch, Example, collate
from shared.runtime.export.compression import Agreement
from shared.runtime.export.parts import Parts

CACHE_BYTES = 1 << 30
_MOST_NUMBERS = 1 << 25
"""Of outputs at once: a language model says 50,000 of each token."""
_SORTED_TOGETHER = 16
_JUDGED = 32
_LARGEST = torch.finfo(torch.float16).max
_WARM_UP = 0.1
_MAX_NORM = 1.0
_PATIENCE = 0.5  # of all passes: while the learning rate is high, agreement may fall before it rises


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a student learns.

    Attributes:
        epochs: passes over the texts, at most; it ends when half of them in a row did not help.
        learning_rate: at its highest, after a tenth of the steps; it then falls to 0 in a line.
        temperature: by which both sides' logits are divided.
        hidden_weight: of the relative squared error of hidden states, beside that of the answers.
        seed: of the order of the texts.
    """

    epochs: int = 12
    learning_rate: float = 1e-4
    temperature: float = 1.0
    hidden_weight: float = 1.0
    batch_size: int = 32
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """After some steps.

    Attributes:
        steps, total: done, and planned.
        agreement: of the last pass.
    """

    steps: int
    total: int
    agreement: Agreement


@dataclass(frozen=True)
class Place:
    """On what is computed, and in which numbers.

    Attributes:
        dtype: torch.bfloat16 for autocast, or None.
    """

    device: torch.device
    dtype: torch.dtype | None

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context of forward passes that need not be exact."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, dtype=self.dtype)


class Teacher:
    """What a model thinks and says of texts: thoughts are kept in float16 while there is room, or computed anew."""

    def __init__(self, network: Network, matched: Sequence[int], place: Place, cache_bytes: int = CACHE_BYTES) -> None:
        """Take the model.

        Args:
            matched: numbers of the layers whose hidden states a student's layers learn, the last one among them.
        """
        self._network, self._matched, self._place = network, matched, place
        self._kept: dict[int, Tensor] = {}
        self._room = cache_bytes

    def of(
        self, numbers: Sequence[int], examples: Sequence[Example], batch: Batch, *, exact: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        """Return hidden states [B, T, H] of the matched layers and outputs of a batch.

        Args:
            numbers: of its examples, by which they are known again.
            batch: of these examples, on the device.
            exact: compute in float32.
        """
        if any(number not in self._kept for number in numbers):
            with torch.no_grad(), nullcontext() if exact else self._place.autocast():
                found = self._network(batch)[0]
            hidden = torch.stack([found[layer] for layer in self._matched], dim=2)  # [B, T, matched, H]
            self._keep(numbers, examples, hidden)
        else:
            rows = [self._kept[number] for number in numbers]
            hidden = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self._place.device)
        layers = list(hidden.float().unbind(dim=2))
        with torch.no_grad():
            return layers, self._network.answer(layers[-1], batch)

    def _keep(self, numbers: Sequence[int], examples: Sequence[Example], hidden: Tensor) -> None:
        for number, example, row in zip(numbers, examples, hidden, strict=True):
            kept = row[: example.length].float().clamp(-_LARGEST, _LARGEST).to("cpu", torch.float16, copy=True)
            if number not in self._kept and self._room >= (size := kept.numel() * kept.element_size()):
                self._kept[number], self._room = kept, self._room - size


def distil(
    student: Network,
    teacher: Teacher,
    texts: Sequence[Example],
    held_out: Sequence[Example],
    recipe: Recipe,
    place: Place,
    told: Callable[[Progress], None] = lambda progress: None,
) -> tuple[int, Agreement, Agreement]:
    """Train `student` in place; it ends with the weights that agreed best with the teacher on `held_out`.

    Args:
        texts: to learn from.
        held_out: other texts.
        told: is called every few steps.

    Returns:
        (steps, agreement before, agreement after)
    """
    order, numbers = random.Random(recipe.seed), list(range(len(texts)))
    total = recipe.epochs * -(-len(texts) // recipe.batch_size)
    optimizer = torch.optim.AdamW([one for one in student.parameters() if one.requires_grad], lr=0.0, weight_decay=0.01)
    judge = _Judge(student, teacher, held_out, place)
    before = best = last = judge.agreement()
    best_weights, best_epoch, step = _copied(student), 0, 0
    for epoch in range(1, recipe.epochs + 1):
        # 1. One pass over all texts.
        for rows in _batches(texts, numbers, recipe.batch_size, order):
            step += 1
            optimizer.zero_grad()
            for part in _parted(rows, texts, student):
                chosen = [texts[row] for row in part]
                batch = collate(chosen).to(place.device)
                with place.autocast():
                    hidden, outputs = student(batch)
                loss = _loss(student.built_from, hidden, outputs, teacher.of(part, chosen, batch), batch, recipe)
                (loss * len(part) / len(rows)).backward()  # type: ignore[no-untyped-call]
            _step(optimizer, recipe.learning_rate * _schedule(step, total))
            told(Progress(steps=step, total=total, agreement=last))

        # 2. Does it agree better than after any pass before?
        last = judge.agreement()
        if last.divergence < best.divergence:
            best, best_weights, best_epoch = last, _copied(student), epoch
        elif epoch - best_epoch > _PATIENCE * recipe.epochs:
            break
    student.load_state_dict(best_weights)
    return step, before, best


def divergence(job: Job, outputs: Tensor, expected: Tensor, temperature: float = 1.0) -> Tensor:
    """Return how far answers are from the expected ones, one number each; see `Agreement`.

    Args:
        outputs, expected: one answer a row.
    """
    if job.task.target_range is not None:
        return (outputs.float() - expected.float()).square().mean(dim=-1)
    found, right = ((one.float() / temperature).log_softmax(dim=-1) for one in (outputs, expected))
    return (right.exp() * (right - found)).sum(dim=-1)


def _loss(
    parts: Parts,
    hidden: Sequence[Tensor],
    outputs: Tensor,
    expected: tuple[Sequence[Tensor], Tensor],
    batch: Batch,
    recipe: Recipe,
) -> Tensor:
    """Return the divergence of the answers, and the mean over layers of the squared error of hidden states over their size."""
    places = answering_places(parts, batch)
    rows, right = (outputs, expected[1]) if places is None else (outputs[places], expected[1][places])
    answers = divergence(parts.job, rows, right, recipe.temperature).mean() * recipe.temperature**2
    seen = batch.attention_mask
    errors = [
        (found.float()[seen] - target[seen]).square().sum() / target[seen].square().sum()
        for found, target in zip(hidden, expected[0], strict=True)
    ]
    return answers + recipe.hidden_weight * torch.stack(errors).mean()


class _Judge:
    """Compares answers on the held-out texts, in float32."""

    def __init__(self, student: Network, teacher: Teacher, held_out: Sequence[Example], place: Place) -> None:
        self._student, self._teacher, self._texts, self._place = student, teacher, held_out, place
        by_length = sorted(range(len(held_out)), key=lambda row: held_out[row].length)
        self._batches = [
            part
            for begin in range(0, len(by_length), _JUDGED)
            for part in _parted(by_length[begin : begin + _JUDGED], held_out, student)
        ]

    def agreement(self) -> Agreement:
        parts = self._student.built_from
        differences, same, count = 0.0, 0, 0
        for rows in self._batches:
            examples = [self._texts[row] for row in rows]
            batch = collate(examples).to(self._place.device)
            with torch.no_grad():
                outputs = self._student(batch)[1]
                expected = self._teacher.of([-1 - row for row in rows], examples, batch, exact=True)[1]
            places = answering_places(parts, batch)
            outputs, expected = (one if places is None else one[places] for one in (outputs, expected))
            differences += float(divergence(parts.job, outputs, expected).double().sum())
            same += int((outputs.argmax(dim=-1) == expected.argmax(dim=-1)).sum())
            count += len(outputs)
        scores = parts.job.task.target_range is not None
        return Agreement(divergence=differences / count, same_answers=None if scores else same / count)


def _parted(rows: list[int], texts: Sequence[Example], network: Network) -> Iterator[list[int]]:
    """Cut a batch so that its outputs fit into memory."""
    parts = network.built_from
    outputs = len(parts.head[1]) if parts.head is not None else int(parts.config["vocab_size"])
    most = max(1, _MOST_NUMBERS // (outputs * max(texts[row].length for row in rows)))
    for begin in range(0, len(rows), most):
        yield rows[begin : begin + most]


def _batches(texts: Sequence[Example], numbers: list[int], size: int, order: random.Random) -> Iterator[list[int]]:
    """Yield one pass over all texts in a new order; texts of about one length stand together."""
    order.shuffle(numbers)
    found: list[list[int]] = []
    for begin in range(0, len(numbers), size * _SORTED_TOGETHER):
        near = sorted(numbers[begin : begin + size * _SORTED_TOGETHER], key=lambda number: texts[number].length)
        found += [near[i : i + size] for i in range(0, len(near), size)]
    order.shuffle(found)
    yield from found


def _schedule(step: int, total: int) -> float:
    return min(step / (_WARM_UP * total + 1), (total + 1 - step) / total)


def _step(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        nn.utils.clip_grad_norm_(group["params"], _MAX_NORM)
    optimizer.step()


def _copied(network: Network) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}
