"""`train.learning_rate = "search"`: three rates tried on a part of the work, before the run begins.

The run's recipe.toml records the rate that was found, and how: a run that goes on or is repeated searches no more.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab import config, interrupts
from trimtab.build import make_ready, with_trunk
from trimtab.calibration import fit_temperature
from trimtab.classification import mean_loss
from trimtab.config import Layered
from trimtab.errors import DivergedError
from trimtab.headstart import start_head
from trimtab.loop import run_loop
from trimtab.resolve import Job, resolve
from trimtab.rundir import RunDir

_FACTORS = (1 / 3, 1.0, 3.0)  # of the rate that `auto` takes
_SHARE = 0.1  # of the steps of the run, for each rate, after the start of its head
_FEWEST_STEPS = 20  # below this the warm-up is all that is seen
_MOST_EVAL_ROWS = 500


class Tried(NamedTuple):
    """A rate, and the loss of the evaluation rows that it came to."""

    rate: float
    loss: float
    """After the best temperature, so that a rate does not lose for being sure of itself."""


def find_rate(layered: Layered, tell: Callable[[str], None]) -> Layered:
    """Settles a learning rate that is to be searched; any other recipe comes back as it is.

    Raises:
        TrimtabError: as training.
    """
    if layered.recipe.train.learning_rate != "search":
        return layered
    usual = resolve(layered.override({"train.learning_rate": "auto"}, "search"))
    centre = float(usual.recipe.train.learning_rate)
    brief = _brief(layered, usual)
    tried = []
    for factor in _FACTORS:
        rate = float(f"{centre * factor:.2g}")
        try:
            tried.append(_try(brief, rate))
        except DivergedError:
            tell(f"learning rate {rate:g}: diverged")
            continue
        tell(f"learning rate {tried[-1].rate:g}: evaluation loss {tried[-1].loss:.4f}")
    if not tried:
        raise DivergedError(
            "search.diverged",
            "All rates that were tried diverged.",
            mend="--set train.learning_rate=1e-5, or look at the data",
        )
    best = min(tried, key=lambda one: one.loss)
    told = ", ".join(f"{one.rate:g} -> {one.loss:.4f}" for one in tried)
    return layered.override({"train.learning_rate": best.rate}, f"search, evaluation loss: {told}")


def _brief(layered: Layered, usual: Job) -> Layered:
    """The recipe of a trial: one pass over as many rows as a tenth of the run's steps take."""
    settings = usual.recipe.train
    a_step = settings.batch_size * settings.gradient_accumulation_steps
    steps = max(_FEWEST_STEPS, round(_SHARE * usual.steps_per_epoch * int(settings.num_epochs)))
    named = usual.data_report["train"]["label_names"]
    rows = min(len(usual.train.examples) - named, steps * a_step)
    values = {
        "train.num_epochs": max(1, round(steps * a_step / rows)),
        "train.early_stopping_patience": 0,
        "train.save_every_s": 1e9,
        "data.limit_train": rows,
        "data.limit_eval": min(len(usual.eval.examples), _MOST_EVAL_ROWS),
        "data.max_length": usual.recipe.data.max_length,
        # Fewer rows would settle these otherwise.
        "data.label_names": usual.recipe.data.label_names,
        "train.head_start": usual.recipe.train.head_start,
    }
    return layered.override(values, "search")


def _try(brief: Layered, rate: float) -> Tried:
    """Trains briefly in a folder that is gone afterwards."""
    layered = brief.override({"train.learning_rate": rate}, "search")
    ready = with_trunk(make_ready(resolve(layered)), lambda event: None)
    with tempfile.TemporaryDirectory(prefix="trimtab-search-") as folder:
        run = RunDir(Path(folder))
        run.recipe.write_text(config.dump(layered), "utf-8")
        _, best = run_loop(
            run,
            ready.job,
            ready.model,
            ready.forward,
            tell=lambda event, **values: None,
            observe=lambda event: None,
            start=lambda: start_head(ready),
        )
    interrupts.check()
    logits: npt.NDArray[np.float32] = best["eval_logits"].numpy()
    labels = ready.job.eval.encoded.labels
    return Tried(rate, mean_loss(logits / np.float32(fit_temperature(logits, labels)), labels))
