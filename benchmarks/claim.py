"""LoRA against full fine-tuning and a linear probe, by `trimtab compare`: is a thousandth of the parameters enough?

    python benchmarks/claim.py [--keep DIR] [--tasks imdb-1000,rotten-1000] [--seeds 3] [--rates 3]

1,000 rows of each task, the same for all seeds, three rates a method, three seeds at the best of them; sealed rows
decide. What has finished is kept in the folder of --keep, for the same commit. Writes
benchmarks/results/claim-KIND.json, KIND = bf16 or avx2, and prints the tables as Markdown. Needs the extra `demo`.
"""

import argparse
from pathlib import Path

from evidence import data
from record import commit, kind, read, write

from trimtab import config, trials
from trimtab.config import MINILM

METHODS = ("lora", "head", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, default=Path("runs/evidence"), help="where trials go and are found again")
    parser.add_argument("--tasks", default="rotten-1000,imdb-1000")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=int, default=3)
    given = parser.parse_args()
    plan = trials.Plan(METHODS, given.seeds, given.rates)
    name = f"claim-{kind()}"
    found = read(name).get("tasks", {})
    for task in given.tasks.split(","):
        files = data(task, 0, given.keep, None)
        layered = config.assemble(
            "default", {"data.train": (str(files.train),), "data.test": (str(files.sealed),), "base.model": MINILM}
        )
        begun = commit()
        out = given.keep / f"claim-{task}-{begun[:8]}"  # other code begins anew
        found[task] = trials.run(layered, plan, out=str(out), tell=lambda line: print(line, flush=True))
        found[task] = {"commit": begun, **found[task]}
        found[task].pop("folder")
        write(name, {"tasks": found})
        print("\n".join([f"### {task}", "", *trials.markdown_lines(found[task])]), flush=True)


if __name__ == "__main__":
    main()
