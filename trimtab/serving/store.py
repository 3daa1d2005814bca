"""Adapters by name: registered, in memory, pinned or evicted, replaced while requests run.

A name is registered with its folder and costs a few hundred bytes until somebody asks for it; then a thread of its own
reads it, and nobody else waits. What is least recently used makes room, within a budget of bytes. A version stays in
memory as long as a request holds it, whatever becomes of its name: replacing is one assignment, and a new version that
cannot be read leaves the old one where it is.
"""

import copy
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from trimtab import untrusted
from trimtab.errors import ArtefactError, ResourceError, TrimtabError, plain
from trimtab.serving.base import Described, Resident, ServedBase, describe, place
from trimtab.serving.memory import Pieces

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What an adapter may be called: it stands in addresses, headers and folders."""

Stamp = tuple[tuple[int, int, int], ...]
"""What changes when a folder's files do: inode, time and size of each."""


class UnknownAdapterError(ArtefactError):
    """No adapter has this name. Never answered by the base or by another adapter."""


class GenerationError(ArtefactError):
    """The adapter is not in the version that the caller expects."""


@dataclass
class _Entry:
    """What is known of a name. Changed under the store's lock alone."""

    name: str
    folder: Path
    stamp: Stamp
    generation: int = 0
    sha256: str | None = "none yet"
    """Of the version that `generation` counts; None: of whatever its files turn out to be."""
    resident: Resident | None = None
    failed: TrimtabError | None = None
    """Why its newest version cannot be used; an older one may be in memory nevertheless."""
    failed_at: float = 0.0
    failed_stamp: Stamp | None = None
    """What its files were like, where it is they that cannot be used: they are not read again before they change."""
    loading: "Future[Resident] | None" = None
    reading: threading.RLock = field(default_factory=threading.RLock)
    """Held while a version is read, so that the last to be asked for is the last to be in place."""
    changes: int = 0
    """Counts registrations and replacements: who reads meanwhile sees that it reads what is over."""
    pinned: bool = False
    hits: int = 0
    last_used: float = 0.0


@dataclass(frozen=True)
class Status:
    """What the outside sees of an adapter."""

    name: str
    state: str
    """registered, loading, resident or failed"""
    generation: int
    version: str
    pinned: bool
    hits: int
    last_used: float
    """Seconds since 1970; 0: never."""
    bytes: int
    rank: int
    variant: str
    targets: tuple[str, ...]
    labels: tuple[str, ...]
    reason: str
    """Why the newest version cannot be used; empty where it can."""


@dataclass
class Counts:
    """What has happened since the start."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    failures: dict[str, int] = field(default_factory=dict)
    """By the error's code."""


