"""The `default` recipe on six tasks, over seeds, against the `tutorial` settings, its baselines and other rates.

    python benchmarks/evidence.py [--banking77 DIR] [--keep DIR] [--tasks NAME,...] [--seeds 5] [--arms NAME,...]

Every seed draws its own rows, or their order where all are taken, in a file that all arms share. Sealed rows are the
same for all and choose nothing: epoch and temperature come from a tenth of the training rows. DIR of banking77 holds
train.csv and test.csv. What has finished is kept in the folder of --keep: a second call goes on from there, with more
tasks, arms or seeds. Writes benchmarks/results/evidence-KIND.json, KIND = bf16 or avx2, and prints the table.
Needs the extra `demo`.
"""

import argparse
import csv
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from record import commit, kind, write

from trimtab import demo
from trimtab.comparison import read_answers
from trimtab.config import MINILM
from trimtab.data import read_table
from trimtab.paired import mean_over_seeds, paired_over_seeds

TASKS = ("rotten-1000", "banking77-10", "imdb-1000", "rotten-6800", "banking77-full", "imdb-20000")
ARMS: dict[str, tuple[str, ...]] = {
    "default": ("--recipe", "default"),
    "tutorial": ("--recipe", "tutorial", "--set", "data.limit_train=0", "--set", "data.limit_eval=0"),
    **{
        f"rate-{rate}": ("--recipe", "default", "--set", f"train.learning_rate={rate}")
        for rate in ("2.5e-4", "5e-4", "2e-3", "4e-3")  # 1e-3 is the default's own
    },
}
Rows = Sequence[tuple[str, str]]


def data(task: str, seed: int, keep: Path, banking77: Path | None) -> tuple[Path, Path]:
    """The training file of a seed and the sealed file of a task, written unless they are there."""
    name, _, size = task.rpartition("-")
    train, sealed = keep / "data" / f"{task}-{seed}.parquet", keep / "data" / f"{name}-sealed.parquet"
    if not (train.is_file() and sealed.is_file()):
        pool, held = {"imdb": _imdb, "rotten": rotten}.get(name, lambda keep: _banking77(banking77))(keep)
        order = np.random.default_rng(seed).permutation(len(pool))
        if size.isdigit() and name == "banking77":
            order = np.concatenate(
                [[i for i in order if pool[i][1] == label][: int(size)] for label in sorted({row[1] for row in pool})]
            )
        elif size.isdigit():
            order = order[: int(size)]
        _save(train, [pool[i] for i in order])
        _save(sealed, held)
    return train, sealed


def _imdb(keep: Path) -> tuple[Rows, Rows]:
    parts = [pq.read_table(file) for file in demo.prepare(keep / "data")]
    pool, held = (
        list(zip(part["text"].to_pylist(), map(str, part["label"].to_pylist()), strict=True)) for part in parts
    )
    return pool, held


def rotten(keep: Path) -> tuple[Rows, Rows]:
    columns = read_table(demo.reviews_csv()).columns
    rows = [
        (text, label)
        for text, label, source in zip(columns["text"], columns["label"], columns["source"], strict=True)
        if source == "rotten_tomatoes"
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows[i] for i in order[:6_800]], [rows[i] for i in order[6_800:]]


def _banking77(folder: Path | None) -> tuple[Rows, Rows]:
    if folder is None:
        sys.exit("banking77 is no package: --banking77 DIR with its train.csv and test.csv, or --tasks without it")
    found = []
    for part in ("train", "test"):
        with (folder / f"{part}.csv").open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        label = "category" if "category" in rows[0] else "label"
        found.append([(row["text"], row[label]) for row in rows])
    return found[0], found[1]


def _save(file: Path, rows: Rows) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    texts, labels = zip(*rows, strict=True)
    draft = file.with_name(file.name + ".tmp")
    pq.write_table(pa.table({"text": list(texts), "label": list(labels)}), draft)
    draft.replace(file)


def trial(task: str, arm: str, seed: int, keep: Path, banking77: Path | None) -> dict[str, Any]:
    """The figures of one run; trained now, unless that was done before."""
    run = keep / task / arm / str(seed)
    told = run / "trial.json"
    if not told.is_file():
        train, sealed = data(task, seed, keep, banking77)
        command = [sys.executable, "-m", "trimtab", "train"]
        if (run / "recipe.toml").is_file():
            command += ["--resume", str(run)]
        else:
            command += [str(train), "--test", str(sealed), "--base", MINILM, "--out", str(run), *ARMS[arm]]
            command += ["--set", f"train.seed={seed}", "--set", f"data.seed={seed}"]
            command += [] if arm == "default" else ["--set", "train.baselines=false"]
        run.parent.mkdir(parents=True, exist_ok=True)
        with (run.parent / f"{seed}.log").open("ab") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
        metrics = json.loads((run / "metrics.json").read_text("utf-8"))
        keys = ("accuracy", "macro_f1", "chosen_on_accuracy", "epoch", "train_seconds", "calibration", "baselines")
        found = {key: metrics[key] for key in keys if key in metrics}
        recipe = [line for line in (run / "recipe.toml").read_text("utf-8").splitlines() if "/" not in line]
        found |= {"recipe_sha256": hashlib.sha256("\n".join(recipe).encode()).hexdigest(), "commit": commit()}
        told.write_text(json.dumps(found | {"kind": kind()}), "utf-8")
    return dict(json.loads(told.read_text("utf-8")))


