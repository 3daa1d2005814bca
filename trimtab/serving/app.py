"""The HTTP API: routes -> one call to the service -> bodies. What stands before every route is in `guard`."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from trimtab import __version__
from trimtab.errors import ArtefactError, DataError, DivergedError, ResourceError, TrimtabError, plain
from trimtab.serving.access import ForbiddenError, Token
from trimtab.serving.engine import DeadlineError, OverloadedError, StoppingError
from trimtab.serving.formats import CODES, Failure, Health, failures
from trimtab.serving.guard import Guard, Limits, State
from trimtab.serving.listing import RefusedAdapterError, changing, known, listing, unchanging
from trimtab.serving.metrics import Metrics
from trimtab.serving.predicting import PAIR, AdapterName, Answers, ClientGoneError, kserve, tei, vllm
from trimtab.serving.service import TOKENIZERS, Service
from trimtab.serving.store import GenerationError, UnknownAdapterError
from trimtab.serving.watch import Watch


@dataclass(frozen=True)
class Manners:
    """How the server meets its callers."""

    tokens: tuple[Token, ...] = ()
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    """Names that a request may call the server by, where there are no tokens: a page elsewhere must not reach it
    through a name of its own (DNS rebinding). ("*",): any."""
    admin: bool = False
    """Whether adapters may be changed by HTTP."""
    limits: Limits = field(default_factory=Limits)


def build(service: Service, manners: Manners, state: State, watch: Watch | None) -> FastAPI:
    """The application.

    Args:
        service: What answers.
        manners: Tokens and limits.
        state: Whether it is ready, and whether it stops.
        watch: Of the directory that adapters come from and uploads go to; None: there is none.
    """
    app = FastAPI(
        title="trimtab serve",
        version=__version__,
        description="LoRA classifiers, many on one base. The adapter is the `model` of a request.",
        docs_url=None,
        redoc_url=None,
        responses=failures(400, 413, 415, 422, 431, 503) | (failures(401) if manners.tokens else {}),
    )
    metrics = Metrics(service, state)
    _errors(app, metrics)
    answers = Answers(service, manners.limits, metrics)
    tei(app, answers)
    vllm(app, answers)
    kserve(app, answers)
    listing(app, service)
    _operating(app, service, manners, state, metrics)
    _pages(app)
    if manners.admin:
        changing(app, service, watch)
    else:
        unchanging(app)
    # Who can put nothing here has no use for the room of an upload.
    limits = manners.limits if manners.admin else replace(manners.limits, upload_bytes=manners.limits.body_bytes)
    app.add_middleware(Guard, tokens=manners.tokens, limits=limits, state=state)
    if not manners.tokens:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(manners.hosts))
    return app


# -- operating ---------------------------------------------------------------------------------------------------------


def _operating(app: FastAPI, service: Service, manners: Manners, state: State, metrics: Metrics) -> None:
    """Routes for whoever runs the server."""

    def ready() -> bool:
        return state.is_ready and not state.is_draining and service.engine.is_alive

    def said(ok: bool, **more: object) -> JSONResponse:
        return JSONResponse({"ok": ok, **more}, 200 if ok else 503)

    healthy: dict[str, Any] = {"tags": ["operate"], "response_model": Health, "responses": {503: {"model": Health}}}

    @app.get("/livez", summary="Whether the server lives", **healthy)
    @app.get("/v2/health/live", summary="Whether the server lives", **healthy)
    async def live() -> JSONResponse:
        return said(service.engine.is_alive)

    @app.get("/health", summary="Whether it can answer", **healthy)
    @app.get("/ping", summary="Whether it can answer", **healthy)
    @app.get("/readyz", summary="Whether it can answer, and has room", **healthy)
    @app.get("/v2/health/ready", summary="Whether it can answer", **healthy)
    async def readiness(request: Request) -> JSONResponse:
        full = request.url.path == "/readyz" and service.engine.is_full
        return said(ready() and not full, draining=state.is_draining, queue_full=full)

    @app.get("/v2", tags=["operate"], summary="KServe's metadata of a server")
    async def server() -> dict[str, Any]:
        return {"name": "trimtab", "version": __version__, "extensions": []}

    def described(labels: Sequence[str]) -> dict[str, Any]:
        served, engine = service.store.served, service.engine
        ids = {label: i for i, label in enumerate(labels)}
        return {
            "model_id": served.name,
            "model_sha": served.base.weights_sha256,
            "model_dtype": str(served.dtype).removeprefix("torch."),
            "model_type": {"classifier": {"id2label": {str(i): label for label, i in ids.items()}, "label2id": ids}},
            "max_input_length": served.longest,
            "max_batch_tokens": engine.limits.batch_tokens,
            "max_client_batch_size": manners.limits.texts,
            "max_batch_requests": None,
            "max_concurrent_requests": engine.limits.queue_rows,
            "tokenization_workers": TOKENIZERS,
            "auto_truncate": True,
            "version": __version__,
            "sha": None,
            "docker_label": None,
            "adapters": {**service.store.totals(), "budget_bytes": service.store.budget_bytes},
            "queue": {
                "texts": engine.backlog[0],
                "tokens": engine.backlog[1],
                "max_tokens": engine.limits.queue_tokens,
            },
            "admin": manners.admin,
        }

    @app.get("/info", tags=["operate"], summary="What is served, and the limits, as TEI tells them")
    async def info() -> dict[str, Any]:
        return described(())

    @app.get(
        "/a/{adapter}/info",
        tags=["operate"],
        summary="The same with an adapter's labels, once it is in memory",
        responses=failures(403, 404),
    )
    async def info_by(request: Request, adapter: AdapterName) -> dict[str, Any]:
        return described(known(service.store, request, adapter).labels)

    text: dict[int | str, Any] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", tags=["operate"], summary="Prometheus", response_class=Response, responses=text)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _pages(app: FastAPI) -> None:
    """The page for people, and the API's documentation; both are in the package, so that no network is needed."""
    page = Path(str(resources.files("trimtab.serving") / "page"))
    policy = {
        "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",  # asked for again each time, so that old and new files never meet
    }

    class Page(StaticFiles):
        def file_response(self, *given: Any, **named: Any) -> Response:
            response = super().file_response(*given, **named)
            response.headers["Cache-Control"] = "no-cache"
            return response

    @app.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        return FileResponse(page / "index.html", headers=policy)

    app.mount("/page/", Page(directory=page), name="page")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="trimtab serve",
            swagger_js_url="/docs-assets/swagger-ui-bundle.js",
            swagger_css_url="/docs-assets/swagger-ui.css",
            swagger_favicon_url="/page/icon.svg",
        )

    app.mount("/docs-assets/", StaticFiles(packages=[("fastapi_offline", "static")]), name="docs")


