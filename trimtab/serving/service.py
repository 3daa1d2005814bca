"""Texts and the names of adapters in, predictions out: what every route of the server stands on. Knows no HTTP."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab import tokens
from trimtab.config import Keep
from trimtab.data import has_half_character
from trimtab.errors import DataError, DivergedError
from trimtab.predict import Prediction, decode
from trimtab.serving.base import Resident
from trimtab.serving.engine import DeadlineError, Engine, Logits, OverloadedError
from trimtab.serving.store import Store

TOKENIZERS = 2
"""Threads that make tokens."""
_CHARACTERS_PER_S = 300_000
"""Of one of them, by the slowest text seen: 1,000,000 Chinese characters took 3 s beside busy cores."""


class Item(NamedTuple):
    """One text, and the adapter that is to answer it."""

    adapter: str
    text: str


@dataclass(frozen=True)
class Answer:
    """What one adapter says of one text, and in which version."""

    prediction: Prediction
    logits: Logits
    """float32[C], as the model gives them."""
    resident: Resident
    tokens: int


@dataclass(frozen=True)
class Times:
    """Where the time of a request went, in seconds."""

    total: float
    tokenization: float
    queue_and_inference: float


class Service:
    """A store and an engine, and threads that tokenize."""

    def __init__(self, store: Store, engine: Engine) -> None:
        self.store, self.engine = store, engine
        self._tokenizing = ThreadPoolExecutor(TOKENIZERS, thread_name_prefix="tokenize")
        self.changes = ThreadPoolExecutor(2, thread_name_prefix="change")
        """Not of those that answer: a change of adapters may wait long."""
        self._unread = _Room("whose adapters are being read")
        self._unencoded = _Room("which become tokens")

    async def answer(
        self, items: Sequence[Item], *, timeout_s: float = float("inf"), whole: bool = False
    ) -> tuple[list[Answer], Times]:
        """Answers texts, each by its own adapter, in their order. Cancelling takes them out of the queue.

        Args:
            items: Texts with their adapters.
            timeout_s: How long the caller waits.
            whole: Whether texts that would be cut are refused.

        Raises:
            TrimtabError: an adapter that is unknown or cannot be read, a text that is none, a full queue, time over,
                logits that are not finite.
        """
        begin = time.monotonic()
        if (half := next((i for i, item in enumerate(items) if has_half_character(item.text)), None)) is not None:
            raise DataError(
                "data.half_character",
                "Half a character (an escape without its other half) in a text.",
                where=f"input {half}, counted from 0",
                mend="write this text again",
            )
        self.engine.check_full()
        waiting: dict[str, Future[Resident]] = {}
        try:
            async with asyncio.timeout(None if timeout_s == float("inf") else timeout_s):
                for name in dict.fromkeys(item.adapter for item in items):
                    waiting[name] = self.store.hold(name)
                if not all(one.done() for one in waiting.values()):
                    with self._unread.holding(items, self._most_characters()):
                        await asyncio.gather(*map(asyncio.wrap_future, waiting.values()), return_exceptions=True)
                held = {name: one.result() for name, one in waiting.items()}
                _check_scores(items, held)
                loaded = time.monotonic()
                encoded = await asyncio.wrap_future(self._encoding(items, held))
                tokenized = time.monotonic()
                if whole and (cut := next((i for i, one in enumerate(encoded) if one.truncated), None)) is not None:
                    longest = held[items[cut].adapter].max_length
                    raise DataError(
                        "serve.truncated",
                        f"Input {cut} is longer than {longest} tokens.",
                        mend="a shorter text; or leave truncate out, and it is cut",
                    )
                rows = [(one.ids, held[item.adapter]) for one, item in zip(encoded, items, strict=True)]
                is_alone = len(self.store) == 1
                computed = self.engine.submit(rows, deadline=begin + timeout_s, only_adapter=is_alone)
                logits = await asyncio.wrap_future(computed)
            # 64 texts of 20,000 labels take a second.
            predictions = await asyncio.to_thread(_decode, items, held, logits, encoded)
        except TimeoutError:
            raise DeadlineError(
                "serve.deadline", f"No answer within the {timeout_s:g} s that were given.", mend="give it more time"
            ) from None
        finally:
            for one in waiting.values():  # also of one that is handed over in the moment in which its caller goes
                one.add_done_callback(self._let_go)
        end = time.monotonic()
        answers = [
            Answer(prediction, row, held[item.adapter], len(one.ids))
            for prediction, row, item, one in zip(predictions, logits, items, encoded, strict=True)
        ]
        return answers, Times(end - begin, tokenized - loaded, end - tokenized)

    def _let_go(self, handed_over: "Future[Resident]") -> None:
        if not handed_over.cancelled() and handed_over.exception() is None:
            self.store.release(handed_over.result())

    def _most_characters(self) -> tuple[float, float]:
        """Of all texts that wait, and of one adapter's: what becomes tokens in the time that the queue may take."""
        limits = self.engine.limits
        most = limits.queue_s * TOKENIZERS * _CHARACTERS_PER_S
        return most, limits.adapter_share * most if len(self.store) > 1 else most

    def _encoding(self, items: Sequence[Item], held: Mapping[str, Resident]) -> "Future[list[_Encoded]]":
        """Tokens, soon. They take room until their thread is done, also where nobody waits for it any more."""
        mine = self._unencoded.take(items, self._most_characters())
        encoding = self._tokenizing.submit(self._encode, items, held)
        encoding.add_done_callback(lambda _: self._unencoded.give_back(mine))
        return encoding

    def _encode(self, items: Sequence[Item], held: Mapping[str, Resident]) -> "list[_Encoded]":
        """Tokens as each adapter was trained on them; texts that are cut alike go through together."""
        alike: dict[tuple[int, Keep], list[int]] = {}
        for i, item in enumerate(items):
            resident = held[item.adapter]
            alike.setdefault((resident.max_length, resident.keep), []).append(i)
        found: dict[int, _Encoded] = {}
        for (max_length, keep), rows in alike.items():
            texts = [items[i].text for i in rows]
            encoded = tokens.encode(texts, self.store.served.tokenizer, max_length, keep=keep)
            for i, (begin, end), cut in zip(
                rows, zip(encoded.offsets[:-1], encoded.offsets[1:], strict=True), encoded.truncated, strict=True
            ):
                found[i] = _Encoded(encoded.ids[begin:end], bool(cut))
        return [found[i] for i in range(len(items))]

    def close(self, timeout_s: float) -> None:
        """Finishes what was accepted, and leaves behind what is not done in time."""
        until = time.monotonic() + timeout_s
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        self.changes.shutdown(wait=False, cancel_futures=True)
        self.engine.close(timeout_s)
        self.store.close(max(0.0, until - time.monotonic()))
        # One between two renames, of an upload, must come to its end.
        changing = threading.Thread(target=self.changes.shutdown, daemon=True)
        changing.start()
        changing.join(max(0.0, until - time.monotonic()))


