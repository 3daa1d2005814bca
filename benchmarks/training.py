"""The tutorial's recipe end to end: trimtab against stock transformers and peft, as they are and tuned.

    python benchmarks/training.py [--rounds 3] [--keep DIR]

Each round runs every side once, with a seed of its own, each in a process of its own. They take turns of seconds,
and who has no turn is stopped (SIGSTOP); ratios are taken within a round and their median over the rounds is what
counts. Three rounds take about two hours on two AVX2 cores. Writes benchmarks/results/training-KIND.json after
every round, KIND = bf16 or avx2, with the machine and the commit. What has finished is kept in DIR: a second call goes
on from there, and accuracy.py judges the adapters. Needs the extra `demo`.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
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
SLICE_S = {"ours": 12.0, "stock": 30.0, "ours, no base dropout": 12.0, "stock, tuned": 18.0}
"""Seconds of a turn: as the sides' whole times, so that all end at about the same time."""
FIRST = 6  # turns at first: loading, and the 20 steps after which trimtab tells how long it will take
_KEPT = (
    *("train_seconds", "accuracy", "peak_rss_bytes", "padding_pct"),
    *("estimated_train_seconds", "estimated_peak_bytes"),
)


def train(side: str, seed: int, keep: Path) -> tuple[Path, dict[str, Any]]:
    """The adapter and the figures of one side with one seed, run alone now, unless that was done before."""
    return race([side], seed, keep)[side]


def race(sides: Sequence[str], seed: int, keep: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The adapter and the figures of each side with one seed, run now in turns, unless all were before."""
    folders = {side: keep / f"{side.replace(', ', '-').replace(' ', '-')}-{seed}" for side in sides}
    if not all((folder / "result.json").is_file() for folder in folders.values()):
        files = [str(file) for file in demo.prepare(keep)]
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
        with ExitStack() as stack:
            runs = [stack.enter_context(Turns(side, seed, folder, files)) for side, folder in folders.items()]
            for turn in itertools.count():
                running = [run for run in runs if run.is_running]
                for run in running:
                    run.go_on(SLICE_S[run.side] * (1 if turn else FIRST), is_alone=len(running) == 1)
                if not running:
                    break
        for run in runs:
            found = {**run.figures(), "seed": seed, "commit": commit()}
            (run.folder / "result.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    return {
        side: (folder / "adapter", json.loads((folder / "result.json").read_text("utf-8")))
        for side, folder in folders.items()
    }


class Turns:
    """One side as a process that is stopped while others have their turn, and what it told.

    The machine's speed drifts by a third within minutes, while a run takes five to fifteen: sides one after another
    would be compared at different speeds. A stopped process computes nothing; the time it stands still is taken off.
    """

    def __init__(self, side: str, seed: int, folder: Path, files: Sequence[str]) -> None:
        self.side, self.folder = side, folder
        self._stops: list[tuple[float, float]] = []
        self._since = 0.0
        if self._is_ours:
            command = [sys.executable, "-m", "trimtab", "train", files[0], "--eval", files[1], "--recipe", "tutorial"]
            command += ["--base", MINILM, "--set", f"train.seed={seed}", "--out", str(folder), *SIDES[side]]
            command += ["--set", "train.baselines=false"]  # stock has none
        else:
            command = [sys.executable, str(HERE / "stock.py"), *files, "--seed", str(seed), *SIDES[side]]
            command += ["--out", str(folder / "adapter")]
        self._command = command
        self._told = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed with the run
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Turns":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @property
    def _is_ours(self) -> bool:
        return self.side.startswith("ours")

    @property
    def is_running(self) -> bool:
        """Whether it has not ended; before its first turn too."""
        return self._process is None or self._process.poll() is None

    def go_on(self, seconds: float, *, is_alone: bool) -> None:
        """Runs for some seconds, or to its end where nobody else runs."""
        if self._process is None:
            self._process = subprocess.Popen(self._command, stdout=self._told, start_new_session=True)
        elif self._since:
            os.killpg(self._process.pid, signal.SIGCONT)
            self._stops.append((self._since, time.time()))
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(None if is_alone else seconds)
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGSTOP)
            self._since = time.time()
        elif self._process.returncode:
            raise subprocess.CalledProcessError(self._process.returncode, self._command)

    def figures(self) -> dict[str, Any]:
        """What it told, its seconds without those in which it stood still."""
        if self._is_ours:
            metrics = json.loads((self.folder / "metrics.json").read_text("utf-8"))
            found = {key: metrics[key] for key in _KEPT}
            events = [json.loads(line) for line in (self.folder / "events.jsonl").read_text("utf-8").splitlines()]
            at = {event["event"]: event for event in events if event["event"] in ("start", "forecast")}
            began = at["start"]["time"]
            found["told_after_20_steps"] = at["forecast"]["time"] - began + at["forecast"]["remaining_s"]
            assert not self._stopped(began, at["forecast"]["time"]), "stopped before it told: FIRST is too small"
        else:
            self._told.seek(0)
            found = json.loads(self._told.read().splitlines()[-1])
            began = found.pop("began")
        stood_still = self._stopped(began, began + found["train_seconds"])
        return {**found, "train_seconds": found["train_seconds"] - stood_still, "stood_still_s": stood_still}

    def _stopped(self, begin: float, end: float) -> float:
        """Seconds between two moments in which it stood still."""
        return sum(max(0.0, min(end, until) - max(begin, since)) for since, until in self._stops)


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
            found = race(list(SIDES), seed, asked.keep or Path(place))
            rounds.append({side: figures for side, (_, figures) in found.items()})
            write(f"training-{kind()}", {"ratios": ratios(rounds), "rounds": rounds})


if __name__ == "__main__":
    main()
