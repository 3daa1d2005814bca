"""The tutorial's recipe end to end: trimtab against stock transformers and peft, as they are and tuned.

    python benchmarks/training.py [--rounds 3]

Each round runs every side once, one after another, each in a process of its own; ratios are taken within a round and
their median over the rounds is what counts. Three rounds take about an hour and a quarter on two AVX2 cores. Writes
benchmarks/results/training-KIND.json after every round, KIND = bf16 or avx2, with the machine and the commit. Needs
the extra `demo`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import kind, write

from trimtab import demo
from trimtab.config import MINILM

HERE = Path(__file__).parent
KEPT = ("train_seconds", "accuracy", "peak_rss_bytes", "tokens_per_s", "padding_pct")


def stock(files: tuple[Path, Path], *more: str) -> dict[str, Any]:
    """One run of the baseline."""
    command = [sys.executable, str(HERE / "stock.py"), *map(str, files), *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def ours(files: tuple[Path, Path], *settings: str) -> dict[str, Any]:
    """One run of trimtab."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "run"
        command = [sys.executable, "-m", "trimtab", "train", str(files[0]), "--eval", str(files[1])]
        command += ["--recipe", "tutorial", "--base", MINILM, "--out", str(out)]
        for setting in settings:
            command += ["--set", setting]
        subprocess.run(command, check=True)
        metrics = json.loads((out / "metrics.json").read_text("utf-8"))
        return {key: metrics[key] for key in KEPT}


def ratios(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, float]:
    """Medians over the rounds: how many times faster, and which share of the memory."""

    def median(slow: str, quick: str, key: str = "train_seconds") -> float:
        return statistics.median(one[slow][key] / one[quick][key] for one in rounds)

    return {
        "tutorial against stock": median("stock", "ours"),
        "tutorial with base.dropout=0 against stock": median("stock", "ours, no base dropout"),
        "tutorial with base.dropout=0 against tuned stock": median("stock, tuned", "ours, no base dropout"),
        "peak memory of the tutorial, share of stock": 1 / median("stock", "ours", "peak_rss_bytes"),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    rounds: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as place:
        files = demo.prepare(Path(place))
        for _ in range(asked.rounds):
            rounds.append(
                {
                    "ours": ours(files),
                    "stock": stock(files),
                    "ours, no base dropout": ours(files, "base.dropout=0"),
                    "stock, tuned": stock(files, "--tuned"),
                }
            )
            write(f"training-{kind()}", {"ratios": ratios(rounds), "rounds": rounds})


if __name__ == "__main__":
    main()
