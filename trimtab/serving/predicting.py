"""Routes that answer texts, in the shapes of three families of clients: TEI's, vLLM's, KServe's."""

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi import Path as InPath

from trimtab.errors import DataError
from trimtab.serving.access import Token
from trimtab.serving.formats import (
    ClassifyRequest,
    ClassifyResponse,
    InferRequest,
    InferResponse,
    InferTensor,
    PredictRequest,
    Score,
    failures,
)
from trimtab.serving.guard import Limits
from trimtab.serving.metrics import Metrics
from trimtab.serving.service import Answer, Item, Service, Times

_LONGEST_WAIT_MS = 600_000

AdapterName = Annotated[str, InPath(min_length=1, max_length=200, description="Name of an adapter.")]
FAILURES = failures(403, 404, 424, 429, 504, 507)
"""What may come of asking an adapter."""
T = TypeVar("T")


class Answers:
    """Texts of a request -> answers, within its limits and while its caller is there."""

    def __init__(self, service: Service, limits: Limits, metrics: Metrics) -> None:
        self.service, self.limits, self.metrics = service, limits, metrics

    def adapter(self, request: Request, named: str | None) -> str:
        """The adapter that a request means: the one that it names, else the only one that its caller may ask."""
        caller: Token = request.state.caller
        if named is not None:
            if not caller.may_ask(named):
                raise HTTPException(403, "This token may not ask this adapter.")
            return named
        visible = [name for name in self.service.store.names() if caller.may_ask(name)]
        if len(visible) != 1:
            raise HTTPException(
                400, f'"model" is missing, and there are {len(visible):,} adapters: GET /v1/models lists them.'
            )
        return visible[0]

    def check_number(self, texts: Sequence[object]) -> None:
        """Refuses too many texts, or none, before anything is looked up for each."""
        if not texts:
            raise HTTPException(400, "There is no input.")
        if len(texts) > self.limits.texts:
            raise DataError(
                "serve.batch",
                f"{len(texts):,} texts; one request takes {self.limits.texts:,}.",
                mend="several requests",
            )

    async def __call__(
        self, request: Request, items: Sequence[Item], *, whole: bool = False
    ) -> tuple[list[Answer], Times]:
        """The answers of a request's texts; `whole`: texts that would be cut are refused."""
        self.check_number(items)
        if (size := sum(len(item.text) for item in items)) > self.limits.characters:
            raise DataError(
                "serve.text",
                f"{size:,} characters; one request takes {self.limits.characters:,}.",
                mend="shorter texts",
            )
        work = self.service.answer(items, timeout_s=_timeout_s(request), whole=whole)
        answers, times = await _while_connected(request, work)
        self.metrics.answered(answers, times)
        return answers, times


def _timeout_s(request: Request) -> float:
    said = request.headers.get("x-request-timeout-ms")
    if said is None:
        return float("inf")
    if not (said.isascii() and said.isdigit() and len(said) <= 6 and 1 <= int(said) <= _LONGEST_WAIT_MS):
        raise DataError("serve.timeout", f"X-Request-Timeout-Ms is a whole number from 1 to {_LONGEST_WAIT_MS:,}.")
    return int(said) / 1_000


class ClientGoneError(Exception):
    """Nobody waits for the answer."""


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is cancelled where the client goes away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return await task
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answered(answers: Sequence[Answer], times: Times, body: Callable[[], object]) -> Response:
    """A body with its headers, made beside the event loop: 64 texts of 20,000 labels held it for 10 s.

    In pieces, between which other threads have their turn: json.dumps holds the interpreter for the whole.
    """
    made = await asyncio.to_thread(lambda: "".join(_JSON.iterencode(body())).encode())
    return Response(made, headers=_headers(answers, times), media_type="application/json")


_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_HEADER_BYTES = 2_000  # proxies take 4,096 for all headers together, some of them


def _headers(answers: Sequence[Answer], times: Times) -> dict[str, str]:
    """Which adapter answered in which version, one for each text where they differ, and TEI's times in ms.

    Where that would be too long for a header, the answer has neither: whoever sent `models` knows the names.
    """
    names = [answer.resident.name for answer in answers]
    versions = [answer.resident.version for answer in answers]
    differ = len(set(names)) > 1
    named = {
        "x-adapter": ",".join(names if differ else names[:1]),
        "x-adapter-version": ",".join(versions if differ else versions[:1]),
    }
    return (named if max(map(len, named.values())) <= _HEADER_BYTES else {}) | {
        "x-truncated": str(sum(answer.prediction.truncated for answer in answers)),
        "x-compute-characters": str(sum(len(answer.prediction.text) for answer in answers)),
        "x-compute-tokens": str(sum(answer.tokens for answer in answers)),
        "x-total-time": str(round(1_000 * times.total)),
        "x-tokenization-time": str(round(1_000 * times.tokenization)),
        "x-inference-time": str(round(1_000 * times.queue_and_inference)),
    }


