"""Checkpoints: `checkpoints/step-000063/` with everything that resuming needs. The only place that writes state.

A checkpoint is written beside its place, flushed to disk file by file with a manifest of sha256 sums last, and
renamed: it is whole or it is not there. Reading takes the newest one whose sums are right.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from trimtab.errors import ArtefactError, ResourceError

_KEPT = 2  # newest checkpoints that stay, beside the best one


_MEND = "trimtab train --resume RUN takes the newest whole one"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder, its tensors and its state."""

    path: Path
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def write(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> Path:
    """Writes `folder/step-<step>` atomically and returns it; one that is there already is replaced.

    Raises:
        ResourceError: the disk is full, or the folder may not be written to.
    """
    final = folder / f"step-{step:06d}"
    draft = folder / f".tmp-{step:06d}-{os.getpid()}"
    contents = {
        "tensors.safetensors": save({name: tensor.detach().contiguous() for name, tensor in sorted(tensors.items())}),
        "state.json": (json.dumps(state, indent=1) + "\n").encode(),
    }
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    contents["manifest.json"] = (
        json.dumps({"schema_version": 1, "step": step, "sha256": sums}, indent=1) + "\n"
    ).encode()
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        for name, data in contents.items():
            with (draft / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _sync_folder(draft)
        if final.exists():
            shutil.rmtree(final)
        draft.rename(final)
        _sync_folder(folder)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise ResourceError(
            "checkpoint.write",
            f"The checkpoint of step {step:,} cannot be written: {error.strerror}. Older ones stand as they were.",
            where=str(final),
            mend=f"make room, then: trimtab train --resume {folder.parent}",
        ) from None
    return final


def read(path: Path) -> Checkpoint:
    """Reads one checkpoint.

    Raises:
        ArtefactError: a file is missing or is not what the manifest says.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        contents = {name: (path / name).read_bytes() for name in ("tensors.safetensors", "state.json")}
        sums = {name: manifest["sha256"][name] for name in contents}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(
            "checkpoint.incomplete", f"This checkpoint is not whole: {error}", where=str(path), mend=_MEND
        ) from None
    for name, data in contents.items():
        if hashlib.sha256(data).hexdigest() != sums[name]:
            raise ArtefactError(
                "checkpoint.damaged",
                f"{name} is not what was written: its sha256 differs.",
                where=str(path),
                mend=_MEND,
            )
    return Checkpoint(path, load(contents["tensors.safetensors"]), json.loads(contents["state.json"]))


def newest(
    folder: Path, needs: Callable[[Mapping[str, Any]], int] = lambda state: -1
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were passed over; those are set aside.

    `needs` names the step of another checkpoint without which this one is of no use, or -1.
    """
    skipped: list[str] = []
    for path in reversed(_by_step(folder)):
        try:
            found = read(path)
            if (other := needs(found.state)) >= 0:
                read(folder / f"step-{other:06d}")
            return found, skipped
        except ArtefactError as error:
            about = "" if error.where == str(path) else f"it needs {Path(error.where).name}: "
            skipped.append(f"{path.name}: {about}{error.what}")
            aside = path.with_name(f".damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    return None, skipped


def prune(folder: Path, best_step: int) -> None:
    """Deletes all but the newest two checkpoints and the best one."""
    for path in _by_step(folder)[:-_KEPT]:
        if path.name != f"step-{best_step:06d}":
            shutil.rmtree(path)


def _by_step(folder: Path) -> list[Path]:
    """Oldest first. By number: from a million on, names no longer sort so."""
    numbered = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("step-")))


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a directory cannot be opened, and renames are flushed by the system
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
