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
"""Of a body that is refused. Anybody may make us read it: nothing is kept, and it must arrive within `receive_s`."""


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
            if not limit.expired():  # by an earlier call; it is being cleared up
                limit.reschedule(0.0)


_LATER = "ask again once it has started"


@dataclass(frozen=True)
class _Refusal:
    status: int
    kind: str
    """Of TEI's errors."""
    code: str
    what: str
    mend: str
    retry_after_s: int = 0


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
                what = "The server stops before this was answered."
                await self._refuse(sent, _Refusal(503, "unhealthy", "serve.stopping", what, _LATER, retry_after_s=5))
        finally:
            self.state.running.discard(limit)

    async def _pass(self, scope: Scope, receive: Receive, send: Send, limit: asyncio.Timeout) -> None:
        if scope["method"] == "HEAD":  # load balancers ask so; uvicorn, which knows it too, sends no body
            scope = {**scope, "method": "GET"}
        headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
        is_public = scope["path"] in PUBLIC or scope["path"].startswith(PUBLIC_FOLDERS)
        caller = ANYBODY if is_public or not self.tokens else access.find(self.tokens, _secret(headers))
        is_upload = scope["method"] == "PUT" and scope["path"].startswith("/v1/adapters/") and caller and caller.admin
        most = self.limits.upload_bytes if is_upload else 0 if is_public else self.limits.body_bytes
        refusal = self._refusal(scope, headers, caller, is_public)
        if refusal is None and not is_public:
            self.state.running.add(limit)
        body = None
        try:
            if refusal is None:
                body = await self._body(headers, receive, most)
            else:
                await _read_away(headers, receive)
        except _GoneError:
            return  # half a request is none
        if body is None:
            what = f"The body has more than {most:,} bytes."
            mend = "send it in several requests" if most else "send none here"
            await self._refuse(send, refusal or _Refusal(413, "validation", "serve.body", what, mend))
            return
        scope.setdefault("state", {})["caller"] = caller
        await self.app(scope, _replay(body, receive), send)

    def _refusal(
        self, scope: Scope, headers: dict[bytes, str], caller: Token | None, is_public: bool
    ) -> _Refusal | None:
        """Why a request is refused by its headers; None where it is not."""
        if caller is None:
            mend = "Authorization: Bearer TOKEN, with the one that you have from whoever runs this server"
            return _Refusal(401, "unauthorized", "serve.token", "This needs a token: Authorization: Bearer TOKEN", mend)
        if self.state.is_draining and not is_public:
            what = "The server stops; it takes no new requests."
            return _Refusal(503, "unhealthy", "serve.stopping", what, _LATER, retry_after_s=5)
        if sum(len(key) + len(value) for key, value in scope["headers"]) > self.limits.header_bytes:
            what = f"The headers have more than {self.limits.header_bytes:,} bytes."
            return _Refusal(431, "validation", "serve.headers", what, "send fewer headers, or shorter ones")
        if reason := _unread(headers):
            return _Refusal(415, "validation", "serve.encoding", *reason)
        return None

    async def _body(self, headers: dict[bytes, str], receive: Receive, most: int) -> bytes | None:
        """The whole body; None where it is too large."""
        length = headers.get(b"content-length", "0")
        if not length.isdigit() or int(length) > most:
            await _read_away(headers, receive)
            return None
        pieces: list[bytes] = []
        size, more = 0, True
        while more:
            piece, more = await _piece(receive)
            pieces.append(piece)
            size += len(piece)
            if size > most:
                pieces.clear()
                if more:
                    await _read_away({}, receive)
                return None
        return b"".join(pieces)

    async def _refuse(self, send: Send, refusal: _Refusal) -> None:
        status, kind = refusal.status, refusal.kind
        self.state.failures[kind] = self.state.failures.get(kind, 0) + 1
        said = {"error": refusal.what, "error_type": kind, "code": refusal.code, "mend": refusal.mend}
        body = json.dumps(said).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
        headers += [(b"retry-after", str(refusal.retry_after_s).encode())] if refusal.retry_after_s else []
        headers += [(b"connection", b"close")]  # its body, or the rest of it, is perhaps not read
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def _piece(receive: Receive) -> tuple[bytes, bool]:
    """The next piece of a body, and whether there are more."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise _GoneError
    return message.get("body", b""), message.get("more_body", False)


async def _read_away(headers: dict[bytes, str], receive: Receive) -> None:
    """Reads a body that is refused, before its answer: who still sends would find the connection reset instead."""
    if headers.get(b"expect", "").lower() == "100-continue":
        return  # it waits for leave to send
    left, more = _READ_AWAY, True
    while more and left > 0:
        piece, more = await _piece(receive)
        left -= len(piece)


def _unread(headers: dict[bytes, str]) -> tuple[str, str] | None:
    """Why a body of this kind is not read, and the mend. What is small and compressed may be large."""
    if headers.get(b"content-encoding", "identity").strip().lower() not in ("", "identity"):
        return "Compressed bodies are not read here.", "leave Content-Encoding out"
    if b"inference-header-content-length" in headers:
        return "Binary tensors are not read here: send them as JSON (binary_data=False).", "binary_data=False"
    return None


def _secret(headers: dict[bytes, str]) -> str:
    scheme, _, secret = headers.get(b"authorization", "").partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else headers.get(b"x-api-key", "")


_PIECE = 64 << 10  # a parser of uploads needs 20 ms for this much of a body that was made to be slow


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body, in pieces between which others have their turn; then tells when the client went away."""
    begins = iter(range(0, max(len(body), 1), _PIECE))

    async def replayed() -> Message:
        if (begin := next(begins, None)) is None:
            return await receive()
        await asyncio.sleep(0)
        end = begin + _PIECE
        return {"type": "http.request", "body": body[begin:end], "more_body": end < len(body)}

    return replayed