def _scores(answer: Answer, body: PredictRequest) -> list[dict[str, object]]:
    """The labels of one text as `Score`s, the best first."""
    labels = answer.resident.labels.values
    values = answer.logits if body.raw_scores else np.array(list(answer.prediction.scores.values()))
    best = np.argsort(-values, kind="stable")[: body.top_k]
    return [{"score": float(values[i]), "label": labels[i]} for i in best]


PAIR = (
    "a flat list of several texts is a pair in TEI, and pairs are not classified here: "
    'a batch is [["first"], ["second"]]'
)


def _texts(inputs: str | list[str] | list[list[str]]) -> tuple[list[str], bool]:
    """The texts of TEI's `inputs`, and whether they are a batch."""
    if isinstance(inputs, str):
        return [inputs], False
    if all(isinstance(one, str) for one in inputs):
        if len(inputs) > 1:
            raise DataError("serve.pair", f"inputs: {PAIR}.")
        return [str(one) for one in inputs], False
    if any(len(one) != 1 for one in inputs):
        raise DataError(
            "serve.pair", 'inputs: each text of a batch stands alone in its list, as in [["first"], ["second"]].'
        )
    return [one[0] for one in inputs], True


async def _predict(
    answers: Answers, request: Request, body: PredictRequest, adapter: str | None = None, *, in_lists: bool = False
) -> Response:
    """TEI's predict; `adapter` is what the address names. `in_lists`: one text's scores stand in a list too."""
    texts, is_batch = _texts(body.inputs)
    answers.check_number(texts)
    if body.truncation_direction.lower() == "left":
        raise DataError("serve.truncation", "A long text is cut as in training; leave truncation_direction out.")
    if body.models is None:
        names = [answers.adapter(request, _agreed(adapter, body.model))] * len(texts)
    elif body.model is not None or adapter is not None:
        raise DataError("serve.models", "`models` names the adapters already; leave `model` out.")
    elif len(body.models) != len(texts):
        raise DataError("serve.models", f"{len(body.models)} models for {len(texts)} inputs.")
    else:
        names = [answers.adapter(request, name) for name in body.models]
    items = [Item(name, text) for name, text in zip(names, texts, strict=True)]
    found, times = await answers(request, items, whole=body.truncate is False)

    def scores() -> object:
        made = [_scores(one, body) for one in found]
        return made if is_batch or in_lists else made[0]

    return await _answered(found, times, scores)


def _agreed(adapter: str | None, model: str | None) -> str | None:
    """The adapter that the address or the body names, or both."""
    if adapter is not None and model not in (None, adapter):
        raise DataError("serve.models", "The address names another adapter than `model`.")
    return adapter or model


def tei(app: FastAPI, answers: Answers) -> None:
    """TEI's predict, and what Hugging Face's client expects of an address of its own."""
    either: dict[str, Any] = {"responses": FAILURES, "response_model": list[Score] | list[list[Score]]}

    @app.post("/predict", tags=["predict"], summary="TEI's predict", **either)
    async def predict(request: Request, body: PredictRequest) -> Response:
        return await _predict(answers, request, body)

    @app.post(
        "/a/{adapter}/predict", tags=["predict"], summary="TEI's predict; the address names the adapter", **either
    )
    async def predict_by(request: Request, adapter: AdapterName, body: PredictRequest) -> Response:
        return await _predict(answers, request, body, adapter)

    @app.post(
        "/a/{adapter}",
        tags=["predict"],
        summary="Hugging Face's text classification",
        responses=FAILURES,
        response_model=list[list[Score]],
    )
    async def hugging_face(request: Request, adapter: AdapterName, body: PredictRequest) -> Response:
        # Its client reads the first list alone, so that one text's scores stand in a list of their own.
        return await _predict(answers, request, body, adapter, in_lists=True)


