"""The tutorial's recipe end to end: trimtab against stock transformers and peft, as they are and tuned.

    python benchmarks/training.py [--rounds 3] [--keep DIR]

Each round runs every side once, one after another, each in a process of its own, with a seed of its own; ratios are
taken within a round and their median over the rounds is what counts. Three rounds take about an hour and a quarter on
two AVX2 cores. Writes benchmarks/results/training-KIND.json after every round, KIND = bf16 or avx2, with the machine
and the commit. What has finished is kept in DIR: a second call goes on from there, and accuracy.py judges the adapters.
Needs the extra `demo`.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import commit, kind, write

from trimtab import demo
from trimtab.config import MINILM

HERE = Path(__file__).parent
SEED = 42
SIDES: dict[str, tuple[str, ...]] = {
    "ours": (),
    "stock": (),
    "ours, no base dropout": ("--set", "base.dropout=0"),
    "stock, tuned": ("--tuned",),
}
"""What is compared, with the flags that make it so; the first word says whose."""
_KEPT = (
    *("train_seconds", "accuracy", "peak_rss_bytes", "tokens_per_s", "padding_pct"),
    *("estimated_train_seconds", "estimated_peak_bytes"),
)


def train(side: str, seed: int, keep: Path) -> tuple[Path, dict[str, Any]]:
    """The adapter and the figures of one side with one seed; trained now, unless that was done before."""
    folder = keep / f"{side.replace(', ', '-').replace(' ', '-')}-{seed}"
    if (folder / "result.json").is_file():
        return folder / "adapter", json.loads((folder / "result.json").read_text("utf-8"))
    shutil.rmtree(folder, ignore_errors=True)
    files = [str(file) for file in demo.prepare(keep)]
    if side.startswith("ours"):
        command = [sys.executable, "-m", "trimtab", "train", files[0], "--eval", files[1], "--recipe", "tutorial"]
        command += ["--base", MINILM, "--set", f"train.seed={seed}", "--out", str(folder), *SIDES[side]]
        command += ["--set", "train.baselines=false"]  # stock has none
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
        found = {key: metrics[key] for key in _KEPT}
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text("utf-8").splitlines()]
        at = {event["event"]: event for event in events if event["event"] in ("start", "forecast")}
        found["told_after_20_steps"] = at["forecast"]["time"] - at["start"]["time"] + at["forecast"]["remaining_s"]
    else:
        command = [sys.executable, str(HERE / "stock.py"), *files, "--seed", str(seed), *SIDES[side]]
        command += ["--out", str(folder / "adapter")]
        done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
        found = json.loads(done.stdout.splitlines()[-1])
    found |= {"seed": seed, "commit": commit()}
    (folder / "result.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    return folder / "adapter", found


def ratios(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, float]:
    """Medians over the rounds: how many times faster, and which share of the memory."""

    def median(slow: str, quick: str, key: str = "train_seconds") -> float:
        return statistics.median(one[slow][key] / one[quick][key] for one in rounds)

    def told(before: str, after: str) -> float:
        return statistics.median(one["ours"][before] / one["ours"][after] for one in rounds)

    return {
        "tutorial against stock": median("stock", "ours"),
        "tutorial with base.dropout=0 against stock": median("stock", "ours, no base dropout"),
        "tutorial with base.dropout=0 against tuned stock": median("stock, tuned", "ours, no base dropout"),
        "peak memory of the tutorial, share of stock": median("ours", "stock", "peak_rss_bytes"),
        "seconds told before the start, share of those taken": told("estimated_train_seconds", "train_seconds"),
        "seconds told after 20 steps, share of those taken": told("told_after_20_steps", "train_seconds"),
        "memory told before the start, share of the peak": told("estimated_peak_bytes", "peak_rss_bytes"),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="where runs are kept (default: nowhere)")
    asked = parser.parse_args()
    rounds: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as place:
        for seed in range(SEED, SEED + asked.rounds):
            rounds.append({side: train(side, seed, asked.keep or Path(place))[1] for side in SIDES})
            write(f"training-{kind()}", {"ratios": ratios(rounds), "rounds": rounds})


if __name__ == "__main__":
    main()
