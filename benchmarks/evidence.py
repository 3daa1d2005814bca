"""The `default` recipe on six tasks, over seeds, against the `tutorial` settings, its baselines and other rates.

    python benchmarks/evidence.py [--banking77 DIR] [--keep DIR] [--tasks NAME,...] [--seeds 5] [--arms NAME,...]
                                  [--jobs 1]

Every seed draws its own rows, or their order where all are taken, in a file that all arms share. Sealed rows are the
same for all and choose nothing: epoch and temperature come from a tenth of the training rows. DIR of banking77 holds
train.csv and test.csv.

What has finished stands in benchmarks/results/evidence.json, each trial with its commit, its processor's kind (bf16 or
avx2) and a bit for every sealed row: a second call, in another clone or on another machine too, goes on from there with
more tasks, arms or seeds. A trial belongs to its settings as they are settled for its rows, so what a changed recipe or
a changed rule for an `auto` makes another run is trained again, and what another arm has trained already is taken from
there. Differences are of trials on the same kind. --jobs 2 trains two at a time with half of the cores each. Prints the
table. Needs the extra `demo`.
"""

import argparse
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from record import commit, kind, packed, read, unpacked, write

from trimtab import config, demo
from trimtab.comparison import read_answers
from trimtab.config import MINILM
from trimtab.data import read_table
from trimtab.machine import usable_cores
from trimtab.paired import mean_over_seeds, paired_over_seeds
from trimtab.resolve import resolve

TASKS = ("rotten-1000", "banking77-10", "imdb-1000", "rotten-6800", "banking77-full", "imdb-20000")
ARMS: dict[str, tuple[str, ...]] = {  # a shipped recipe, and what is set beside it
    "default": ("default",),
    "tutorial": ("tutorial", "data.limit_train=0", "data.limit_eval=0"),
    "once": ("default", "train.refit=off"),  # so rates are compared, also where the default is `twice`
    "twice": ("default", "train.refit=on"),
    **{
        f"rate-{rate}": ("default", f"train.learning_rate={rate}", "train.refit=off")
        for rate in ("2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3")  # 1e-3, of banking77-full 2e-3, is the default's
    },
}
ORIGIN = ("commit", "kind", "threads")
Rows = Sequence[tuple[str, str]]
Key = TypeVar("Key")
_MOST_OTHER = 5_000


class Data(NamedTuple):
    """The files of a seed."""

    train: Path
    sealed: Path
    other: Path
    """Rows of the pool that the seed does not train on, 5,000 at most; no file where it trains on all of them."""


def data(task: str, seed: int, keep: Path, banking77: Path | None) -> Data:
    """The files of a task and seed, written unless they are there."""
    name, _, size = task.rpartition("-")
    stem = keep / "data" / f"{task}-{seed}"
    files = Data(Path(f"{stem}.parquet"), keep / "data" / f"{name}-sealed.parquet", Path(f"{stem}-other.parquet"))
    if not (files.train.is_file() and files.sealed.is_file()):
        pool, held = {"imdb": _imdb, "rotten": rotten}.get(name, lambda keep: _banking77(banking77))(keep)
        order = shuffled = np.random.default_rng(seed).permutation(len(pool))
        if size.isdigit() and name == "banking77":
            order = np.concatenate(
                [[i for i in order if pool[i][1] == label][: int(size)] for label in sorted({row[1] for row in pool})]
            )
        elif size.isdigit():
            order = order[: int(size)]
        taken = {pool[i][0] for i in order}
        if other := [pool[i] for i in shuffled if pool[i][0] not in taken]:
            _save(files.other, other[:_MOST_OTHER])
        _save(files.train, [pool[i] for i in order])
        _save(files.sealed, held)
    return files


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


def settled_sha256(train: Path, recipe: str, settings: Sequence[str], seed: int) -> str:
    """Of every setting as it is settled for these rows; not of where they lie, and whether baselines stand beside."""
    flags = {"data.train": (str(train),), "base.model": MINILM}
    layered = config.assemble(recipe, flags, [f"train.seed={seed}", f"data.seed={seed}", *settings])
    places = {"sha256": True, "data": {"train"}, "base": {"model"}, "train": {"baselines"}}
    settled = resolve(layered).recipe.model_dump(mode="json", exclude=places)
    return hashlib.sha256(json.dumps(settled, sort_keys=True).encode()).hexdigest()


