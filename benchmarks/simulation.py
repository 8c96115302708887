"""Simulations: ours against Flower's Ray runtime with a model per client, and many clients against one.

The peer does what Flower's example of federated LLM tuning does: the ClientApp builds its model from the folder in every round,
loads the global adapter, trains, and returns its arrays to FedAvg. Same backbone, rank, batch size and number of DP steps;
ours in bfloat16 where the processor has it, which is what users get. Ours adapts the last layer, as the demo does; the peer all
layers, as the example and PEFT do by default, and then the last one alone.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Findings, Pairs, PeakMemory, Tell, alternate, calm_environment, in_own_process, seconds
from benchmarks.peers import Classifier, OpacusTraining
from client.training.trainer import LocalRound, LocalWork, train_local_rounds
from shared.data.datasets import write_jsonl
from shared.job.job import Job
from shared.job.parsing import parse
from shared.models.batches import Example
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime.runtime import Runtime
from simulations.data.demo_data import load_movie_reviews, split_public_test
from simulations.scenario import SimulationConfig

RECORDS, BATCH, LOCAL_STEPS = 50, 10, 4
"""Of every client: records, expected size of a Poisson sample, DP steps of a round."""

MAX_LENGTH, NUM_TEST = 64, 100
LEARNING_RATE = 1.0
_LAST_LAYERS = 1
_ALL, _LAST = "Flower on Ray, all layers", "Flower on Ray, last layer"
T = TypeVar("T")
_TRAINING = {"optimizer": "sgd", "momentum": 0.9, "learning_rate": LEARNING_RATE, "local_steps": LOCAL_STEPS}


CLIENTS, ROUNDS = 100, 5
MANY, MANY_RECORDS, MANY_STEPS, MANY_TEXTS, MANY_TOKENS = 1000, 20, 4, 2000, 32
"""Many clients, records of each, steps of a round, and the different texts among all their records with the tokens that are kept
of each."""


def run(tell: Tell, *, clients: int = CLIENTS, rounds: int = ROUNDS, runs: int = 1) -> Findings:
    """Compare with Flower's simulation on Ray; at full size a pair takes minutes, so `run_pairs` is for patient people."""
    found = against_ray(clients, rounds, runs, tell)
    details: dict[str, Any] = {}
    for peer, pairs in found.items():
        details |= {
            f"{peer}, seconds": pairs.peer,
            f"{peer} / ours": pairs.peer_over_ours(),
        }
    details["ours in process, last layer, seconds"] = [value for pairs in found.values() for value in pairs.ours]
    headlines = {}
    if (clients, rounds) == (CLIENTS, ROUNDS):
        headlines = {
            "simulation_speedup_vs_ray": found[_ALL].peer_over_ours(),
            "simulation_speedup_same_last_layer": found[_LAST].peer_over_ours(),
        }
    return Findings(headlines, {f"{clients} clients x {RECORDS} records x {rounds} rounds": details})


def run_pairs(tell: Tell) -> Findings:
    """Compare with Flower's simulation on Ray in five pairs."""
    return run(tell, runs=5)


def against_ray(clients: int, rounds: int, runs: int, tell: Tell) -> dict[str, Pairs]:
    """Return wall seconds of both simulations, the start of their processes included, by peer."""
    with tempfile.TemporaryDirectory(prefix="silotune-bench-") as folder:
        data = Path(folder)
        write_data(data, clients * RECORDS)
        arguments: dict[str, Any] = {"data": folder, "clients": clients, "rounds": rounds}

        def peer(last_layers: int | None) -> float:
            return seconds(lambda: in_own_process(simulate_on_ray, last_layers=last_layers, **arguments))

        return alternate(
            {_ALL: lambda: peer(None), _LAST: lambda: peer(_LAST_LAYERS)},
            lambda: seconds(lambda: in_own_process(simulate_in_process, **arguments)),
            runs=runs,
            tell=tell,
        )


def write_data(folder: Path, count: int) -> None:
    """Write the clients' records and the test records as both sides want them; the peer's are tokenised already."""
    train, test = split_public_test(load_movie_reviews(), num_test=NUM_TEST, seed=0)
    chosen = _in_random_order(train, count)
    for name, records in (("train", chosen), ("test", test)):
        write_jsonl(
            folder / f"{name}.jsonl", [{role: record[role] for role in ("text", "label")} for record in records]
        )
    torch.save(peers.padded(peers.same_runtime(_job(1)).encode(chosen), MAX_LENGTH), folder / "train.pt")


def simulate_in_process(data: str, clients: int, rounds: int) -> int:
    """Run our in-process engine and return the rounds done."""
    from server.rounds.observer import Observer
    from simulations.running.engine import run_scenario
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
        "compute": {"device": "cpu", "precision": "auto"},
    }
    scenario = parse(Scenario, raw, source="the benchmark")
    with tempfile.TemporaryDirectory(prefix="silotune-bench-") as folder:
        return run_scenario(scenario, Path(folder) / "run", observer=lambda arm: Observer()).round_number


