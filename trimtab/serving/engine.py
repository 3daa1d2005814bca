"""Rows in, logits out: one queue, a thread for each core, batches of similar length whatever their adapter.

While batches are computed the queue collects; nothing waits for a batch to fill. A batch begins with the oldest row, so
nobody starves, and is filled with the rows nearest to it in length. What cannot be taken in is refused at once, with
the seconds after which it is worth trying again.

Each thread computes batches of its own on one core. Two cores on one batch must meet after every product, and wait for
each other whenever something else, the tokenizing of the next request to begin with, has taken one of them.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimtab.errors import ArtefactError, DataError, DivergedError, ResourceError
from trimtab.fast import mixed
from trimtab.fast.encoder import Encoder
from trimtab.fast.workspace import Workspace
from trimtab.serving.base import Resident, ServedBase

Logits = npt.NDArray[np.float32]


class OverloadedError(ResourceError):
    """The queue is full, of all rows or of one adapter's."""

    def __init__(self, what: str, retry_after_s: float) -> None:
        super().__init__("serve.overloaded", what, mend=f"try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return OverloadedError, (self.what, self.retry_after_s)


class DeadlineError(ResourceError):
    """The caller's time ran out before the rows were computed."""


class StoppingError(ResourceError):
    """The server stops and takes no new work."""


@dataclass(eq=False)
class Ticket:
    """The rows of one request, and where their answers come together."""

    answers: list[Logits | None]
    left: int
    deadline: float
    """On time.monotonic's clock; infinity: none."""
    done: "Future[list[Logits]]" = field(default_factory=Future)

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for it any more: answered, failed or cancelled."""
        return self.done.done()


@dataclass(eq=False)
class _Row:
    """One text in the queue."""

    ids: npt.NDArray[np.int32]
    resident: Resident
    ticket: Ticket
    place: int
    """Its number within the ticket."""
    is_taken: bool = False


@dataclass(frozen=True)
class Limits:
    """What the queue takes in, and what one batch holds."""

    batch_tokens: int = 1_024
    queue_tokens: int = 262_144
    queue_rows: int = 8_192
    queue_s: float = 10.0
    """What waits may take, by the speed of the last batches: who comes later is better told to come again."""
    adapter_share: float = 0.5
    """The part of the queue that one adapter's rows may fill while other adapters are known."""


@dataclass
class Totals:
    """What has been computed since the start."""

    batches: int = 0
    rows: int = 0
    tokens: int = 0
    adapters: int = 0
    """Distinct ones, summed over batches."""
    seconds: float = 0.0
    failures: int = 0
    dropped: int = 0
    """Rows whose caller had gone, or whose time was over."""


class Engine:
    """Answers rows. `submit` may be called from any thread; threads of its own compute, each on one core."""

    def __init__(
        self,
        served: ServedBase,
        limits: Limits = Limits(),
        *,
        workers: int = 1,
        compute: Callable[..., list[Tensor]] = mixed.logits,
    ) -> None:
        self.served, self.limits, self.totals = served, limits, Totals()
        self._compute = compute
        self._wake = threading.Condition()
        self._oldest: deque[_Row] = deque()
        self._by_length: dict[int, deque[_Row]] = {}
        self._rows = self._tokens = 0
        self._of_adapter: dict[str, int] = {}
        self._is_closing = False
        self._computed, self._took, self._tokens_per_s = 0.0, 0.0, 0.0
        """Of the last batches, each counting 0.9 of the next; and the speed of all threads together, 0: not known."""
        self._idle = 0
        self._beats = [time.monotonic()] * workers
        """When each thread took its batch; infinity while it waits."""
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"compute-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    # -- in ------------------------------------------------------------------------------------------------------

    def submit(
        self,
        rows: Sequence[tuple[npt.NDArray[np.int32], Resident]],
        *,
        deadline: float = float("inf"),
        only_adapter: bool = True,
    ) -> "Future[list[Logits]]":
        """Puts rows into the queue, all or none; the future gives the logits float32[C] of each, in their order.

        A future that is cancelled takes its rows out of the queue.

        Args:
            rows: The tokens of each, and the version that answers it, which the caller holds until the future is done.
            deadline: When the caller stops waiting, on time.monotonic's clock.
            only_adapter: Whether no other adapter is known, so that there is nobody to leave room for.

        Raises:
            OverloadedError: the queue is full, or one adapter's share of it.
            ArtefactError: a row has a token that the base has no vector for.
            DataError: a row has no token.
            StoppingError: the server stops.
        """
        ticket = Ticket([None] * len(rows), len(rows), deadline)
        if not rows:
            ticket.done.set_result([])
            return ticket.done
        vocabulary = self.served.vocabulary
        for ids, resident in rows:
            if not len(ids):
                raise DataError("serve.empty", f'"{resident.name}" makes no token of a text.', mend="leave it out")
            if int(ids.max()) >= vocabulary:
                raise ArtefactError(
                    "adapter.tokens",
                    f'"{resident.name}" makes a token {int(ids.max()):,}, and the base has {vocabulary:,} vectors.',
                    mend="the base's tokenizer does not belong to its weights: --base with the whole folder",
                )
        tokens = sum(len(ids) for ids, _ in rows)
        shares: dict[str, int] = {}
        for ids, resident in rows:
            shares[resident.name] = shares.get(resident.name, 0) + len(ids)
        with self._wake:
            if self._is_closing:
                raise StoppingError("serve.stopping", "The server stops; it takes no new requests.")
            self._check_room(tokens, len(rows), {} if only_adapter else shares)
            for place, (ids, resident) in enumerate(rows):
                row = _Row(ids, resident, ticket, place)
                self._oldest.append(row)
                self._by_length.setdefault(len(ids), deque()).append(row)
            self._rows += len(rows)
            self._tokens += tokens
            for name, share in shares.items():
                self._of_adapter[name] = self._of_adapter.get(name, 0) + share
            self._wake.notify_all()
        return ticket.done

    def check_full(self, tokens: int = 0, rows: int = 0) -> None:
        """Refuses what has no room; with nothing more to take in, whatever comes, before its tokens are made.

        Raises:
            OverloadedError: the queue is full.
        """
        limits = self.limits
        too_many = self._tokens + tokens > limits.queue_tokens or self._rows + rows > limits.queue_rows
        # How long it waits is judged without the new rows: a large request must have its chance beside many small ones.
        if self._rows and (too_many or self.is_full):
            raise OverloadedError(
                f"The queue is full: {self._rows:,} texts of {self._tokens:,} tokens wait.", self.wait_s
            )

    def _check_room(self, tokens: int, rows: int, shares: dict[str, int]) -> None:
        self.check_full(tokens, rows)
        limits, speed = self.limits, self._tokens_per_s
        most = limits.adapter_share * min(limits.queue_tokens, limits.queue_s * speed or limits.queue_tokens)
        for name, share in shares.items():
            waiting = self._of_adapter.get(name, 0)
            if waiting and waiting + share > most:
                raise OverloadedError(f'"{name}" fills its part of the queue: {waiting:,} tokens wait.', self.wait_s)

    @property
    def wait_s(self) -> float:
        """How long the rows that wait will take, by the speed of the last batches; at least a second."""
        speed = self._tokens_per_s
        return max(1.0, self._tokens / speed) if speed else 1.0

    @property
    def backlog(self) -> tuple[int, int]:
        """Rows and tokens that wait."""
        return self._rows, self._tokens

    @property
    def is_full(self) -> bool:
        """Whether a request would most likely be refused."""
        limits, speed = self.limits, self._tokens_per_s
        too_many = self._tokens >= limits.queue_tokens or self._rows >= limits.queue_rows
        return too_many or (speed > 0 and self._tokens > limits.queue_s * speed)

    @property
    def is_alive(self) -> bool:
        """Whether the threads that compute are there and none hangs."""
        longest = time.monotonic() - min(self._beats)
        return all(thread.is_alive() for thread in self._threads) and (not self._rows or longest < _HANGS_S)

    def close(self, timeout_s: float = 30.0) -> bool:
        """Takes no new rows and computes those that wait; whether all were done in time."""
        with self._wake:
            self._is_closing = True
            self._wake.notify_all()
        until = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # -- out -----------------------------------------------------------------------------------------------------

    def _run(self, number: int) -> None:
        torch.set_num_threads(1)  # holds for this thread
        encoder = replace(self.served.encoder, workspace=Workspace())
        while True:
            with self._wake:
                self._idle += 1
                self._beats[number] = float("inf")  # who waits for work does not hang
                while not self._rows and not self._is_closing:
                    self._wake.wait()
                self._idle -= 1
                self._beats[number] = time.monotonic()
                if not self._rows:
                    return
                batch = self._take()
            if batch:
                self._answer(batch, encoder)

    def _take(self) -> list[_Row]:
        """The oldest row and those nearest to it in length, as many as one batch holds; nobody's rows are let go.

        What waits is shared with the threads that have nothing to do.
        """
        most = min(self.limits.batch_tokens, max(_LEAST_TOKENS, self._tokens // (self._idle + 1)))
        batch: list[_Row] = []
        tokens, now = 0, time.monotonic()
        while self._oldest and self._oldest[0].is_taken:
            self._oldest.popleft()
        for row in self._nearest(len(self._oldest[0].ids)):
            if batch and tokens + len(row.ids) > most:
                break
            self._remove(row)
            if row.ticket.deadline < now:
                _fail(row.ticket, DeadlineError("serve.deadline", "The time given for this request is over."))
            if row.ticket.is_over:
                self.totals.dropped += 1
                continue
            batch.append(row)
            tokens += len(row.ids)
        return batch

    def _nearest(self, length: int) -> Iterator[_Row]:
        """Rows by how near their length is to the given one, the oldest of each length first, as they are removed."""
        for wanted in sorted(self._by_length, key=lambda one: abs(one - length)):
            while waiting := self._by_length.get(wanted):
                yield waiting[0]

    def _remove(self, row: _Row) -> None:
        length = len(row.ids)
        waiting = self._by_length[length]
        waiting.popleft()
        if not waiting:
            del self._by_length[length]
        row.is_taken = True
        self._rows -= 1
        self._tokens -= length
        self._of_adapter[row.resident.name] -= length
        if not self._of_adapter[row.resident.name]:
            del self._of_adapter[row.resident.name]

    def _answer(self, batch: list[_Row], encoder: Encoder) -> None:
        """Computes a batch. Whatever goes wrong concerns its rows and nobody else."""
        begin = time.monotonic()
        lengths = [len(row.ids) for row in batch]
        try:
            found = self._compute(
                encoder,
                np.concatenate([row.ids for row in batch]),
                np.array([0, *itertools.accumulate(lengths)], np.int64),
                [row.resident.beside for row in batch],
                self.served.costs,
            )
            answers: list[Logits] = [one.numpy() for one in found]
        except Exception as error:  # the thread must live: what it dies of would take every adapter with it
            self.totals.failures += 1
            apart: dict[int, list[_Row]] = {}
            for row in batch:
                apart.setdefault(id(row.resident), []).append(row)
            if len(apart) > 1:  # whoever's fault it is, the others get their answers
                for rows in apart.values():
                    self._answer(rows, encoder)
                return
            with self._wake:  # another thread may hold rows of the same request
                for row in batch:
                    _fail(row.ticket, error)
            return
        took = time.monotonic() - begin
        totals = self.totals
        with self._wake:
            # Tokens and seconds apart: many batches of a few tokens say little of how fast a full one is.
            self._computed = 0.9 * self._computed + sum(lengths)
            self._took = 0.9 * self._took + took
            # Nor when it is cold: by the first few texts, computed while adapters were read, it refused 256 texts.
            if self._computed >= self.limits.batch_tokens:
                self._tokens_per_s = len(self._threads) * self._computed / self._took
            totals.batches += 1
            totals.rows += len(batch)
            totals.tokens += sum(lengths)
            totals.adapters += len({id(row.resident) for row in batch})
            totals.seconds += took
            done = [row.ticket for row, logits in zip(batch, answers, strict=True) if _settle(row, logits)]
        for ticket in done:
            if not ticket.is_over and ticket.done.set_running_or_notify_cancel():
                ticket.done.set_result([one for one in ticket.answers if one is not None])


_HANGS_S = 60.0
_LEAST_TOKENS = 128  # fewer are not worth a batch of their own: the weights must come from memory all the same


def _settle(row: _Row, logits: Logits) -> bool:
    """Gives a row its answer; whether it was the last of its request."""
    ticket = row.ticket
    if not np.isfinite(logits).all():
        _fail(ticket, DivergedError("logits.not_finite", f'"{row.resident.name}" gave logits that are not finite.'))
        return False
    ticket.answers[row.place] = logits
    ticket.left -= 1
    return not ticket.left


def _fail(ticket: Ticket, error: Exception) -> None:
    """Ends a request with an error, once; its rows that still wait are dropped when their turn comes."""
    if not ticket.is_over and ticket.done.set_running_or_notify_cancel():
        ticket.done.set_exception(error)
