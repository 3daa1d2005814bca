"""Adapters by name: loading, evicting, replacing, refusing; nobody waits for another's file or sees another's fault."""

import errno
import hashlib
import json
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import seal, write_adapter
from bases import write_base
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trimtab import tokens, untrusted
from trimtab.config import RuntimeSettings
from trimtab.errors import ArtefactError, DataError, ResourceError, TrimtabError
from trimtab.hub import find_base
from trimtab.serving import base as bases
from trimtab.serving import store as stores
from trimtab.serving import uploads
from trimtab.serving.base import Resident, ServedBase, load_base
from trimtab.serving.memory import Pieces
from trimtab.serving.store import GenerationError, Store, UnknownAdapterError
from trimtab.serving.watch import Watch


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ServedBase, Path]:
    """A base, and the folder with the adapters a, b, c and d of one size, and other/ over another base."""
    folder = tmp_path_factory.mktemp("store")
    write_base(folder / "base", "bert")
    write_base(folder / "other-base", "bert", seed=1)
    for seed, name in enumerate("abcd"):
        write_adapter(folder / name, folder / "base", seed=seed)
    write_adapter(folder / "other", folder / "other-base")
    base = find_base(str(folder / "base"))
    return load_base(base, tokens.from_base(base.folder), RuntimeSettings(threads=1)), folder


@pytest.fixture
def store(made: tuple[ServedBase, Path]) -> Iterator[Store]:
    store = Store(made[0], 1 << 30)
    yield store
    store.close()


@pytest.fixture
def directory(made: tuple[ServedBase, Path], tmp_path: Path) -> Path:
    """A directory with copies of a, b, c and d."""
    for name in "abcd":
        shutil.copytree(made[1] / name, tmp_path / "adapters" / name)
    return tmp_path / "adapters"


def get(store: Store, name: str) -> Resident:
    """Loads an adapter and lets it go again."""
    resident = store.hold(name).result(timeout=10)
    store.release(resident)
    return resident


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    seal(folder)


# -- names and memory


def test_a_name_costs_nothing_until_it_is_asked_for(store: Store, directory: Path) -> None:
    store.register("a", directory / "a")
    assert (store.status("a").state, store.totals()["bytes"]) == ("registered", 0)
    assert get(store, "a").version.startswith("1-")
    status = store.status("a")
    assert (status.state, status.labels, status.generation, status.hits) == ("resident", ("neg", "pos"), 1, 1)
    assert status.bytes == store.totals()["bytes"] > 0


def test_an_unknown_name_is_an_error(store: Store) -> None:
    for ask in (store.hold, store.status, store.remove):
        with pytest.raises(UnknownAdapterError):
            ask("nobody")


def test_the_least_recently_used_makes_room(made: tuple[ServedBase, Path], directory: Path) -> None:
    size = bases.describe(made[0], directory / "a").layout.bytes
    store = Store(made[0], 2 * size)
    for name in "abc":
        store.register(name, directory / name)
    for name in "abac":
        get(store, name)
    assert {name: store.status(name).state for name in "abc"} == {"a": "resident", "b": "registered", "c": "resident"}
    assert store.totals()["bytes"] == 2 * size
    assert store.counts.evictions == 1
    assert get(store, "b").labels.values == ("neg", "pos")


def test_what_is_held_or_pinned_stays_and_then_there_is_no_room(made: tuple[ServedBase, Path], directory: Path) -> None:
    store = Store(made[0], 2 * bases.describe(made[0], directory / "a").layout.bytes)
    for name in "abc":
        store.register(name, directory / name)
    store.pin("a", True)
    get(store, "a")
    held = store.hold("b").result(10)
    with pytest.raises(ResourceError, match="No room"):
        store.hold("c").result(10)
    store.release(held)
    assert get(store, "c")
    assert store.status("a").state == "resident"
    store.pin("a", False)
    get(store, "b")
    get(store, "c")
    assert store.status("a").state == "registered"


# -- replacing and removing


