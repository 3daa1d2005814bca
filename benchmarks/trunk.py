"""Three rates x three seeds over one cached trunk, against a single run with LoRA on all layers and no cache.

    python benchmarks/trunk.py [--source imdb|rotten_tomatoes] [--rows 600] [--epochs 5] [--layers 2]

Base, rows, epochs and evaluation are the same on both sides; LoRA stands on the top third of MiniLM's six layers, or on
all of them. The nine runs share a cache that is empty before the first. After each rate's three seeds one single run
follows at that rate; what counts is nine against the median of the three. Seconds are those of training, the lower
layers that are computed before the first step included; those of whole processes stand beside them. Wanted: less than 4
times a single run. Writes benchmarks/results/trunk-KIND.json. Needs the extra `demo`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from record import kind, write

from trimtab import data, demo
from trimtab.config import MINILM

RATES, SEEDS = (3e-4, 1e-3, 3e-3), (42, 43, 44)
_KEPT = ("train_seconds", "trunk_seconds", "total_seconds", "accuracy", "peak_rss_bytes")


def write_rows(file: Path, source: str, rows: int) -> None:
    """As many rows of each label, the first of their source."""
    table = data.read_table(demo.reviews_csv()).columns
    texts: list[str] = []
    labels: list[int] = []
    for wanted in (0, 1):
        found = [i for i, name in enumerate(table["source"]) if name == source and int(table["label"][i]) == wanted]
        texts += [table["text"][i] for i in found[: rows // 2]]
        labels += [wanted] * len(found[: rows // 2])
    pq.write_table(pa.table({"text": texts, "label": labels}), file)


def run(file: Path, out: Path, *, rate: float, seed: int, epochs: int, settings: tuple[str, ...]) -> dict[str, Any]:
    """The figures of one run, in a process of its own."""
    chosen = (
        *(f"train.learning_rate={rate}", f"train.seed={seed}", f"train.num_epochs={epochs}"),
        *("train.early_stopping_patience=0", "train.refit=off", "train.head_start=probe", *settings),
    )
    command = [sys.executable, "-m", "trimtab", "train", str(file), "--base", MINILM, "--out", str(out)]
    command += [word for setting in chosen for word in ("--set", setting)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(file.parent / "cache")}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    metrics = json.loads((out / "metrics.json").read_text("utf-8"))
    found = {key: metrics[key] for key in _KEPT} | {"learning_rate": rate, "seed": seed}
    print(out.name, found, flush=True)
    return found


def training(one: dict[str, Any]) -> float:
    """Seconds of training with what comes before the first step."""
    return float(one["train_seconds"] + one["trunk_seconds"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", choices=("imdb", "rotten_tomatoes"), default="imdb")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=2)
    asked = parser.parse_args()
    nine: list[dict[str, Any]] = []
    single: list[dict[str, Any]] = []
    cached = (f"lora.layers=top:{asked.layers}", "runtime.trunk_cache=on")
    whole = ("lora.layers=all", "base.dropout=0", "runtime.trunk_cache=off")  # which a kept trunk has, too
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        file = folder / "rows.parquet"
        write_rows(file, asked.source, asked.rows)
        for rate in RATES:
            for seed in SEEDS:
                out = folder / f"cached-{rate:g}-{seed}"
                nine.append(run(file, out, rate=rate, seed=seed, epochs=asked.epochs, settings=cached))
            out = folder / f"whole-{rate:g}"
            single.append(run(file, out, rate=rate, seed=SEEDS[0], epochs=asked.epochs, settings=whole))
        kept = sum(states.stat().st_size for states in folder.glob("cache/trimtab/trunk/*/states.bin"))
    write(
        f"trunk-{kind()}",
        {
            "ratios": {
                "nine runs over one cached trunk, times a single run of all layers": sum(map(training, nine))
                / statistics.median(map(training, single)),
                "the same by whole processes": sum(one["total_seconds"] for one in nine)
                / statistics.median(one["total_seconds"] for one in single),
            },
            **vars(asked),
            "cache_bytes": kept,
            "cached": nine,
            "whole": single,
        },
    )


if __name__ == "__main__":
    main()
