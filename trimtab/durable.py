"""Writes that a loss of power cannot tear: flushed file by file, named last.

POSIX promises of a file only what was flushed with fsync, and of a name only what was flushed with its folder
(Pillai et al. 2014, "All File Systems Are Not Created Equal").
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file and flushes it to the disk."""
    write_pieces(path, (data,))


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Writes a file piece by piece, so that it need not fit the memory, and flushes it to the disk."""
    with path.open("wb") as file:
        for data in pieces:
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, data: bytes) -> None:
    """Writes a file that is whole, old or new, at any moment."""
    draft = path.with_name(path.name + ".tmp")
    try:
        write_bytes(draft, data)
        draft.replace(path)
    except OSError:  # of a full disk: half a file helps nobody
        draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def new_folder(folder: Path, draft: Path) -> Iterator[Path]:
    """Yields `draft` to write in, which becomes `folder` at the end, or is gone where the writing fails.

    Raises:
        OSError: the disk is full, `folder` is there already, and the like.
    """
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was stopped here, with the same number
    make_folder(draft.parent)
    draft.mkdir()
    try:
        yield draft
        sync_folder(draft)
        draft.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, and flushes the name of each that is new."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    for place in reversed(new):
        place.mkdir(exist_ok=True)
        sync_folder(place.parent)


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder."""
    if os.name == "posix":  # elsewhere a directory cannot be opened, and renames are flushed by the system
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