def right(task: str, arm: str, seeds: Sequence[int], keep: Path) -> Any:
    """Which sealed rows were answered rightly: bool[seeds, n]."""
    answers = [read_answers(keep / task / arm / str(seed)) for seed in seeds]
    return np.stack([one.rows.told == one.rows.truth for one in answers])


def summary(task: str, found: dict[str, dict[str, Any]], keep: Path) -> dict[str, Any]:
    """What the trials of a task come to: means, intervals, differences to the default."""
    lines: dict[str, Any] = {}
    own = sorted(map(int, found["default"]))
    for arm, trials in found.items():
        seeds = sorted(map(int, trials))
        mean, ci95 = mean_over_seeds(right(task, arm, seeds, keep).astype(float))
        accuracies = [trials[str(seed)]["accuracy"] for seed in seeds]
        lines[arm] = {"seeds": len(seeds), "accuracy": mean, "ci95": ci95, "lowest": min(accuracies)}
        if len(seeds) > 1:
            lines[arm]["std"] = float(np.std(accuracies, ddof=1))
        both = [seed for seed in seeds if seed in own]
        if arm != "default" and both:
            difference, ci95 = paired_over_seeds(right(task, "default", both, keep), right(task, arm, both, keep))
            lines[arm] |= {"default_minus_this": difference, "difference_ci95": ci95}
    for name in ("tfidf", "probe"):
        beside = [found["default"][str(seed)]["baselines"][name]["accuracy"] for seed in own]
        lines[name] = {"seeds": len(own), "accuracy": float(np.mean(beside))}
    for when in ("before", "after"):
        lines["default"][f"ece_{when}"] = float(
            np.mean([found["default"][str(seed)]["calibration"][f"ece_{when}"] for seed in own])
        )
    return lines


def markdown(tasks: dict[str, Any]) -> list[str]:
    """The table."""
    lines = [
        "| task | arm | seeds | accuracy | std | lowest | 95 % interval | default minus this | ECE raw -> calibrated |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task, arms in tasks.items():
        for arm, one in arms.items():
            interval = "{:.3f} to {:.3f}".format(*one["ci95"]) if "ci95" in one else ""
            against = ""
            if "default_minus_this" in one:
                against = "{:+.4f} ({:+.4f} to {:+.4f})".format(one["default_minus_this"], *one["difference_ci95"])
            ece = f"{one['ece_before']:.3f} -> {one['ece_after']:.3f}" if "ece_before" in one else ""
            std = f"{one['std']:.4f}" if "std" in one else ""
            lowest = f"{one['lowest']:.4f}" if "lowest" in one else ""
            lines.append(
                f"| {task} | {arm} | {one['seeds']} | {one['accuracy']:.4f} | {std} | {lowest} | {interval} | "
                f"{against} | {ece} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--banking77", type=Path, help="a folder with train.csv and test.csv")
    parser.add_argument("--keep", type=Path, default=Path("runs/evidence"), help="where trials go and are found again")
    parser.add_argument("--tasks", default=",".join(TASKS[:5]))
    parser.add_argument("--arms", default="default,tutorial")
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    arms = given.arms.split(",")
    for task in given.tasks.split(","):
        for seed in range(given.seeds):
            for arm in arms:
                found = trial(task, arm, seed, given.keep, given.banking77)
                print(f"{task} {arm} seed {seed}: {found['accuracy']:.4f}", flush=True)
    done = {
        task: {
            arm: {
                file.parent.name: json.loads(file.read_text("utf-8"))
                for file in sorted((given.keep / task / arm).glob("*/trial.json"))
            }
            for arm in ARMS
            if list((given.keep / task / arm).glob("*/trial.json"))
        }
        for task in TASKS
    }
    tables = {task: summary(task, found, given.keep) for task, found in done.items() if "default" in found}
    write(f"evidence-{kind()}", {"tasks": tables, "trials": done})
    print("\n".join(markdown(tables)))


if __name__ == "__main__":
    main()
