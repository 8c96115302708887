"""Who may ask what, requests that are bad or too large, and what is billed."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from server.registry.registry import Registry
from server.serving.access.tokens import SCOPES, TokenFile
from server.serving.engine import Batching
from server.serving.models import Plan
from server.serving.refusals import Refused
from server.serving.schemas import _EITHER, CompletionRequest, openapi, read
from server.serving.serving import ROUTES, place_of_service
from shared.errors import ConfigError
from shared.job.compute import ComputeConfig
from shared.runtime.inference import load_model, predict
from tests.conftest import LINES
from tests.server.serving.fuzzing import fuzz
from tests.server.serving.live import Live, live
from tests.shared.runtime.export.runs import finished_run

ASK = {"/v1/predict": {"texts": ["a film"]}, "/v1/completions": {"prompt": "a"}, "/v1/explain": {"text": "a film"}}


@pytest.fixture(scope="module")
def guarded(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Live, TokenFile]]:
    path = tmp_path_factory.mktemp("tokens") / "tokens.db"
    file = TokenFile(path, create=True)
    plan = Plan("torch", explain=True)
    with live("films", filled, tokens=path, plan=plan, body_bytes=20_000, texts=50, characters=5_000) as found:
        yield found, file


def ask(found: Live, path: str, token: str | None) -> httpx.Response:
    return found.ask(ROUTES[path].method, path, token, json=ASK.get(path))


@pytest.mark.parametrize("times", [1, 12], ids=["small", "large"])
def test_predictions_are_those_of_the_run(films: Live, small_run: Path, times: int) -> None:
    runtime = load_model(small_run, ComputeConfig(device="cpu", precision="float32"))
    texts = [*LINES, "x", " ".join(LINES)] * times
    found = films.post("/v1/predict", {"texts": texts, "model": "films"}).json()
    assert (found["model"], found["version"]) == ("films", "films:2")
    for one, expected in zip(found["predictions"], predict(runtime, texts), strict=True):
        assert one.keys() == {"label", "probability", "probabilities"}
        assert one["label"] == expected["label"]
        assert one["probability"] == pytest.approx(expected["probability"], abs=1e-4)
    assert found["usage"]["tokens"] == sum(one.length for one in runtime.encode([{"text": text} for text in texts]))


@pytest.mark.parametrize("engine", ["onnx", "torch"])
@pytest.mark.parametrize(
    ("task", "body"),
    [
        ({"kind": "token_classification", "labels": ["O", "B-film"]}, {"texts": ["a quiet film", "the cast"]}),
        ({"kind": "regression", "target_range": [1.0, 5.0]}, {"texts": ["a quiet film"]}),
        ({"kind": "pair_matching", "labels": ["other", "match"]}, {"pairs": [["a film", "the cast"]]}),
        (
            {
                "kind": "image_classification",
                "labels": ["a", "b"],
                "image_shape": [1, 4, 4],
                "pixel_range": [0.0, 16.0],
            },
            {"images": [[float(i) for i in range(16)], [0.5] * 16]},
        ),
    ],
    ids=["entities", "score", "pairs", "images"],
)
def test_every_task_answers_as_predict_does(
    task_job: Any, tmp_path: Path, task: dict[str, Any], body: dict[str, Any], engine: Any
) -> None:
    run = finished_run(tmp_path / "model", task_job(task), temperature=1.3 if "labels" in task else 1.0)
    runtime = load_model(run, ComputeConfig(device="cpu", precision="float32"))
    ((kind, given),) = body.items()
    joined = {"texts": given, "pairs": ["\t".join(map(str, one)) for one in given]}
    texts = [" ".join(map(str, one)) for one in given] if kind == "images" else joined[kind]
    with live(str(run), tmp_path, plan=Plan(engine)) as found:
        answers = found.post("/v1/predict", body).json()["predictions"]
        other = "texts" if kind != "texts" else "pairs"
        assert found.post("/v1/predict", {other: [["a", "b"]] if other == "pairs" else ["a"]}).status_code == 400
    for one, expected in zip(answers, predict(runtime, texts), strict=True):
        assert one.keys() <= expected.keys()
        for key, value in one.items():
            assert expected[key] == (pytest.approx(value, abs=1e-4) if isinstance(value, float | dict) else value)


def test_every_scope_on_every_route(guarded: tuple[Live, TokenFile]) -> None:
    found, file = guarded
    for number, (count, models) in enumerate(itertools.product(range(len(SCOPES) + 1), (None, ["films"], ["other"]))):
        for scopes in itertools.combinations(SCOPES, count):
            if not scopes:
                continue
            token = file.add(f"t{number}-{'-'.join(scopes)}", scopes=scopes, models=models)
            for path, route in ROUTES.items():
                status = ask(found, path, token).status_code
                if route.open or (path == "/v1/models"):
                    expected = {200}
                elif route.scope not in scopes or (models == ["other"] and route.method == "POST"):
                    expected = {403}
                else:
                    expected = {400} if path == "/v1/completions" else {200}  # this model labels texts
                assert status in expected, (path, scopes, models)
            listed = [one["id"] for one in ask(found, "/v1/models", token).json()["data"]]
            assert listed == ([] if models == ["other"] else ["films"])


@pytest.mark.parametrize("token", [None, "slt_wrong", "x" * 5000])
def test_without_a_token_that_counts_nothing_is_answered(guarded: tuple[Live, TokenFile], token: str | None) -> None:
    found, _ = guarded
    for path, route in ROUTES.items():
        response = ask(found, path, token)
        assert response.status_code == (200 if route.open else 401)
        if not route.open:
            assert response.headers["www-authenticate"] == "Bearer"


def test_a_revoked_token_stops(guarded: tuple[Live, TokenFile]) -> None:
    found, file = guarded
    token = file.add("leaver", scopes=("predict",))
    assert ask(found, "/v1/predict", token).status_code == 200
    TokenFile(file.path).revoke("leaver")
    assert ask(found, "/v1/predict", token).status_code == 401


def test_quota_and_rate_are_429(guarded: tuple[Live, TokenFile]) -> None:
    found, file = guarded
    token = file.add("small", scopes=("predict",), tokens_per_day=12)
    answers = [ask(found, "/v1/predict", token) for _ in range(5)]
    assert {one.status_code for one in answers} == {200, 429}
    assert answers[-1].json()["error"]["code"] == "insufficient_quota"
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 86_400
    token = file.add("slow", scopes=("predict",), requests_per_minute=2)
    answers = [ask(found, "/v1/predict", token) for _ in range(4)]
    assert [one.status_code for one in answers] == [200, 200, 429, 429]
    assert int(answers[-1].headers["retry-after"]) >= 1


def test_what_is_not_answered_is_not_billed(guarded: tuple[Live, TokenFile], monkeypatch: pytest.MonkeyPatch) -> None:
    found, file = guarded
    token = file.add("unlucky", scopes=("predict",))
    with monkeypatch.context() as patched:
        patched.setattr(type(found.service.following.model), "outputs", lambda *_: 1 / 0)
        assert ask(found, "/v1/predict", token).status_code == 500
    assert found.post("/v1/predict", {"texts": [3]}, token).status_code == 400
    assert ask(found, "/v1/predict", token).status_code == 200
    end = time.monotonic() + 5
    while (rows := file.usage("unlucky")) and rows[0]["requests"] != 1 and time.monotonic() < end:
        time.sleep(0.02)
    assert [row["requests"] for row in rows] == [1]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[" * 5000, 400),
        (b'{"texts": []}', 400),
        (b'{"texts": ["a", " "]}', 400),
        (b'{"texts": ["\\ud800"]}', 400),
        (b'{"texts": ["a\\u0000b"]}', None),
        (b'{"texts": [""]}', None),
        (b'{"texts": ["a"], "x": 1}', 400),
        (b'{"texts": ["a"], "pairs": [["a", "b"]]}', 400),
        (b'{"texts": "a"}', 400),
        (b'{"texts": ["' + b"a" * 5001 + b'"]}', 400),
        (b'{"texts": [' + b",".join([b'"a"'] * 51) + b"]}", 400),
        (b'{"texts": ["a"], "model": "other"}', 404),
        (b'\xff\xfe{"texts"', 400),
        (b'{"texts": ["' + b"a" * 20_000 + b'"]}', 413),
    ],
)
def test_bad_requests_are_told_in_one_shape(
    guarded: tuple[Live, TokenFile], content: bytes, status: int | None
) -> None:
    found, file = guarded
    known = {token.name for token in file.tokens()}
    secret = file.add(f"asker-{len(known)}", scopes=("predict",))
    with found.client(secret) as client:
        response = client.post("/v1/predict", content=content, headers={"content-type": "application/json"})
    assert response.status_code == (status or response.status_code)
    assert response.status_code < 500
    if response.status_code != 200:
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"textes": ["a"]}', "unknown key 'textes'; did you mean 'texts'?"),
        (b'{"texts": ["a"], "%s": 1}' % (b"x" * 4000), "(4,002 characters); known: "),
        (b'{"texts": 1}', "texts: expected a list"),
        (b'{"texts": ["a", 7]}', "texts.1: expected text"),
        (b'{"texts": ["a"], "model": true}', "model: expected text"),
    ],
)
def test_a_bad_request_is_told_in_our_words(guarded: tuple[Live, TokenFile], content: bytes, message: str) -> None:
    found, file = guarded
    known = {token.name for token in file.tokens()}
    with found.client(file.add(f"asker-{len(known)}", scopes=("predict",))) as client:
        response = client.post("/v1/predict", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert message in (told := response.json()["error"]["message"])
    assert len(told) < 500


def test_a_key_in_the_wrong_object_is_not_told_in_words_of_toml() -> None:
    with pytest.raises(Refused) as refused:
        read(CompletionRequest, b'{"prompt": "a", "stream_options": {"model": 1}}')
    assert refused.value.message == (
        "the request does not fit: unknown key 'stream_options.model'; known: include_usage"
    )


def test_large_bodies_are_refused(guarded: tuple[Live, TokenFile]) -> None:
    found, file = guarded
    secret = file.add("sender", scopes=("predict",))

    def parts() -> Iterator[bytes]:
        yield b'{"texts": ["'
        for _ in range(1000):
            yield b"a" * 1000

    with found.client(secret) as client:
        json_type = {"content-type": "application/json"}
        assert client.post("/v1/predict", content=parts(), headers=json_type).status_code == 413
        assert client.post("/v1/predict", content=b"{}").status_code == 415
        assert client.get("/v1/predict").status_code == 405
        assert client.get("/nothing").status_code == 404
        assert client.post("/v1/predict", json={"texts": ["a"]}).status_code == 200


def test_without_tokens_a_strangers_name_is_refused(films: Live) -> None:
    with films.client() as client:
        for path in ("/v1/models", "/healthz"):
            assert client.get(path, headers={"host": "evil.example"}).status_code == 421
            assert client.get(path, headers={"host": "localhost"}).status_code == 200


def test_beyond_loopback_tls_and_tokens_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--certificate"):
        place_of_service("0.0.0.0", 0, None, None, tmp_path / "tokens.db")  # noqa: S104
    from tests.client.console.test_start import certificate

    cert, key = certificate(tmp_path, "films.example")[:2]
    with pytest.raises(ConfigError, match="--tokens"):
        place_of_service("0.0.0.0", 0, cert, key, None)  # noqa: S104
    assert place_of_service("0.0.0.0", 0, cert, key, tmp_path / "tokens.db").secure  # noqa: S104


def test_a_slow_body_is_cut_off(filled: Path) -> None:
    with live("films", filled, request_seconds=1.0) as found:
        with socket.create_connection(("127.0.0.1", found.port), timeout=20) as connection:
            connection.sendall(
                b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 1000\r\n\r\n{"
            )
            began = time.monotonic()
            with contextlib.suppress(OSError):
                while time.monotonic() - began < 15:
                    connection.sendall(b" ")
                    time.sleep(0.05)
        assert time.monotonic() - began < 10
        assert found.post("/v1/predict", {"texts": ["a"]}).status_code == 200


def test_whoever_leaves_is_not_computed_and_a_full_queue_is_503(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with live("films", filled, queue=4, texts=4) as found:
        engine, go, seen = found.service.engine, threading.Event(), []
        assert isinstance(engine, Batching)

        def outputs(self: Any, examples: Any) -> list[torch.Tensor]:
            seen.append(len(examples))
            go.wait(20)
            return [torch.tensor([0.0, 1.0]) for _ in examples]

        monkeypatch.setattr(type(found.service.following.model), "outputs", outputs)
        held = threading.Thread(target=found.post, args=("/v1/predict", {"texts": ["a"]}))
        held.start()
        _until(lambda: len(seen) == 1)
        with pytest.raises(httpx.ReadTimeout), found.client() as client:
            client.post("/v1/predict", json={"texts": ["b"] * 4}, timeout=0.5)
        refused = found.post("/v1/predict", {"texts": ["c"] * 2})
        # Whoever left makes room as soon as the engine comes round; until then the queue is full.
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        # The service hears of it by the connection, some time after the client closed it.
        _until(lambda: [asked.future.cancelled() for asked, _ in engine._queue] == [True] * 4)
        go.set()
        held.join(20)
        _until(lambda: engine.waiting == 0)
        assert found.post("/v1/predict", {"texts": ["d"] * 3}).status_code == 200
        assert seen == [1, 3]


def _until(reached: Any) -> None:
    end = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_metrics_hold_numbers_and_no_names(guarded: tuple[Live, TokenFile]) -> None:
    found, file = guarded
    secret = file.add("watcher", scopes=("metrics", "predict"))
    ask(found, "/v1/predict", secret)
    text = ask(found, "/metrics", secret).text
    assert 'silotune_requests_total{path="/v1/predict",status="200"}' in text
    assert "silotune_waiting_texts_limit" in text
    assert not any(word in text for word in ("watcher", "negative", "bad", "good", "a film"))


@pytest.mark.parametrize("kind", ["films", "writer", "explaining"])
def test_schemathesis_finds_no_500(kind: str, request: pytest.FixtureRequest) -> None:
    found: Live = request.getfixturevalue(kind)
    assert fuzz(openapi(), found.address, examples=8) == []
    assert found.client().get("/healthz").status_code == 200


def test_a_path_is_served_by_its_folders_name(registry: Registry, small_run: Path) -> None:
    with live(str(small_run), registry.path) as found:
        assert found.post("/v1/predict", {"texts": ["a"]}).json()["model"] == small_run.name


def test_a_service_without_its_file_is_not_healthy(guarded: tuple[Live, TokenFile]) -> None:
    found, file = guarded
    assert found.ask("GET", "/healthz").status_code == 200
    away = file.path.with_name("away")
    file.path.rename(away)
    try:
        answer = found.ask("GET", "/healthz")
        assert (answer.status_code, answer.json()["healthy"]) == (503, False)
        assert found.post("/v1/predict", {"texts": ["a"]}, "slt_x").status_code == 503
    finally:
        away.rename(file.path)
    assert found.ask("GET", "/healthz").status_code == 200


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *itertools.product(("prompt", "stop"), (1, [1], [["a"]], {"a": 1}, True)),
        ("prompt", []),
        ("stop", ""),
        ("stop", ["a"] * 5),
        ("stop", "a" * 201),
    ],
)
def test_what_may_be_of_two_types_is_refused_in_one_sentence(key: str, value: object) -> None:
    with pytest.raises(Refused) as caught:
        read(CompletionRequest, json.dumps({"prompt": "a"} | {key: value}).encode())
    assert caught.value.message.startswith(f"the request does not fit: {key}: expected a text"), caught.value.message
    assert caught.value.param == key


def test_every_key_of_two_types_has_its_sentence() -> None:
    defined = openapi()["components"]["schemas"]
    for name in ("PredictRequest", "ExplainRequest", "CompletionRequest"):
        for key, value in defined[name]["properties"].items():
            types = {one.get("type") for one in value.get("anyOf", ())} - {"null"}
            assert len(types) < 2 or key in _EITHER, key
