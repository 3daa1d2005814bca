"""Routes that list adapters and change them."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import JSONResponse
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData

from trimtab.errors import DataError, ResourceError, TrimtabError
from trimtab.serving import uploads
from trimtab.serving.access import ForbiddenError, Token
from trimtab.serving.formats import PatchAdapter, PutAdapter, failures
from trimtab.serving.predicting import AdapterName
from trimtab.serving.service import Service
from trimtab.serving.store import GenerationError, Status, Store, UnknownAdapterError
from trimtab.serving.watch import Watch


def known(store: Store, request: Request, adapter: str) -> Status:
    """What is known of an adapter that the caller may ask."""
    if not request.state.caller.may_ask(adapter):
        raise ForbiddenError(
            "serve.forbidden", "This token may not ask this adapter.", mend="one whose `adapters` include it"
        )
    return store.status(adapter)


def listing(app: FastAPI, service: Service) -> None:
    """Routes that tell which adapters there are."""
    store = service.store
    one: dict[str, Any] = {"tags": ["adapters"], "responses": failures(403, 404)}
    Limit = Annotated[int, Query(ge=1, le=1_000)]
    After = Annotated[str, Query(max_length=200, description="Begin after this name.")]

    def visible(request: Request, after: str, limit: int) -> tuple[list[str], bool]:
        caller: Token = request.state.caller
        names = [name for name in store.names() if name > after and caller.may_ask(name)]
        return names[:limit], len(names) > limit

    @app.get("/v1/models", tags=["adapters"], summary="OpenAI's list of models")
    async def models(request: Request, after: After = "", limit: Limit = 1_000) -> dict[str, Any]:
        names, more = visible(request, after, limit)
        root = service.store.served.name
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "trimtab", "parent": root} for name in names]
        return {"object": "list", "data": data, "has_more": more, "last_id": names[-1] if names else None}

    @app.get("/v1/models/{adapter}", summary="OpenAI's model", **one)
    async def model(request: Request, adapter: AdapterName) -> dict[str, Any]:
        status = known(store, request, adapter)
        root = service.store.served.name
        return {"id": status.name, "object": "model", "created": 0, "owned_by": "trimtab", "parent": root}

    @app.get("/v1/adapters", tags=["adapters"], summary="Adapters with state, version and memory")
    async def adapters(request: Request, after: After = "", limit: Limit = 1_000) -> dict[str, Any]:
        names, more = visible(request, after, limit)
        found = []
        for name in names:
            with suppress(UnknownAdapterError):  # removed in this very moment
                status = store.status(name)
                # Without the labels themselves: a page of adapters with 20,000 each held the event loop for 2.5 s.
                said = asdict(replace(status, labels=())) | {"num_labels": len(status.labels)}
                del said["labels"]
                found.append(said)
        return {"adapters": found, "has_more": more, "last": names[-1] if names else None, **store.totals()}

    @app.get("/v1/adapters/{adapter}", summary="One adapter", **one)
    async def adapter_(request: Request, adapter: AdapterName) -> Status:
        return known(store, request, adapter)

    @app.get("/v2/models/{adapter}", summary="KServe's metadata of a model", **one)
    async def metadata(request: Request, adapter: AdapterName) -> dict[str, Any]:
        status = known(store, request, adapter)
        return {
            "name": status.name,
            "versions": [status.version] if status.version else [],
            "platform": "trimtab",
            "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
            "outputs": [
                {"name": "label", "datatype": "BYTES", "shape": [-1]},
                {"name": "score", "datatype": "FP32", "shape": [-1]},
                {"name": "probs", "datatype": "FP32", "shape": [-1, len(status.labels) or -1]},
            ],
        }

    @app.get(
        "/v2/models/{adapter}/ready",
        tags=["adapters"],
        summary="Whether a model can be asked",
        responses=failures(403, 404) | {503: {"description": "Its files cannot be used."}},
    )
    async def model_ready(request: Request, adapter: AdapterName) -> JSONResponse:
        status = known(store, request, adapter)
        ready = status.state != "failed"
        return JSONResponse({"name": status.name, "ready": ready}, 200 if ready else 503)


def unchanging(app: FastAPI) -> None:
    """The same routes of a server without --admin: a bare 405 would not say that they exist."""

    @app.api_route("/v1/adapters/{adapter}", methods=["PUT", "PATCH", "DELETE"], include_in_schema=False)
    async def refused(adapter: AdapterName) -> None:
        raise ForbiddenError(
            "serve.admin",
            "This server was started without --admin: no adapter is changed by HTTP.",
            mend="trimtab serve --admin, for whoever runs it; folders of --adapter-dir are followed without it",
        )


def changing(app: FastAPI, service: Service, watch: Watch | None) -> None:
    """Routes that change adapters. Whoever runs the server reads of each change, beside those that the watch finds."""
    store = service.store
    directory = watch.directory if watch else None

    def note(request: Request, adapter: str, what: str) -> None:
        store.say(f"{adapter}: {what} by {request.state.caller.name}")

    def allowed(request: Request, adapter: str) -> None:
        caller: Token = request.state.caller
        if not caller.admin or not caller.may_ask(adapter):
            raise ForbiddenError(
                "serve.forbidden",
                "This token may not change this adapter.",
                mend="one with `admin = true` whose `adapters` include it",
            )

    @app.put(
        "/v1/adapters/{adapter}",
        tags=["admin"],
        summary="Serve a folder of --adapter-dir, or an upload (multipart/form-data), under a name",
        openapi_extra={
            "requestBody": {
                "content": {
                    "application/json": {"schema": PutAdapter.model_json_schema()},
                    "multipart/form-data": {
                        "schema": {
                            "type": "object",
                            "properties": {
                                "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                                "pin": {"type": "boolean"},
                                "if_generation": {"type": "integer"},
                            },
                        }
                    },
                }
            }
        },
        responses=failures(403, 404, 412, 507),
    )
    async def put(request: Request, adapter: AdapterName) -> Status:
        allowed(request, adapter)
        if directory is None:
            raise DataError("serve.directory", "This server has no --adapter-dir, so nothing can be added to it.")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            said, contents = await _sent(await _form(request))
            change: Callable[[], object] = lambda: uploads.put(  # noqa: E731
                store, directory, adapter, contents, if_generation=said.if_generation
            )
        elif await request.body() and kind != "application/json":
            raise HTTPException(415, "The body is neither application/json nor multipart/form-data.")
        else:
            said = PutAdapter.model_validate_json(await request.body() or b"{}")
            allowed(request, said.folder or adapter)
            change = lambda: store.replace(  # noqa: E731
                adapter, uploads.inside(directory, said.folder or adapter), if_generation=said.if_generation
            )
        await asyncio.get_running_loop().run_in_executor(service.changes, _as_admin, change)
        if said.pin is not None:
            store.pin(adapter, said.pin)
        status = store.status(adapter)
        note(request, adapter, f"version {status.version} put here")
        return status

    @app.patch("/v1/adapters/{adapter}", tags=["admin"], summary="Pin or unpin", responses=failures(403, 404))
    async def patch(request: Request, adapter: AdapterName, body: PatchAdapter) -> Status:
        allowed(request, adapter)
        store.pin(adapter, body.pin)
        status = store.status(adapter)
        note(request, adapter, "pinned" if body.pin else "unpinned")
        return status

    @app.delete(
        "/v1/adapters/{adapter}",
        tags=["admin"],
        summary="Forget an adapter; its folder stays, and is served again once it changes",
        responses=failures(403, 404, 412),
    )
    async def delete(
        request: Request, adapter: AdapterName, if_generation: Annotated[int | None, Query(ge=0)] = None
    ) -> dict[str, Any]:
        allowed(request, adapter)
        remove = (watch or store).remove
        await asyncio.get_running_loop().run_in_executor(
            service.changes, lambda: remove(adapter, if_generation=if_generation)
        )
        note(request, adapter, "removed")
        return {"name": adapter, "deleted": True}


async def _form(request: Request) -> FormData:
    """The parts of an upload.

    Raises:
        DataError: their names are in another coding than UTF-8.
        ResourceError: there is no room for them.
    """
    _, options = parse_options_header(request.headers["content-type"])
    # Python knows codings that can only fail (undefined), and others that give half characters (unicode_escape).
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        raise DataError(
            "serve.upload", "The parts of an upload are read as UTF-8.", mend="leave charset out of Content-Type"
        )
    try:
        return await request.form(max_files=16, max_fields=16)
    except OSError as error:  # a part of more than 1 MB goes through the temporary folder
        raise ResourceError(
            "serve.disk",
            f"The upload cannot be kept: {error.strerror}.",
            mend="make room in the server's temporary folder (TMPDIR)",
        ) from None


async def _sent(form: FormData) -> tuple[PutAdapter, dict[str, bytes]]:
    """What an upload says, and the bytes of its files by their names."""
    said = PutAdapter.model_validate({key: form[key] for key in ("pin", "if_generation") if key in form})
    files = [one for one in form.getlist("files") if not isinstance(one, str)]
    if len(files) < len(form.getlist("files")) or set(form) - {"files", "pin", "if_generation"}:
        raise DataError("serve.upload", "The parts of an upload are files, and the fields pin, if_generation.")
    contents = {str(one.filename): await one.read() for one in files}
    if len(contents) < len(files):
        raise DataError("serve.upload", "Two files of the upload have the same name.")
    return said, contents


class RefusedAdapterError(Exception):
    """An adapter that was to be put in place and cannot be."""

    def __init__(self, reason: TrimtabError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _as_admin(change: Callable[[], object]) -> None:
    try:
        change()
    except (GenerationError, ResourceError):
        raise
    except TrimtabError as error:
        raise RefusedAdapterError(error) from None