def trained(
    run: Path, train: Path, test: Path, recipe: str, settings: Sequence[str], seed: int, threads: int
) -> dict[str, Any]:
    """Trains a run, or goes on with it, and gives what it says of itself, with commit, kind and threads.

    What other code or another machine has begun is trained anew, and what it has ended is told as its own.
    """
    here = {"commit": commit(), "kind": kind(), "threads": threads}
    origin = run.with_name(f"{run.name}.json")
    by = json.loads(origin.read_text("utf-8")) if origin.is_file() else {}
    command = [sys.executable, "-m", "trimtab", "train"]
    if (run / "recipe.toml").is_file() and by and (by == here or (run / "metrics.json").is_file()):
        command += ["--resume", str(run)]
    else:
        shutil.rmtree(run, ignore_errors=True)
        command += [str(train), "--test", str(test), "--base", MINILM, "--out", str(run), "--recipe", recipe]
        settings = [f"train.seed={seed}", f"data.seed={seed}", *settings]
        command += [part for setting in settings for part in ("--set", setting)]
        run.parent.mkdir(parents=True, exist_ok=True)
        by = here
        origin.write_text(json.dumps(by), "utf-8")
    with run.with_name(run.name + ".log").open("ab") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    return {**json.loads((run / "metrics.json").read_text("utf-8")), **by}


def trial(task: str, arm: str, seed: int, sha256: str, keep: Path, files: Data, threads: int) -> dict[str, Any]:
    """What the record keeps of one run, which is trained unless it has been."""
    run = keep / task / arm / f"{seed}-{sha256[:8]}"
    recipe, *settings = ARMS[arm]
    settings += [] if arm == "default" else ["train.baselines=false"]
    metrics = trained(run, files.train, files.sealed, recipe, settings, seed, threads)
    keys = ("accuracy", "macro_f1", "chosen_on_accuracy", "epoch", "train_seconds", "calibration", "baselines", *ORIGIN)
    answers = read_answers(run).rows
    return {
        **{key: metrics[key] for key in keys if key in metrics},
        "recipe_sha256": sha256,
        "rows": len(answers.truth),
        "right": packed(answers.told == answers.truth),
    }


def known(arms: dict[str, Any], arm: str, seed: int, sha256: str, *, with_baselines: bool) -> dict[str, Any] | None:
    """The arm's trial of these settings, or that of another arm."""
    of_seed = [arms[one][str(seed)] for one in (arm, *arms) if str(seed) in arms.get(one, {})]
    fitting = (one for one in of_seed if one["recipe_sha256"] == sha256)
    return next((one for one in fitting if not with_baselines or "tfidf" in one["baselines"]), None)


def carried_out(jobs: int, works: Mapping[Key, Callable[[], dict[str, Any]]]) -> Iterator[tuple[Key, dict[str, Any]]]:
    """What each work gives, as they end; what failed is told when all have."""
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(work): key for key, work in works.items()}
        for done in as_completed(futures):
            if error := done.exception():
                failed.append(f"{futures[done]}: {error}")
                print(f"failed: {failed[-1]}", flush=True)
            else:
                yield futures[done], done.result()
    if failed:
        sys.exit("\n".join(["failed:", *failed]))


