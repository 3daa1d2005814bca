"""Where the scripts of this folder write: JSON with the commit and the machine."""

import json
import subprocess
from pathlib import Path
from typing import Any

from trimtab import rundir
from trimtab.machine import has_bf16, processor

RESULTS = Path(__file__).parent / "results"


def kind() -> str:
    """The kind of processor that a figure belongs to: `bf16` where it has such instructions, else `avx2`."""
    return "bf16" if has_bf16(processor()) else "avx2"


def commit() -> str:
    """The commit of the code that runs, `-dirty` where files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
    return subprocess.run(command, cwd=RESULTS.parent, capture_output=True, encoding="utf-8", check=True).stdout.strip()


def write(name: str, found: dict[str, Any]) -> None:
    """Writes results/NAME.json and prints the ratios."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps({"commit": commit(), **rundir.environment(), **found}, indent=2) + "\n", "utf-8")
    for what, ratio in found.get("ratios", {}).items():
        print(f"{ratio:6.2f}  {what}")
    print(f"written: {file}")