class _Room:
    """Characters of texts that wait for something, by adapter."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._waiting = Counter[str]()
        self._lock = threading.Lock()

    def take(self, items: Sequence[Item], most: tuple[float, float]) -> Counter[str]:
        """Counts texts until they are given back.

        Raises:
            OverloadedError: there is no room, in all or for one adapter; where nothing waits there always is.
        """
        mine = Counter[str]()
        for item in items:
            mine[item.adapter] += len(item.text)
        with self._lock:
            waiting = self._waiting
            if (waiting and waiting.total() + mine.total() > most[0]) or any(
                waiting[name] and waiting[name] + size > most[1] for name, size in mine.items()
            ):
                raise OverloadedError(
                    f"Texts of {waiting.total():,} characters wait {self._what}.",
                    max(1.0, waiting.total() / (TOKENIZERS * _CHARACTERS_PER_S)),
                )
            waiting += mine
        return mine

    def give_back(self, mine: Counter[str]) -> None:
        """Ends a `take`."""
        with self._lock:
            self._waiting -= mine

    @contextmanager
    def holding(self, items: Sequence[Item], most: tuple[float, float]) -> Iterator[None]:
        """Takes room for as long as it lasts."""
        mine = self.take(items, most)
        try:
            yield
        finally:
            self.give_back(mine)


_SCORES = 1_000_000


def _check_scores(items: Sequence[Item], held: Mapping[str, Resident]) -> None:
    """Refuses an answer of 80 MB or more before anything is computed for it."""
    scores = sum(len(held[item.adapter].labels) for item in items)
    if scores > _SCORES and len(items) > 1:
        raise DataError(
            "serve.scores",
            f"{len(items):,} texts have {scores:,} scores; one request takes {_SCORES:,}.",
            mend="fewer texts in a request",
        )


class _Encoded(NamedTuple):
    """One text as tokens int32[n], and whether it was cut."""

    ids: npt.NDArray[np.int32]
    truncated: bool


def _decode(
    items: Sequence[Item], held: Mapping[str, Resident], logits: Sequence[Logits], encoded: Sequence[_Encoded]
) -> list[Prediction]:
    """The predictions of each adapter's rows, by the decode of every other command."""
    found: dict[int, Prediction] = {}
    for name, resident in held.items():
        rows = [i for i, item in enumerate(items) if item.adapter == name]
        with np.errstate(over="ignore"):
            scaled = np.stack([logits[i] for i in rows]) / np.float32(resident.temperature)
        if not np.isfinite(scaled).all():
            raise DivergedError(
                "logits.not_finite",
                f'"{name}" gave logits that its temperature makes infinite.',
                mend="train this adapter again",
            )
        cut = np.array([encoded[i].truncated for i in rows])
        found |= dict(zip(rows, decode([items[i].text for i in rows], scaled, cut, resident.labels), strict=True))
    return [found[i] for i in range(len(items))]
