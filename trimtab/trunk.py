"""The cached trunk: what the frozen layers below LoRA make of every row, computed once and kept on the disk.

With LoRA on the top layers only, and no dropout below them, the lower layers say the same of a row in every epoch, with
every seed and rate, in every run. An entry holds the states of the rows of one part, in bfloat16: 2 bytes x tokens x
width, 0.2 GB for 1,000 reviews of 256 tokens on MiniLM. It is known by the sha256 of all that decides its bytes, is
whole or not there, and is checked by its sum before each use.

bfloat16 rounds. A run that reads its trunk reads it in its first epoch too, so its bytes do not depend on whether the
entry was found or made; they differ from those of a run that computes every layer.
"""

import errno
import hashlib
import json
import mmap
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trimtab import durable, interrupts
from trimtab.errors import RecipeError, ResourceError, TrimtabError
from trimtab.fast import encoder
from trimtab.fast.encoder import Encoder, Stored
from trimtab.forward import Engine, Forward, fast
from trimtab.hub import file_sha256
from trimtab.machine import processor
from trimtab.resolve import Job
from trimtab.tokens import Encoded

_SCHEMA = 1  # one more where the forward computes other bytes
_BATCH_TOKENS = 4_096  # of a pass: the workspace of an evaluation
_FEWEST_EPOCHS = 2  # from which `auto` keeps states: a single pass would be written and never read again
_DISK_RESERVE = 1 << 30  # bytes that an entry leaves free
_ABANDONED_S = 3_600.0  # a draft is written to all the time; after an hour without, its process is gone
_STATES, _MANIFEST = "states.bin", "manifest.json"


