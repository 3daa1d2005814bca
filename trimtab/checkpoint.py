"""Checkpoints: `checkpoints/step-000063/` with everything that resuming needs. The only place that writes state.

A checkpoint is written beside its place, flushed to disk file by file with a manifest of sha256 sums last, and
renamed: it is whole or it is not there. Reading takes the newest one whose sums are right.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from trimtab import durable
from trimtab.errors import ArtefactError, ResourceError, quoted

SCHEMA_VERSION = 2
_KEPT = 2  # newest checkpoints that stay, beside the best one


_MEND = "trimtab train --resume RUN takes the newest whole one"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder, its tensors and its state."""

    path: Path
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def write(
    folder: Path, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], *, evaluated: bool = False
) -> Path:
    """Writes `folder/step-<step>`, or `step-<step>-evaluated`, atomically, and returns it.

    One name is one state of a run, so one that is there already is left as it is, and its name flushed.

    Raises:
        ResourceError: the disk is full, or the folder may not be written to.
    """
    final = folder / name_of(step, evaluated=evaluated)
    try:
        if final.is_dir():
            durable.sync_folder(folder)
            return final
        contents = {
            "tensors.safetensors": save({name: one.detach().contiguous() for name, one in sorted(tensors.items())}),
            "state.json": (json.dumps({"schema_version": SCHEMA_VERSION, "state": state}, indent=1) + "\n").encode(),
        }
        sums = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
        contents["manifest.json"] = (json.dumps({"step": step, "sha256": sums}, indent=1) + "\n").encode()
        with durable.new_folder(final, folder / f".tmp-{final.name}-{os.getpid()}") as draft:
            for name, data in contents.items():
                durable.write_bytes(draft / name, data)
    except OSError as error:
        raise ResourceError(
            "checkpoint.write",
            f"The checkpoint of step {step:,} cannot be written: {error.strerror}. Older ones stand as they were.",
            where=str(final),
            mend=f"make room, then: trimtab train --resume {quoted(folder.parent)}",
        ) from None
    return final


def name_of(step: int, *, evaluated: bool) -> str:
    """The name of a checkpoint's folder: steps done, and whether the evaluation after them is done too."""
    return f"step-{step:06d}" + ("-evaluated" if evaluated else "")


def read(path: Path) -> Checkpoint:
    """Reads one checkpoint.

    Raises:
        ArtefactError: a file is missing or is not what the manifest says, or another version wrote it.
        OSError: the disk does not give it; that says nothing of the checkpoint.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        contents = {name: (path / name).read_bytes() for name in ("tensors.safetensors", "state.json")}
        sums = {name: manifest["sha256"][name] for name in contents}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError) as error:
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
    said = json.loads(contents["state.json"])
    if (version := said.get("schema_version", 1)) != SCHEMA_VERSION:
        raise ArtefactError(
            "checkpoint.schema",
            f"Another trimtab wrote this checkpoint: its schema version is {version}; this one reads {SCHEMA_VERSION}.",
            where=str(path),
            mend="go on with the version in the run's environment.json; or train anew with its recipe.toml",
        )
    return Checkpoint(path, load(contents["tensors.safetensors"]), said["state"])


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were passed over; damaged ones are set aside.

    Raises:
        ArtefactError: another version wrote it.
        OSError: there are too many open files, or too little memory.
    """
    skipped: list[str] = []
    for path in reversed(_by_step(folder)):
        try:
            return read(path), skipped
        except ArtefactError as error:
            if error.code == "checkpoint.schema":
                raise
            skipped.append(f"{path.name}: {error.what}")
            aside = path.with_name(f".damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise
            skipped.append(f"{path.name}: it cannot be read: {error.strerror}")
    return None, skipped


def prune(folder: Path, best_step: int) -> None:
    """Deletes all but the newest two checkpoints and the best one."""
    for path in _by_step(folder)[:-_KEPT]:
        if path.name != name_of(best_step, evaluated=True):
            trash = path.with_name(f".trash-{path.name}")
            path.rename(trash)  # or a process that is killed here leaves half a checkpoint under a good name
            shutil.rmtree(trash, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Deletes what a process that was killed left behind: drafts and trash. What was damaged stays, for a look."""
    for path in (*folder.glob(".tmp-*"), *folder.glob(".trash-*")):
        shutil.rmtree(path, ignore_errors=True)


_NAME = re.compile(r"step-(\d+)(-evaluated)?")


def _by_step(folder: Path) -> list[Path]:
    """Oldest first. By number: from a million on, names no longer sort so."""
    found = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda one: (int(one[0].group(1)), bool(one[0].group(2))))]
