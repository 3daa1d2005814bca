"""Three rates x three seeds on the cached trunk against one run of all layers without it.

    python benchmarks/trunk.py [--rows 1000] [--rounds 3] [--task imdb]

LoRA on the top third of MiniLM's layers, the same rows and epochs on both sides. Each round has an empty cache: the
first of the nine runs makes the entries, the others read them. Both sides alternate by round, and the median of the
ratios counts. Writes benchmarks/results/trunk-KIND.json, KIND = bf16 or avx2. Needs the extra `demo`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from evidence import data
from record import kind, write

from trimtab.config import MINILM

RATES, SEEDS = ("5e-4", "1e-3", "2e-3"), (0, 1, 2)
EPOCHS = 5


def seconds(train: Path, evaluation: Path, out: Path, cache: Path, *settings: str) -> float:
    """One run in a process of its own, from its start to its end."""
    command = [sys.executable, "-m", "trimtab", "train", str(train), "--eval", str(evaluation), "--base", MINILM]
    fixed = (f"train.num_epochs={EPOCHS}", "train.early_stopping_patience=0", "train.baselines=false")
    command += ["--out", str(out), *(word for setting in (*fixed, *settings) for word in ("--set", setting))]
    began = time.monotonic()
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="imdb", choices=("imdb", "rotten"))
    parser.add_argument("--rows", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        train, evaluation = data(f"{given.task}-{given.rows}", 0, root, None)
        for number in range(given.rounds):
            cache = root / f"cache-{number}"
            single = seconds(train, evaluation, root / f"single-{number}", cache, "data.limit_eval=200")
            nine = sum(
                seconds(
                    train,
                    evaluation,
                    root / f"nine-{number}-{rate}-{seed}",
                    cache,
                    *("data.limit_eval=200", "lora.layers=top:2", f"train.learning_rate={rate}", f"train.seed={seed}"),
                )
                for rate in RATES
                for seed in SEEDS
            )
            found = json.loads((root / f"nine-{number}-1e-3-0" / "metrics.json").read_text("utf-8"))
            plain = json.loads((root / f"single-{number}" / "metrics.json").read_text("utf-8"))
            rounds.append(
                {"single_seconds": single, "nine_seconds": nine}
                | {"single_accuracy": plain["accuracy"], "cached_accuracy": found["accuracy"]}
            )
            ratio = statistics.median(one["nine_seconds"] / one["single_seconds"] for one in rounds)
            write(
                f"trunk-{kind()}",
                {
                    "ratios": {"nine runs on the cached trunk against one run of all layers": ratio},
                    "rows": given.rows,
                    "task": given.task,
                    "epochs": EPOCHS,
                    "rounds": rounds,
                },
            )


if __name__ == "__main__":
    main()