@dataclass(frozen=True)
class Entry:
    """The states of the rows of one part, as they stand or would stand in the cache."""

    texts: Encoded
    described: Mapping[str, Any]
    """All that decides its bytes."""
    width: int

    @property
    def name(self) -> str:
        """Of its folder: the sha256 of its description."""
        return hashlib.sha256(json.dumps(self.described, sort_keys=True).encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Of its states: two bytes a number."""
        return 2 * self.width * len(self.texts.ids)


@dataclass(frozen=True)
class Trunk:
    """Whether a run reads its lower layers from the cache, and why."""

    depth: int
    """Layers that are read; 0: every layer is computed."""
    reason: str
    settled: str = "auto"
    """What runtime.trunk_cache comes to: on or off; auto where model or recipe leave nothing to decide."""
    layers: int = 0
    entries: tuple[Entry, ...] = ()
    """Of the training and the evaluation rows; test rows are seen once and not kept."""
    is_told: bool = False
    """Whether people hear of it: not where LoRA stands beside every layer."""

    @property
    def size_bytes(self) -> int:
        """Of all entries."""
        return sum(entry.size_bytes for entry in self.entries)

    @property
    def line(self) -> str:
        """A few words for people; empty where there is nothing to tell."""
        if self.depth:
            return f"the lower {self.depth} of {self.layers} layers from the cache ({self.reason})"
        return f"every layer computed ({self.reason})" if self.is_told else ""


def choose_trunk(job: Job, engine: Engine) -> Trunk:
    """Decides whether a run reads its trunk, from the model, the recipe and the room on the disk; writes nothing.

    What is in the cache already does not count: the same recipe must come to the same bytes.

    Raises:
        RecipeError: runtime.trunk_cache = on, and model or recipe do not allow it.
        ResourceError: it is on, and the entries do not fit.
    """
    runtime, built = job.recipe.runtime, engine.encoder
    depth = 0 if built is None else encoder.lowest_trained(built)
    is_told = job.recipe.lora.top > 0 or depth > 0
    if runtime.trunk_cache == "off":
        return Trunk(0, "as the recipe says", "off", is_told=is_told)
    problem = ""
    if built is None:
        problem = "the stock forward reads no states"
    elif depth == 0:
        problem = "LoRA stands beside the lowest layer"
    elif encoder.drops_below(built, depth):
        problem = "base.dropout makes every pass another one"
    if problem or built is None:
        if runtime.trunk_cache == "on":
            raise RecipeError(
                "runtime.trunk_cache",
                f"The lower layers cannot be kept: {problem}.",
                where="runtime.trunk_cache = on",
                mend="--set runtime.trunk_cache=auto"
                + ("; or LoRA on fewer layers: --set lora.layers=top:2" if built and not depth else ""),
            )
        return Trunk(0, problem, is_told=is_told)
    epochs = int(job.recipe.train.num_epochs)
    if runtime.trunk_cache == "auto" and epochs < _FEWEST_EPOCHS:
        return Trunk(0, f"{epochs} epoch would read it once", "off", is_told=is_told)
    width = len(built.layers[0].output_norm.weight)
    texts = (job.train.encoded, job.eval.encoded)
    entries = tuple(Entry(part, _describe(job, engine, depth, part), width) for part in texts)
    size = sum(entry.size_bytes for entry in entries)
    limit = int(runtime.trunk_cache_gb * 1e9)
    if problem := _no_room(entries, limit):
        if runtime.trunk_cache == "on":
            raise ResourceError(
                "trunk.room",
                f"The lower layers of {sum(len(entry.texts) for entry in entries):,} rows cannot be kept: {problem}.",
                where=str(place()),
                mend=(
                    f"--set runtime.trunk_cache_gb={np.ceil(size / 1e8) / 10:g}"
                    if size > limit
                    else "make room, or another volume: XDG_CACHE_HOME=DIR"
                )
                + "; or train anew with --set runtime.trunk_cache=off",
            )
        return Trunk(0, problem, "off", is_told=True)
    reason = f"{size_text(size)} in bfloat16, read in {epochs} epoch{'s' if epochs > 1 else ''}"
    return Trunk(depth, reason, "on", len(built.layers), entries, is_told=True)


def load_trunk(
    job: Job, engine: Engine, trunk: Trunk, observe: Callable[[Mapping[str, Any]], None]
) -> tuple[Trunk, Forward]:
    """Finds the entries of a trunk or makes them; the forward that reads them. What is written is announced first.

    Returns:
        The trunk as it came to be: where `auto` met a disk that fails, without a cache; and the loop's forward.

    Raises:
        ResourceError: runtime.trunk_cache = on, and the entries cannot be written or read.
    """
    if not trunk.depth or engine.encoder is None:
        return trunk, engine.forward
    try:
        maps = _maps(job, engine.encoder, trunk, observe)
    except OSError as error:
        if isinstance(error, TrimtabError):
            raise
        problem = f"the cache cannot be written or read: {error.strerror or error}"
        if job.recipe.runtime.trunk_cache == "on":
            raise ResourceError(
                "trunk.write",
                f"The lower layers cannot be kept: {problem.partition(': ')[2]}.",
                where=str(error.filename or place()),
                mend="make room, or another volume: XDG_CACHE_HOME=DIR; or --set runtime.trunk_cache=off",
            ) from None
        return Trunk(0, problem, "off", is_told=True), engine.forward
    kept = [
        (entry.texts, Stored(_states(memory, entry.width), trunk.depth))
        for entry, memory in zip(trunk.entries, maps, strict=True)
    ]
    inner = fast(engine.encoder, kept)

    def forward(encoded: Encoded, rows: npt.NDArray[np.int64], dropout_seed: int | None = None) -> torch.Tensor:
        logits = inner(encoded, rows, dropout_seed)
        for memory in maps:  # pages that have been read would count as memory of this process, up to the whole file
            if hasattr(mmap, "MADV_DONTNEED"):
                memory.madvise(mmap.MADV_DONTNEED)
        return logits

    return trunk, forward


def forward_in_memory(built: Encoder, texts: Encoded, depth: int) -> Forward:
    """The forward over states of a few texts, computed here one by one and kept nowhere: for trying out a batch."""
    data = bytearray(b"".join(compute(built, texts, depth, most_tokens=1)))
    states = torch.frombuffer(data, dtype=torch.bfloat16).view(len(texts.ids), -1)
    return fast(built, [(texts, Stored(states, depth))])


def compute(built: Encoder, texts: Encoded, depth: int, *, most_tokens: int = _BATCH_TOKENS) -> Iterator[bytes]:
    """The states of texts after the first `depth` layers: bfloat16, a vector a token, in the order of the texts."""
    for rows in _consecutive(texts.lengths, most_tokens):
        interrupts.check()
        batch = encoder.pack(texts.ids, texts.offsets, rows)
        states = encoder.trunk(built, batch, depth).view(torch.uint8).numpy()
        begins = batch.first[batch.order].tolist()
        yield b"".join(
            states[begin : begin + length].tobytes()
            for begin, length in zip(begins, texts.lengths[rows].tolist(), strict=True)
        )


def place() -> Path:
    """The folder of all entries: that of the user for what can be made again."""
    home = os.environ.get("XDG_CACHE_HOME", "")  # a relative one is to be ignored (XDG Base Directory Specification)
    root = Path(home) if os.path.isabs(home) else Path(os.path.expanduser("~/.cache"))
    return root / "trimtab" / "trunk"


def missing(trunk: Trunk) -> list[Entry]:
    """The entries that would have to be made; those that are there may still be damaged."""
    return [entry for entry in trunk.entries if not (place() / entry.name).is_dir()]


def size_text(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _describe(job: Job, engine: Engine, depth: int, texts: Encoded) -> dict[str, Any]:
    """All that decides the bytes of an entry; another order of sums, with other threads, is another entry."""
    from trimtab import __version__

    rows = hashlib.sha256(texts.ids.tobytes())
    rows.update(texts.offsets.tobytes())
    chip = processor()
    return {
        "schema": _SCHEMA,
        "base_sha256": job.base.weights_sha256,
        "config_sha256": file_sha256(job.base.folder / "config.json"),
        "tokenizer_sha256": job.tokenizer.sha256,
        "max_length": int(job.recipe.data.max_length),
        "depth": depth,
        "computed_in": engine.dtype,
        "threads": job.placement.threads,
        "processor": [chip.name, *chip.features],
        "versions": [__version__, torch.__version__],
        "rows_sha256": rows.hexdigest(),
    }


def _consecutive(lengths: npt.NDArray[np.int64], most_tokens: int) -> Iterator[npt.NDArray[np.int64]]:
    """Rows in their order, as many at a time as have at most so many tokens, and at least one."""
    start, tokens = 0, 0
    for row, length in enumerate(lengths.tolist()):
        if row > start and tokens + length > most_tokens:
            yield np.arange(start, row)
            start, tokens = row, 0
        tokens += length
    if start < len(lengths):
        yield np.arange(start, len(lengths))


# -- the folder ------------------------------------------------------------------------------------------------


def _no_room(entries: Sequence[Entry], limit: int) -> str:
    """Why entries do not fit into the cache or onto the disk; empty: they do."""
    size = sum(entry.size_bytes for entry in entries)
    if size > limit:
        return f"{size_text(size)} are more than runtime.trunk_cache_gb = {limit / 1e9:g}"
    folder = place()
    if not folder.is_absolute():
        return "this user has no home folder; XDG_CACHE_HOME=DIR names another"
    needed = sum(entry.size_bytes for entry in entries if not (folder / entry.name).is_dir())
    try:
        volume = next(part for part in (folder, *folder.parents) if part.exists())
        free = shutil.disk_usage(volume).free + sum(found for _, found in _too_many(entries, limit))
    except (OSError, StopIteration) as error:
        return f"{folder} cannot be read: {error}"
    if needed and needed + _DISK_RESERVE > free:
        return f"{size_text(needed)} would leave less than {size_text(_DISK_RESERVE)} of {size_text(free)} free"
    return ""


def _too_many(entries: Sequence[Entry], limit: int) -> list[tuple[Path, int]]:
    """Entries of others that must go so that these fit, the longest unused first, each with its size."""
    mine, others = {entry.name for entry in entries}, []
    for path in place().glob("[0-9a-f]*"):
        with suppress(OSError):  # another process has just deleted it
            if path.name not in mine:
                others.append(((path / _MANIFEST).stat().st_mtime, path, (path / _STATES).stat().st_size))
    others.sort()
    total, going = sum(entry.size_bytes for entry in entries) + sum(size for _, _, size in others), []
    for _, path, size in others:
        if total <= limit:
            break
        going.append((path, size))
        total -= size
    return going


def _maps(job: Job, built: Encoder, trunk: Trunk, observe: Callable[[Mapping[str, Any]], None]) -> list[mmap.mmap]:
    """The states of each entry, mapped; those that are missing or damaged are made."""
    folder, limit = place(), int(job.recipe.runtime.trunk_cache_gb * 1e9)
    durable.make_folder(folder)
    _sweep(folder)
    found: dict[str, mmap.mmap | None] = {}
    for entry in trunk.entries:
        try:
            found[entry.name] = _open(folder / entry.name, entry)
        except ValueError as error:
            observe({"event": "warning", "text": f"lower layers that were kept are damaged and made anew: {error}"})
            _discard(folder / entry.name)
            found[entry.name] = None
    absent = [entry for entry in trunk.entries if found[entry.name] is None]
    observe(
        {
            "event": "trunk",
            "time": round(time.time(), 3),
            "depth": trunk.depth,
            "layers": trunk.layers,
            "rows": sum(len(entry.texts) for entry in trunk.entries),
            "bytes": trunk.size_bytes,
            "bytes_written": sum(entry.size_bytes for entry in absent),
            "limit_bytes": limit,
            "folder": str(folder),
        }
    )
    if absent:
        for path, _ in _too_many(trunk.entries, limit):
            _discard(path)
    done, rows = 0, sum(len(entry.texts) for entry in absent)
    for entry in absent:

        def after(share: float, done: int = done, entry: Entry = entry) -> None:
            observe({"event": "progress", "kept": done + round(share * len(entry.texts)), "rows": rows})

        found[entry.name] = _make(folder, entry, built, trunk.depth, after)
        done += len(entry.texts)
    return [memory for entry in trunk.entries if (memory := found[entry.name]) is not None]


def _make(folder: Path, entry: Entry, built: Encoder, depth: int, after: Callable[[float], None]) -> mmap.mmap:
    """Computes an entry and writes it, whole or not at all; another process that was quicker has made the same."""
    final = folder / entry.name
    digest = hashlib.sha256()

    def pieces() -> Iterator[bytes]:
        written = 0
        for data in compute(built, entry.texts, depth):
            digest.update(data)
            written += len(data)
            yield data
            after(written / entry.size_bytes)

    try:
        with durable.new_folder(final, folder / f".draft-{entry.name}-{secrets.token_hex(4)}") as draft:
            durable.write_pieces(draft / _STATES, pieces())
            manifest = {"of": entry.described, "sha256": digest.hexdigest()}
            durable.write_bytes(draft / _MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    except OSError:
        if not final.is_dir():
            raise
    try:
        memory = _open(final, entry)
    except ValueError as error:
        raise OSError(errno.EIO, str(error), str(final)) from None
    if memory is None:
        raise FileNotFoundError(errno.ENOENT, "another process has deleted what was just written", str(final))
    return memory


def _open(path: Path, entry: Entry) -> mmap.mmap | None:
    """The states of an entry, mapped, once their sum is right; None: it is not there.

    Raises:
        ValueError: it is there, and is not what was written.
        OSError: the disk does not give it.
    """
    if not path.is_dir():
        return None
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        with (path / _STATES).open("rb") as stream:  # what is summed is what is mapped, whoever deletes it meanwhile
            if os.fstat(stream.fileno()).st_size != entry.size_bytes or manifest["of"] != entry.described:
                raise ValueError("of another size, or of other rows")
            if hashlib.file_digest(stream, "sha256").hexdigest() != manifest["sha256"]:
                raise ValueError("its sha256 differs")
            memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not path.is_dir():
            return None
        raise ValueError(f"{Path(error.filename).name} is missing") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its manifest is no manifest: {error}") from None
    with suppress(OSError):  # a cache that may only be read
        os.utime(path / _MANIFEST)  # the longest unused is deleted first
    return memory


def _states(memory: mmap.mmap, width: int) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it may not be written to
        return torch.frombuffer(memory, dtype=torch.bfloat16).view(-1, width)


def _discard(path: Path) -> None:
    """Deletes an entry; one that is half deleted has no name. Whoever has mapped it keeps what is mapped."""
    trash = path.with_name(f".trash-{path.name}-{secrets.token_hex(4)}")
    with suppress(OSError):
        path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Deletes what processes that were killed have left behind."""
    for path in (*folder.glob(".draft-*"), *folder.glob(".trash-*")):
        with suppress(OSError):
            if time.time() - max(file.stat().st_mtime for file in (path, *path.iterdir())) > _ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)
