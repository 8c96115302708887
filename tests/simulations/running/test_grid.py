"""The in-process Grid keeps Flower's contract, and drop-outs are the same everywhere."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.grid import Grid

from shared.wire.messages import DESCRIBE, TRAIN
from simulations.running.grid import DropoutGrid, InProcessGrid


def echo_app(seen: list[int]) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen.append(context.node_id)
        context.state["calls"] = ConfigRecord({"n": int(context.state.get("calls", {}).get("n", 0)) + 1})
        answer = {"partition": context.node_config["partition-id"], "calls": context.state["calls"]["n"]}
        return Message(RecordDict({"answer": ConfigRecord(answer)}), reply_to=message)

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    return app


def requests(nodes: list[int], kind: str = TRAIN, group: str = "1") -> list[Message]:
    grid = InProcessGrid(ClientApp(), 1)
    return [grid.create_message(RecordDict(), kind, node, group) for node in nodes]


def test_both_grids_implement_every_abstract_method() -> None:
    abstract = Grid.__abstractmethods__
    assert abstract, "the contract must be looked up in Flower itself"
    for kind in (InProcessGrid, DropoutGrid):
        assert not kind.__abstractmethods__
        for name in abstract - {"run"}:
            ours = list(inspect.signature(getattr(kind, name)).parameters)
            assert ours == list(inspect.signature(getattr(Grid, name)).parameters), name


def test_replies_name_their_request_and_their_sender() -> None:
    seen: list[int] = []
    grid = InProcessGrid(echo_app(seen), 3)
    identifiers = list(grid.push_messages(requests([2, 3, 1])))
    assert len(set(identifiers)) == 3
    assert seen == [], "a message runs when its reply is pulled"
    replies = [reply for _ in range(3) for reply in grid.pull_messages(identifiers)]
    assert seen == [2, 3, 1], "one message at a pull, in the order of sending"
    assert [reply.metadata.reply_to_message_id for reply in replies] == identifiers
    assert [reply.metadata.src_node_id for reply in replies] == [2, 3, 1]
    assert [reply.content["answer"]["partition"] for reply in replies] == [1, 2, 0]
    assert list(grid.pull_messages(identifiers)) == [], "a reply is given once"


def test_pulling_answers_only_what_was_asked_for() -> None:
    seen: list[int] = []
    grid = InProcessGrid(echo_app(seen), 2)
    first, second = grid.push_messages(requests([1, 2]))
    (reply,) = grid.pull_messages([second])
    assert reply.metadata.reply_to_message_id == second
    assert seen == [2]
    assert list(grid.pull_messages(["unknown"])) == []
    (reply,) = grid.pull_messages([first])
    assert reply.metadata.src_node_id == 1


def test_send_and_receive_waits_for_all_and_nodes_keep_their_state() -> None:
    grid = InProcessGrid(echo_app([]), 4)
    assert list(grid.get_node_ids()) == [1, 2, 3, 4]
    for turn in (1, 2):
        replies = list(grid.send_and_receive(requests([1, 2, 3, 4])))
        assert sorted(r.metadata.src_node_id for r in replies) == [1, 2, 3, 4]
        assert {r.content["answer"]["calls"] for r in replies} == {turn}


def dropped(grid: DropoutGrid, nodes: list[int], group: str) -> list[int]:
    """Return the positions whose request was not answered."""
    messages = requests(nodes, group=group)
    identifiers = set(grid.push_messages(messages))
    errors = []
    while identifiers:
        for reply in grid.pull_messages(identifiers):
            identifiers.discard(reply.metadata.reply_to_message_id)
            if reply.has_error():
                assert reply.error.reason == "dropped out (simulated)"
                errors.append(nodes.index(reply.metadata.src_node_id))
    return sorted(errors)


def test_drop_outs_depend_on_seed_round_and_place_only() -> None:
    nodes = list(range(1, 41))
    seen: list[int] = []
    one, two = (DropoutGrid(InProcessGrid(echo_app(seen), 40), 0.3, seed=5) for _ in range(2))
    by_round = [dropped(one, nodes, str(number)) for number in range(1, 11)]
    assert by_round[6] == dropped(two, nodes, "7"), "a resumed run sees the same drop-outs"
    # Another backend has other node ids in the same places.
    assert by_round[6] == dropped(two, list(reversed(nodes)), "7")
    assert len({tuple(positions) for positions in by_round}) == 10
    share = sum(map(len, by_round)) / 400
    assert 0.22 < share < 0.38
    other = DropoutGrid(InProcessGrid(echo_app([]), 40), 0.3, seed=6)
    assert dropped(other, nodes, "7") != by_round[6]


def test_a_round_that_is_asked_for_again_has_other_drop_outs() -> None:
    nodes, tries = list(range(1, 41)), {"1": 0, "2": 0}
    grid = DropoutGrid(InProcessGrid(echo_app([]), 40), 0.3, seed=5, begin_try=lambda number: tries[str(number)])
    first = dropped(grid, nodes, "1")
    assert first == dropped(DropoutGrid(InProcessGrid(echo_app([]), 40), 0.3, seed=5), nodes, "1")
    tries["1"] = 1
    again = dropped(grid, nodes, "1")
    assert again != first
    assert again == dropped(grid, nodes, "1")
    assert dropped(grid, nodes, "2") != again


def test_a_dropped_site_is_not_trained_and_descriptions_never_drop() -> None:
    seen: list[int] = []
    grid = DropoutGrid(InProcessGrid(echo_app(seen), 20), 0.5, seed=1)
    nodes = list(range(1, 21))
    lost = dropped(grid, nodes, "1")
    assert lost
    assert sorted(seen) == [node for place, node in enumerate(nodes) if place not in lost]
    identifiers = list(grid.push_messages(requests(nodes, kind=DESCRIBE, group="0")))
    replies = [reply for _ in nodes for reply in grid.pull_messages(identifiers)]
    assert len(replies) == 20
    assert not any(reply.has_error() for reply in replies)
    with pytest.raises(NotImplementedError):
        grid.send_and_receive([])


def test_requests_to_train_run_together_and_are_handed_out_as_they_are_pulled() -> None:
    seen: list[int] = []
    together: list[list[int]] = []
    app = echo_app(seen)

    def answer(messages: Sequence[tuple[Message, Context]]) -> list[Message]:
        together.append([context.node_id for _, context in messages])
        return [app(message, context) for message, context in messages]

    grid = InProcessGrid(app, 5, together=answer, at_once=3)
    (stale,) = grid.push_messages(requests([5], group="1"))
    (asked,) = grid.push_messages(requests([1], kind=DESCRIBE))
    identifiers = list(grid.push_messages(requests([4, 2, 3, 1], group="2")))
    # A pull for some of them runs others of the same round too; none of another round, and nothing that is no training.
    assert [r.metadata.src_node_id for r in grid.pull_messages(identifiers[:1])] == [4]
    assert together == [[4, 2, 3]]
    assert [r.metadata.src_node_id for r in grid.pull_messages(identifiers[1:])] == [2, 3]
    assert together == [[4, 2, 3]], "what is ready is handed out before anything else runs"
    assert [r.metadata.src_node_id for r in grid.pull_messages(identifiers)] == [1]
    assert list(grid.pull_messages(identifiers)) == [], "a reply is given once"
    assert [r.metadata.reply_to_message_id for r in grid.pull_messages([asked])] == [asked]
    assert together == [[4, 2, 3], [1]]
    assert [r.metadata.src_node_id for r in grid.pull_messages([stale])] == [5]
