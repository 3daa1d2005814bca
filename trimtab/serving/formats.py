"""The bodies that clients send and get, of three families: TEI's, vLLM's and KServe's. Shapes alone, no work.

Sources: text-embeddings-inference, `router/src/http/types.rs`; vLLM, `entrypoints/pooling/classify/protocol.py`; the
Open Inference Protocol of KServe, version 2 (REST).
"""

import difflib
from itertools import islice
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

# The first fault is enough: a million of them took 30 s of the event loop and 2.5 GB.
Texts = Annotated[list[StrictStr], Field(fail_fast=True)]
# With a bound pydantic looks at the characters, and refuses half a one (\ud800), which no answer can be written with:
# every string of a body has one but texts, whose faults the service names.
Word = Annotated[str, Field(max_length=200)]
Name = Annotated[Word, Field(description="Name of an adapter, as GET /v1/models lists it.")]


_MOST = 10_000
"""Texts, or names, of a body: more are not looked at. What a request takes (`guard.Limits`) is less, and told by it."""


class _NamesAdapter(BaseModel):
    """A body that names its adapter. Fields that are not known here are ignored, as TEI does."""

    @model_validator(mode="before")
    @classmethod
    def _is_no_flood(cls, body: object) -> object:
        """Refuses at sight what took 0.3 s to check, and 2.3 s to answer, in which nobody else was answered."""
        if isinstance(body, dict):
            for name in ("inputs", "input", "models"):
                if isinstance(body.get(name), list):
                    _count(body[name], "models" if name == "models" else "texts")
        return body

    @model_validator(mode="before")
    @classmethod
    def _names_no_other(cls, body: object) -> object:
        """Refuses a misspelt `model` where there is none: the only adapter would answer for the one that was meant."""
        names = [name for name in ("model", "models") if name in cls.model_fields]
        if not isinstance(body, dict) or any(name in body for name in names):
            return body
        for key in islice(body, 20):  # a comparison takes 30 µs, and a body may have 100,000 keys
            if key in cls.model_fields or not (isinstance(key, str) and key.isascii() and len(key) <= 16):
                continue
            if close := difflib.get_close_matches(key.lower(), names, n=1, cutoff=0.65):
                raise _refusal(key, f"This field is not known. Is `{close[0]}` meant?")
        return body


def _count(items: list[Any], what: str) -> None:
    if len(items) > _MOST:
        raise _refusal(what, f"{len(items):,} are too many for one request; /info says how many it takes.")


def _refusal(where: str, what: str) -> ValidationError:
    fault = PydanticCustomError("refused", what)
    return ValidationError.from_exception_data("body", [{"type": fault, "loc": (where,), "input": None}])


class PredictParameters(BaseModel):
    """What Hugging Face's client says beside its text."""

    top_k: Annotated[int | None, Field(ge=1, description="As `top_k` of the body.")] = None
    function_to_apply: Annotated[
        Literal["softmax", "none"] | None, Field(description="softmax, the default; none is `raw_scores` of the body.")
    ] = None

    @field_validator("function_to_apply", mode="before")
    @classmethod
    def _is_no_sigmoid(cls, said: object) -> object:
        if said == "sigmoid":
            raise PydanticCustomError("refused", "sigmoid scores each label alone, and an adapter here chooses one.")
        return said


class PredictRequest(_NamesAdapter):
    """TEI's body. Fields that are not known here are ignored, as TEI does."""

    inputs: Annotated[
        StrictStr | Texts | Annotated[list[Texts], Field(fail_fast=True)],
        Field(
            description='A text, ["a text"], or a batch [["first"], ["second"]].',
            examples=["What a wonderful film."],
        ),
    ]
    model: Annotated[
        Name | None, Field(description="The adapter that answers; may be left out where there is one.")
    ] = None
    models: Annotated[
        Annotated[list[Name], Field(fail_fast=True)] | None,
        Field(description="One adapter for each input of a batch, instead of `model`."),
    ] = None
    raw_scores: Annotated[bool, Field(description="Logits instead of probabilities.")] = False
    top_k: Annotated[int | None, Field(ge=1, description="The best labels alone.")] = None
    truncate: Annotated[
        bool | None, Field(description="false refuses a text that would be cut. Else it is cut, as in training.")
    ] = None
    truncation_direction: Literal["right", "Right", "left", "Left"] = "right"
    parameters: Annotated[PredictParameters | None, Field(description="Hugging Face's client sends them so.")] = None

    @model_validator(mode="after")
    def _fold(self) -> Self:
        """One place for what two families call by two names; what stands in the body itself comes first."""
        if self.parameters is not None:
            self.top_k = self.top_k or self.parameters.top_k
            self.raw_scores = self.raw_scores or self.parameters.function_to_apply == "none"
        return self


