"""Our server rounds over the link: the same model, the same account as in one process."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.app import make_client_app
from client.link.answering import answering
from client.link.client import Handler
from server.app import Run, execute
from server.link.grid import LinkGrid
from server.store.checkpoint import Checkpoint
from shared.data.datasets import write_jsonl
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from simulations.running.grid import InProcessGrid
from simulations.running.sites import forget_simulated_sites, simulated_site
from tests.integration.conftest import site_records
from tests.integration.link.parts import Consortium, eventually, serving, site

ONE_AT_A_TIME = threading.Lock()  # the sites of one process share its backbone
COMPUTE = ComputeConfig(device="cpu", precision="float32")


def homes(folder: Path) -> Path:
    """Make the homes of two sites."""
    for index, name in enumerate(("a", "b")):
        home = folder / name / "home"
        home.mkdir(parents=True)
        write_jsonl(home / "data.jsonl", site_records(index))
        config = {
            "name": name,
            "dataset": "notes",
            "data": {"path": "data.jsonl", "columns": {"text": "text", "label": "label"}},
            "budget": {"epsilon": 50.0, "delta": 1e-5},
            "evaluation_share": 0.25,
            "compute": COMPUTE.model_dump(exclude_none=True),
        }
        (home / "site.toml").write_text(tomli_w.dumps(config))
    return folder


def app_of(sites: Path) -> ClientApp:
    """The ClientApp of a simulation, whose ledgers start anew."""
    forget_simulated_sites()
    return make_client_app(functools.partial(simulated_site, sites=sites, injected_seed="link"))


def handler(app: ClientApp, partition: int) -> Handler:
    """Let the app answer as one of the two sites."""

    def act(message: Message, node: int, waited: float) -> Message:
        where: Any = {"partition-id": partition, "num-partitions": 2}
        context = Context(
            run_id=message.metadata.run_id, node_id=node, node_config=where, state=RecordDict(), run_config={}
        )
        with ONE_AT_A_TIME:
            return app(message, context)

    return answering(act)


def run(job: Job, folder: Path, public: list[dict[str, Any]]) -> Run:
    return Run(job=job, folder=folder, public_records=public, compute=COMPUTE, report=False)


def test_rounds_over_the_link_give_what_they_give_in_one_process(
    consortium: Consortium,
    tmp_path: Path,
    classification_job: Callable[..., Job],
    evaluation_records: list[dict[str, Any]],
) -> None:
    job = classification_job(
        privacy={"noise_multiplier": 1.0},
        training={"rounds": 3, "local_steps": 2},
        federation={"min_sites": 2, "round_timeout_seconds": 60.0},
        site_metrics={"names": ["accuracy"], "noise_multiplier": 5.0},
    )
    in_process = InProcessGrid(app_of(homes(tmp_path / "sites-here")), 2)
    here = execute(in_process, run(job, tmp_path / "here", evaluation_records))
    app = app_of(homes(tmp_path / "sites-there"))
    with (
        serving(consortium) as (server, heard),
        site(server.port, consortium.credentials["a"], handler(app, 0)),
        site(server.port, consortium.credentials["b"], handler(app, 1)),
    ):
        eventually(lambda: heard.open == {"a", "b"})
        there = execute(LinkGrid(server, 1), run(job, tmp_path / "there", evaluation_records))
        assert heard.of("disconnected") == []
    assert untimed(there) == untimed(here)
    assert there.adapter.keys() == here.adapter.keys()
    for name, tensor in here.adapter.items():
        assert torch.equal(there.adapter[name], tensor)
    assert any(bool(tensor.abs().max() > 1e-3) for tensor in here.adapter.values()), "nothing was learned"


def untimed(checkpoint: Checkpoint) -> list[object]:
    rounds = [(r.round, r.metrics, r.sites, r.failed, r.bytes_up, r.bytes_down) for r in checkpoint.history]
    return [rounds, checkpoint.releases, checkpoint.site_metrics]
