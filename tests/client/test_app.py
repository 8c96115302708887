"""The ClientApp: what a node answers, whatever it is sent."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.app import make_client_app
from client.site.site import Site
from shared.errors import DataError
from shared.job.job import Job
from shared.wire.messages import (
    DESCRIBE,
    TRAIN,
    WITHHELD,
    Refusal,
    SiteDescription,
    TrainReply,
    TrainRequest,
    describe_request,
    pack_request,
    unpack_description,
    unpack_reply,
)
from simulations.running.grid import InProcessGrid
from simulations.running.sites import simulated_site, site_homes


def ask(app: ClientApp, content: RecordDict, kind: str, *, node: int = 1, num_nodes: int = 3) -> Message:
    grid = InProcessGrid(app, num_nodes)
    (identifier,) = grid.push_messages([grid.create_message(content, kind, node, "")])
    (reply,) = grid.pull_messages([identifier])
    return reply


@pytest.fixture
def sites(site_home: Callable[..., Path], tmp_path: Path) -> Path:
    for name in ("b", "a", "c"):
        site_home(name)
    return tmp_path


def test_partitions_follow_the_order_of_names(sites: Path) -> None:
    app = make_client_app(functools.partial(simulated_site, sites=sites, injected_seed="order"))
    assert [home.parent.name for home in site_homes(sites)] == ["a", "b", "c"]
    for node, name in ((1, "a"), (2, "b"), (3, "c")):
        answer = unpack_description(ask(app, describe_request(), DESCRIBE, node=node))
        assert isinstance(answer, SiteDescription)
        assert (answer.site, answer.declared_records) == (name, 32)


def test_a_training_request_is_answered_with_an_update(
    sites: Path, private_job: Callable[..., Job], request_for: Callable[..., TrainRequest]
) -> None:
    app = make_client_app(functools.partial(simulated_site, sites=sites, injected_seed="train"))
    request = request_for(private_job())
    answer = unpack_reply(ask(app, pack_request(request), TRAIN, node=2))
    assert isinstance(answer, TrainReply)
    assert (answer.site, answer.round_number, answer.job_sha256) == ("b", 1, request.job.sha256)
    assert answer.randomness == "injected"


def test_a_simulated_site_draws_from_the_operating_system_unless_told(sites: Path) -> None:
    context = Context(run_id=1, node_id=1, node_config={"partition-id": 0}, state=RecordDict(), run_config={})
    site = simulated_site(context, sites=sites)
    assert site.new_randomness().origin == "os"
    assert simulated_site(context, sites=sites) is site, "a site is opened once per process"


def test_sites_that_were_added_to_the_folder_are_seen(sites: Path, site_home: Callable[..., Path]) -> None:
    def opened(partition: int) -> str:
        config = {"partition-id": partition}
        context = Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config={})
        return simulated_site(context, sites=sites).config.name

    assert [opened(place) for place in range(3)] == ["a", "b", "c"]
    site_home("aa")
    assert [opened(place) for place in range(4)] == ["a", "aa", "b", "c"]


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"silotune": ConfigRecord({"kind": "train", "job": "{", "round_number": 1})}),
        RecordDict({"silotune": ConfigRecord({"kind": "train", "job": '{"code": "import os"}', "round_number": 1})}),
    ],
)
def test_a_malformed_request_is_refused_and_logged(
    sites: Path, content: RecordDict, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_client_app(functools.partial(simulated_site, sites=sites))
    with caplog.at_level(logging.ERROR, logger="silotune.site"):
        answer = unpack_reply(ask(app, content, TRAIN))
    assert isinstance(answer, Refusal)
    assert answer.reason == "see the site's own log"
    assert len(caplog.records) == 1


def test_a_site_that_cannot_be_opened_says_why_in_its_own_log_only(caplog: pytest.LogCaptureFixture) -> None:
    def fails(context: Context) -> Site:
        raise DataError("ward-7.csv does not exist")

    app = make_client_app(fails)
    with caplog.at_level(logging.ERROR, logger="silotune.site"):
        description = unpack_description(ask(app, describe_request(), DESCRIBE))
        reply = unpack_reply(ask(app, describe_request(), TRAIN))
    expected = Refusal(site="", code=WITHHELD, reason="see the site's own log")
    assert description == expected
    assert isinstance(reply, Refusal)
    assert "ward-7.csv" not in f"{description} {reply}"
    assert "ward-7.csv does not exist" in caplog.text