class Score(BaseModel):
    """The score of one label."""

    score: float
    label: str


class ClassifyRequest(_NamesAdapter):
    """vLLM's body. Fields that are not known here are ignored."""

    model: Annotated[
        Name | None, Field(description="The adapter that answers; may be left out where there is one.")
    ] = None
    input: Annotated[StrictStr | Texts, Field(examples=[["What a wonderful film."]])]


class Classified(BaseModel):
    """vLLM's answer for one text."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Usage(BaseModel):
    """Tokens that were computed."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class ClassifyResponse(BaseModel):
    """vLLM's answer."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Classified]
    usage: Usage


class InferTensor(BaseModel):
    """A tensor of the Open Inference Protocol."""

    model_config = ConfigDict(extra="ignore")
    name: Word
    shape: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=2), Field(fail_fast=True)]
    datatype: Word
    parameters: dict[str, Any] | None = None
    data: list[Any]


class InferOutput(BaseModel):
    """A tensor that is asked for."""

    name: Word


class InferRequest(BaseModel):
    """The Open Inference Protocol's body: one BYTES tensor of texts, of any name."""

    id: Word | None = None
    inputs: Annotated[
        list[InferTensor],
        Field(fail_fast=True),
        Field(
            min_length=1,
            max_length=1,
            examples=[[{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["What a wonderful film."]}]],
        ),
    ]
    outputs: Annotated[list[InferOutput], Field(fail_fast=True, max_length=100)] | None = None
    parameters: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _is_no_flood(self) -> Self:
        _count(self.inputs[0].data, "texts")
        return self


class InferResponse(BaseModel):
    """The Open Inference Protocol's answer: `label`, `score`, and `probs` whose columns `labels` names."""

    model_name: str
    model_version: str
    id: Word | None = None
    outputs: list[InferTensor]


class PutAdapter(BaseModel):
    """What to serve under a name."""

    folder: Annotated[Word | None, Field(description="A folder of --adapter-dir; left out: the one of that name.")] = (
        None
    )
    pin: bool | None = None
    if_generation: Annotated[
        int | None, Field(ge=0, description="Only if the adapter is in this generation; 0: only if there is none.")
    ] = None


class PatchAdapter(BaseModel):
    """What to change of an adapter."""

    pin: bool


class Failure(BaseModel):
    """TEI's error, with the code and the mend that our other commands have."""

    error: str
    error_type: str
    code: str = ""
    mend: str = ""


class Health(BaseModel):
    """Whether the server, or a model of it, can be asked."""

    ok: bool


_WHEN = {
    400: "No adapter is named and there are several, nothing to answer, or no bytes of a request.",
    401: "No token, or a wrong one.",
    403: "A token for other adapters, or for none of the changes.",
    404: "No such adapter.",
    412: "The adapter is in another generation than expected.",
    413: "The body is too large.",
    415: "A body of another kind: compressed, binary tensors, neither JSON nor an upload.",
    422: "The request cannot be understood.",
    424: "The adapter's files cannot be used, or it gives numbers that are none.",
    429: "The queue is full, or this adapter's part of it; Retry-After says for how long.",
    431: "The headers are too long.",
    503: "The server stops.",
    504: "X-Request-Timeout-Ms is over.",
    507: "No room in memory, or on the disk.",
}


CODES: dict[int, tuple[str, str]] = {
    400: ("serve.request", "/docs says what each route takes"),
    403: ("serve.forbidden", "a token whose `adapters` include this one"),
    404: ("serve.route", "/docs lists the routes"),
    405: ("serve.method", "/docs lists the routes"),
    415: ("serve.kind", "Content-Type: application/json"),
}
"""Code and mend of failures that bring none of their own, by status; others have those of 400."""


def failures(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Codes as a route documents them, each with the body that all failures have."""
    return {code: {"model": Failure, "description": _WHEN[code]} for code in codes}
