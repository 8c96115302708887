"""Simulations: ours against Flower's Ray runtime with a model per client, and many clients against one.

The peer does what Flower's example of federated LLM tuning does: the ClientApp builds its model from the folder in every round,
loads the global adapter, trains, and returns its arrays to FedAvg. Same backbone, adapters, batch size and number of DP steps.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import client.trainer
from benchmarks import peers
from benchmarks.harness import Findings, Pairs, PeakMemory, Tell, alternate, calm_environment, in_own_process, seconds
from benchmarks.peers import Classifier, OpacusTraining
from client.trainer import LocalRound, train_local_round
from shared.batches import Example
from shared.config import Job, parse
from shared.datasets import Record, write_jsonl
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime import Runtime
from simulations.demo_data import load_movie_reviews, split_public_test

RECORDS, BATCH, LOCAL_STEPS = 50, 10, 4
"""Of every client: records, expected size of a Poisson sample, DP steps of a round."""

SMALL_RECORDS = 20
"""Records of one of the many clients."""

MAX_LENGTH, NUM_TEST = 64, 100
LEARNING_RATE = 1.0
_LAST_LAYERS = 1
_TRAINING = {"optimizer": "sgd", "momentum": 0.9, "learning_rate": LEARNING_RATE, "local_steps": LOCAL_STEPS}


@dataclass(frozen=True)
class Size:
    """How large a comparison is."""

    clients: int = 100
    rounds: int = 5
    runs: int = 1

    def __str__(self) -> str:
        return f"{self.clients} clients x {RECORDS} records x {self.rounds} rounds"


def run(
    tell: Tell, *, size: Size = Size(), small: Size = Size(clients=20, rounds=2, runs=5), many: int = 1000
) -> Findings:
    """Measure.

    Args:
        tell: told what is going on.
        size: the comparison that the headline figure states.
        small: a smaller one, whose spread can be had in minutes.
        many: number of small clients that are compared with one.
    """
    findings = Findings()
    for one in (size, small):
        pairs = against_ray(one, tell)
        speedups = pairs.peer_over_ours()
        findings.details[f"Ray, {one}"] = {
            "Flower on Ray, seconds": pairs.peer,
            "ours in process, seconds": pairs.ours,
            "Flower on Ray / ours": speedups,
        }
        if one is size:
            findings.headlines["simulation_speedup_vs_ray"] = speedups
    found = many_against_one(many, tell)
    findings.details[f"{many:,} clients x {SMALL_RECORDS} records against one x {many * SMALL_RECORDS:,}"] = found
    findings.headlines["many_client_time_ratio"] = found["many / one, seconds"]
    return findings


def against_ray(size: Size, tell: Tell) -> Pairs:
    """Return wall seconds of both simulations, the start of their processes included."""
    with tempfile.TemporaryDirectory(prefix="silotune-bench-") as folder:
        data = Path(folder)
        write_data(data, size.clients * RECORDS)
        arguments = {"data": folder, "clients": size.clients, "rounds": size.rounds}
        return alternate(
            {"Flower on Ray": lambda: seconds(lambda: in_own_process(simulate_on_ray, **arguments))},
            lambda: seconds(lambda: in_own_process(simulate_in_process, **arguments)),
            runs=size.runs,
            tell=lambda what: tell(f"{size}: {what}"),
        )["Flower on Ray"]


def write_data(folder: Path, count: int) -> None:
    """Write the clients' records and the test records as both sides want them; the peer's are tokenised already."""
    train, test = split_public_test(load_movie_reviews(), num_test=NUM_TEST, seed=0)
    chosen = _repeated(train, count)
    for name, records in (("train", chosen), ("test", test)):
        write_jsonl(
            folder / f"{name}.jsonl", [{role: record[role] for role in ("text", "label")} for record in records]
        )
    torch.save(peers.padded(_runtime().encode(chosen), MAX_LENGTH), folder / "train.pt")


def simulate_in_process(data: str, clients: int, rounds: int) -> int:
    """Run our in-process engine and return the rounds done."""
    from server.observer import Observer
    from simulations.engine import run_scenario
    from simulations.scenario import Scenario

    columns = {"text": "text", "label": "label"}
    raw = {
        "name": "benchmark",
        "base": data,
        "job": {**_job(rounds).model_dump(mode="json"), "federation": {"min_sites": clients}},
        "data": {
            "train": {"path": "train.jsonl", "columns": columns},
            "test": {"path": "test.jsonl", "columns": columns},
        },
        "partition": {"kind": "iid", "num_sites": clients},
        "simulation": {"evaluate_every": rounds},
        "compute": {"device": "cpu", "precision": "float32"},
    }
    scenario = parse(Scenario, raw, source="the benchmark")
    with tempfile.TemporaryDirectory(prefix="silotune-bench-") as folder:
        return run_scenario(scenario, Path(folder) / "run", observer=lambda arm: Observer()).round_number


def simulate_on_ray(data: str, clients: int, rounds: int) -> int:
    """Run Flower's simulation on Ray and return the rounds done.

    Raises:
        RuntimeError: if a client failed.
    """
    # Ray's workers are started elsewhere and must find this package.
    root = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    from flwr.simulation import run_simulation

    done: list[int] = []
    run_simulation(
        server_app=_flower_server(clients, rounds, done),
        client_app=_flower_client(data),
        num_supernodes=clients,
        backend_config={
            "init_args": {"num_cpus": len(os.sched_getaffinity(0)), "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    if done != [clients] * rounds:
        raise RuntimeError(f"of {clients} clients in {rounds} rounds these answered: {done}")
    return len(done)


def _flower_server(clients: int, rounds: int, done: list[int]) -> Any:
    from flwr.app import ArrayRecord, Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        class Counting(FedAvg):
            def aggregate_train(self, server_round: int, replies: Any) -> Any:
                answered = [reply for reply in replies if reply.has_content()]
                done.append(len(answered))
                return super().aggregate_train(server_round, answered)

        strategy = Counting(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        initial = ArrayRecord([parameter.detach().numpy() for parameter in _peer_model().trainable()])
        strategy.start(grid=grid, initial_arrays=initial, num_rounds=rounds)

    return app


def _flower_client(data: str) -> Any:
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        calm_environment()
        own = int(str(context.node_config["partition-id"])) * RECORDS
        model = _peer_model()
        with torch.no_grad():
            received = message.content.array_records["arrays"].to_numpy_ndarrays()
            for parameter, value in zip(model.trainable(), received, strict=True):
                parameter.copy_(torch.from_numpy(value))
        ids, mask, labels = (column[own : own + RECORDS] for column in _peer_data(data))
        private = OpacusTraining(
            model,
            (ids, mask, labels),
            mode="hooks",
            batch_size=BATCH,
            poisson=True,
            noise_multiplier=1.0,
            optimizer=torch.optim.SGD(model.trainable(), lr=LEARNING_RATE, momentum=0.9),
            collate=peers.longest_of_batch,
        )
        for batch in islice(private.loader, LOCAL_STEPS):
            if len(batch[0]):
                private.step(batch)
        arrays = ArrayRecord([parameter.detach().numpy() for parameter in model.trainable()])
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": RECORDS})})
        return Message(content, reply_to=message)

    return app


def _peer_model() -> Classifier:
    return Classifier(last_layers=_LAST_LAYERS)


@lru_cache(maxsize=1)
def _peer_data(folder: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return all records; a process reads them once, which is more than the example does for its clients."""
    loaded: tuple[Tensor, Tensor, Tensor] = torch.load(Path(folder) / "train.pt", weights_only=True)
    return loaded


