"""Settings beside those of the recipe `default`, judged on rows that choose nothing else: what a default is chosen by.

    python benchmarks/choose.py TASK [SETTING[,SETTING...] ...] [--seeds 5] [--banking77 DIR] [--keep DIR] [--jobs 1]

Trains a task of evidence.py, or one of its pools with another number of rows such as `rotten-5000`, as it is and with
each argument's settings, such as `base.dropout=0.2`, and asks for rows of the pool that the seed does not train on: a
sealed row chooses no default.

What has finished stands in benchmarks/results/choices.json, each trial under what it sets beside today's default, with
its commit and its processor's kind; a second call goes on from there. As in evidence.py, a trial belongs to its
settings as they are settled. Needs the extra `demo`.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from evidence import ORIGIN, Data, carried_out, data, known, settled_sha256, trained
from record import read, write

from trimtab.machine import usable_cores


def settings_of(arm: str) -> list[str]:
    """Of an argument; of the empty one, the default itself, none."""
    return arm.split(",") if arm else []


def table(task: str, arms: dict[str, Any]) -> list[str]:
    """A line for each arm: its mean, and the difference to the default over the seeds that both have on one kind."""
    lines = []
    own = arms.get("", {})
    for arm, trials in arms.items():
        scores = [one["accuracy"] for one in trials.values()]
        line = f"{task} {arm or 'as it is'}: {statistics.mean(scores):.4f} over {len(scores)} seeds"
        both = [seed for seed in trials if seed in own and own[seed]["kind"] == trials[seed]["kind"]]
        less = [trials[seed]["accuracy"] - own[seed]["accuracy"] for seed in both]
        if arm and len(less) > 1:
            line += f", {statistics.mean(less):+.4f} (standard error {statistics.stdev(less) / len(less) ** 0.5:.4f})"
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", help="as evidence.py's, with any number of rows that leaves some of the pool")
    parser.add_argument("arms", nargs="*", metavar="SETTING[,SETTING...]")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--banking77", type=Path, help="a folder with train.csv and test.csv")
    parser.add_argument("--keep", type=Path, default=Path("runs/choices"), help="where trials go and are found again")
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    threads = max(1, usable_cores() // given.jobs)
    tasks: dict[str, Any] = read("choices").get("tasks", {})
    before: dict[str, Any] = tasks.get(given.task, {})
    arms: dict[str, Any] = {}
    tasks[given.task] = arms
    asked = {(one, seed) for one in ["", *given.arms] for seed in range(given.seeds)}
    missing: dict[tuple[int, str], list[str]] = {}
    for arm, seed in sorted(asked | {(one, int(seed)) for one in before for seed in before[one]}):
        files = data(given.task, seed, given.keep, given.banking77)
        sha256 = settled_sha256(files.train, "default", settings_of(arm), seed)
        if there := known(before, arm, seed, sha256, with_baselines=False):
            arms.setdefault(arm, {})[str(seed)] = there
        elif (arm, seed) in asked:
            missing.setdefault((seed, sha256), []).append(arm)

    def trial(arm: str, seed: int, sha256: str, files: Data) -> dict[str, Any]:
        run = given.keep / given.task / f"{seed}-{sha256[:8]}"
        settings = ["train.baselines=false", *settings_of(arm)]
        metrics = trained(run, files.train, files.other, "default", settings, seed, threads)
        keys = ("accuracy", "epoch", "train_seconds", *ORIGIN)
        return {**{key: metrics[key] for key in keys}, "recipe_sha256": sha256}

    def training(seed: int, sha256: str) -> Callable[[], dict[str, Any]]:
        """Of the first of the arms that come to the same."""
        files = data(given.task, seed, given.keep, given.banking77)
        return partial(trial, missing[seed, sha256][0], seed, sha256, files)

    for (seed, sha256), found in carried_out(given.jobs, {key: training(*key) for key in missing}):
        for arm in missing[seed, sha256]:
            arms.setdefault(arm, {})[str(seed)] = found
            print(f"{given.task} {arm or 'as it is'} seed {seed}: {found['accuracy']:.4f}", flush=True)
        write("choices", {"tasks": tasks})
    print("\n".join(table(given.task, arms)))


if __name__ == "__main__":
    main()
