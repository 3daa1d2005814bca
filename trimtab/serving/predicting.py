"""Routes that answer texts, in the shapes of three families of clients: TEI's, vLLM's, KServe's."""

import asyncio
import time
import uuid
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi import Path as InPath

from trimtab.errors import DataError
from trimtab.serving.access import Token
from trimtab.serving.formats import (
    Classified,
    ClassifyRequest,
    ClassifyResponse,
    InferRequest,
    InferResponse,
    InferTensor,
    PredictRequest,
    Score,
    Usage,
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

    async def __call__(
        self, request: Request, items: Sequence[Item], *, raw_scores: bool = False
    ) -> tuple[list[Answer], Times]:
        """The answers of a request's texts."""
        if not items:
            raise HTTPException(400, "There is no input.")
        if len(items) > self.limits.texts:
            raise DataError("serve.batch", f"{len(items):,} texts; one request takes {self.limits.texts:,}.")
        if (size := sum(len(item.text) for item in items)) > self.limits.characters:
            raise DataError("serve.text", f"{size:,} characters; one request takes {self.limits.characters:,}.")
        work = self.service.answer(items, timeout_s=_timeout_s(request), raw_scores=raw_scores)
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


def _headers(answers: Sequence[Answer], times: Times) -> dict[str, str]:
    """Which adapter answered in which version, one for each text where they differ, and TEI's times in ms."""
    names = [answer.resident.name for answer in answers]
    versions = [answer.resident.version for answer in answers]
    return {
        "x-adapter": ",".join(names if len(set(names)) > 1 else names[:1]),
        "x-adapter-version": ",".join(versions if len(set(names)) > 1 else versions[:1]),
        "x-truncated": str(sum(answer.prediction.truncated for answer in answers)),
        "x-compute-characters": str(sum(len(answer.prediction.text) for answer in answers)),
        "x-compute-tokens": str(sum(answer.tokens for answer in answers)),
        "x-total-time": str(round(1_000 * times.total)),
        "x-tokenization-time": str(round(1_000 * times.tokenization)),
        "x-inference-time": str(round(1_000 * times.queue_and_inference)),
    }


def _scores(answer: Answer, body: PredictRequest) -> list[Score]:
    """The labels of one text, the best first."""
    labels = answer.resident.labels.values
    values = answer.logits.tolist() if body.raw_scores else answer.prediction.scores.values()
    scores = sorted(zip(values, labels, strict=True), key=lambda pair: -pair[0])
    return [Score(score=float(score), label=label) for score, label in scores[: body.top_k]]


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
    answers: Answers, request: Request, response: Response, body: PredictRequest, adapter: str | None = None
) -> list[Score] | list[list[Score]]:
    """TEI's predict; `adapter` is what the address names."""
    texts, is_batch = _texts(body.inputs)
    if body.truncation_direction.lower() == "left":
        raise DataError("serve.truncation", "Texts are cut on their right, as in training.")
    if body.models is None:
        names = [answers.adapter(request, _agreed(adapter, body.model))] * len(texts)
    elif body.model is not None or adapter is not None:
        raise DataError("serve.models", "`models` names the adapters already; leave `model` out.")
    elif len(body.models) != len(texts):
        raise DataError("serve.models", f"{len(body.models)} models for {len(texts)} inputs.")
    else:
        names = [answers.adapter(request, name) for name in body.models]
    items = [Item(name, text) for name, text in zip(names, texts, strict=True)]
    found, times = await answers(request, items, raw_scores=body.raw_scores)
    if body.truncate is False and (cut := [i for i, one in enumerate(found) if one.prediction.truncated]):
        raise DataError("serve.truncated", f"Input {cut[0]} is longer than {found[cut[0]].resident.max_length} tokens.")
    response.headers.update(_headers(found, times))
    scores = [_scores(one, body) for one in found]
    return scores if is_batch else scores[0]


def _agreed(adapter: str | None, model: str | None) -> str | None:
    """The adapter that the address or the body names, or both."""
    if adapter is not None and model not in (None, adapter):
        raise DataError("serve.models", "The address names another adapter than `model`.")
    return adapter or model


def tei(app: FastAPI, answers: Answers) -> None:
    """TEI's predict, and what Hugging Face's client expects of an address of its own."""

    @app.post("/predict", tags=["predict"], summary="TEI's predict", responses=FAILURES)
    async def predict(request: Request, response: Response, body: PredictRequest) -> list[Score] | list[list[Score]]:
        return await _predict(answers, request, response, body)

    @app.post(
        "/a/{adapter}/predict",
        tags=["predict"],
        summary="TEI's predict; the address names the adapter",
        responses=FAILURES,
    )
    async def predict_by(
        request: Request, response: Response, adapter: AdapterName, body: PredictRequest
    ) -> list[Score] | list[list[Score]]:
        return await _predict(answers, request, response, body, adapter)

    @app.post("/a/{adapter}", tags=["predict"], summary="Hugging Face's text classification", responses=FAILURES)
    async def hugging_face(
        request: Request, response: Response, adapter: AdapterName, body: PredictRequest
    ) -> list[list[Score]]:
        found = await _predict(answers, request, response, body, adapter)
        # Its client reads the first list alone, so that one text's scores stand in a list of their own.
        return [one for one in found if isinstance(one, list)] or [[one for one in found if isinstance(one, Score)]]


async def _classify(
    answers: Answers, request: Request, response: Response, body: ClassifyRequest, adapter: str | None = None
) -> ClassifyResponse:
    """VLLM's classify; `adapter` is what the address names."""
    name = answers.adapter(request, _agreed(adapter, body.model))
    texts = [body.input] if isinstance(body.input, str) else body.input
    found, times = await answers(request, [Item(name, text) for text in texts])
    response.headers.update(_headers(found, times))
    tokens = sum(one.tokens for one in found)
    return ClassifyResponse(
        id=f"classify-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=name,
        data=[
            Classified(
                index=i,
                label=one.prediction.label,
                probs=list(one.prediction.scores.values()),
                num_classes=len(one.prediction.scores),
            )
            for i, one in enumerate(found)
        ],
        usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
    )


def vllm(app: FastAPI, answers: Answers) -> None:
    """VLLM's classify."""

    @app.post("/classify", tags=["predict"], summary="vLLM's classify", responses=FAILURES)
    @app.post("/v1/classify", tags=["predict"], summary="vLLM's classify", responses=FAILURES)
    async def classify(request: Request, response: Response, body: ClassifyRequest) -> ClassifyResponse:
        return await _classify(answers, request, response, body)

    @app.post(
        "/a/{adapter}/v1/classify",
        tags=["predict"],
        summary="vLLM's classify; the address names the adapter",
        responses=FAILURES,
    )
    async def classify_by(
        request: Request, response: Response, adapter: AdapterName, body: ClassifyRequest
    ) -> ClassifyResponse:
        return await _classify(answers, request, response, body, adapter)


def kserve(app: FastAPI, answers: Answers) -> None:
    """KServe's infer: the Open Inference Protocol."""
    router = APIRouter(strict_content_type=False)  # Triton's client declares none

    @router.post(
        "/v2/models/{adapter}/infer",
        tags=["predict"],
        summary="KServe's infer",
        responses=FAILURES,
        response_model_exclude_none=True,
    )
    async def infer(request: Request, response: Response, adapter: AdapterName, body: InferRequest) -> InferResponse:
        name = answers.adapter(request, adapter)
        if "content-type" not in request.headers and "origin" in request.headers:
            raise HTTPException(415, "A web page declares its body as application/json.")  # else it needs no leave
        texts = _tensor_texts(body.inputs[0])
        wanted = {one.name for one in body.outputs or ()} or set(_OUTPUTS)
        if unknown := sorted(wanted - set(_OUTPUTS)):
            raise DataError("serve.outputs", f"There is no output {unknown[0]!r}: {', '.join(_OUTPUTS)}.")
        found, times = await answers(request, [Item(name, text) for text in texts])
        response.headers.update(_headers(found, times))
        outputs = [tensor for tensor in _tensors(found) if tensor.name in wanted]
        return InferResponse(model_name=name, model_version=found[0].resident.version, id=body.id, outputs=outputs)

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


def _tensors(answers: Sequence[Answer]) -> list[InferTensor]:
    labels = answers[0].resident.labels.values
    rows = len(answers)
    probabilities = [float(np.float32(p)) for one in answers for p in one.prediction.scores.values()]
    return [
        InferTensor(name="label", shape=[rows], datatype="BYTES", data=[one.prediction.label for one in answers]),
        InferTensor(name="score", shape=[rows], datatype="FP32", data=[one.prediction.score for one in answers]),
        InferTensor(
            name="probs",
            shape=[rows, len(labels)],
            datatype="FP32",
            parameters={"labels": list(labels)},
            data=probabilities,
        ),
    ]
