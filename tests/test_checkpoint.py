"""Checkpoints: whole or not there, in the order of their steps."""

import hashlib
import json
import os
import resource
from pathlib import Path

import pytest
import torch

from trimtab import checkpoint
from trimtab.errors import ArtefactError, ResourceError


def write(folder: Path, step: int) -> None:
    checkpoint.write(folder, step, {"weight": torch.full((100,), float(step))}, {"step": step})


def test_the_order_is_that_of_numbers_beyond_a_million_too(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000):
        write(tmp_path, step)
        checkpoint.prune(tmp_path, best_step=-1)
    found, skipped = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found.state, skipped) == ({"step": 1_000_000}, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-999999"]


def test_a_disk_that_is_full_is_told_and_leaves_the_older_ones(tmp_path: Path) -> None:
    write(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(ResourceError, match="step 2 cannot be written") as caught:
            write(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "--resume" in caught.value.mend
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoint.newest(tmp_path)[0] is not None


def test_a_checkpoint_of_another_version_is_no_damage(tmp_path: Path) -> None:
    write(tmp_path, 1)
    state, manifest = (tmp_path / "step-000001" / name for name in ("state.json", "manifest.json"))
    state.write_text('{"step": 1}', "utf-8")
    said = json.loads(manifest.read_text("utf-8"))
    said["sha256"]["state.json"] = hashlib.sha256(state.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(said), "utf-8")
    with pytest.raises(ArtefactError, match="schema version is 1"):
        checkpoint.newest(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_disk_that_does_not_answer_says_nothing_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    read = Path.read_bytes

    def failing(number: int, at: str) -> None:
        def fails(path: Path) -> bytes:
            if at in str(path):
                raise OSError(number, os.strerror(number), str(path))
            return read(path)

        monkeypatch.setattr(Path, "read_bytes", fails)

    failing(24, "step-")
    with pytest.raises(OSError, match="Too many open files"):
        checkpoint.newest(tmp_path)
    failing(5, "step-000002")
    older, skipped = checkpoint.newest(tmp_path)
    assert older is not None
    assert (older.state, skipped) == ({"step": 1}, ["step-000002: it cannot be read: Input/output error"])
    failing(5, "nowhere")
    newest, _ = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.state == {"step": 2}
