"""One DP step against the same step without privacy, and against Opacus: time and peak memory.

MiniLM-L6, rank 8 on query and value of all six layers, 64 records of 48 tokens, AdamW. Ours is `train_local_rounds` with every
record drawn, noise from the site's cryptographic generator and default speed settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import harness, peers
from benchmarks.harness import Findings, PeakMemory, Tell, alternate, in_own_process, seconds
from benchmarks.peers import MODES, Classifier, Precision, Train

BATCH, TOKENS = 64, 48
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
TRAINS: tuple[Train, ...] = ("b", "both")
PLAIN = "plain PEFT"
# Wide enough for the whole batch in one forward pass; the default cuts it in two.
_ONE_PASS = BATCH * TOKENS


def run(tell: Tell, *, runs: int = 5, steps: int = 2) -> Findings:
    """Measure all variants in float32, and in bfloat16 where the processor has it.

    Args:
        tell: told what is going on.
        runs: pairs of a comparison.
        steps: steps of one measurement of time.
    """
    findings = Findings(details={"batch": f"{BATCH} x {TOKENS} tokens"})
    for setting in (Setting(precision, train) for precision in PRECISIONS for train in TRAINS):
        if setting.emulated:
            continue
        comparison = compare_time(setting, runs=runs, steps=steps, tell=tell)
        findings.details[f"time, {setting}"] = comparison
        if setting.train == "b":
            key = "dp_step_time_ratio" + ("" if setting.precision == "float32" else "_bfloat16")
            findings.headlines[key] = comparison[f"ours / {PLAIN}"]
    for train in TRAINS:
        memory = compare_memory(Setting("float32", train), runs=runs if train == "b" else 2, tell=tell)
        findings.details[f"memory, float32, train {train}"] = memory
        if train == "b":
            findings.headlines["dp_step_memory_ratio"] = memory[f"ours / {PLAIN}"]
    return findings


def run_bfloat16(tell: Tell, *, runs: int = 3) -> Findings:
    """Measure time in bfloat16, also where it is emulated: then an eighth of the batch, one step, few runs."""
    settings = [Setting("bfloat16", train) for train in TRAINS]
    return Findings(
        {}, {f"time, {setting}": compare_time(setting, runs=runs, steps=1, tell=tell) for setting in settings}
    )


@dataclass(frozen=True)
class Setting:
    """What all variants of one comparison share."""

    precision: Precision
    train: Train

    @property
    def emulated(self) -> bool:
        """Whether the processor has no such arithmetic: then matrix products hide everything else."""
        return self.precision == "bfloat16" and not torch.cpu._is_avx512_bf16_supported()

    @property
    def batch(self) -> int:
        """Records of a step."""
        return BATCH // 8 if self.emulated else BATCH

    def __str__(self) -> str:
        emulated = f" (emulated, {self.batch} records, one step)" if self.emulated else ""
        return f"{self.precision}{emulated}, train {self.train}"


def compare_time(setting: Setting, *, runs: int, steps: int, tell: Tell) -> dict[str, list[float]]:
    """Return seconds of every variant and ratios within pairs.

    Args:
        setting: of all variants.
        runs: pairs of each.
        steps: steps of a measurement.
        tell: told before every pair.
    """
    tell(f"{setting}: loading")
    # Emulation is slow: the limit and one mode of Opacus suffice.
    steps, modes = (1, MODES[:1]) if setting.emulated else (steps, MODES)
    theirs = {name: peer(name, setting) for name in (PLAIN, *modes)}
    ours = our_training(setting, steps)
    # Against ourselves: what privacy costs, and what the cut into micro-batches costs.
    variants = {
        "ours, clipping and noise off": our_training(setting, steps, private=False),
        "ours, one micro-batch": our_training(setting, steps, micro_batch_tokens=_ONE_PASS),
    }
    if setting.train == "both" or setting.emulated:
        variants = {}
    for action in (*theirs.values(), ours, *variants.values()):
        action()

    measured = {name: lambda act=action: seconds(act, steps) for name, action in theirs.items()}
    measured |= {name: lambda act=action: seconds(act) / steps for name, action in variants.items()}
    pairs = alternate(measured, lambda: seconds(ours) / steps, runs=runs, tell=lambda what: tell(f"{setting}: {what}"))
    found = {f"{name}, seconds": pair.peer for name, pair in pairs.items()}
    found["ours, seconds"] = [value for pair in pairs.values() for value in pair.ours]
    return found | {f"ours / {name}": pair.ours_over_peer() for name, pair in pairs.items()}


def peer(name: str, setting: Setting) -> Callable[[], None]:
    """Return the step of a peer: plain PEFT, or a mode of Opacus."""
    model = Classifier(train=setting.train)
    data = peers.padded(peers.random_examples(setting.batch, TOKENS), TOKENS)
    if name == PLAIN:
        return peers.plain_step(model, setting.precision, data)
    return peers.opacus_step(model, setting.precision, data, name)


def our_training(setting: Setting, steps: int, *, private: bool = True, **compute: Any) -> Callable[[], object]:
    """Return one local round of `steps` steps over the whole batch."""
    job = peers.same_job(
        train=setting.train,
        max_length=TOKENS,
        training={"local_steps": steps},
        privacy={"mechanism": "dp-sgd" if private else "none"},
    )
    runtime = peers.same_runtime(job, precision=setting.precision, **compute)
    examples = peers.random_examples(setting.batch, TOKENS)
    return lambda: peers.local_round(runtime, job, examples)


def compare_memory(setting: Setting, *, runs: int, tell: Tell) -> dict[str, list[float]]:
    """Return peak MB above the loaded model of every variant, each in a process of its own, and ratios within pairs."""

    def measure(name: str) -> Callable[[], float]:
        return lambda: float(in_own_process(peak, name=name, precision=setting.precision, train=setting.train))

    def compare(names: tuple[str, ...], count: int) -> dict[str, harness.Pairs]:
        peers_of = {name: measure(name) for name in names}
        return alternate(peers_of, measure("ours"), runs=count, tell=lambda what: tell(f"memory, {setting}: {what}"))

    # Memory hardly varies and every process costs its start, so the modes of Opacus get fewer runs.
    pairs = compare((PLAIN,), runs) | compare(MODES if setting.train == "b" else MODES[:1], min(runs, 2))
    found = {f"{name}, MB": pair.peer for name, pair in pairs.items()}
    found["ours, MB"] = [value for pair in pairs.values() for value in pair.ours]
    return found | {f"ours / {name}": pair.ours_over_peer() for name, pair in pairs.items()}


def peak(name: str, precision: Precision, train: Train) -> float:
    """Return the peak MB of two steps above what is held once the model is loaded."""
    setting = Setting(precision, train)
    step = our_training(setting, 2) if name == "ours" else peer(name, setting)
    with PeakMemory() as memory:
        for _ in range(1 if name == "ours" else 2):
            step()
    return memory.megabytes