def test_a_request_keeps_its_version_and_the_next_gets_the_new_one(store: Store, directory: Path) -> None:
    store.register("a", directory / "a")
    old = store.hold("a").result(10)
    numbers = old.beside.numbers.clone()
    new = store.replace("a", directory / "b")
    assert (old.generation, new.generation) == (1, 2)
    assert get(store, "a") is new
    get_more = [store.replace("a", directory / name) for name in "cd"]  # would take the memory, were it free
    assert torch.equal(old.beside.numbers, numbers)
    store.release(old)
    assert store.totals()["bytes"] == get_more[-1].bytes


def test_removing_lets_those_finish_that_hold_it(store: Store, directory: Path) -> None:
    store.register("a", directory / "a")
    held = store.hold("a").result(10)
    store.remove("a")
    with pytest.raises(UnknownAdapterError):
        store.hold("a")
    assert store.totals() == {"registered": 0, "resident": 0, "pinned": 0, "bytes": held.bytes}
    store.release(held)
    assert store.totals()["bytes"] == 0


def test_a_generation_can_be_expected(store: Store, directory: Path) -> None:
    with pytest.raises(GenerationError):
        store.replace("a", directory / "a", if_generation=1)
    store.replace("a", directory / "a", if_generation=0)
    with pytest.raises(GenerationError, match="in generation 1, expected 0"):
        store.replace("a", directory / "b", if_generation=0)
    with pytest.raises(GenerationError):
        store.remove("a", if_generation=7)
    assert store.replace("a", directory / "b", if_generation=1).generation == 2


def truncated(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def not_finite(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: next(iter(tensors.values())).view(-1)[0].fill_(float("nan")))


def wrong_shape(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({next(iter(tensors)): torch.zeros(3, 3)}))


def no_head(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "classifier" in name]:
            del tensors[name]

    edit_tensors(folder, edit)


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def garbled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 5_000)


def no_description(folder: Path) -> None:
    (folder / "trimtab.json").unlink()


