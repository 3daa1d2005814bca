"""The queue: batches of similar length, limits, deadlines, faults that stay with their rows, an end in good order."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from adapters import write_adapter
from bases import write_base

from trimtab import tokens
from trimtab.config import RuntimeSettings
from trimtab.errors import ArtefactError, DataError, DivergedError
from trimtab.fast import mixed
from trimtab.hub import find_base
from trimtab.serving import service as services
from trimtab.serving import store as stores
from trimtab.serving.base import Resident, ServedBase, describe, load_base, place
from trimtab.serving.engine import DeadlineError, Engine, Limits, OverloadedError, StoppingError
from trimtab.serving.memory import Pieces
from trimtab.serving.service import Item, Service
from trimtab.serving.store import Store


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ServedBase, list[Resident]]:
    folder = tmp_path_factory.mktemp("engine")
    write_base(folder / "base", "bert")
    found_base = find_base(str(folder / "base"))
    base = load_base(found_base, tokens.from_base(found_base.folder), RuntimeSettings(threads=1))
    pieces, residents = Pieces(), []
    for seed, name in enumerate(("a", "b", "c")):
        write_adapter(folder / name, folder / "base", seed=seed)
        found = describe(base, folder / name)
        residents.append(place(base, found, found.read_tensors(), name, pieces.take(found.layout.bytes)))
    return base, residents


class Held:
    """Computes as the engine does, but waits until it is let go; and knows what it was given."""

    def __init__(self) -> None:
        self.go, self.began = threading.Event(), threading.Event()
        self.batches: list[list[int]] = []
        self.fault: Callable[[Any], object] = lambda adapters: None

    def __call__(self, encoder: Any, ids: Any, offsets: Any, adapters: Any, costs: Any) -> list[torch.Tensor]:
        self.batches.append(np.diff(offsets).tolist())
        self.began.set()
        assert self.go.wait(10)
        self.fault(adapters)
        return mixed.logits(encoder, ids, offsets, adapters, costs)


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def start(made: tuple[ServedBase, list[Resident]], held: Held) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def start(workers: int = 1, **limits: Any) -> Engine:
        engines.append(Engine(made[0], Limits(**limits), workers=workers, compute=held))
        return engines[-1]

    yield start
    held.go.set()
    for engine in engines:
        assert engine.close(10)


def row(length: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.full(length, 7, np.int32)


def test_answers_come_in_the_order_of_the_rows_whatever_their_batches(
    made: tuple[ServedBase, list[Resident]], start: Callable[..., Engine], held: Held
) -> None:
    base, residents = made
    held.go.set()
    rng = np.random.default_rng(0)
    rows = [
        (rng.integers(5, 40, int(rng.integers(2, 30))).astype(np.int32), residents[int(rng.integers(3))])
        for _ in range(50)
    ]
    found = start(batch_tokens=64).submit(rows).result(20)
    for (ids, resident), logits in zip(rows, found, strict=True):
        alone = mixed.logits(base.encoder, ids, np.array([0, len(ids)]), [resident.beside], base.costs)[0]
        assert np.abs(logits - alone.numpy()).max() < 1e-5
    assert max(sum(batch) for batch in held.batches) <= 64
    assert len(held.batches) > 5


def test_the_oldest_row_begins_a_batch_and_its_likes_fill_it(
    made: tuple[ServedBase, list[Resident]], start: Callable[..., Engine], held: Held
) -> None:
    engine, one = start(batch_tokens=30), made[1][0]
    first = engine.submit([(row(5), one)])
    assert held.began.wait(10)
    waiting = [engine.submit([(row(length), one)]) for length in (10, 3, 30, 11, 9, 4, 2)]
    held.go.set()
    for done in (first, *waiting):
        done.result(10)
    assert held.batches == [[5], [10, 11, 9], [3, 4, 2], [30]]


def test_what_waits_is_shared_with_threads_that_have_nothing_to_do(
    made: tuple[ServedBase, list[Resident]], start: Callable[..., Engine], held: Held
) -> None:
    engine, one = start(workers=2), made[1][0]
    time.sleep(0.05)  # until both wait
    done = engine.submit([(row(20), one)] * 20)
    for _ in range(100):
        if len(held.batches) == 2:
            break
        time.sleep(0.01)
    held.go.set()
    assert len(done.result(10)) == 20
    assert sorted(len(batch) for batch in held.batches) == [10, 10]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(
    made: tuple[ServedBase, list[Resident]], start: Callable[..., Engine], held: Held
) -> None:
    engine, one = start(queue_tokens=100), made[1][0]
    engine.submit([(row(5), one)])
    assert held.began.wait(10)
    engine.submit([(row(60), one)])
    begin = time.monotonic()
    with pytest.raises(OverloadedError, match="queue is full") as refused:
        engine.submit([(row(20), one), (row(21), one)])
    assert time.monotonic() - begin < 0.05
    assert refused.value.retry_after_s >= 1
    assert engine.backlog == (1, 60)
    assert engine.submit([(row(40), one)])


def test_a_queue_that_takes_too_long_is_full(
    made: tuple[ServedBase, list[Resident]], start: Callable[..., Engine], held: Held
) -> None:
    engine, one = start(queue_s=0.001, batch_tokens=100), made[1][0]
    held.go.set()
    engine.submit([(row(5), one)]).result(10)
    held.go.clear()
    held.began.clear()
    engine.submit([(row(5), one)])
    assert held.began.wait(10)
    full = engine.submit([(row(50), one)] * 2)
    assert not engine.is_full  # a few tokens tell no speed
    held.go.set()
    full.result(10)  # and a full batch does
    held.go.clear()
    held.began.clear()
    engine.submit([(row(5), one)])
    assert held.began.wait(10)
    large = engine.submit([(row(60), one)] * 100)
    assert engine.is_full
    with pytest.raises(OverloadedError, match="queue is full"):
        engine.submit([(row(5), one)])
    held.go.set()
    assert len(large.result(20)) == 100
    assert not engine.is_full


def test_what_is_refused_costs_no_adapter_and_no_tokens() -> None:
    class Full:
        def check_full(self) -> None:
            raise OverloadedError("The queue is full.", 3.0)

    service = Service(cast(Store, None), cast(Engine, Full()))
    with pytest.raises(OverloadedError):
        asyncio.run(service.answer([Item("reviews", "a fine film")]))


def test_texts_whose_tokens_are_being_made_fill_the_queue_too(
    made: tuple[ServedBase, list[Resident]], start: Callable[..., Engine], held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    held.go.set()
    began, go, encode = threading.Event(), threading.Event(), tokens.encode

    def slow(*given: Any, **how: Any) -> Any:
        began.set()
        go.wait(10)
        return encode(*given, **how)

    monkeypatch.setattr(tokens, "encode", slow)
    store = Store(made[0], 1 << 30)
    for name in "ab":
        store.replace(name, made[0].base.folder.parent / name)
    service = Service(store, start(queue_s=100 / 600_000))  # room for 100 characters, and 50 of one adapter's

    async def ask() -> None:
        first = asyncio.ensure_future(service.answer([Item("a", "film " * 8)]))
        while not began.is_set():
            await asyncio.sleep(0.01)
        with pytest.raises(OverloadedError, match="40 characters wait which"):
            await service.answer([Item("a", "film " * 3)])
        with pytest.raises(OverloadedError):
            await service.answer([Item("b", "film " * 13)])
        first.cancel()  # its thread works on
        with pytest.raises(OverloadedError):
            await service.answer([Item("a", "film " * 3)])
        second = asyncio.ensure_future(service.answer([Item("b", "film " * 3)]))
        await asyncio.sleep(0.05)
        go.set()
        assert len((await second)[0]) == 1
        assert len((await service.answer([Item("a", "film " * 3)]))[0]) == 1

    asyncio.run(ask())


def test_who_waits_for_a_slow_disk_leaves_room_for_those_who_do_not(
    made: tuple[ServedBase, list[Resident]], start: Callable[..., Engine], held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    held.go.set()
    go, describe = threading.Event(), stores.describe
    store = Store(made[0], 1 << 30)
    store.replace("a", made[0].base.folder.parent / "a")
    monkeypatch.setattr(stores, "describe", lambda *all_: (go.wait(10), describe(*all_))[1])
    store.register("b", made[0].base.folder.parent / "b")
    service = Service(store, start(queue_s=100 / 600_000))  # room for 100 characters, and 50 of one adapter's

    async def ask() -> None:
        slow = asyncio.ensure_future(service.answer([Item("b", "film " * 10)]))
        await asyncio.sleep(0.05)
        with pytest.raises(OverloadedError, match="being read"):
            await service.answer([Item("b", "film " * 10)])
        assert len((await service.answer([Item("a", "film " * 10)]))[0]) == 1
        go.set()
        assert len((await slow)[0]) == 1

    asyncio.run(ask())


def test_a_temperature_that_makes_logits_infinite_is_an_error(
    made: tuple[ServedBase, list[Resident]], start: Callable[..., Engine], held: Held
) -> None:
    held.go.set()
    store = Store(made[0], 1 << 30)
    held_one = store.replace("a", made[0].base.folder.parent / "a")
    store._entries["a"].resident = replace(held_one, temperature=1e-45)
    with pytest.raises(DivergedError, match="temperature"):
        asyncio.run(Service(store, start()).answer([Item("a", "a fine film")]))


def test_a_text_that_would_be_cut_is_refused_before_it_is_computed(
    made: tuple[ServedBase, list[Resident]], start: Callable[..., Engine], held: Held
) -> None:
    held.go.set()
    store = Store(made[0], 1 << 30)
    store.replace("a", made[0].base.folder.parent / "a")
    with pytest.raises(DataError, match="Input 1 is longer than 48 tokens"):
        asyncio.run(Service(store, start()).answer([Item("a", "film"), Item("a", "film " * 100)], whole=True))
    assert held.batches == []


def test_each_adapter_keeps_of_a_long_text_what_it_was_trained_on(
    made: tuple[ServedBase, list[Resident]], start: Callable[..., Engine]
) -> None:
    held = {"a": replace(made[1][0], keep="ends"), "b": made[1][1]}
    text = "good " * 40 + "bad " * 40
    found = Service(Store(made[0], 1 << 30), start())._encode([Item("a", text), Item("b", text)], held)
    for one, resident in zip(found, held.values(), strict=True):
        alone = tokens.encode([text], made[0].tokenizer, resident.max_length, keep=resident.keep)
        assert np.array_equal(one.ids, alone.ids)
    assert not np.array_equal(found[0].ids, found[1].ids)


def test_an_answer_of_too_many_scores_is_refused_before_it_is_computed(
    made: tuple[ServedBase, list[Resident]], start: Callable[..., Engine], held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "_SCORES", 5)
    held.go.set()
    store = Store(made[0], 1 << 30)
    store.replace("a", made[0].base.folder.parent / "a")
    service = Service(store, start())
    assert len(asyncio.run(service.answer([Item("a", "film")] * 2))[0]) == 2
    with pytest.raises(DataError, match="6 scores"):
        asyncio.run(service.answer([Item("a", "film")] * 3))
    assert sum(map(len, held.batches)) == 2
    assert not service._unencoded._waiting


def test_a_speed_that_is_known_stays_so_beside_small_batches(
    made: tuple[ServedBase, list[Resident]], start: Callable[..., Engine], held: Held
) -> None:
    engine, one = start(batch_tokens=100), made[1][0]
    held.go.set()
    engine.submit([(row(50), one)] * 2).result(10)
    for _ in range(60):
        engine.submit([(row(2), one)]).result(10)
    held.go.clear()
    held.began.clear()
    engine.submit([(row(5), one)])
    assert held.began.wait(10)
    engine.submit([(row(60), one)] * 4)
    assert engine.wait_s == max(1.0, 240 / engine._tokens_per_s)
    assert engine._tokens_per_s > 0
    held.go.set()


def test_one_adapter_cannot_fill_the_queue(
    made: tuple[ServedBase, list[Resident]], start: Callable[..., Engine], held: Held
) -> None:
    engine, (a, b, _) = start(queue_tokens=100), made[1]
    engine.submit([(row(5), a)])
    assert held.began.wait(10)
    engine.submit([(row(40), a)], only_adapter=False)
    with pytest.raises(OverloadedError, match='"a" fills its part'):
        engine.submit([(row(20), a)], only_adapter=False)
    assert engine.submit([(row(40), b)], only_adapter=False)
    assert engine.submit([(row(20), a)], only_adapter=True)


def test_rows_whose_time_is_over_or_whose_caller_went_are_not_computed(
    made: tuple[ServedBase, list[Resident]], start: Callable[..., Engine], held: Held
) -> None:
    engine, one = start(), made[1][0]
    first = engine.submit([(row(5), one)])
    assert held.began.wait(10)
    late = engine.submit([(row(6), one)], deadline=time.monotonic() + 0.01)
    gone = engine.submit([(row(7), one), (row(8), one)])
    kept = engine.submit([(row(9), one)])
    assert gone.cancel()
    time.sleep(0.02)
    held.go.set()
    first.result(10)
    with pytest.raises(DeadlineError):
        late.result(10)
    with pytest.raises(CancelledError):
        gone.result(10)
    kept.result(10)
    assert held.batches == [[5], [9]]
    assert engine.totals.dropped == 3
    assert engine.backlog == (0, 0)


def test_an_exception_stays_with_the_adapter_that_caused_it(
    made: tuple[ServedBase, list[Resident]], start: Callable[..., Engine], held: Held
) -> None:
    engine, (a, b, c) = start(), made[1]
    first = engine.submit([(row(5), a)])
    assert held.began.wait(10)

    def fault(adapters: Any) -> None:
        if any(one is b.beside for one in adapters):
            raise RuntimeError("broken")

    held.fault = fault
    good, bad, other = (engine.submit([(row(6), one)] * 2) for one in (a, b, c))
    held.go.set()
    first.result(10)
    assert len(good.result(10)) == len(other.result(10)) == 2
    with pytest.raises(RuntimeError, match="broken"):
        bad.result(10)
    assert engine.is_alive
    assert len(engine.submit([(row(6), a)]).result(10)) == 1


@pytest.mark.parametrize("tokens", [6, 24], ids=["by hand", "fused"])
def test_logits_that_are_not_finite_are_an_error_of_their_row(
    made: tuple[ServedBase, list[Resident]], start: Callable[..., Engine], held: Held, tokens: int
) -> None:
    engine, (a, b, _) = start(), made[1]
    held.go.set()
    kept = b.beside.numbers.clone()
    try:
        b.beside.numbers.fill_(float("inf"))
        good, bad = engine.submit([(row(tokens), a)]), engine.submit([(row(tokens), b)])
        assert good.result(10)
        with pytest.raises(DivergedError, match='"b"'):
            bad.result(10)
    finally:
        b.beside.numbers.copy_(kept)


def test_a_token_that_the_base_does_not_have_is_refused(
    made: tuple[ServedBase, list[Resident]], start: Callable[..., Engine], held: Held
) -> None:
    with pytest.raises(ArtefactError, match="vectors"):
        start().submit([(np.array([2, 1_000_000], np.int32), made[1][0])])
    held.go.set()


def test_what_was_accepted_is_answered_before_the_end(
    made: tuple[ServedBase, list[Resident]], start: Callable[..., Engine], held: Held
) -> None:
    engine, one = start(batch_tokens=10), made[1][0]
    accepted = [engine.submit([(row(9), one)]) for _ in range(5)]
    assert held.began.wait(10)
    assert not engine.close(0.05)
    with pytest.raises(StoppingError):
        engine.submit([(row(5), one)])
    held.go.set()
    assert engine.close(10)
    assert all(len(done.result(0)) == 1 for done in accepted)


def test_many_callers_at_once_get_their_own_answers(
    made: tuple[ServedBase, list[Resident]], start: Callable[..., Engine], held: Held
) -> None:
    base, residents = made
    engine = start(workers=3, batch_tokens=128)
    held.go.set()
    faults: list[object] = []

    def call(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(15):
            resident = residents[int(rng.integers(3))]
            ids = rng.integers(5, 40, int(rng.integers(2, 30))).astype(np.int32)
            found = engine.submit([(ids, resident)]).result(20)[0]
            alone = mixed.logits(base.encoder, ids, np.array([0, len(ids)]), [resident.beside], base.costs)[0]
            if np.abs(found - alone.numpy()).max() > 1e-5:
                faults.append(seed)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
