"""Continuations: stops, seeds, streams, and the openai client."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.serving.application import check_model
from server.serving.completing import Completing, Row, certain_length
from server.serving.models import Model, Plan
from server.serving.refusals import Refused
from shared.job.compute import ComputeConfig
from shared.runtime.inference import Decoding, generate, load_model
from tests.server.serving.live import Live, events, live

PROMPT = "the film is"


@pytest.fixture(scope="module")
def client(writer: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{writer.address}/v1", api_key="none", max_retries=0) as found:
        yield found


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.text("abc", max_size=12))
def test_text_is_handed_out_only_when_no_stop_can_take_it_back(stops: list[str], text: str) -> None:
    if any(stop in text for stop in stops):
        return
    certain = certain_length(text, stops)
    for stop in stops:
        for more in range(1, len(stop)):
            found = (text + stop[more:]).find(stop)
            if found >= 0 and text.endswith(stop[:more]):
                assert certain <= found
    assert certain_length("half \N{REPLACEMENT CHARACTER}", ()) == 5


def test_greedy_text_is_what_generate_gives(client: openai.OpenAI, writer_run: Path) -> None:
    runtime = load_model(writer_run, ComputeConfig(device="cpu", precision="float32"))
    (expected,) = generate(runtime, PROMPT, Decoding(max_new_tokens=12, temperature=0))
    found = client.completions.create(model="writer", prompt=PROMPT, max_tokens=12, temperature=0)
    assert found.choices[0].text == expected
    assert found.usage is not None
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found.system_fingerprint == "writer"


def test_a_stream_is_the_same_text_piece_by_piece(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "writer", "prompt": PROMPT, "max_tokens": 20, "seed": 3, "n": 2}
    whole = client.completions.create(**asked)
    texts, ends, usage = ["", ""], [None, None], None
    for piece in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in piece.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason  # type: ignore[call-overload]
        usage = piece.usage or usage
    assert texts == [choice.text for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    assert texts[0] != texts[1]


def test_a_seed_makes_a_text_repeatable_in_any_company(client: openai.OpenAI, writer: Live) -> None:
    asked: dict[str, Any] = {"model": "writer", "prompt": PROMPT, "max_tokens": 30, "seed": 11}
    alone = client.completions.create(**asked).choices[0].text
    with writer.client() as http:
        # It begins, and others join: one longer, one that is gone after a moment.
        streams = [
            http.stream("POST", "/v1/completions", json={"prompt": "a" * k, "max_tokens": 40, "stream": True})
            for k in (1, 9)
        ]
        with streams[0] as first, streams[1]:
            next(first.iter_raw())
            assert client.completions.create(**asked).choices[0].text == alone


def test_a_stop_sequence_ends_the_text_before_it(client: openai.OpenAI, writer: Live) -> None:
    asked: dict[str, Any] = {"model": "writer", "prompt": PROMPT, "max_tokens": 40, "seed": 5}
    text = client.completions.create(**asked).choices[0].text
    stop = text[7:10]
    expected = text[: text.index(stop)]
    found = client.completions.create(**asked, stop=[stop, "never this"])
    assert (found.choices[0].text, found.choices[0].finish_reason) == (expected, "stop")
    pieces = events(writer.post("/v1/completions", {**asked, "stop": stop, "stream": True}))
    assert "".join(piece["choices"][0]["text"] for piece in pieces[:-1]) == expected
    assert pieces[-1] == "[DONE]"


def test_fault_half_a_character_is_no_stop(writer: Live) -> None:
    model = writer.service.following.model
    text, said = "é and 😀 ", list[str]()
    tokens = model.runtime.tokenizer(text)["input_ids"]
    row = Row(
        model, [1], Decoding(max_new_tokens=60), ("\N{REPLACEMENT CHARACTER}",), lambda new, end: said.append(new)
    )
    assert all(row.take(token) for token in tokens)
    assert "".join(said) == text
    assert len(tokens) > len(text), "characters came in halves"


def test_several_prompts_are_answered_in_their_order(client: openai.OpenAI) -> None:
    prompts = ["a dull plot", "warm", "what a bright and funny"]
    asked: dict[str, Any] = {"model": "writer", "max_tokens": 5, "temperature": 0}
    found = client.completions.create(prompt=prompts, **asked)
    alone = [client.completions.create(prompt=prompt, **asked).choices[0].text for prompt in prompts]
    assert [choice.text for choice in found.choices] == alone
    assert [choice.index for choice in found.choices] == [0, 1, 2]


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"max_tokens": 64}, "context_length_exceeded"),
        ({"prompt": "x " * 500}, "context_length_exceeded"),
        ({"prompt": [[1, 2, 3]]}, "invalid_request"),
        ({"temperature": 3}, "invalid_request"),
        ({"logprobs": 5}, "invalid_request"),
        ({"echo": True}, "invalid_request"),
        ({"n": 100, "prompt": ["a", "b", "c"]}, "too_many_texts"),
        ({"stop": [""]}, "invalid_request"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "invalid_request"),
    ],
)
def test_what_cannot_be_is_a_bad_request_in_openais_shape(
    client: openai.OpenAI, wrong: dict[str, Any], code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**{"model": "writer", "prompt": PROMPT, **wrong})
    assert refused.value.code == code
    assert refused.value.type == "invalid_request_error"


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt=PROMPT)
    assert [one.id for one in client.models.list()] == ["writer"]


def test_whoever_leaves_is_computed_no_further(writer_run: Path) -> None:
    with live(str(writer_run), writer_run.parent, plan=Plan("torch")) as slow:
        engine = slow.service.engine
        assert isinstance(engine, Completing)
        asked = {"prompt": "a", "max_tokens": 60, "n": 100, "stream": True, "seed": 1}
        with slow.client() as http, http.stream("POST", "/v1/completions", json=asked) as response:
            next(response.iter_raw())
        end = time.monotonic() + 10
        while engine._groups or engine.waiting:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert engine.told.tokens < 60 * 100, "it was left before its end"


def test_more_than_the_caches_hold_waits_its_turn(writer_run: Path) -> None:
    with live(str(writer_run), writer_run.parent, plan=Plan("onnx"), cache_tokens=100) as narrow:
        asked = {"prompt": ["a", "b"], "max_tokens": 30, "n": 4, "seed": 1}
        found = narrow.post("/v1/completions", asked).json()
        assert len(found["choices"]) == 8


def test_a_stream_is_of_one_version_from_its_begin_to_its_end(writer: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, following = writer.service.engine, writer.service.following
    assert isinstance(engine, Completing)
    first, step = following.model, engine._step
    second = replace(first, version="writer:2")
    asked: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 40, "n": 2, "seed": 3}
    expected = [choice["text"] for choice in writer.post("/v1/completions", asked).json()["choices"]]

    def slow(model: Model) -> None:  # so that every stream is still at its begin when another version takes over
        time.sleep(0.02)
        step(model)

    monkeypatch.setattr(engine, "_step", slow)
    with ExitStack() as stack:
        client, found = stack.enter_context(writer.client()), list[tuple[str, Iterator[str], list[str]]]()
        for model in (first, first, second, second, first):
            monkeypatch.setattr(following, "model", model)
            body = {**asked, "stream": True}
            lines = stack.enter_context(client.stream("POST", "/v1/completions", json=body)).iter_lines()
            found.append((model.version, lines, [next(lines)]))
        assert len(engine._groups) == 2
        monkeypatch.setattr(following, "withdrawn", "writer:2 was retired")
        assert writer.post("/v1/completions", asked).status_code == 503
        for version, lines, seen in found:
            *pieces, done = [line.removeprefix("data: ") for line in [*seen, *lines] if line]
            read = [json.loads(piece) for piece in pieces]
            assert done == "[DONE]"
            assert {(one["version"], one["system_fingerprint"]) for one in read} == {(version, version)}
            choices = [one["choices"][0] for one in read]
            assert ["".join(one["text"] for one in choices if one["index"] == row) for row in (0, 1)] == expected


def test_who_names_a_version_is_answered_by_it_or_not_at_all(writer: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    service = writer.service
    first = service.following.model
    monkeypatch.setattr(service.following, "model", replace(first, version="writer:2"))  # it took over meanwhile
    with pytest.raises(Refused, match="model_not_found"):
        check_model(service, first, "writer:2")
    check_model(service, first, first.version)
