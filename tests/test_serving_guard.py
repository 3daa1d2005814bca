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


def test_giving_up_twice_answers_each_request_once() -> None:
    async def slow_to_clear_up(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.sleep(30)
        finally:
            await asyncio.sleep(0.05)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    said: list[Message] = []

    async def send(message: Message) -> None:
        said.append(message)

    async def run() -> State:
        state = State(is_ready=True)
        stands = Guard(slow_to_clear_up, (), Limits(), state)
        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
        asked = asyncio.ensure_future(stands(scope, receive, send))
        await asyncio.sleep(0.01)
        for _ in range(3):
            state.give_up()
            await asyncio.sleep(0.01)
        await asked
        return state

    state = asyncio.run(run())
    assert (state.unanswered, state.running) == (1, set())
    assert [message["status"] for message in said if message["type"] == "http.response.start"] == [503]


def test_a_large_body_comes_in_pieces_between_which_others_have_their_turn() -> None:
    body, turns = bytes(range(256)) * 1_024, 0

    async def run() -> list[bytes]:
        nonlocal turns

        async def another() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        beside = asyncio.ensure_future(another())
        replayed, pieces, more = guard._replay(body, receive), [], True
        while more:
            message = await replayed()
            pieces.append(message["body"])
            more = message["more_body"]
        assert (await replayed())["type"] == "http.disconnect"
        beside.cancel()
        return pieces

    pieces = asyncio.run(run())
    assert b"".join(pieces) == body
    assert turns >= len(pieces) == 4