def many_against_one(many: int, tell: Tell, *, runs: int = 5) -> dict[str, Any]:
    """Return time and memory of `many` small clients and of one client with all their records.

    Every record is used once on both sides: one step over all records of a client. What the frozen layers compute is in
    memory before the clock starts.
    """
    runtime = _runtime()
    tell("encoding, and filling the prefix cache")
    examples = many_examples(runtime, many)
    runtime.warm_cache(examples)
    train_all(runtime, examples[: 10 * SMALL_RECORDS], SMALL_RECORDS)
    pair = alternate(
        {"one client": lambda: seconds(lambda: train_all(runtime, examples, len(examples)))},
        lambda: seconds(lambda: train_all(runtime, examples, SMALL_RECORDS)),
        runs=runs,
        tell=lambda what: tell(f"many clients, {what}"),
    )["one client"]
    # Memory needs processes of their own, which fill the cache anew: it hardly varies, so three do.
    memory = alternate(
        {"one client": lambda: float(in_own_process(many_peak, many=many, size=many * SMALL_RECORDS))},
        lambda: float(in_own_process(many_peak, many=many, size=SMALL_RECORDS)),
        runs=min(runs, 3),
        tell=lambda what: tell(f"many clients, memory, {what}"),
    )["one client"]
    return {
        "one client, seconds": pair.peer,
        "many clients, seconds": pair.ours,
        "many / one, seconds": pair.ours_over_peer(),
        "one client, peak MB": memory.peer,
        "many clients, peak MB": memory.ours,
        "many / one, peak MB": memory.ours_over_peer(),
    }


