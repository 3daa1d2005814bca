"""What stands before every route, alone: what it reads before it refuses, and what it never reads."""

import asyncio
import hashlib
import json
from typing import Any

import pytest

from trimtab.serving import guard
from trimtab.serving.access import Token
from trimtab.serving.guard import Guard, Limits, Message, Receive, Scope, Send, State

SECRET = "secret-secret-secret"
MINE = [(b"authorization", f"Bearer {SECRET}".encode())]
PIECE = b"x" * (64 << 10)


def ask(
    headers: list[tuple[bytes, bytes]], pieces: int, *, is_draining: bool = False, path: str = "/predict"
) -> tuple[int, dict[str, Any], int]:
    """Status, what the answer says, and how many pieces of the body were read before it."""
    read, said = 0, list[Message]()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("it came through")

    async def receive() -> Message:
        nonlocal read
        assert not said, "read after the answer"
        assert read < pieces, "it waits for what never comes"
        read += 1
        return {"type": "http.request", "body": PIECE, "more_body": read < pieces}

    async def send(message: Message) -> None:
        said.append(message)

    tokens = (Token("me", hashlib.sha256(SECRET.encode()).digest(), ("*",)),)
    stands = Guard(app, tokens, Limits(), State(is_ready=True, is_draining=is_draining))
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    asyncio.run(stands(scope, receive, send))
    return said[0]["status"], json.loads(said[1]["body"]), read


GZIP, LONG = [*MINE, (b"content-encoding", b"gzip")], [*MINE, (b"x", b"a" * 17_000)]
LARGE = [*MINE, (b"content-length", b"9999999999")]
REFUSED = [
    (401, [], False), (503, MINE, True), (431, LONG, False), (415, GZIP, False), (413, MINE, False), (413, LARGE, False)
]  # fmt: skip


@pytest.mark.parametrize(("status", "headers", "is_draining"), REFUSED)
def test_a_refused_body_is_read_to_its_end_before_the_answer(
    status: int, headers: list[tuple[bytes, bytes]], is_draining: bool
) -> None:
    found, failure, read = ask(headers, 128, is_draining=is_draining)
    assert (found, read) == (status, 128)
    assert all(failure.values()), failure


@pytest.mark.parametrize(("status", "headers", "is_draining"), REFUSED)
def test_a_refused_body_without_an_end_is_not_read_for_ever(
    status: int, headers: list[tuple[bytes, bytes]], is_draining: bool
) -> None:
    found, _, read = ask(headers, 1 << 20, is_draining=is_draining)
    assert (found, read * len(PIECE) <= guard._READ_AWAY + Limits.body_bytes + len(PIECE)) == (status, True)


@pytest.mark.parametrize(("status", "headers", "is_draining"), [one for one in REFUSED if one[1] is not MINE or one[2]])
def test_who_asks_before_it_sends_is_refused_at_once(
    status: int, headers: list[tuple[bytes, bytes]], is_draining: bool
) -> None:
    headers = [*headers, (b"expect", b"100-continue")]
    assert ask(headers, 0, is_draining=is_draining)[::2] == (status, 0)
