"""What requests may hold, and the OpenAPI document that says so.

Unknown keys are refused, with one exception: what the openai client may send and what changes no answer here is accepted at its
neutral value.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from pydantic.json_schema import models_json_schema

from server.serving.refusals import Refused
from shared.job.parsing import explain
from shared.version import silotune_version

_REF = "#/components/schemas/{model}"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True, frozen=True)


_Zero = Annotated[float, Field(ge=0, le=0)]
Body = TypeVar("Body", bound=_Body)


class PredictRequest(_Body):
    """What to label, rate or find entities in: one of `texts`, `pairs` and `images`, as the model's task is."""

    model: str | None = Field(default=None, description="The model's name, as /v1/models has it; may be left out.")
    texts: list[str] | None = Field(default=None, min_length=1)
    pairs: list[Annotated[list[str], Field(min_length=2, max_length=2)]] | None = Field(default=None, min_length=1)
    images: list[Annotated[list[FiniteFloat], Field(min_length=1)]] | None = Field(
        default=None, min_length=1, description="Pixel values, channel by channel and row by row."
    )


class ExplainRequest(_Body):
    """Of which text to say why: one of `text` and `pair`, as the model's task is."""

    model: str | None = Field(default=None, description="The model's name, as /v1/models has it; may be left out.")
    text: str | None = None
    pair: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    label: str | None = Field(default=None, description="Explain this label; by default the predicted one.")
    word: Annotated[int, Field(ge=1, le=1 << 20)] | None = Field(
        default=None, description="Of token classification: number of the word; by default of the first entity."
    )
    baseline: Literal["pad", "mask"] = Field(default="pad", description="The token that stands for an absent word.")


class StreamOptions(_Body):
    """Of a stream."""

    include_usage: bool = False


class CompletionRequest(_Body):
    """What to continue, by the names of OpenAI's completions."""

    model: str | None = None
    prompt: str | Annotated[list[str], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 16
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=128)] = 1
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=200)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=4)]
        | None
    ) = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, description="Ignored.")
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: Literal[""] | None = None
    presence_penalty: _Zero | None = None
    frequency_penalty: _Zero | None = None
    logit_bias: Annotated[dict[str, int], Field(max_length=0)] | None = None


class Prediction(BaseModel):
    """What the model says of one text; which keys there are depends on its task."""

    model_config = ConfigDict(extra="allow")


class PredictUsage(BaseModel):
    """What is billed."""

    tokens: int


class ExplainUsage(BaseModel):
    """What is billed: every reading of the text by the model, of which integrated gradients need many."""

    tokens: int = Field(description="`text_tokens` times `readings`.")
    text_tokens: int
    readings: int


class PredictResponse(BaseModel):
    """Predictions in the order of the texts."""

    model: str
    version: str = Field(description="Which version answered.")
    predictions: list[Prediction]
    usage: PredictUsage


class WordAttribution(BaseModel):
    """What a word adds to the number that is explained."""

    text: int = Field(description="0, or 1 for the second text of a pair.")
    begin: int
    end: int = Field(description="Its place in that text is from `begin` to before `end`.")
    attribution: float


class ExplainResponse(BaseModel):
    """Integrated gradients of one number: words add up to `output` minus `baseline_output`, but for `gap`."""

    model: str
    version: str = Field(description="Which version answered.")
    prediction: str
    target: str = Field(description="What is explained.")
    output: float
    baseline_output: float
    baseline: str
    steps: int
    gap: float
    words: list[WordAttribution]
    unread: list[int] = Field(description="Texts that go on beyond what the model read.")
    usage: ExplainUsage


