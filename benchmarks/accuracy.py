"""Whether accuracy pays for speed: five seeds of the tutorial's recipe, ours, stock, and ours without base dropout.

    python benchmarks/accuracy.py --keep DIR [--seeds 5] [--jobs 1]

Every arm is trained on the same 1,000 IMDB reviews, its epoch chosen on the same 500, and judged here on the other
4,500 of the evaluation file, which chose nothing: ours in the dtype that this processor takes, stock in float32. Where
ours is bfloat16, the share of 2,000 rows that get the same label in float32 is recorded too.
Differences are paired: of each seed, and of each row. The interval is a bootstrap over rows (10,000 draws) of the
difference in accuracy, averaged over the seeds (Efron & Tibshirani 1993, chapter 13: percentiles). The rule, fixed
beforehand: an arm is no worse than stock if the lower end of its interval lies above -1.0 points.

Which rows each run answered rightly is kept in benchmarks/results/accuracy-KIND.json, 4,500 bits a run: a second call,
in another clone too, goes on from there, and from adapters that this script or training.py left in DIR. Stock computes
in float32 on every processor, so what the other kind's record says of it is taken as it is. --jobs 2 trains
two at a time with half of the cores each, which is quicker; times are not compared here. Needs the extra `demo`. From
nothing it takes three hours on two AVX2 cores.
"""

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from peft import PeftModel
from record import kind, packed, read, unpacked, write
from training import SEED, train
from transformers import AutoModelForSequenceClassification

from trimtab import demo, forward, tokens
from trimtab.classification import compute_logits
from trimtab.config import MINILM, RuntimeSettings
from trimtab.device import place
from trimtab.hub import find_base
from trimtab.machine import usable_cores

Right = npt.NDArray[np.bool_]
ARMS = ("ours", "stock", "ours, no base dropout")
ROWS, IN_BOTH_DTYPES = 4_500, 2_000
MARGIN = -0.01
DRAWS = 10_000


def judged(folder: Path) -> tokens.Encoded:
    """The 4,500 evaluation rows that chose no epoch, in tokens."""
    table = pq.read_table(demo.prepare(folder)[1])
    rest = table.take(np.random.default_rng(42).permutation(len(table))[500:])
    assert len(rest) == ROWS
    tokenizer = tokens.from_base(find_base(MINILM).folder)
    return tokens.encode(rest["text"].to_pylist(), tokenizer, 256, rest["label"].to_pylist())


def right(adapter: Path, rows: tokens.Encoded, dtype: Literal["auto", "float32"]) -> Right:
    """For each row whether the adapter's answer is right, loaded by peft and computed by the fast forward."""
    base = AutoModelForSequenceClassification.from_pretrained(str(find_base(MINILM).folder), num_labels=2)
    model = PeftModel.from_pretrained(base, adapter)
    engine = forward.choose(model, 0, torch.device("cpu"), RuntimeSettings(fast="on", dtype=dtype))
    found: Right = compute_logits(engine.forward, rows).argmax(1) == rows.labels
    return found


def run(arm: str, seed: int, keep: Path) -> dict[str, Any]:
    """Trains one arm with one seed and judges it: what the record keeps of a run."""
    place(RuntimeSettings(device="cpu"))
    adapter, result = train(arm, seed, keep)
    rows = judged(keep)
    answers = right(adapter, rows, "float32" if arm == "stock" else "auto")
    beside = {}
    if arm != "stock" and kind() == "bf16":  # of two labels, both right or both wrong is the same
        first = np.arange(IN_BOTH_DTYPES)
        beside["same_label_in_float32"] = float((answers[first] == right(adapter, rows.only(first), "float32")).mean())
    return {
        **beside,
        "arm": arm,
        "seed": seed,
        "accuracy": float(answers.mean()),
        "right": packed(answers),
        "commit": result["commit"],
    }


def difference(arm: Right, other: Right) -> dict[str, Any]:
    """Accuracy of `arm` less that of `other`, both bool[seeds, rows]: each seed's, their mean and its 95 % interval."""
    of_rows = arm.mean(0) - other.mean(0)
    rng = np.random.default_rng(0)
    drawn = [of_rows[rng.integers(0, len(of_rows), len(of_rows))].mean() for _ in range(DRAWS)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {
        "of_each_seed": [round(float(one), 5) for one in arm.mean(1) - other.mean(1)],
        "mean": float(of_rows.mean()),
        "interval_95": [float(low), float(high)],
        "no_worse_than_1_point": bool(low > MARGIN),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Differences to stock over the seeds that every arm has finished."""
    answers = {(one["arm"], one["seed"]): one["right"] for one in runs}
    seeds = sorted({seed for _, seed in answers if all((arm, seed) in answers for arm in ARMS)})
    if not seeds:
        return {"seeds": seeds}
    correct = {arm: unpacked([answers[arm, seed] for seed in seeds], ROWS) for arm in ARMS}
    return {
        "seeds": seeds,
        "accuracy": {arm: [float(one) for one in found.mean(1)] for arm, found in correct.items()},
        "less_stock": {arm: difference(correct[arm], correct["stock"]) for arm in ARMS if arm != "stock"},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--keep", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1)
    asked = parser.parse_args()
    threads = max(1, usable_cores() // asked.jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that are started here
    name = f"accuracy-{kind()}"
    runs: list[dict[str, Any]] = read(name).get("runs", [])
    if not runs:
        others = read(f"accuracy-{'avx2' if kind() == 'bf16' else 'bf16'}").get("runs", [])
        runs = [one for one in others if one["arm"] == "stock"]
    done = {(one["arm"], one["seed"]) for one in runs}
    missing = [(arm, seed) for seed in range(SEED, SEED + asked.seeds) for arm in ARMS if (arm, seed) not in done]
    demo.prepare(asked.keep)  # once, before several need it
    with ProcessPoolExecutor(asked.jobs, multiprocessing.get_context("spawn")) as pool:
        for found in as_completed([pool.submit(run, arm, seed, asked.keep) for arm, seed in missing]):
            runs = sorted([*runs, found.result() | {"threads": threads}], key=lambda one: (one["seed"], one["arm"]))
            write(name, {**summary(runs), "rows": ROWS, "runs": runs})
    for arm, one in summary(runs).get("less_stock", {}).items():
        low, high = one["interval_95"]
        print(f"{arm} less stock: {one['mean']:+.4f} [{low:+.4f}, {high:+.4f}], each seed {one['of_each_seed']}")


if __name__ == "__main__":
    main()