class Store:
    """The adapters of one server. Every method may be called from any thread."""

    def __init__(
        self,
        served: ServedBase,
        budget_bytes: int,
        say: Callable[[str], None] = lambda line: None,
        loaders: int = 8,
    ) -> None:
        self.served, self.say = served, say
        self.budget_bytes = budget_bytes
        self.counts = Counts()
        self.directory_lock = threading.Lock()
        """Held while folders of the adapter directory are exchanged, and while it is looked through."""
        self._pieces = Pieces()
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._recent: OrderedDict[str, None] = OrderedDict()
        """Names with an evictable version in memory, the least recently used first."""
        self._holders: dict[int, tuple[Resident, int]] = {}
        """Of each version that requests hold: how many. By id: a version equals itself alone."""
        self._bytes = 0
        self._large = threading.Lock()
        self._over = 0
        """The highest generation of the names that were removed: one that comes again goes on above it."""
        # More than cores: what they wait for is a disk, and one that hangs must not keep the others.
        self._loaders = ThreadPoolExecutor(loaders, thread_name_prefix="load")

    # -- names ---------------------------------------------------------------------------------------------------

    def register(self, name: str, folder: Path) -> None:
        """Makes a name known without reading its files. A name that is known gets a new version, read when asked for.

        Raises:
            ArtefactError: it cannot be a name.
        """
        check_name(name)
        found = stamp(folder)
        with self._lock:
            entry = self._entries.setdefault(name, _Entry(name, folder, found, generation=self._over))
            entry.folder, entry.stamp, entry.failed, entry.failed_stamp = folder, found, None, None
            entry.generation, entry.sha256 = entry.generation + 1, None
            entry.changes += 1
            self._drop(entry)

    def replace(self, name: str, folder: Path, *, if_generation: int | None = None) -> Resident:
        """Reads a folder and makes it the version of a name at once; what is there stays where it cannot be read.

        Raises:
            ArtefactError: the folder cannot be used; the name keeps its version.
            GenerationError: the name is not in the generation that was expected; 0 expects no such name.
            ResourceError: it does not fit the memory budget.
        """
        check_name(name)
        with self._lock:
            entry = self._entries.get(name)
            self._check_generation(entry, name, if_generation)
            entry = entry or _Entry(name, folder, (), generation=self._over)
        with entry.reading:
            before, resident = self._read(entry, folder)
            with self._lock:
                try:
                    self._check_generation(self._entries.get(name), name, if_generation)
                except GenerationError:
                    self._free(resident)
                    raise
                # Asked for just now, whatever was removed or registered while it was read.
                entry = self._entries.setdefault(name, entry)
                entry.changes += 1
                return self._put_in_place(entry, folder, before, resident)

    def remove(self, name: str, *, if_generation: int | None = None) -> None:
        """Forgets a name. Requests that hold its version are answered.

        Raises:
            UnknownAdapterError: there is none of that name.
            GenerationError: it is not in the generation that was expected.
        """
        with self._lock:
            entry = self._known(name)
            self._check_generation(entry, name, if_generation)
            self._drop(entry)
            self._over = max(self._over, entry.generation)
            del self._entries[name]

    def check(self, folder: Path) -> None:
        """Reads a folder as for a name, and lets it go again.

        Raises:
            TrimtabError: it cannot be served.
        """
        self._tensors(self._described(folder))

    @contextmanager
    def exchanging(self, name: str) -> Iterator[None]:
        """While a folder of a name is exchanged: its files are read by nobody but the caller."""
        with self._lock:
            entry = self._entries.get(name)
        with entry.reading if entry else nullcontext():
            yield

    def pin(self, name: str, pinned: bool) -> None:
        """Keeps an adapter in memory from its next use on, or no longer.

        Raises:
            UnknownAdapterError: there is none of that name.
        """
        with self._lock:
            entry = self._known(name)
            entry.pinned = pinned
            self._recent.pop(name, None)
            if entry.resident and not pinned:
                self._recent[name] = None

    def __len__(self) -> int:
        return len(self._entries)

    def stamp_of(self, name: str) -> Stamp | None:
        """What the files were like that are in use under a name; None where there is no such name."""
        with self._lock:
            entry = self._entries.get(name)
            return entry.stamp if entry else None

    def places(self) -> dict[str, Path]:
        """All names with their folders."""
        with self._lock:
            return {name: entry.folder for name, entry in self._entries.items()}

    def check_generation(self, name: str, expected: int | None) -> None:
        """Raises a GenerationError where a name is not in the generation that was expected."""
        with self._lock:
            self._check_generation(self._entries.get(name), name, expected)

    def names(self) -> list[str]:
        """All names, sorted."""
        with self._lock:
            return sorted(self._entries)

    def status(self, name: str) -> Status:
        """What is known of one adapter.

        Raises:
            UnknownAdapterError: there is none of that name.
        """
        with self._lock:
            entry = self._known(name)
            held = entry.resident
            is_bad = entry.failed_stamp is not None
            state = "resident" if held else "loading" if entry.loading else "failed" if is_bad else "registered"
            return Status(
                name=name,
                state=state,
                generation=entry.generation,
                version=held.version if held else "",
                pinned=entry.pinned,
                hits=entry.hits,
                last_used=entry.last_used,
                bytes=held.bytes if held else 0,
                rank=held.rank if held else 0,
                variant=held.variant if held else "",
                targets=held.targets if held else (),
                labels=held.labels.values if held else (),
                reason=entry.failed.what if entry.failed else "",
            )

    def totals(self) -> dict[str, int]:
        """How many adapters are registered, resident and pinned, and the bytes of all versions in memory."""
        with self._lock:
            entries = self._entries.values()
            return {
                "registered": len(entries),
                "resident": sum(entry.resident is not None for entry in entries),
                "pinned": sum(entry.pinned for entry in entries),
                "bytes": self._bytes,
            }

    # -- versions in memory ----------------------------------------------------------------------------------------

    def hold(self, name: str) -> "Future[Resident]":
        """The version that a request is to be answered with; `release` it afterwards.

        A future, so that one who waits for a file keeps nobody else waiting.

        Raises:
            UnknownAdapterError: there is none of that name.
        """
        with self._lock:
            entry = self._known(name)
            entry.hits += 1
            entry.last_used = time.time()
            if entry.resident is not None:
                self.counts.hits += 1
                if name in self._recent:
                    self._recent.move_to_end(name)
                done: Future[Resident] = Future()
                done.set_result(self._held(entry.resident))
                return done
            self.counts.misses += 1
            if entry.loading is None:
                if entry.failed_stamp is not None and time.monotonic() - entry.failed_at < _RETRY_S:
                    failed: Future[Resident] = Future()
                    failed.set_exception(_another(entry.failed))
                    return failed
                entry.loading = self._loaders.submit(self._load, entry)
            loading, mine = entry.loading, Future[Resident]()
        loading.add_done_callback(lambda found: self._hand_over(entry, found, mine))
        return mine

    def release(self, resident: Resident) -> None:
        """Ends a `hold`."""
        with self._lock:
            _, count = self._holders[id(resident)]
            if count > 1:
                self._holders[id(resident)] = (resident, count - 1)
                return
            del self._holders[id(resident)]
            entry = self._entries.get(resident.name)
            if entry is None or entry.resident is not resident:
                self._free(resident)

    def close(self, timeout_s: float = 30.0) -> None:
        """Reads nothing more, and waits for what is being read, but no longer than that."""
        with self._lock:
            loading = [entry.loading for entry in self._entries.values() if entry.loading]
        self._loaders.shutdown(wait=False, cancel_futures=True)
        wait(loading, timeout_s)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _known(self, name: str) -> _Entry:
        if name not in self._entries:
            raise UnknownAdapterError(
                "serve.unknown_adapter",
                f'There is no adapter "{name[:100]}" here.',  # no "did you mean": names are other people's secrets
                mend="GET /v1/models lists them",
            )
        return self._entries[name]

    def _check_generation(self, entry: _Entry | None, name: str, expected: int | None) -> None:
        found = entry.generation if entry else 0
        if expected is not None and found != expected:
            raise GenerationError(
                "serve.generation",
                f'"{name}" is in generation {found}, expected {expected}.',
                mend=f"GET /v1/adapters/{name}, and decide again",
            )

    def _held(self, resident: Resident) -> Resident:
        _, count = self._holders.get(id(resident), (resident, 0))
        self._holders[id(resident)] = (resident, count + 1)
        return resident

    def _hand_over(self, entry: _Entry, found: "Future[Resident]", mine: "Future[Resident]") -> None:
        """Gives a version that has been read to one who waits, if nobody evicted it meanwhile; else asks again."""
        if not mine.set_running_or_notify_cancel():
            return
        if found.cancelled():  # by `close`
            mine.set_exception(ResourceError("serve.stopping", "The server stops."))
            return
        if found.exception() is not None:
            mine.set_exception(_another(found.exception()))
            return
        resident = found.result()
        with self._lock:
            is_there = entry.resident is resident or id(resident) in self._holders
            if is_there:
                self._held(resident)
        if is_there:
            mine.set_result(resident)  # without the lock: who waits no longer releases it in this very call
            return
        try:
            self.hold(entry.name).add_done_callback(lambda again: _copy(again, mine))
        except UnknownAdapterError as error:
            mine.set_exception(error)

    def _load(self, entry: _Entry) -> Resident:
        """Reads the folder of an entry and makes it the entry's version."""
        try:
            with entry.reading:
                while True:
                    with self._lock:
                        if entry.resident is not None:  # somebody has put one in place meanwhile
                            return entry.resident
                        folder, changes = entry.folder, entry.changes
                    before, resident = self._read(entry, folder)
                    with self._lock:
                        if entry.changes == changes:
                            return self._put_in_place(entry, folder, before, resident)
                        self._free(resident)  # registered anew meanwhile: what was read is over
        finally:
            with self._lock:
                entry.loading = None

    def _put_in_place(self, entry: _Entry, folder: Path, before: Stamp, resident: Resident) -> Resident:
        """Makes what was read the version of its name. Under the lock."""
        self._drop(entry)
        entry.folder, entry.stamp, entry.failed, entry.failed_stamp = folder, before, None, None
        if entry.sha256 not in (None, resident.sha256):  # the same files again are the same version
            entry.generation += 1
        entry.sha256 = resident.sha256
        entry.resident = resident = replace(resident, generation=entry.generation)
        self.counts.loads += 1
        if self._entries.get(entry.name) is not entry:  # removed meanwhile
            self._drop(entry)
        elif not entry.pinned:
            self._recent[entry.name] = None
        return resident

    def _read(self, entry: _Entry, folder: Path) -> tuple[Stamp, Resident]:
        """What a folder was like, and what it held. One that is exchanged while it is read is read again."""
        for left in reversed(range(_ATTEMPTS)):
            begin, before = time.monotonic(), stamp(folder)
            try:
                if entry.failed is not None and (entry.failed_stamp, entry.folder) == (before, folder):
                    raise entry.failed  # what these very files are is known
                return before, self._read_once(entry, folder)
            except (TrimtabError, OSError) as error:
                found = _tamed(error if isinstance(error, TrimtabError) else _unreadable(error, folder))
                if not left or stamp(folder) == before:
                    self._failed(entry, folder, before, found)
                    raise found from None
            finally:
                with self._lock:
                    self.counts.load_seconds += time.monotonic() - begin
        raise AssertionError

    def _failed(self, entry: _Entry, folder: Path, before: Stamp, error: TrimtabError) -> None:
        with self._lock:
            is_known = entry.failed is not None and entry.failed.code == error.code
            if folder == entry.folder:  # that another folder is bad says nothing of its own files
                entry.failed, entry.failed_at = _another(error), time.monotonic()
                # That there was no room, or that the system refused something, says nothing of the files.
                entry.failed_stamp = before if isinstance(error, ArtefactError) else None
            self.counts.failures[error.code] = self.counts.failures.get(error.code, 0) + 1
        if not is_known:
            self.say(f"{entry.name}: cannot be used; {error.what}")

    def _read_once(self, entry: _Entry, folder: Path) -> Resident:
        found = self._described(folder)
        size = found.layout.bytes
        with self._lock:
            self._going(entry, size)  # before a tensor is read
        tensors = self._tensors(found)
        with self._lock:
            for one in self._going(entry, size):
                self._drop(one)
                self.counts.evictions += 1
            piece = self._pieces.take(size)
            self._bytes += size
        try:
            return place(self.served, found, tensors, entry.name, piece)
        except BaseException:
            with self._lock:
                self._bytes -= size
            self._pieces.give_back(piece)
            raise

    def _described(self, folder: Path) -> Described:
        found = describe(self.served, folder)
        if found.layout.bytes > (most := max(self.budget_bytes // 8, _LARGE)):
            raise ArtefactError(
                "serve.too_large",
                f"This adapter takes {found.layout.bytes:,} bytes; one takes at most {most:,}: an eighth of the memory "
                f"for all, or {_LARGE:,}.",
                mend="a lower rank or fewer targets, or serve with more: --memory 4GB",
            )
        return found

    def _tensors(self, found: Described) -> dict[str, Tensor]:
        """Twice their size while they are read, beside the budget: one at a time where that is much."""
        if found.layout.bytes <= _LARGE:
            return found.read_tensors()
        if not self._large.acquire(blocking=False):  # and not wait, in a thread that others need
            raise ResourceError("serve.busy", "Another large adapter is being read.", mend="try again")
        try:
            return found.read_tensors()
        finally:
            self._large.release()

    def _going(self, entry: _Entry, size: int) -> list[_Entry]:
        """Whose versions make room within the budget: the least recently used, at last the entry's own if it is pinned.

        Raises:
            ResourceError: it will not fit; then nobody goes.
        """
        missing = self._bytes + size - self.budget_bytes
        going: list[_Entry] = []
        for one in (*(self._entries[name] for name in self._recent), *([entry] if entry.pinned else [])):
            if missing <= 0:
                break
            if one.resident and id(one.resident) not in self._holders:
                going.append(one)
                missing -= one.resident.bytes
        if missing > 0:
            raise ResourceError(
                "serve.memory",
                f"No room for an adapter of {size:,} bytes: {self._bytes:,} of {self.budget_bytes:,} are in use, "
                "by adapters that are pinned or that requests hold.",
                mend="try again, unpin some, or serve with more: --memory 4GB",
            )
        return going

    def _drop(self, entry: _Entry) -> None:
        """Takes the version of a name out of use; its memory is free once nobody holds it."""
        if self._entries.get(entry.name) is entry:
            self._recent.pop(entry.name, None)
        resident, entry.resident = entry.resident, None
        if resident is not None and id(resident) not in self._holders:
            self._free(resident)

    def _free(self, resident: Resident) -> None:
        self._bytes -= resident.bytes
        self._pieces.give_back(resident.memory)


_RETRY_S = 5.0  # a folder that could not be used is not looked at again at every request
_LARGE = 64 << 20  # bytes; an adapter of usual rank has 0.3 to 10 MB
_ATTEMPTS = 4  # of reading a folder that changes meanwhile


def check_name(name: str) -> None:
    """Raises an ArtefactError where a string cannot be the name of an adapter."""
    if not NAME.fullmatch(name):
        raise ArtefactError(
            "serve.name",
            f"{name[:100]!r} cannot be the name of an adapter.",
            mend="letters, digits, dot, underscore and hyphen, beginning with a letter or a digit; at most 100",
        )


def stamp(folder: Path) -> Stamp:
    """What changes when the files of a folder do; empty where there is nothing to read."""
    found = []
    for name in (".", "trimtab.json", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
        with suppress(OSError):
            one = os.stat(folder / name)
            found.append((one.st_ino, one.st_mtime_ns, one.st_size))
    return tuple(found)


def folders(directory: Path) -> Iterator[tuple[str, Path]]:
    """The adapters of a directory by name: its folders, but for those that begin with a dot or lead out of it."""
    with os.scandir(directory) as found:
        for item in found:
            if NAME.fullmatch(item.name) and item.is_dir() and not item.is_symlink():
                yield item.name, Path(item.path)


def links(directory: Path) -> set[str]:
    """What could be the name of an adapter in a directory, and is a link."""
    with os.scandir(directory) as found:
        return {item.name for item in found if item.is_symlink() and NAME.fullmatch(item.name)}


def _unreadable(error: OSError, folder: Path) -> TrimtabError:
    where = str(error.filename or folder)
    if error.errno in untrusted.OF_THE_FILE:
        mend = "see to it that the folder is there and can be read"
        return ArtefactError("adapter.unreadable", f"{error.strerror}.", where=where, mend=mend)
    return ResourceError("serve.system", f"{error.strerror or error}.", where=where, mend="try again")


def _tamed(error: TrimtabError) -> TrimtabError:
    """The same for logs, lists and answers, where a stranger's words may be of any length and any kind."""
    return type(error)(error.code, plain(error.what, 300), where=plain(error.where, 300), mend=plain(error.mend, 300))


E = TypeVar("E", bound=BaseException | None)


def _another(error: E) -> E:
    """An error of ours once more: one object for all who are told would keep the texts of their requests."""
    return copy.copy(error) if isinstance(error, TrimtabError) else error


def _copy(found: "Future[Resident]", into: "Future[Resident]") -> None:
    if (error := found.exception()) is not None:
        into.set_exception(error)
    else:
        into.set_result(found.result())