def many_peak(many: int, size: int) -> float:
    """Return the peak MB of one pass over all records above the runtime with its records and prefix cache."""
    runtime = _runtime()
    examples = many_examples(runtime, many)
    runtime.warm_cache(examples)
    with PeakMemory() as memory:
        train_all(runtime, examples, size)
    return memory.megabytes


def many_examples(runtime: Runtime, many: int) -> list[Example]:
    """Return the records of `many` clients, reviews in turn."""
    return runtime.encode(_repeated(load_movie_reviews(), many * SMALL_RECORDS))


def train_all(runtime: Runtime, examples: list[Example], size: int) -> dict[str, Tensor]:
    """Train one round with clients of `size` records each and return the mean of what they release."""
    clients = [examples[start : start + size] for start in range(0, len(examples), size)]
    mean = {name: torch.zeros_like(value) for name, value in runtime.initial.items()}
    for result in local_rounds(runtime, clients):
        for name, value in result.delta.items():
            mean[name] += value / len(clients)
    return mean


def local_rounds(runtime: Runtime, clients: list[list[Example]]) -> Iterator[LocalRound]:
    """Yield one round of every client: by the trainer of many clients at once where there is one, else one by one."""
    job = _job(1, local_steps=1, sample_rate=1.0)
    arguments = [
        {
            "examples": examples,
            "training": job.training,
            "plan": PrivacyPlan.from_job(job),
            "declared_records": len(examples),
            "randomness": SiteRandomness.from_os(),
            "round_number": 1,
        }
        for examples in clients
    ]
    at_once = getattr(client.trainer, "train_local_rounds", None)
    if at_once is not None and len(clients) > 1:
        yield from at_once(runtime, arguments, runtime.initial)
        return
    for own in arguments:
        examples = own.pop("examples")
        yield train_local_round(runtime, examples, runtime.initial, **own)  # type: ignore[arg-type]


def _runtime() -> Runtime:
    return peers.same_runtime(_job(1))


def _job(rounds: int, *, local_steps: int = LOCAL_STEPS, sample_rate: float = BATCH / RECORDS) -> Job:
    return peers.same_job(
        last_layers=_LAST_LAYERS,
        max_length=MAX_LENGTH,
        rounds=rounds,
        training={**_TRAINING, "local_steps": local_steps},
        privacy={"sample_rate": sample_rate},
    )


def _repeated(records: Sequence[Record], count: int) -> list[Record]:
    """Return `count` records in a fixed random order, again from the start where there are not so many."""
    # The data set is sorted by label.
    records = random.Random(0).sample(records, len(records))
    return [records[index % len(records)] for index in range(count)]