def described(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "trimtab.json"
    meta = json.loads(file.read_text("utf-8"))
    edit(meta)
    file.write_text(json.dumps(meta), "utf-8")
    seal(folder)


def longer_than_the_base(folder: Path) -> None:
    described(folder, lambda meta: meta["preprocessing"].update(max_length=5_000))


def head_by_name_alone(folder: Path) -> None:
    no_head(folder)
    described(folder, lambda meta: meta.update(head=[]))


def huge(folder: Path) -> None:
    with (folder / "adapter_model.safetensors").open("ab") as file:
        file.truncate(1 << 40)


DAMAGES = [
    truncated,
    not_finite,
    wrong_shape,
    no_head,
    pickled,
    garbled,
    no_description,
    longer_than_the_base,
    head_by_name_alone,
    huge,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_adapter_is_refused_with_its_reason_and_the_old_one_stays(
    store: Store, directory: Path, damage: Callable[[Path], object]
) -> None:
    store.register("a", directory / "a")
    old = get(store, "a")
    damage(directory / "b")
    with pytest.raises(ArtefactError) as refused:
        store.replace("a", directory / "b")
    assert refused.value.what
    assert get(store, "a") is old
    assert store.totals()["bytes"] == old.bytes


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_adapter_fails_alone(store: Store, directory: Path, damage: Callable[[Path], object]) -> None:
    damage(directory / "b")
    for name in "abc":
        store.register(name, directory / name)
    with pytest.raises(ArtefactError):
        store.hold("b").result(10)
    assert store.status("b").state == "failed"
    assert store.status("b").reason
    assert get(store, "a")
    assert get(store, "c")


def test_an_adapter_of_another_base_is_refused(store: Store, made: tuple[ServedBase, Path]) -> None:
    with pytest.raises(ArtefactError, match="weights are not the base's here"):
        store.replace("other", made[1] / "other")
    assert "other" not in store.names()


def test_a_folder_that_was_mended_is_read_again(
    store: Store, made: tuple[ServedBase, Path], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.register("a", directory / "a")
    truncated(directory / "a")
    with pytest.raises(ArtefactError):
        store.hold("a").result(10)
    shutil.copytree(made[1] / "a", directory / "a", dirs_exist_ok=True)
    with pytest.raises(ArtefactError):
        store.hold("a").result(10)  # not at every request
    monkeypatch.setattr(stores, "_RETRY_S", 0.0)
    assert get(store, "a")


def test_files_that_go_or_shrink_while_in_use_harm_nobody(store: Store, directory: Path) -> None:
    store.register("a", directory / "a")
    held = store.hold("a").result(10)
    before = held.beside.numbers.clone()
    (directory / "a" / "adapter_model.safetensors").write_bytes(b"")
    shutil.rmtree(directory / "a")
    assert torch.equal(held.beside.numbers, before)
    store.release(held)
    assert get(store, "a") is held


# -- waiting


def test_nobody_waits_for_another_ones_slow_file(
    store: Store, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, describe = threading.Event(), stores.describe

    def delayed(served: ServedBase, folder: Path, *rest: Any) -> Any:
        if folder.name == "a":
            slow.wait(10)
        return describe(served, folder, *rest)

    monkeypatch.setattr(stores, "describe", delayed)
    for name in "ab":
        store.register(name, directory / name)
    waiting = [store.hold("a") for _ in range(5)]
    assert get(store, "b")
    assert not any(one.done() for one in waiting)
    assert store.status("a").state == "loading"
    slow.set()
    assert len({id(one.result(10)) for one in waiting}) == 1
    assert store.counts.loads == 2  # those who waited for the same file had it read once
    for one in waiting:
        store.release(one.result())


def test_one_who_no_longer_waits_lets_go_in_the_very_moment_of_the_hand_over(
    store: Store, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, describe = threading.Event(), stores.describe
    monkeypatch.setattr(stores, "describe", lambda *all_: (slow.wait(10), describe(*all_))[1])
    store.register("a", directory / "a")
    waiting, let_go = store.hold("a"), threading.Event()

    def release(done: Any) -> None:
        store.release(done.result())
        let_go.set()

    waiting.add_done_callback(release)
    slow.set()
    assert let_go.wait(10), "the store is locked by itself"
    assert store.status("a").state == "resident"


def test_a_registered_name_is_there_for_whoever_expects_none(store: Store, directory: Path) -> None:
    store.register("a", directory / "a")
    with pytest.raises(GenerationError):
        store.replace("a", directory / "b", if_generation=0)


def test_the_same_files_again_are_the_same_version(store: Store, directory: Path) -> None:
    store.register("a", directory / "a")
    first = get(store, "a")
    again = store.replace("a", directory / "a")
    assert (again.version, again is first) == (first.version, False)
    assert store.replace("a", directory / "b").generation == 2


def test_a_refused_folder_is_no_fault_of_the_one_that_is_there(store: Store, directory: Path) -> None:
    truncated(directory / "b")
    store.register("a", directory / "a")
    with pytest.raises(ArtefactError):
        store.replace("a", directory / "b")
    assert store.status("a").state == "registered"
    assert get(store, "a")


def test_one_that_cannot_fit_drives_nobody_out_and_is_not_read(
    made: tuple[ServedBase, Path], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = bases.describe(made[0], directory / "a").layout.bytes
    store = Store(made[0], 2 * size)
    for name in "ab":
        store.register(name, directory / name)
        get(store, name)
    store._bytes += size  # as if requests held versions of this size
    store.budget_bytes -= size // 2
    monkeypatch.setattr(untrusted, "read_tensors", lambda *all_: pytest.fail("its tensors were read"))
    store.budget_bytes = size - 1
    with pytest.raises(ResourceError):
        store.replace("c", directory / "c")
    assert [store.status(name).state for name in "ab"] == ["resident", "resident"]


def with_tokenizer(folder: Path, text: str) -> None:
    """An adapter that says that it was trained with a tokenizer of this text."""
    (folder / "tokenizer.json").write_text(text, "utf-8")
    sha256 = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    described(folder, lambda meta: meta["preprocessing"].update(tokenizer_sha256=sha256))


@pytest.mark.parametrize(
    "change",
    [
        lambda said: {"model": {}},
        lambda said: said | {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 20_000}},
        lambda said: said | {"more": list(range(1_000_000))},
        None,
    ],
    ids=["no tokenizer", "one that makes more of a text", "one that is long", "no JSON"],
)
def test_an_adapter_brings_no_tokenizer_of_its_own(
    store: Store, directory: Path, change: Callable[[dict[str, Any]], object] | None
) -> None:
    said = json.loads((directory / "a" / "tokenizer.json").read_text("utf-8"))
    with_tokenizer(directory / "a", "[" * 100_000 if change is None else json.dumps(change(said)))
    with pytest.raises(ArtefactError, match=r"another tokenizer"):
        store.replace("new", directory / "a")
    assert store.names() == []


def test_the_same_tokenizer_written_by_another_version_is_the_bases(store: Store, directory: Path) -> None:
    said = json.loads((directory / "a" / "tokenizer.json").read_text("utf-8"))
    said["model"] = {"a_new_setting": False, "another": None} | said["model"]
    with_tokenizer(directory / "a", json.dumps(said, indent=1))
    assert store.replace("new", directory / "a")


def test_who_gave_up_waiting_holds_nothing(store: Store, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, describe = threading.Event(), stores.describe
    monkeypatch.setattr(stores, "describe", lambda *all_: (slow.wait(10), describe(*all_))[1])
    store.register("a", directory / "a")
    first, second = store.hold("a"), store.hold("a")
    assert first.cancel()
    slow.set()
    store.release(second.result(10))
    store.remove("a")
    assert store.totals()["bytes"] == 0


def test_what_is_removed_while_it_is_read_takes_no_memory(
    store: Store, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, describe = threading.Event(), stores.describe
    monkeypatch.setattr(stores, "describe", lambda *all_: (slow.wait(10), describe(*all_))[1])
    store.register("a", directory / "a")
    waiting = store.hold("a")
    store.remove("a")
    slow.set()
    with pytest.raises(UnknownAdapterError):
        waiting.result(10)
    assert store.totals()["bytes"] == 0


def test_replacing_needs_no_room_beside_what_it_replaces(made: tuple[ServedBase, Path], directory: Path) -> None:
    store = Store(made[0], bases.describe(made[0], directory / "a").layout.bytes)
    store.replace("a", directory / "a")
    assert store.replace("a", directory / "b").generation == 2
    store.pin("a", True)
    assert store.replace("a", directory / "c").generation == 3
    truncated(directory / "d")
    with pytest.raises(ArtefactError):
        store.replace("a", directory / "d")
    assert store.status("a").state == "resident"
    assert store.totals()["bytes"] == store.budget_bytes


def test_many_threads_at_once_leave_the_books_in_order(made: tuple[ServedBase, Path], directory: Path) -> None:
    size = bases.describe(made[0], directory / "a").layout.bytes
    store = Store(made[0], 3 * size)
    for name in "abcd":
        store.register(name, directory / name)
    expected = {name: get(store, name).beside.numbers.clone() for name in "abcd"}
    faults: list[object] = []

    def use(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            name = rng.choice("abcd")
            try:
                if rng.random() < 0.1:
                    store.replace(name, directory / name)
                held = store.hold(name).result(20)
                if not torch.equal(held.beside.numbers, expected[name]) or held.name != name:
                    faults.append(name)
                store.release(held)
            except ResourceError:
                pass  # three adapters fit, and others hold them
            except Exception as error:
                faults.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert store.totals()["bytes"] == size * store.totals()["resident"] <= 3 * size
    assert store._holders == {}


def test_a_name_that_is_registered_while_it_is_read_gets_the_new_files(
    store: Store, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go, describe = threading.Event(), threading.Event(), stores.describe

    def slow(served: ServedBase, folder: Path) -> Any:
        found = describe(served, folder)
        began.set()
        go.wait(10)
        return found

    monkeypatch.setattr(stores, "describe", slow)
    store.register("x", directory / "a")
    waiting = store.hold("x")
    assert began.wait(10)
    store.register("x", directory / "b")
    go.set()
    found = waiting.result(10)
    assert (found.generation, found.sha256) == (2, describe(store.served, directory / "b").adapter.description_sha256)
    assert get(store, "x") is not None
    store.release(found)
    assert store.totals()["bytes"] == found.bytes


def test_a_new_name_that_fails_takes_nothing_from_one_that_was_registered_meanwhile(
    store: Store, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(served: ServedBase, folder: Path) -> Any:
        store.register("x", directory / "a")
        raise ArtefactError("adapter.damaged", "It is broken.")

    with monkeypatch.context() as patch:
        patch.setattr(stores, "describe", fails)
        with pytest.raises(ArtefactError):
            store.replace("x", directory / "b")
    assert get(store, "x")


def test_a_folder_that_is_exchanged_while_it_is_read_is_read_again(
    store: Store, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = bases.Described.read_tensors

    def exchanged(found: bases.Described) -> Any:
        monkeypatch.setattr(bases.Described, "read_tensors", read)
        shutil.rmtree(directory / "a")
        shutil.copytree(directory / "b", directory / "a")
        return read(found)

    monkeypatch.setattr(bases.Described, "read_tensors", exchanged)
    store.register("a", directory / "a")
    assert get(store, "a").sha256 == stores.describe(store.served, directory / "b").adapter.description_sha256
    assert store.counts.failures == {}


def test_a_name_that_comes_again_goes_on_counting(store: Store, directory: Path) -> None:
    store.replace("a", directory / "a")
    store.replace("a", directory / "b")
    store.remove("a")
    assert store.replace("a", directory / "c").generation == 3
    with pytest.raises(GenerationError):
        store.replace("a", directory / "d", if_generation=1)


def test_what_fails_is_said_once_and_every_caller_gets_an_error_of_their_own(
    made: tuple[ServedBase, Path], directory: Path
) -> None:
    said: list[str] = []
    store = Store(made[0], 1 << 30, said.append)
    truncated(directory / "a")
    store.register("a", directory / "a")
    errors = [store.hold("a").exception(10) for _ in range(3)]
    assert len({id(error) for error in errors}) == 3
    assert {type(error) for error in errors} == {ArtefactError}
    assert len(said) == 1
    assert said[0].startswith("a: cannot be used; ")


def test_what_the_system_refuses_is_not_the_adapters_fault(
    store: Store, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_many(served: ServedBase, folder: Path) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    watch = Watch(store, directory)
    watch.first_look()
    get(store, "a")
    shutil.rmtree(directory / "a")
    shutil.copytree(directory / "b", directory / "a")
    with monkeypatch.context() as patch:
        patch.setattr(stores, "describe", too_many)
        with pytest.raises(ResourceError, match="Too many"):
            store.hold("c").result(10)
        for _ in range(3):
            watch.look()
    assert get(store, "c")
    watch.look()
    assert get(store, "a").generation == 2


def test_files_that_cannot_be_used_are_read_again_only_once_they_changed(
    store: Store, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_RETRY_S", 0.0)
    kept, reads, describe = files_of(directory / "a"), [], stores.describe
    monkeypatch.setattr(stores, "describe", lambda *all_: (reads.append(1), describe(*all_))[1])
    truncated(directory / "a")
    store.register("a", directory / "a")
    for _ in range(3):
        with pytest.raises(ArtefactError):
            store.hold("a").result(10)
    assert len(reads) == 1
    for name, data in kept.items():
        (directory / "a" / name).write_bytes(data)
    assert get(store, "a")


def test_a_strangers_words_are_cut_and_made_plain(made: tuple[ServedBase, Path], directory: Path) -> None:
    said: list[str] = []
    store = Store(made[0], 1 << 30, said.append)
    described(directory / "a", lambda meta: meta.update(schema_version="\x1b[2J\nready " * 100_000))
    with pytest.raises(ArtefactError) as refused:
        store.replace("a", directory / "a")
    store.register("a", directory / "a")
    with pytest.raises(ArtefactError):
        store.hold("a").result(10)
    for text in (refused.value.what, store.status("a").reason, *said):
        assert len(text) < 400
        assert text.isprintable()


def test_labels_have_a_length(store: Store, directory: Path) -> None:
    described(directory / "a", lambda meta: meta["labels"][0].update(label="x" * 201))
    with pytest.raises(ArtefactError, match="201 characters"):
        store.replace("a", directory / "a")


def test_one_adapter_takes_an_eighth_of_the_memory_at_most(
    made: tuple[ServedBase, Path], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = bases.describe(made[0], directory / "a").layout.bytes
    monkeypatch.setattr(stores, "_LARGE", 0)
    assert Store(made[0], 8 * size).replace("a", directory / "a")
    with pytest.raises(ArtefactError, match="an eighth"):
        Store(made[0], 8 * size - 8).replace("a", directory / "a")


def test_pieces_of_a_size_that_nobody_has_leave_no_mapping() -> None:
    pieces = Pieces()
    taken = [pieces.take(1 << 20) for _ in range(20)]
    for piece in taken:
        pieces.give_back(piece)
    assert (pieces._free, pieces._places) == ({}, {})


def test_pages_of_a_piece_that_was_given_back_are_let_go() -> None:
    pieces = Pieces()
    piece, _other = pieces.take(1 << 20), pieces.take(1 << 20)
    piece.fill_(7)
    pieces.give_back(piece)
    assert int(pieces.take(1 << 20)[1 << 16 : -(1 << 16)].max()) == 0


# -- names that could lead elsewhere

_OPENED: list[str] | None = None


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if _OPENED is not None and event in ("open", "os.rename", "os.mkdir", "os.scandir", "shutil.rmtree"):
        _OPENED.append(str(arguments[0]))


sys.addaudithook(_note_opened)

PARTS = st.sampled_from(
    [
        "..",
        ".",
        "/",
        "\\",
        "a",
        "b",
        "%2e%2e",
        "\0",
        "~",
        "secret",
        "C:",
        "//",
        "a/../..",
        "\u2025",
        "é",
        " ",
        "\n",
        "-",
    ]
)


@pytest.mark.parametrize("use", ["inside", "upload", "register"])
def test_no_name_leads_out_of_the_directory(store: Store, directory: Path, use: str) -> None:
    outside = directory.parent / "secret"
    shutil.copytree(directory / "a", outside)
    (directory / "link").symlink_to(outside)
    tries = {"inside": 2_000, "upload": 500, "register": 500}[use]
    good = files_of(directory / "a")

    @settings(max_examples=tries, deadline=None, database=None)
    @given(st.lists(PARTS, min_size=1, max_size=6).map("".join) | st.text(max_size=20) | st.just(str(outside)))
    def no_way_out(name: str) -> None:
        global _OPENED
        _OPENED = []
        try:
            if use == "inside":
                folder = uploads.inside(directory, name)
                assert os.path.dirname(os.path.realpath(folder)) == str(directory)
            elif use == "upload":
                uploads.put(store, directory, name, good)
            else:
                store.replace(name, uploads.inside(directory, name))
        except TrimtabError:
            pass
        finally:
            opened, _OPENED = _OPENED, None
        outside_of = [path for path in opened if not os.path.realpath(path).startswith(str(directory))]
        assert [path for path in outside_of if "secret" in path or ".." in path] == []

    no_way_out()
    with pytest.raises(DataError):
        uploads.inside(directory, "link")
    assert (outside / "trimtab.json").is_file()
    assert sorted(path.name for path in directory.parent.iterdir()) == ["adapters", "secret"]
    assert use == "upload" or dict(stores.folders(directory)).keys() == set("abcd")


def test_links_out_of_an_adapters_folder_are_not_followed(store: Store, directory: Path, tmp_path: Path) -> None:
    file = directory / "a" / "adapter_model.safetensors"
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtefactError, match="leads out"):
        store.replace("a", directory / "a")


# -- uploads


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_an_upload_is_served_and_replaced_and_a_bad_one_leaves_no_trace(
    store: Store, made: tuple[ServedBase, Path], directory: Path
) -> None:
    assert uploads.put(store, directory, "new", files_of(made[1] / "a")).generation == 1
    there = get(store, "new")
    good = files_of(directory / "new")
    with pytest.raises(ArtefactError):
        uploads.put(store, directory, "new", files_of(made[1] / "b") | {"adapter_model.safetensors": b"no"})
    with pytest.raises(DataError, match="no file of an adapter"):
        uploads.put(store, directory, "new", good | {"../evil": b""})
    assert get(store, "new") is there
    assert files_of(directory / "new") == good
    with pytest.raises(GenerationError):
        uploads.put(store, directory, "new", files_of(made[1] / "b"), if_generation=7)
    assert files_of(directory / "new") == good
    assert uploads.put(store, directory, "new", files_of(made[1] / "b"), if_generation=1).generation == 2
    assert sorted(path.name for path in directory.iterdir()) == ["a", "b", "c", "d", "new"]


def test_a_disk_that_is_full_leaves_no_trace(
    store: Store, made: tuple[ServedBase, Path], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(uploads.durable, "write_bytes", full)
    with pytest.raises(ResourceError, match="No space left"):
        uploads.put(store, directory, "new", files_of(made[1] / "a"))
    assert sorted(path.name for path in directory.iterdir()) == ["a", "b", "c", "d"]


def test_nobody_reads_a_folder_while_an_upload_exchanges_it(
    store: Store, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.register("a", directory / "a")
    new, replace, waiting = files_of(directory / "b"), store.replace, []

    def asked_in_between(*given: Any, **named: Any) -> Resident:
        waiting.append(store.hold("a"))
        time.sleep(0.2)
        return replace(*given, **named)

    monkeypatch.setattr(store, "replace", asked_in_between)
    put = uploads.put(store, directory, "a", new, if_generation=1)
    assert waiting[0].result(10) is put


def test_an_upload_takes_no_name_of_the_command_line_and_no_plain_file(
    store: Store, made: tuple[ServedBase, Path], directory: Path
) -> None:
    store.replace("named", made[1] / "a")
    (directory / "plain").write_text("mine")
    for name in ("named", "plain"):
        with pytest.raises(DataError):
            uploads.put(store, directory, name, files_of(made[1] / "b"))
    assert (directory / "plain").read_text() == "mine"
    assert not (directory / "named").exists()


def test_an_upload_that_fails_takes_nothing_from_one_that_is_under_way(
    store: Store, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.register("a", directory / "a")
    kept, new = files_of(directory / "a"), files_of(directory / "b")

    def another_fails_and_then_this(*given: Any, **named: Any) -> Resident:
        with pytest.raises(TrimtabError):
            uploads.put(store, directory, "a", new | {"adapter_model.safetensors": b"no"})
        raise ResourceError("serve.memory", "No room.")

    monkeypatch.setattr(store, "replace", another_fails_and_then_this)
    with pytest.raises(ResourceError):
        uploads.put(store, directory, "a", new)
    assert files_of(directory / "a") == kept
    assert sorted(path.name for path in directory.iterdir()) == ["a", "b", "c", "d"]


def test_what_killed_uploads_left_is_cleared_and_what_they_moved_aside_comes_back(directory: Path) -> None:
    kept = files_of(directory / "a")
    mark = "0" * 32
    (directory / "a").rename(directory / f".trimtab-old-{mark}-a")
    shutil.copytree(directory / "b", directory / f".trimtab-old-{mark}-b")
    shutil.copytree(directory / "b", directory / f".trimtab-new-{mark}")
    shutil.copytree(directory / "b", directory / ".trimtab-new-another-servers")
    for left in directory.glob(f".trimtab-*{mark}*"):
        os.utime(left, (0, 0))
    uploads.tidy(directory)
    shutil.rmtree(directory / ".trimtab-new-another-servers")
    assert sorted(path.name for path in directory.iterdir()) == ["a", "b", "c", "d"]
    assert files_of(directory / "a") == kept


# -- the watched directory


def test_folders_come_change_and_go(store: Store, made: tuple[ServedBase, Path], directory: Path) -> None:
    said: list[str] = []
    store = Store(store.served, store.budget_bytes, said.append)
    watch = Watch(store, directory)
    watch.first_look()
    assert store.names() == ["a", "b", "c", "d"]
    old = get(store, "a")

    shutil.copytree(made[1] / "c", directory / "e")
    shutil.rmtree(directory / "d")
    shutil.copytree(made[1] / "b", directory / ".draft")
    shutil.rmtree(directory / "a")
    (directory / ".draft").rename(directory / "a")
    watch.look()
    assert store.names() == ["a", "b", "c", "d"]  # what is new, or gone, has not settled yet
    watch.look()
    assert store.names() == ["a", "b", "c", "e"]
    new = get(store, "a")
    assert (new.generation, new.sha256 != old.sha256) == (2, True)
    watch.look()
    assert get(store, "a") is new
    assert said == [f"a: replaced by {new.version}", "d: removed", "e: added"]


def test_a_bad_change_leaves_the_old_one_and_is_told_once(store: Store, directory: Path) -> None:
    said: list[str] = []
    store = Store(store.served, store.budget_bytes, said.append)
    watch = Watch(store, directory)
    watch.first_look()
    old = get(store, "a")
    time.sleep(0.01)
    truncated(directory / "a")
    for _ in range(4):
        watch.look()
    assert get(store, "a") is old
    assert store.status("a").reason
    assert len(said) == 1
    assert said[0].startswith("a: cannot be used; ")


def test_a_folder_that_is_still_being_copied_is_left_alone(
    store: Store, made: tuple[ServedBase, Path], directory: Path
) -> None:
    watch = Watch(store, directory)
    watch.first_look()
    (directory / "e").mkdir()
    for i, file in enumerate(sorted((made[1] / "c").iterdir())):
        watch.look()
        assert "e" not in store.names(), i
        shutil.copy(file, directory / "e")
        time.sleep(0.01)
    watch.look()
    watch.look()
    assert get(store, "e")


def test_what_was_removed_or_put_by_hand_stays_so_until_its_folder_changes(store: Store, directory: Path) -> None:
    watch = Watch(store, directory)
    watch.first_look()
    watch.remove("d")
    uploads.put(store, directory, "e", files_of(directory / "a"))
    watch.remove("e")  # before any look has seen it
    put = store.replace("b", directory / "c")
    for _ in range(3):
        watch.look()
    assert store.names() == ["a", "b", "c"]
    assert get(store, "b") is put

    os.utime(directory / "d")
    (directory / "e").rename(directory / ".e")
    watch.look()
    (directory / ".e").rename(directory / "e")
    for _ in range(2):
        watch.look()
    assert store.names() == ["a", "b", "c", "d", "e"]


def test_what_the_command_line_named_is_not_the_directorys_to_forget(
    store: Store, made: tuple[ServedBase, Path], directory: Path
) -> None:
    store.replace("named", made[1] / "a")
    watch = Watch(store, directory)
    watch.first_look()
    watch.look()
    assert "named" in store.names()


def test_a_directory_does_not_take_a_name_that_is_served_from_elsewhere(
    store: Store, made: tuple[ServedBase, Path], directory: Path
) -> None:
    watch = Watch(store, directory)
    watch.first_look()
    named = store.replace("named", made[1] / "a")
    shutil.copytree(directory / "b", directory / "named")
    for _ in range(3):
        watch.look()
    assert get(store, "named") is named
    shutil.rmtree(directory / "named")
    for _ in range(3):
        watch.look()
    assert get(store, "named") is named


def test_a_folder_that_was_put_under_another_name_is_watched_too(store: Store, directory: Path) -> None:
    watch = Watch(store, directory)
    watch.first_look()
    old = store.replace("alias", directory / "a")
    watch.look()
    shutil.rmtree(directory / "a")
    shutil.copytree(directory / "b", directory / "a")
    for _ in range(2):
        watch.look()
    assert get(store, "alias").sha256 == get(store, "a").sha256 != old.sha256
    shutil.rmtree(directory / "a")
    for _ in range(2):
        watch.look()
    assert store.names() == ["b", "c", "d"]


def test_a_link_in_the_directory_is_told_of_once(made: tuple[ServedBase, Path], directory: Path) -> None:
    said: list[str] = []
    watch = Watch(Store(made[0], 1 << 30, said.append), directory)
    (directory / "run").symlink_to(made[1] / "a")
    watch.first_look()
    for _ in range(3):
        watch.look()
    assert said == ["run: is a link, and links are not followed; cp -rL LINK FOLDER makes a folder of it"]


def test_a_name_stays_while_its_folder_is_exchanged(store: Store, directory: Path) -> None:
    watch = Watch(store, directory)
    watch.first_look()
    old = get(store, "a")
    (directory / "a").rename(directory / ".old")
    watch.look()
    assert get(store, "a") is old
    (directory / "b").rename(directory / "a")
    watch.look()
    watch.look()
    assert get(store, "a").generation == 2


def test_a_replacement_that_had_no_room_is_tried_again_and_says_why(
    made: tuple[ServedBase, Path], directory: Path
) -> None:
    said: list[str] = []
    store = Store(made[0], 1 << 30, said.append)
    watch = Watch(store, directory)
    watch.first_look()
    old = store.hold("a").result(10)
    store.budget_bytes = old.bytes
    shutil.rmtree(directory / "a")
    shutil.copytree(directory / "b", directory / "a")
    for _ in range(4):
        watch.look()
    assert len(said) == 1
    assert "No room" in store.status("a").reason
    store.release(old)
    watch.look()
    assert get(store, "a").generation == 2
