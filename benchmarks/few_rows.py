"""An adapter that was trained on a few rows, for what does not depend on what it learned. No script of its own."""

from pathlib import Path

import trimtab
from trimtab import demo
from trimtab.config import MINILM


def trained_on_a_few_rows(folder: Path) -> tuple[trimtab.Run, Path]:
    """A run on MiniLM in `folder`, and the evaluation rows of the demo."""
    train, evaluation = demo.prepare(folder)
    settings = {"data.limit_train": 64, "data.limit_eval": 32, "train.num_epochs": 1}
    run = trimtab.train(train, eval=evaluation, recipe="tutorial", base=MINILM, settings=settings, out=folder / "run")
    return run, evaluation
