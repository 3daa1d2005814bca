"""Where the scripts of this folder write: JSON with the commit and the machine."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab import rundir
from trimtab.machine import is_faster_in_bf16, processor

RESULTS = Path(__file__).parent / "results"


def kind() -> str:
    """The kind of processor that a figure belongs to: `bf16` where we compute in it, else `avx2`."""
    return "bf16" if is_faster_in_bf16(processor()) else "avx2"


def commit() -> str:
    """The commit of the code that runs, `-dirty` where files other than results differ from it."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=RESULTS.parent, capture_output=True, encoding="utf-8", check=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
    return git("rev-parse", "HEAD") + ("-dirty" if changed else "")


def read(name: str) -> dict[str, Any]:
    """What stands in results/NAME.json; nothing where there is no such file."""
    file = RESULTS / f"{name}.json"
    return dict(json.loads(file.read_text("utf-8"))) if file.is_file() else {}


def packed(right: npt.NDArray[np.bool_]) -> str:
    """Which rows were answered rightly, bool[n], a bit each."""
    return np.packbits(right).tobytes().hex()


def unpacked(rights: Sequence[str], rows: int) -> npt.NDArray[np.bool_]:
    """bool[len(rights), rows] of what `packed` made of each."""
    return np.stack([np.unpackbits(np.frombuffer(bytes.fromhex(one), np.uint8))[:rows] > 0 for one in rights])


def write(name: str, found: dict[str, Any]) -> None:
    """Writes results/NAME.json and prints the ratios."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps({"commit": commit(), **rundir.environment(), **found}, indent=2) + "\n", "utf-8")
    for what, ratio in found.get("ratios", {}).items():
        print(f"{ratio:6.2f}  {what}")
    print(f"written: {file}")
