"""The run directory: file names, the event stream, the record of the environment. Files here are the contract."""

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trimtab import durable
from trimtab.errors import ArtefactError, RecipeError, ResourceError, TrimtabError, did_you_mean, quoted
from trimtab.machine import processor, usable_cores

_LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "pyarrow")


@dataclass(frozen=True)
class RunDir:
    """A run directory by its path; every file of it has one name, here."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe: `trimtab train --recipe` of it repeats the run."""
        return self.path / "recipe.toml"

    @property
    def environment(self) -> Path:
        """Versions, processor, threads and the reason of each choice."""
        return self.path / "environment.json"

    @property
    def events(self) -> Path:
        """One JSON object a line."""
        return self.path / "events.jsonl"

    @property
    def data_report(self) -> Path:
        """What was read, used and set aside."""
        return self.path / "data_report.json"

    @property
    def rejects(self) -> Path:
        """Rows that were set aside, with file, line and reason."""
        return self.path / "rejects.csv"

    @property
    def metrics(self) -> Path:
        """The scores; it exists once the run is done."""
        return self.path / "metrics.json"

    @property
    def predictions(self) -> Path:
        """Text, label and logits of every row that the headline score is about."""
        return self.path / "predictions.parquet"

    @property
    def report(self) -> Path:
        """The report of the run as a page."""
        return self.path / "report.html"

    @property
    def adapter(self) -> Path:
        """The trained artefact."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Resumable steps."""
        return self.path / "checkpoints"

    @property
    def refit_checkpoints(self) -> Path:
        """Those of the second training, on all rows."""
        return self.path / "checkpoints-refit"

    def append(self, event: Mapping[str, Any]) -> None:
        """Adds one line to the event stream; behind half a line, of a process that was killed, a line of its own."""
        line = (json.dumps(event, ensure_ascii=False) + "\n").encode()
        with self.events.open("ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                line = line if stream.read(1) == b"\n" else b"\n" + line
            stream.write(line)


def write_json(path: Path, value: object) -> None:
    """Writes JSON that people can read; the file is whole or not there."""
    durable.replace(path, (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode())


@contextmanager
def only_writer(run: RunDir) -> Iterator[None]:
    """Within it, no other process can write this run; the lock ends with the process, however that ends.

    Raises:
        ResourceError: another process is writing it.
    """
    lock, writer = _lock(run), run.path / ".writer.json"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        try:
            holder = json.loads(writer.read_text("utf-8"))
            who = f"Process {holder['pid']} on {holder['host']}"
        except (OSError, ValueError, TypeError, KeyError):  # it has the lock, and has not said so yet
            who = "Another process"
        raise ResourceError(
            "run.locked",
            f"{who} is writing this run.",
            where=str(run.path),
            mend="wait until it is done, or stop it; the lock ends with it",
        ) from None
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        write_json(writer, {"pid": os.getpid(), "host": platform.node()})
        yield
    finally:
        with suppress(OSError):
            writer.unlink(missing_ok=True)
        lock.release()


def not_ended(run: RunDir) -> tuple[str, str]:
    """Why a run has not come to its end, and what to do then."""
    if _is_being_written(run):
        return "it is still training", "wait until it ends: then all of it is there, the adapter too"
    return "it did not come to its end", f"trimtab train --resume {quoted(run.path)}"


def _is_being_written(run: RunDir) -> bool:
    """Whether a process is at work within `only_writer`."""
    if not (run.path / ".writer.json").exists():
        return False
    lock = _lock(run)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # somebody else's folder, or a file system without locks
        return False
    lock.release()  # of a process that was killed
    return False


def _lock(run: RunDir) -> FileLock:
    # A soft lock, a file that is there or not, would outlive a process that is killed.
    return FileLock(run.path / ".lock", fallback_to_soft=False)


def check(out: str | None, *, needs: int = 0) -> None:
    """Whether `create` will do, for those who have long work before it.

    Raises:
        RecipeError: `out` is no name, or exists and is not empty.
        ResourceError: its volume has less than `needs` bytes left.
    """
    if out is not None and not out.strip():  # of a variable that is not set: it would be the current folder
        raise RecipeError(
            "usage", "The run directory has no name.", where="--out", mend="--out DIR, or without it: a new one in runs"
        )
    with _creating():
        path = Path(os.path.expanduser("runs" if out is None else out)).resolve()
        _check_room(path, needs)
        if (
            out is not None
            and path.exists()
            and (not path.is_dir() or any(not _is_draft(file) for file in path.iterdir()))
        ):
            raise RecipeError(
                "run.exists",
                f"{out} exists and is not empty; nothing in it was touched.",
                mend=f"another --out, or go on with that run: trimtab train --resume {quoted(out)}",
            )


def create(out: str | None, stem: str, *, needs: int = 0) -> RunDir:
    """Makes the run directory: `out` itself, else `runs/<time>-<stem>` with `runs/latest` pointing to it.

    Raises:
        RecipeError, ResourceError: as `check`; or the directory cannot be made.
    """
    check(out, needs=needs)
    with _creating():
        if out is not None:
            path = Path(os.path.expanduser(out)).resolve()
            durable.make_folder(path)
            return RunDir(path)
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{stem}"
        for number in range(1, 1_000):
            path = Path("runs").resolve() / (name if number == 1 else f"{name}-{number}")
            durable.make_folder(path.parent)
            try:
                path.mkdir()
            except FileExistsError:
                continue
            durable.sync_folder(path.parent)
            _point_latest_to(path)
            return RunDir(path)
        raise AssertionError("a thousand runs of one name in one second")


@contextmanager
def _creating() -> Iterator[None]:
    """Whatever the system refuses here is told with the way out."""
    try:
        yield
    except OSError as error:
        if isinstance(error, TrimtabError):
            raise
        raise ResourceError(
            "run.create",
            f"The run directory cannot be made: {error.strerror}.",
            where=str(error.filename),
            mend="--out DIR in a folder that you may write to",
        ) from None


def _is_draft(file: Path) -> bool:
    """Whether a process that was killed before it wrote the recipe left this behind: a lock, half a file."""
    return file.name in (".lock", ".writer.json", ".writer.json.tmp", "recipe.toml.tmp")


def _check_room(path: Path, needs: int) -> None:
    volume = next(place for place in (path, *path.parents) if place.exists())
    free = shutil.disk_usage(volume).free
    if free < needs:
        raise ResourceError(
            "disk.too_little",
            f"This run writes up to {needs / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free.",
            where=str(volume),
            mend="make room, or --out DIR on another volume",
        )


def _point_latest_to(path: Path) -> None:
    latest = path.parent / "latest"
    draft = path.parent / f".latest-{os.getpid()}"
    try:
        draft.symlink_to(path.name)
    except (OSError, NotImplementedError):  # Windows without the privilege: a file with the name does as well
        draft.write_text(path.name, "utf-8")
    try:
        draft.replace(latest)
    except OSError:  # a folder of the user's has that name: the run goes without the pointer
        draft.unlink()


def locate(path: str | Path) -> Path:
    """Follows a run or adapter path that a user gave, `runs/latest` included, to an existing directory.

    Raises:
        ArtefactError: there is nothing.
    """
    place = Path(os.path.expanduser(path))
    if place.name == "latest" and place.is_file():
        place = place.parent / place.read_text("utf-8").strip()
    if not os.path.isdir(place):
        siblings = [item.name for item in place.parent.iterdir()] if os.path.isdir(place.parent) else []
        raise ArtefactError(
            "adapter.missing",
            f"{path} is a file; a run or an adapter is a folder."
            if place.exists()
            else f"There is no run or adapter {path}.{did_you_mean(place.name, siblings)}",
            where=f"looked from {Path.cwd()}",
            mend="a run directory such as runs/latest, or the adapter folder in it",
        )
    return place.resolve()


def adapter_in(path: str | Path) -> Path:
    """The adapter folder of a run directory, or the folder itself.

    Raises:
        ArtefactError: the run has no adapter yet.
    """
    place = locate(path)
    if (place / "recipe.toml").is_file():
        if not (place / "adapter").is_dir():
            why, mend = not_ended(RunDir(place))
            raise ArtefactError("run.unfinished", f"This run has no adapter: {why}.", where=str(place), mend=mend)
        return place / "adapter"
    return place


def environment() -> dict[str, Any]:
    """Versions and processor, without host or user names."""
    from trimtab import __version__

    chip = processor()
    versions = {"trimtab": __version__, "python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in _LIBRARIES}
    return {
        "versions": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": {"name": chip.name, "features": list(chip.features)},
        "cores": usable_cores(),
    }
