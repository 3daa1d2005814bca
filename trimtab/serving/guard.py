"""What stands before every route: who asks, how much they send, and whether the server still takes work.

An ASGI middleware, so that a route that forgets to ask cannot be written: what is not in `PUBLIC` needs a token, where
there are tokens.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.serving import access
from trimtab.serving.access import ANYBODY, Token

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PUBLIC = frozenset(
    {"/", "/health", "/ping", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/openapi.json"}
)
"""Paths that need no token: whether the server lives, the page, and what the API is. None of them names an adapter."""
PUBLIC_FOLDERS = ("/docs", "/page/")


@dataclass(frozen=True)
class Limits:
    """What a request may bring."""

    body_bytes: int = 2 << 20
    upload_bytes: int = 512 << 20
    texts: int = 256
    characters: int = 1_000_000
    """Of all texts of a request."""
    header_bytes: int = 16 << 10
    receive_s: float = 10.0
    """For the whole of a request to arrive."""


_READ_AWAY = 64 << 20


@dataclass
class State:
    """What changes while the server runs."""

    is_ready: bool = False
    is_draining: bool = False
    failures: dict[str, int] = field(default_factory=dict)
    """Refusals of the guard, by error type."""
    running: set[asyncio.Timeout] = field(default_factory=set)
    """Of each request that was accepted and is not answered yet: what ends it."""
    unanswered: int = 0
    """Accepted requests that were told in the end that the server stops."""

    def give_up(self) -> None:
        """Ends the requests that are still under way, each with the answer that the server stops."""
        for limit in list(self.running):
            limit.reschedule(0.0)


class _GoneError(Exception):
    """The client went away before its request was here."""


class Guard:
    """Asks for a token, counts bytes, and refuses new work while the server stops."""

    def __init__(self, app: App, tokens: Sequence[Token], limits: Limits, state: State) -> None:
        self.app, self.tokens, self.limits, self.state = app, tokens, limits, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        has_begun = False

        async def sent(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                if self.state.is_draining:  # no second request on this connection: it would be lost
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        limit = asyncio.timeout(None)
        try:
            async with limit:
                await self._pass(scope, receive, sent, limit)
        except TimeoutError:
            if not limit.expired():
                raise
            self.state.unanswered += 1
            if not has_begun:
                await self._refuse(sent, 503, "unhealthy", "The server stops before this was answered.", 5)
        finally:
            self.state.running.discard(limit)

    async def _pass(self, scope: Scope, receive: Receive, send: Send, limit: asyncio.Timeout) -> None:
        if scope["method"] == "HEAD":  # load balancers ask so; uvicorn, which knows it too, sends no body
            scope = {**scope, "method": "GET"}
        headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
        is_public = scope["path"] in PUBLIC or scope["path"].startswith(PUBLIC_FOLDERS)
        caller = ANYBODY
        if self.tokens and not is_public:
            found = access.find(self.tokens, _secret(headers))
            if found is None:
                await self._refuse(send, 401, "unauthorized", "This needs a token: Authorization: Bearer TOKEN")
                return
            caller = found
        if self.state.is_draining and not is_public:
            await self._refuse(send, 503, "unhealthy", "The server stops; it takes no new requests.", retry_after_s=5)
            return
        if not is_public:
            self.state.running.add(limit)
        scope.setdefault("state", {})["caller"] = caller
        if sum(len(key) + len(value) for key, value in scope["headers"]) > self.limits.header_bytes:
            await self._refuse(
                send, 431, "validation", f"The headers have more than {self.limits.header_bytes:,} bytes."
            )
            return
        is_upload = scope["method"] == "PUT" and scope["path"].startswith("/v1/adapters/") and caller.admin
        most = self.limits.upload_bytes if is_upload else 0 if is_public else self.limits.body_bytes
        if reason := _unread(headers):
            await self._refuse(send, 415, "validation", reason)
            return
        try:
            body = await self._body(headers, receive, most)
        except _GoneError:
            return  # half a request is none
        if body is None:
            await self._refuse(send, 413, "validation", f"The body has more than {most:,} bytes.")
            return
        await self.app(scope, _replay(body, receive), send)

    async def _body(self, headers: dict[bytes, str], receive: Receive, most: int) -> bytes | None:
        """The whole body; None where it is too large."""
        length = headers.get(b"content-length", "0")
        too_large = not length.isdigit() or int(length) > most
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            piece = message.get("body", b"")
            size += len(piece)
            too_large = too_large or size > most
            if too_large:
                # Read on, and away: a client that still sends would find its connection reset, and not our answer.
                pieces.clear()
                if size > most + _READ_AWAY:
                    return None
            else:
                pieces.append(piece)
            if message["type"] == "http.disconnect":
                raise _GoneError
            if not message.get("more_body", False):
                return None if too_large else b"".join(pieces)

    async def _refuse(self, send: Send, status: int, kind: str, what: str, retry_after_s: int = 0) -> None:
        self.state.failures[kind] = self.state.failures.get(kind, 0) + 1
        body = json.dumps({"error": what, "error_type": kind, "code": "", "mend": ""}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
        headers += [(b"retry-after", str(retry_after_s).encode())] if retry_after_s else []
        headers += [(b"connection", b"close")] if status in (413, 415) else []  # the body, or its rest, is not read
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _unread(headers: dict[bytes, str]) -> str:
    """Why a body of this kind is not read; empty where it is. What is small and compressed may be large."""
    if headers.get(b"content-encoding", "identity").strip().lower() not in ("", "identity"):
        return "Compressed bodies are not read here: leave Content-Encoding out."
    if b"inference-header-content-length" in headers:
        return "Binary tensors are not read here: send them as JSON (binary_data=False)."
    return ""


def _secret(headers: dict[bytes, str]) -> str:
    scheme, _, secret = headers.get(b"authorization", "").partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else headers.get(b"x-api-key", "")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body once, and from then on what the connection says: that the client went away."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed
