"""Adapters that come by HTTP: into a folder of the adapter directory, checked before they take a name."""

import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from trimtab import durable
from trimtab.errors import DataError, ResourceError, TrimtabError
from trimtab.serving.base import Resident
from trimtab.serving.store import Store, check_name

FILES = frozenset(
    {
        *("adapter_config.json", "adapter_model.safetensors", "trimtab.json", "tokenizer.json"),
        *("tokenizer_config.json", "special_tokens_map.json", "README.md"),
    }
)
"""What an adapter folder may hold; anything else is refused by its name, before a byte is written."""


def inside(directory: Path, name: str) -> Path:
    """A folder of the adapter directory by its name; never one outside, whatever the name says.

    Raises:
        TrimtabError: it cannot be a name, or there is no such folder.
    """
    check_name(name)
    folder = directory / name
    if folder.is_symlink() or not folder.is_dir():
        raise DataError("serve.folder", f'There is no folder "{name}" in the adapter directory.', mend="copy it there")
    return folder


def put(
    store: Store, directory: Path, name: str, contents: Mapping[str, bytes], *, if_generation: int | None = None
) -> Resident:
    """Writes files as the folder of a name and serves it; what was there stays where they cannot be used.

    Args:
        store: Where it will be served.
        directory: The adapter directory.
        name: The adapter's name.
        contents: The bytes of each file by its name.
        if_generation: Only if the name is in this generation.

    Raises:
        TrimtabError: a file that does not belong there, an adapter that cannot be used, a full disk.
    """
    check_name(name)
    if strange := sorted(set(contents) - FILES):
        raise DataError(
            "serve.upload",
            f"{strange[0][:100]!r} is no file of an adapter.",
            mend=f"send each as a part called files: {', '.join(sorted(FILES))}",
        )
    store.check_generation(name, if_generation)
    target = directory / name
    if store.places().get(name, target).parent != directory:
        raise DataError(
            "serve.folder",
            f'"{name}" is served from a folder of its own, which was named when the server was started.',
            mend="another name; or change that folder and start the server again",
        )
    mark = uuid.uuid4().hex
    draft, old = directory / f"{_NEW}{mark}", directory / f"{_OLD}{mark}-{name}"
    try:
        try:
            draft.mkdir()
            for file, data in contents.items():
                durable.write_bytes(draft / file, data)
            durable.sync_folder(draft)
        except OSError as error:
            raise ResourceError(
                "serve.disk", f"The upload cannot be written: {error.strerror}.", mend="make room on the server"
            ) from None
        store.check(draft)
        with store.directory_lock, store.exchanging(name), _exchanged(draft, target, old):
            return store.replace(name, target, if_generation=if_generation)
    except OSError as error:
        if isinstance(error, TrimtabError):
            raise
        raise ResourceError("serve.disk", f"{error.strerror}.", mend="see to the adapter directory") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _exchanged(draft: Path, target: Path, old: Path) -> Iterator[None]:
    """A draft in its place; where anything goes wrong the folder is what it was."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        what = f'"{target.name}" is no folder in the adapter directory.'
        raise DataError("serve.folder", what, mend="remove it there")
    was_there = target.exists()
    if was_there:
        target.rename(old)
    try:
        draft.rename(target)
        durable.sync_folder(target.parent)
        yield
    except BaseException:  # no room for it, another generation, whatever else
        if target.exists():
            target.rename(draft)
        if was_there:
            old.rename(target)
        raise


_NEW, _OLD = ".trimtab-new-", ".trimtab-old-"  # what folders begin with while an upload is under way


def tidy(directory: Path) -> None:
    """Clears what uploads left that were under way when a server was killed; before the directory is served.

    A version that was moved aside, and whose successor did not take its place, comes back. What is younger than an
    hour may belong to another server of the same directory.
    """
    for left in sorted(directory.glob(".trimtab-*")):
        name = left.name.removeprefix(_OLD)[33:]  # behind the mark
        kept = directory / name
        with suppress(OSError):  # gone, or not ours to change
            if left.name.startswith(_OLD) and name and not os.path.lexists(kept):
                left.rename(kept)
            elif left.name.startswith((_NEW, _OLD)) and time.time() - left.stat().st_mtime > _LEFT_S:
                shutil.rmtree(left, ignore_errors=True)


_LEFT_S = 3_600
