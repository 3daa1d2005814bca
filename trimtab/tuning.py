"""`trimtab tune`: optuna over learning rate, rank, targets and epochs; the best recipe is written as TOML.

The evaluation rows choose; test rows, where the recipe has some, are not looked at. Every trial is a run of its own,
named after its values, so that nothing is trained twice and a search that was stopped goes on.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab import config, durable, interrupts
from trimtab.config import Layered
from trimtab.errors import MissingExtraError, RecipeError
from trimtab.resolve import Job, resolve
from trimtab.rundir import RunDir
from trimtab.trials import train_once

_RATE_RANGE = 5.0  # below and above the rate that `auto` takes
_RANKS = (4, 8, 16, 32)
_TARGETS = ("query-value", "all-linear")
_EPOCHS = (2, 10)
_SEED = 0


def tune(layered: Layered, trials: int, *, out: str | None = None, tell: Callable[[str], None]) -> dict[str, Any]:
    """Tries out recipes until there are `trials` of them in the folder, and writes the best.

    Args:
        layered: The recipe to start from.
        trials: How many in all; those of an earlier call count.
        out: The folder; None: a new one under ./runs. The same one again goes on.
        tell: Receives a line for people after each trial.

    Returns:
        metric, best (its value), values (the settings that led there), recipe (the file), trials, folder.

    Raises:
        MissingExtraError: optuna is not installed.
        TrimtabError: as training.
    """
    try:
        import optuna
    except ImportError:
        raise MissingExtraError("tune.extra", "optuna is not installed.", mend='pip install "trimtab[tune]"') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if layered.recipe.train.learning_rate == "search":
        layered = layered.override({"train.learning_rate": "auto"}, "tune")
    with interrupts.heard():
        job = resolve(layered)
        folder = _folder(layered, job, out)
        tell(f"plan    {trials} recipes in {folder}; the same command with --out {folder} goes on where this one stops")
        metric = job.recipe.train.metric_for_best_model
        study = optuna.create_study(
            study_name="trimtab",
            storage=f"sqlite:///{folder / 'study.db'}",
            load_if_exists=True,
            direction="minimize" if metric == "loss" else "maximize",
            sampler=optuna.samplers.TPESampler(seed=_SEED),
        )
        for stopped in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(stopped.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(stopped.params)
        while (done := len(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)))) < trials:
            trial = study.ask()
            values = _suggest(trial, float(job.recipe.train.learning_rate))
            scores = train_once(
                RunDir(folder / "trials" / _name(values)),
                layered.override(values | {"data.test": (), "train.baselines": False}, "tune"),
            )
            study.tell(trial, scores[metric])
            reached = f"{metric} {scores[metric]:.4f} (best {study.best_value:.4f})"
            tell(f"trial   {done + 1}/{trials}  {reached}  {_told(values)}")
        best = _suggest(optuna.trial.FixedTrial(study.best_params), float(job.recipe.train.learning_rate))
        file = folder / "best.toml"
        durable.replace(file, config.dump(resolve(layered.override(best, "tune")).layered).encode())
    return {
        "metric": metric,
        "best": study.best_value,
        "values": best,
        "recipe": str(file),
        "trials": trials,
        "folder": str(folder),
    }


def _folder(layered: Layered, job: Job, out: str | None) -> Path:
    """The search's folder, new or of this very recipe.

    Raises:
        RecipeError: it holds something else.
    """
    stem = Path(layered.recipe.data.train[0]).name.partition(".")[0]
    folder = Path(os.path.expanduser(out or f"runs/tune-{time.strftime('%Y%m%d-%H%M%S')}-{stem}")).resolve()
    wanted, there = config.dump(job.layered), folder / "recipe.toml"
    if there.is_file() and there.read_text("utf-8") == wanted:
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(
            "tune.exists",
            f"{folder} holds another search or something else; nothing in it was touched.",
            mend="another --out; or the settings and the files that it was begun with",
        )
    durable.make_folder(folder)
    durable.replace(there, wanted.encode())
    return folder


def _suggest(trial: Any, centre: float) -> dict[str, object]:
    """Settings of a trial; lora_alpha follows the rank, so that the scale of B A stays 2."""
    rank = trial.suggest_categorical("r", _RANKS)
    rate = trial.suggest_float("learning_rate", centre / _RATE_RANGE, centre * _RATE_RANGE, log=True)
    return {
        "lora.r": rank,
        "lora.lora_alpha": 2 * rank,
        "lora.target_modules": trial.suggest_categorical("target_modules", _TARGETS),
        "train.learning_rate": float(f"{rate:.3g}"),
        "train.num_epochs": trial.suggest_int("num_epochs", *_EPOCHS),
    }


def _name(values: dict[str, object]) -> str:
    return (
        f"{values['train.learning_rate']}-r{values['lora.r']}-{values['lora.target_modules']}-"
        f"{values['train.num_epochs']}-epochs"
    )


def _told(values: dict[str, object]) -> str:
    return ", ".join(f"{key.partition('.')[2]} {value}" for key, value in values.items() if key != "lora.lora_alpha")