async def _classify(answers: Answers, request: Request, body: ClassifyRequest, adapter: str | None = None) -> Response:
    """VLLM's classify; `adapter` is what the address names."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    answers.check_number(texts)
    name = answers.adapter(request, _agreed(adapter, body.model))
    found, times = await answers(request, [Item(name, text) for text in texts])
    tokens = sum(one.tokens for one in found)

    def classified() -> object:
        return {
            "id": f"classify-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": name,
            "data": [
                {
                    "index": i,
                    "label": one.prediction.label,
                    "probs": list(one.prediction.scores.values()),
                    "num_classes": len(one.prediction.scores),
                }
                for i, one in enumerate(found)
            ],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }

    return await _answered(found, times, classified)


def vllm(app: FastAPI, answers: Answers) -> None:
    """VLLM's classify."""
    documented: dict[str, Any] = {"tags": ["predict"], "responses": FAILURES, "response_model": ClassifyResponse}

    @app.post("/classify", summary="vLLM's classify", **documented)
    @app.post("/v1/classify", summary="vLLM's classify", **documented)
    async def classify(request: Request, body: ClassifyRequest) -> Response:
        return await _classify(answers, request, body)

    @app.post("/a/{adapter}/v1/classify", summary="vLLM's classify; the address names the adapter", **documented)
    async def classify_by(request: Request, adapter: AdapterName, body: ClassifyRequest) -> Response:
        return await _classify(answers, request, body, adapter)


def kserve(app: FastAPI, answers: Answers) -> None:
    """KServe's infer: the Open Inference Protocol."""
    router = APIRouter(strict_content_type=False)  # Triton's client declares none

    @router.post(
        "/v2/models/{adapter}/infer",
        tags=["predict"],
        summary="KServe's infer",
        responses=FAILURES,
        response_model=InferResponse,
    )
    async def infer(request: Request, adapter: AdapterName, body: InferRequest) -> Response:
        name = answers.adapter(request, adapter)
        if "content-type" not in request.headers and "origin" in request.headers:
            raise HTTPException(415, "A web page declares its body as application/json.")  # else it needs no leave
        texts = _tensor_texts(body.inputs[0])
        wanted = {one.name for one in body.outputs or ()} or set(_OUTPUTS)
        if unknown := sorted(wanted - set(_OUTPUTS)):
            raise DataError("serve.outputs", f"There is no output {unknown[0]!r}: {', '.join(_OUTPUTS)}.")
        answers.check_number(texts)
        found, times = await answers(request, [Item(name, text) for text in texts])

        def inferred() -> object:
            said = {"model_name": name, "model_version": found[0].resident.version}
            said |= {} if body.id is None else {"id": body.id}
            return said | {"outputs": [tensor for tensor in _tensors(found) if tensor["name"] in wanted]}

        return await _answered(found, times, inferred)

    app.include_router(router)


_OUTPUTS = ("label", "score", "probs")


def _tensor_texts(tensor: InferTensor) -> list[str]:
    """The texts of a BYTES tensor of shape [n] or [n, 1]."""
    if tensor.datatype != "BYTES":
        raise DataError("serve.datatype", f"inputs[0] holds {tensor.datatype[:20]}, expected BYTES: the texts.")
    data = [cell for row in tensor.data for cell in (row if isinstance(row, list) else [row])]
    if not all(isinstance(cell, str) for cell in data):
        raise DataError("serve.datatype", "inputs[0].data holds something else than texts.")
    if tensor.shape not in ([len(data)], [len(data), 1]):
        raise DataError(
            "serve.shape", f"inputs[0] has shape {tensor.shape} and {len(data):,} texts; expected [n] or [n, 1]."
        )
    return data


def _tensors(answers: Sequence[Answer]) -> list[dict[str, object]]:
    """`label`, `score` and `probs` as `InferTensor`s."""
    labels = answers[0].resident.labels.values
    rows = len(answers)
    probabilities = [float(np.float32(p)) for one in answers for p in one.prediction.scores.values()]
    predicted = [one.prediction for one in answers]
    return [
        {"name": "label", "shape": [rows], "datatype": "BYTES", "data": [one.label for one in predicted]},
        {"name": "score", "shape": [rows], "datatype": "FP32", "data": [one.score for one in predicted]},
        {
            "name": "probs",
            "shape": [rows, len(labels)],
            "datatype": "FP32",
            "parameters": {"labels": list(labels)},
            "data": probabilities,
        },
    ]
