"""The figures of the README: the demo, and 1,000 film sentences judged on 500 sealed ones. About 6 minutes.

    python benchmarks/readme_figures.py

Writes benchmarks/results/readme_figures.json with the machine and the commit. Needs the extra `demo`.
"""

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from record import write

from trimtab import data, demo

KEPT = ("scored_on", "eval_rows", "accuracy", "accuracy_ci95", "macro_f1", "majority_accuracy", "epoch")
KEPT += ("train_seconds", "total_seconds", "peak_rss_bytes", "adapter_bytes", "largest_difference_after_reload")


def write_sentences(folder: Path) -> tuple[Path, Path]:
    """reviews.csv and sealed.csv: 1,000 and 500 of the package's rotten_tomatoes sentences, drawn with seed 0."""
    columns = data.read_table(demo.reviews_csv()).columns
    rows = [i for i, source in enumerate(columns["source"]) if source == "rotten_tomatoes"]
    order = np.random.default_rng(0).permutation(len(rows))
    files = folder / "reviews.csv", folder / "sealed.csv"
    for file, part in zip(files, (order[:1_000], order[1_000:1_500]), strict=True):
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["text", "label"])
            writer.writerows([columns["text"][rows[i]].strip(), columns["label"][rows[i]]] for i in part)
    return files


def run(folder: Path, *words: str) -> dict[str, Any]:
    """One command in a process of its own, so that its peak memory is its own; returns the run's metrics."""
    out = folder / words[0]
    subprocess.run([sys.executable, "-m", "trimtab", *words, "--out", str(out)], cwd=folder, check=True)
    metrics = json.loads((out / "metrics.json").read_text("utf-8"))
    return {key: metrics[key] for key in KEPT}


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        reviews, sealed = write_sentences(folder)
        write(
            "readme_figures",
            {"own_file": run(folder, "train", str(reviews), "--test", str(sealed)), "demo": run(folder, "demo")},
        )


if __name__ == "__main__":
    main()