def simulate_on_ray(data: str, clients: int, rounds: int, last_layers: int | None) -> int:
    """Run Flower's simulation on Ray, adapters in the last layers or in all, and return the rounds done.

    Raises:
        RuntimeError: if a client failed.
    """
    from flwr.simulation import run_simulation

    done: list[int] = []
    run_simulation(
        server_app=_flower_server(clients, rounds, done, last_layers),
        client_app=_flower_client(data, last_layers),
        num_supernodes=clients,
        backend_config={
            "init_args": {"num_cpus": len(os.sched_getaffinity(0)), "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    if done != [clients] * rounds:
        raise RuntimeError(f"of {clients} clients in {rounds} rounds these answered: {done}")
    return len(done)


def _flower_server(clients: int, rounds: int, done: list[int], last_layers: int | None) -> Any:
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
        initial = ArrayRecord(
            [parameter.detach().numpy() for parameter in Classifier(last_layers=last_layers).trainable()]
        )
        strategy.start(grid=grid, initial_arrays=initial, num_rounds=rounds)

    return app


def _flower_client(data: str, last_layers: int | None) -> Any:
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        calm_environment()
        own = int(str(context.node_config["partition-id"])) * RECORDS
        model = Classifier(last_layers=last_layers)
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


@lru_cache(maxsize=1)
def _peer_data(folder: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return all records; a process reads them once, which is more than the example does for its clients."""
    loaded: tuple[Tensor, Tensor, Tensor] = torch.load(Path(folder) / "train.pt", weights_only=True)
    return loaded


def run_many(tell: Tell, *, many: int = MANY, runs: int = 5) -> Findings:
    """Compare `many` small clients with one client that has all their records, in time and memory.

    Every record is drawn once on average on both sides: `MANY_STEPS` Poisson samples, of five records of a small client. Every
    run is in a process of its own; what the frozen layers compute is in memory before the clock starts.
    """
    time_of, memory = Pairs([], []), Pairs([], [])
    one, small = many * MANY_RECORDS, MANY_RECORDS
    for number in range(runs):
        tell(f"pair {number + 1} of {runs}")
        for size in (one, small) if number % 2 == 0 else (small, one):
            found = in_own_process(train_measured, many=many, size=size)
            (time_of.peer if size == one else time_of.ours).append(found["seconds"])
            (memory.peer if size == one else memory.ours).append(found["megabytes"])
    details = {
        "one client, seconds": time_of.peer,
        "many clients, seconds": time_of.ours,
        "many / one, seconds": time_of.ours_over_peer(),
        "one client, peak MB": memory.peer,
        "many clients, peak MB": memory.ours,
        "many / one, peak MB": memory.ours_over_peer(),
    }
    headlines = {"many_client_time_ratio": time_of.ours_over_peer()} if many == MANY else {}
    title = f"{many:,} clients x {MANY_RECORDS} records, one x {one:,}; texts of {MANY_TOKENS} tokens at most"
    return Findings(headlines, {title: details})


def train_measured(many: int, size: int) -> dict[str, float]:
    """Return seconds and peak MB, above the runtime with its records and prefix cache, of one pass over all records."""
    runtime = peers.same_runtime(_many_job())
    texts = _in_random_order(load_movie_reviews(), MANY_TEXTS)
    records = _in_random_order(runtime.encode(texts), many * MANY_RECORDS)
    runtime.warm_cache(records)
    train_all(runtime, records[: 4 * MANY_RECORDS], MANY_RECORDS)
    with PeakMemory() as memory:
        elapsed = seconds(lambda: train_all(runtime, records, size))
    return {"seconds": elapsed, "megabytes": memory.megabytes}


def train_all(runtime: Runtime, examples: list[Example], size: int) -> dict[str, Tensor]:
    """Train one round with clients of `size` records each and return the mean of what they release."""
    clients = [examples[start : start + size] for start in range(0, len(examples), size)]
    mean = {name: torch.zeros_like(value) for name, value in runtime.initial.items()}
    for result in local_rounds(runtime, clients):
        for name, value in result.delta.items():
            mean[name] += value / len(clients)
    return mean


def local_rounds(runtime: Runtime, clients: list[list[Example]]) -> Iterator[LocalRound]:
    """Yield one round of every client, as many at once as the simulation trains by default."""
    job = _many_job()
    at_once = SimulationConfig().clients_at_once
    for begin in range(0, len(clients), at_once):
        works = [
            LocalWork(examples=own, declared_records=len(own), randomness=SiteRandomness.from_os())
            for own in clients[begin : begin + at_once]
        ]
        yield from train_local_rounds(
            runtime,
            works,
            runtime.initial,
            training=job.training,
            plan=PrivacyPlan.from_job(job),
            round_number=1,
        )


def _job(rounds: int) -> Job:
    return peers.same_job(
        last_layers=_LAST_LAYERS,
        max_length=MAX_LENGTH,
        rounds=rounds,
        training=_TRAINING,
        privacy={"sample_rate": BATCH / RECORDS},
    )


def _many_job() -> Job:
    return peers.same_job(
        last_layers=_LAST_LAYERS,
        max_length=MANY_TOKENS,
        training={**_TRAINING, "local_steps": MANY_STEPS},
        privacy={"sample_rate": 1 / MANY_STEPS},
    )


def _in_random_order(items: Sequence[T], count: int) -> list[T]:
    """Return `count` items in a fixed random order, again from the start where there are not so many."""
    # The data set is sorted by label.
    order = random.Random(0).sample(range(len(items)), len(items))
    return [items[order[index % len(items)]] for index in range(count)]
