"""Texts and the names of adapters in, predictions out: what every route of the server stands on. Knows no HTTP."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab import tokens
from trimtab.data import text_problem
from trimtab.errors import DataError
from trimtab.predict import Prediction, decode
from trimtab.serving.base import Resident
from trimtab.serving.engine import DeadlineError, Engine, Logits
from trimtab.serving.store import Store

TOKENIZERS = 2
"""Threads that make tokens."""


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
    loading: float
    tokenization: float
    queue_and_inference: float


class Service:
    """A store and an engine, and threads that tokenize."""

    def __init__(self, store: Store, engine: Engine) -> None:
        self.store, self.engine = store, engine
        self._tokenizing = ThreadPoolExecutor(TOKENIZERS, thread_name_prefix="tokenize")

    async def answer(
        self, items: Sequence[Item], *, timeout_s: float = float("inf"), raw_scores: bool = False
    ) -> tuple[list[Answer], Times]:
        """Answers texts, each by its own adapter, in their order. Cancelling takes them out of the queue.

        Args:
            items: Texts with their adapters.
            timeout_s: How long the caller waits.
            raw_scores: Probabilities as the model gives them, without the adapter's temperature.

        Raises:
            TrimtabError: an adapter that is unknown or cannot be read, a text that is none, a full queue, time over.
        """
        begin = time.monotonic()
        if halves := [i for i, item in enumerate(items) if text_problem(item.text) == "half a character"]:
            raise DataError(
                "data.half_character",
                "Half a character (an escape without its other half) in a text.",
                where=f"input {halves[0]}, counted from 0",
                mend="write this text again",
            )
        self.engine.check_full()
        waiting: dict[str, Future[Resident]] = {}
        try:
            async with asyncio.timeout(None if timeout_s == float("inf") else timeout_s):
                for name in dict.fromkeys(item.adapter for item in items):
                    waiting[name] = self.store.hold(name)
                held = {name: await asyncio.wrap_future(one) for name, one in waiting.items()}
                loaded = time.monotonic()
                loop = asyncio.get_running_loop()
                encoded = await loop.run_in_executor(self._tokenizing, _encode, items, held)
                tokenized = time.monotonic()
                rows = [(one.ids, held[item.adapter]) for one, item in zip(encoded, items, strict=True)]
                is_alone = len(self.store) == 1
                computed = self.engine.submit(rows, deadline=begin + timeout_s, only_adapter=is_alone)
                logits = await asyncio.wrap_future(computed)
            predictions = _decode(items, held, logits, encoded, raw_scores=raw_scores)
        except TimeoutError:
            raise DeadlineError("serve.deadline", f"No answer within the {timeout_s:g} s that were given.") from None
        finally:
            for one in waiting.values():  # also of one that is handed over in the moment in which its caller goes
                one.add_done_callback(self._let_go)
        end = time.monotonic()
        answers = [
            Answer(prediction, row, held[item.adapter], len(one.ids))
            for prediction, row, item, one in zip(predictions, logits, items, encoded, strict=True)
        ]
        return answers, Times(end - begin, loaded - begin, tokenized - loaded, end - tokenized)

    def _let_go(self, handed_over: "Future[Resident]") -> None:
        if not handed_over.cancelled() and handed_over.exception() is None:
            self.store.release(handed_over.result())

    def close(self, timeout_s: float) -> bool:
        """Finishes what was accepted; whether all was done in time."""
        done = self.engine.close(timeout_s)
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        self.store.close()
        return done


class _Encoded(NamedTuple):
    """One text as tokens int32[n], and whether it was cut."""

    ids: npt.NDArray[np.int32]
    truncated: bool


def _encode(items: Sequence[Item], held: dict[str, Resident]) -> list[_Encoded]:
    """Tokens as each adapter was trained on them; texts of adapters that encode alike go through together."""
    alike: dict[tuple[int, int], list[int]] = {}
    for i, item in enumerate(items):
        resident = held[item.adapter]
        alike.setdefault((id(resident.tokenizer), resident.max_length), []).append(i)
    found: dict[int, _Encoded] = {}
    for rows in alike.values():
        resident = held[items[rows[0]].adapter]
        encoded = tokens.encode([items[i].text for i in rows], resident.tokenizer, resident.max_length)
        for i, (begin, end), cut in zip(
            rows, zip(encoded.offsets[:-1], encoded.offsets[1:], strict=True), encoded.truncated, strict=True
        ):
            found[i] = _Encoded(encoded.ids[begin:end], bool(cut))
    return [found[i] for i in range(len(items))]


def _decode(
    items: Sequence[Item],
    held: dict[str, Resident],
    logits: Sequence[Logits],
    encoded: Sequence[_Encoded],
    *,
    raw_scores: bool,
) -> list[Prediction]:
    """The predictions of each adapter's rows, by the decode of every other command."""
    found: dict[int, Prediction] = {}
    for name, resident in held.items():
        rows = [i for i, item in enumerate(items) if item.adapter == name]
        scaled = np.stack([logits[i] for i in rows]) / np.float32(1.0 if raw_scores else resident.temperature)
        cut = np.array([encoded[i].truncated for i in rows])
        found |= dict(zip(rows, decode([items[i].text for i in rows], scaled, cut, resident.labels), strict=True))
    return [found[i] for i in range(len(items))]
