"""How long a run takes to stop when a signal asks it to: the demo's model and texts, at random moments.

    python benchmarks/stopping.py [--trials 12]

Each trial starts `trimtab train` and sends one signal, in turn SIGINT, SIGTERM, SIGUSR1 and SIGHUP, at a moment drawn
between the reading of the files and the second epoch. Twelve minutes on two AVX2 cores. Writes
benchmarks/results/stopping-KIND.json. Needs the extra `demo`.
"""

import argparse
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import kind, write

from trimtab import demo
from trimtab.config import MINILM

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def stop(number: signal.Signals, after: float, files: list[str], out: Path) -> dict[str, Any]:
    """Sends a signal `after` seconds from the first written file of a run; says how long it took and how it ended."""
    settings = ["data.limit_train=160", "data.limit_eval=500", "train.num_epochs=3"]
    command = [sys.executable, "-m", "trimtab", "train", files[0], "--eval", files[1], "--recipe", "tutorial"]
    command += ["--base", MINILM, "--out", str(out), *(word for one in settings for word in ("--set", one))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "recipe.toml").is_file() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(after)
    sent = time.perf_counter()
    process.send_signal(number)
    code = process.wait()
    return {"signal": number.name, "after_s": after, "seconds": time.perf_counter() - sent, "exit": code}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=12)
    asked = parser.parse_args()
    rng, found = random.Random(0), []
    with tempfile.TemporaryDirectory() as place:
        files = [str(file) for file in demo.prepare(Path(place))]
        for trial in range(asked.trials):
            number = SIGNALS[trial % len(SIGNALS)]
            found.append(stop(number, rng.uniform(0, 40), files, Path(place) / str(trial)))
            print(found[-1], flush=True)
    seconds = [one["seconds"] for one in found]
    write(
        f"stopping-{kind()}",
        {"largest_s": max(seconds), "median_s": statistics.median(seconds), "trials": found},
    )


if __name__ == "__main__":
    main()