def right(trials: dict[str, Any], seeds: Sequence[int]) -> Any:
    """Which sealed rows were answered rightly: bool[seeds, n]."""
    chosen = [trials[str(seed)] for seed in seeds]
    return unpacked([one["right"] for one in chosen], chosen[0]["rows"])


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the trials of a task come to: means, intervals, differences to the default; of rates to the arm `once`.

    Where the default learns once by itself, with many rows, asking for `once` costs nothing.
    """
    lines: dict[str, Any] = {}
    found = {arm: trials for arm, trials in found.items() if trials}
    own = sorted(map(int, found["default"]))
    for arm, trials in found.items():
        seeds = sorted(map(int, trials))
        mean, ci95 = mean_over_seeds(right(trials, seeds))
        accuracies = [trials[str(seed)]["accuracy"] for seed in seeds]
        kinds = sorted({trial["kind"] for trial in trials.values()})
        lines[arm] = {"seeds": len(seeds), "kinds": kinds, "accuracy": mean, "ci95": ci95, "lowest": min(accuracies)}
        if len(seeds) > 1:
            lines[arm]["std"] = float(np.std(accuracies, ddof=1))
        kind_of = {seed: trials[str(seed)]["kind"] for seed in seeds}
        other = "once" if arm.startswith("rate-") else "default"
        both = [seed for seed in seeds if found.get(other, {}).get(str(seed), {}).get("kind") == kind_of[seed]]
        if arm != other and both:
            against = paired_over_seeds(right(found[other], both), right(trials, both))
            lines[arm] |= {"compared_to": other, "difference": against.difference, "difference_ci95": against.ci95}
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
        "| task | arm | seeds | on | accuracy | std | lowest | 95 % interval | another less this | ECE raw, after |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task, arms in tasks.items():
        for arm, one in arms.items():
            interval = "{:.3f} to {:.3f}".format(*one["ci95"]) if "ci95" in one else ""
            against = ""
            if "difference" in one:
                figures = "{:+.4f} ({:+.4f} to {:+.4f})".format(one["difference"], *one["difference_ci95"])
                against = f"{one['compared_to']}: {figures}"
            ece = f"{one['ece_before']:.3f}, {one['ece_after']:.3f}" if "ece_before" in one else ""
            std = f"{one['std']:.4f}" if "std" in one else ""
            on = ", ".join(one.get("kinds", ()))
            lowest = f"{one['lowest']:.4f}" if "lowest" in one else ""
            lines.append(
                f"| {task} | {arm} | {one['seeds']} | {on} | {one['accuracy']:.4f} | {std} | "
                f"{lowest} | {interval} | {against} | {ece} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--banking77", type=Path, help="a folder with train.csv and test.csv")
    parser.add_argument("--keep", type=Path, default=Path("runs/evidence"), help="where trials go and are found again")
    parser.add_argument("--tasks", default=",".join(TASKS[:5]))
    parser.add_argument("--arms", default="default,tutorial")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    name, threads = "evidence", max(1, usable_cores() // given.jobs)
    before = read(name)
    trials: dict[str, Any] = before.get("trials", {})
    tables: dict[str, Any] = before.get("tasks", {})
    asked = {(one, seed) for one in given.arms.split(",") for seed in range(given.seeds)}
    missing: dict[tuple[str, int, str], list[str]] = {}
    named = given.tasks.split(",")
    for task in named:
        had, trials[task] = trials.get(task, {}), {}
        for arm, seed in sorted(asked | {(one, int(seed)) for one in had for seed in had[one]}):
            files, (recipe, *settings) = data(task, seed, given.keep, given.banking77), ARMS[arm]
            sha256 = settled_sha256(files.train, recipe, settings, seed)
            if there := known(had, arm, seed, sha256, with_baselines=arm == "default"):
                trials[task].setdefault(arm, {})[str(seed)] = there
            elif (arm, seed) in asked:
                missing.setdefault((task, seed, sha256), []).append(arm)

    def record(task: str) -> None:
        if trials[task].get("default"):
            tables[task] = summary(trials[task])
        write(name, {"tasks": tables, "trials": trials})

    def training(task: str, seed: int, sha256: str) -> Callable[[], dict[str, Any]]:
        """Of the first of the arms that come to the same; `default` comes before `once`, and has baselines."""
        files = data(task, seed, given.keep, given.banking77)
        return partial(trial, task, missing[task, seed, sha256][0], seed, sha256, given.keep, files, threads)

    for task in named:
        record(task)
    for (task, seed, sha256), found in carried_out(given.jobs, {key: training(*key) for key in missing}):
        for arm in missing[task, seed, sha256]:
            trials[task].setdefault(arm, {})[str(seed)] = found
            print(f"{task} {arm} seed {seed}: {found['accuracy']:.4f}", flush=True)
        record(task)
    print("\n".join(markdown({task: tables[task] for task in named if task in tables})))


if __name__ == "__main__":
    main()