class Choice(BaseModel):
    """One continuation."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: None


class Usage(BaseModel):
    """What is billed."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(BaseModel):
    """Continuations, or one piece of a stream of them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    version: str = Field(description="Which version answered.")
    system_fingerprint: str = Field(description="The same, where OpenAI's client looks for it.")
    choices: list[Choice]
    usage: Usage | None


class ModelEntry(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    version: str
    task: str


class ModelList(BaseModel):
    """All models that the token may ask."""

    object: Literal["list"]
    data: list[ModelEntry]


class ErrorDetail(BaseModel):
    """What is wrong and what to do."""

    message: str
    type: str
    param: str | None
    code: str


class Error(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class Health(BaseModel):
    """Whether it can answer."""

    healthy: bool
    model: str
    version: str
    troubles: list[str]
    warning: str | None = Field(description="A certificate that clients refuse, or a version that did not take over.")


_EITHER = {
    "prompt": "expected a text, or a list of one text or more",
    "stop": "expected a text of 1 to 200 characters, or a list of up to 4 such texts",
}
"""What a key may be that takes values of several types."""


def read(kind: type[Body], content: bytes) -> Body:
    """Return a request's body; `Refused` (400) says what does not fit, without the value that was sent."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        if not key:
            place, said = "", str(first["msg"])
        elif key in _EITHER:  # pydantic tells its own names, of the first that does not fit
            place, said = key, f"{key}: {_EITHER[key]}"
        else:
            place, said = ".".join(str(part) for part in first["loc"])[:200], explain(kind, first)
        raise Refused(400, "invalid_request", f"the request does not fit: {said}", param=place or None) from None


def _described(description: str, model: type[BaseModel]) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}},
    }


def _text(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"text/plain": {"schema": {"type": "string"}}}}


_ERRORS = {
    "400": "does not fit",
    "401": "no token that counts",
    "403": "beyond the token",
    "404": "no such model",
    "408": "the body did not come in time",
    "413": "too large",
    "415": "no JSON",
    "421": "called by another name",
    "429": "too fast, or more than a day's quota",
    "500": "a defect; the log says where",
    "503": "too much to do, or no model to answer with",
    "504": "the answer took too long",
}


def _operation(
    summary: str, answer: dict[str, Any], *errors: str, body: type[BaseModel] | None = None, open_: bool = False
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": answer, **{code: _described(_ERRORS[code], Error) for code in errors}},
    }
    if body is not None:
        schema = {"$ref": _REF.format(model=body.__name__)}
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if open_:
        found["security"] = []
    return found


def openapi() -> dict[str, Any]:
    """Return the OpenAPI document."""
    kinds: list[type[BaseModel]] = [
        PredictRequest,
        PredictResponse,
        ExplainRequest,
        ExplainResponse,
        CompletionRequest,
        CompletionResponse,
        ModelList,
        Health,
        Error,
    ]
    _, defined = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_REF)
    asking = tuple(_ERRORS)
    streamed = _described("continuations; a stream of events with `stream`", CompletionResponse)
    streamed["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    seen = ("401", "403", "421", "429", "500", "503")
    return {
        "openapi": "3.1.0",
        "info": {"title": "Silotune", "version": silotune_version(), "description": "A tuned model behind HTTP."},
        "components": {
            "schemas": defined["$defs"],
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}],
        "paths": {
            "/v1/predict": {
                "post": _operation("Predict", _described("predictions", PredictResponse), *asking, body=PredictRequest)
            },
            "/v1/explain": {
                "post": _operation("Explain", _described("why", ExplainResponse), *asking, body=ExplainRequest)
            },
            "/v1/completions": {"post": _operation("Continue", streamed, *asking, body=CompletionRequest)},
            "/v1/models": {"get": _operation("List models", _described("models", ModelList), *seen)},
            "/healthz": {
                "get": _operation("Health", _described("it answers", Health), "421", "500", "503", open_=True)
            },
            "/metrics": {"get": _operation("Metrics for Prometheus", _text("text format of Prometheus"), *seen)},
            "/openapi.json": {
                "get": _operation(
                    "This document",
                    {"description": "OpenAPI 3.1", "content": {"application/json": {"schema": {"type": "object"}}}},
                    "421",
                    "500",
                    open_=True,
                )
            },
        },
    }