# -- errors ------------------------------------------------------------------------------------------------------------

_STATUS: tuple[tuple[type[Exception], int, str], ...] = (
    (ForbiddenError, 403, "forbidden"),
    (UnknownAdapterError, 404, "not_found"),
    (GenerationError, 412, "validation"),
    (OverloadedError, 429, "overloaded"),
    (DeadlineError, 504, "timeout"),
    (StoppingError, 503, "unhealthy"),
    (DataError, 422, "validation"),
    (DivergedError, 424, "backend"),
    (ArtefactError, 424, "backend"),
    (ResourceError, 507, "overloaded"),
    (TrimtabError, 500, "backend"),
)


def _errors(app: FastAPI, metrics: Metrics) -> None:
    """Every exception as a status and TEI's body. None repeats a text of the request."""

    def failed(
        status: int, kind: str, error: str, *, code: str = "", mend: str = "", headers: dict[str, str] | None = None
    ) -> JSONResponse:
        metrics.failed(kind)
        # A stranger's adapter, or the caller, may have written a part of it.
        said = Failure(error=plain(error, 1_000), error_type=kind, code=code, mend=plain(mend, 1_000))
        return JSONResponse(said.model_dump(), status, headers)

    async def ours(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, TrimtabError)
        status, kind = next((status, kind) for one, status, kind in _STATUS if isinstance(error, one))
        headers = {}
        if isinstance(error, OverloadedError):
            headers = {"retry-after": str(max(1, round(error.retry_after_s)))}
        elif status in (503, 507):
            headers = {"retry-after": "5"}
        return failed(status, kind, error.what, code=error.code, mend=error.mend, headers=headers)

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RefusedAdapterError)
        reason = error.reason
        return failed(422, "validation", reason.what, code=reason.code, mend=reason.mend)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError | ValidationError)
        code, mend = CODES[400]
        return failed(422, "validation", _invalid(request, error), code=code, mend=mend)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, StarletteHTTPException)
        kinds = {400: "empty" if error.detail == "There is no input." else "validation", 403: "forbidden"}
        kind = kinds.get(error.status_code, "not_found" if error.status_code == 404 else "validation")
        code, mend = CODES.get(error.status_code, CODES[400])
        return failed(
            error.status_code, kind, str(error.detail), code=code, mend=mend, headers=dict(error.headers or {})
        )

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def bug(request: Request, error: Exception) -> JSONResponse:
        what = "This is our fault; the server's log says more."
        return failed(500, "backend", what, code="serve.bug", mend="tell whoever runs this server")

    handlers: list[tuple[type[Exception], Callable[[Request, Exception], Awaitable[Response]]]] = [
        (TrimtabError, ours),
        (RefusedAdapterError, refused),
        (RequestValidationError, invalid),
        (ValidationError, invalid),
        (StarletteHTTPException, http),
        (ClientGoneError, gone),
        (Exception, bug),
    ]
    for kind, handler in handlers:
        app.add_exception_handler(kind, handler)


def _invalid(request: Request, error: RequestValidationError | ValidationError) -> str:
    """What the first fault of a body is, and where; without the body's words."""
    first = error.errors()[0]
    if first["loc"] == ("body",):
        kind = request.headers.get("content-type", "none")
        was_read = not isinstance(first["input"], bytes)  # as JSON, which its type declares
        return "The body is no JSON object." if was_read else f"Content-Type is {kind}, expected application/json."
    if first["type"] == "json_invalid":
        where = f", from character {first['loc'][-1]} on" if first["loc"] else ""
        return f"The body is no JSON{where}."
    if "inputs" in first["loc"] and not request.url.path.endswith("/infer"):
        return f'inputs: a text, ["a text"], or a batch [["first"], ["second"]]; {PAIR}.'
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return f"{where}: {first['msg']}" if where else str(first["msg"])
