"""Settings beside those of the recipe `default`, judged on rows that choose nothing else: what a default is chosen by.

    python benchmarks/choose.py TASK [SETTING[,SETTING...] ...] [--seeds 5] [--banking77 DIR] [--keep DIR] [--jobs 1]

Trains evidence.py's task as it is and with each argument's settings, such as `base.dropout=0.2`, and asks for rows of
the pool that the seed does not train on: a sealed row chooses no default. What has finished stands in
benchmarks/results/choices.json, each trial with the settings that it was asked for, its commit and its processor's
kind; a second call goes on from there, and trains again what a changed default makes another run. Needs the extra
`demo`.
"""

import argparse
import hashlib
import statistics
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from evidence import TASKS, data, trained
from record import commit, kind, read, write

from trimtab import config
from trimtab.machine import usable_cores


def table(task: str, arms: dict[str, Any]) -> list[str]:
    """A line for each arm: its mean, and the difference to the default over the seeds that both have, paired."""
    lines = []
    for arm, trials in arms.items():
        scores = {seed: trials[seed]["accuracy"] for seed in sorted(trials)}
        line = f"{task} {arm or 'as it is'}: {statistics.mean(scores.values()):.4f} over {len(scores)} seeds"
        less = [score - arms[""][seed]["accuracy"] for seed, score in scores.items() if seed in arms.get("", {})]
        if arm and len(less) > 1:
            line += f", {statistics.mean(less):+.4f} (standard error {statistics.stdev(less) / len(less) ** 0.5:.4f})"
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=[task for task in TASKS if task.rpartition("-")[2].isdigit()])
    parser.add_argument("arms", nargs="*", metavar="SETTING[,SETTING...]")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--banking77", type=Path, help="a folder with train.csv and test.csv")
    parser.add_argument("--keep", type=Path, default=Path("runs/choices"), help="where trials go and are found again")
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    threads = max(1, usable_cores() // given.jobs)
    tasks: dict[str, Any] = read("choices").get("tasks", {})
    arms = tasks.setdefault(given.task, {})

    def trial(arm: str, seed: int) -> dict[str, Any]:
        settings = arm.split(",") if arm else []
        recipe = config.assemble("default", {}, settings).recipe.model_dump_json()
        sha256 = hashlib.sha256(recipe.encode()).hexdigest()
        known = arms.get(arm, {}).get(str(seed))
        if known and known["recipe_sha256"] == sha256:
            return dict(known)
        files = data(given.task, seed, given.keep, given.banking77)
        run = given.keep / given.task / f"{seed}-{sha256[:8]}"
        settings = ["train.baselines=false", *settings]
        metrics = trained(run, files.train, files.other, "default", settings, seed, threads)
        keys = ("accuracy", "epoch", "train_seconds")
        return {**{key: metrics[key] for key in keys}, "recipe_sha256": sha256, "commit": commit(), "kind": kind()}

    wanted = [(arm, seed) for seed in range(given.seeds) for arm in ["", *given.arms]]
    for _, seed in wanted:
        data(given.task, seed, given.keep, given.banking77)  # one after another: arms share them
    with ThreadPoolExecutor(given.jobs) as pool:
        futures = {pool.submit(trial, *one): one for one in wanted}
        for done in as_completed(futures):
            arm, seed = futures[done]
            arms.setdefault(arm, {})[str(seed)] = done.result()
            write("choices", {"tasks": tasks})
            print(f"{given.task} {arm or 'as it is'} seed {seed}: {arms[arm][str(seed)]['accuracy']:.4f}", flush=True)
    print("\n".join(table(given.task, arms)))


if __name__ == "__main__":
    main()
