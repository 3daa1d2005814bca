"""Whether accuracy pays for speed: five seeds of the tutorial's recipe, ours, stock, and ours without base dropout.

    python benchmarks/accuracy.py --keep DIR [--seeds 5]

Every arm is trained on the same 1,000 IMDB reviews, its epoch chosen on the same 500, and judged here on the other
4,500 of the evaluation file, which chose nothing. Differences are paired: of each seed, and of each row. The interval
is a bootstrap over rows (10,000 draws) of the difference in accuracy, averaged over the seeds (Efron & Tibshirani
1993, chapter 13: percentiles). The rule, fixed beforehand: an arm is no worse than stock if the lower end of its
interval lies above -1.0 points.

What has finished is kept in DIR, where training.py may have left it already: a second call goes on from there. Writes
benchmarks/results/accuracy-KIND.json after every seed. Needs the extra `demo`. From nothing it takes hours.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from peft import PeftModel
from record import kind, write
from training import SEED, train
from transformers import AutoModelForSequenceClassification

from trimtab import demo, forward, tokens
from trimtab.classification import compute_logits
from trimtab.config import MINILM, RuntimeSettings
from trimtab.device import place
from trimtab.hub import find_base

ARMS = ("ours", "stock", "ours, no base dropout")
MARGIN = -0.01
DRAWS = 10_000


def judged(folder: Path) -> tokens.Encoded:
    """The 4,500 evaluation rows that chose no epoch, in tokens."""
    table = pq.read_table(demo.prepare(folder)[1])
    rest = table.take(np.random.default_rng(42).permutation(len(table))[500:])
    tokenizer = tokens.from_base(find_base(MINILM).folder)
    return tokens.encode(rest["text"].to_pylist(), tokenizer, 256, rest["label"].to_pylist())


def right(adapter: Path, rows: tokens.Encoded) -> npt.NDArray[np.bool_]:
    """For each row whether the adapter's answer is right; every arm is loaded by peft and computed alike."""
    kept = adapter.parent / "right.npy"
    if not kept.is_file():
        base = AutoModelForSequenceClassification.from_pretrained(str(find_base(MINILM).folder), num_labels=2)
        model = PeftModel.from_pretrained(base, adapter)
        engine = forward.choose(model, 0, torch.device("cpu"), RuntimeSettings(fast="on"))
        np.save(kept, compute_logits(engine.forward, rows).argmax(1) == rows.labels)
    found: npt.NDArray[np.bool_] = np.load(kept)
    return found


def difference(arm: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> dict[str, Any]:
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--keep", type=Path, required=True)
    asked = parser.parse_args()
    place(RuntimeSettings(device="cpu"))
    rows = judged(asked.keep)
    answers: dict[str, list[npt.NDArray[np.bool_]]] = {arm: [] for arm in ARMS}
    commits = []
    for seed in range(SEED, SEED + asked.seeds):
        for arm in ARMS:
            adapter, result = train(arm, seed, asked.keep)
            commits.append(result["commit"])
            answers[arm].append(right(adapter, rows))
        correct = {arm: np.stack(found) for arm, found in answers.items()}
        differences = {arm: difference(correct[arm], correct["stock"]) for arm in ARMS if arm != "stock"}
        for arm, found in differences.items():
            low, high = found["interval_95"]
            print(f"{arm} less stock, {seed - SEED + 1} seeds: {found['mean']:+.4f} [{low:+.4f}, {high:+.4f}]")
        write(
            f"accuracy-{kind()}",
            {
                "seeds": seed - SEED + 1,
                "rows": len(rows),
                "accuracy": {arm: [float(one) for one in found.mean(1)] for arm, found in correct.items()},
                "less_stock": differences,
                "trained_at": sorted(set(commits)),
            },
        )


if __name__ == "__main__":
    main()
