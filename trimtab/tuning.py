"""`trimtab tune`: optuna over learning rate, rank, targets and epochs; the best recipe is written as TOML.

The evaluation rows choose; test rows, where the recipe has some, are not looked at. Every trial is a run of its own,
named after its values, so that nothing is trained twice and a search that was stopped goes on.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab import config, durable, interrupts, rundir
from trimtab.config import Layered
from trimtab.errors import ArtefactError, DivergedError, MissingExtraError, RecipeError, install_extra, some
from trimtab.resolve import Job, resolve
from trimtab.rundir import RunDir
from trimtab.trials import own_folder, train_once

_RATE_RANGE = 5.0  # below and above the rate that `auto` takes
_RANKS = (4, 8, 16, 32)
_TARGETS = ("query-value", "all-linear")
_EPOCHS = (2, 10)  # or as many as `auto` settles, where those are more
_SEED = 0
_SEARCHED = ("train.learning_rate", "lora.r", "lora.target_modules", "train.num_epochs")


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
        raise MissingExtraError("tune.extra", "optuna is not installed.", mend=install_extra("tune")) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if layered.recipe.train.learning_rate == "search":
        layered = layered.override({"train.learning_rate": "auto"}, "tune")
    with interrupts.heard():
        job = resolve(layered)
        _check(layered)
        folder = own_folder(out, "tune", layered, config.dump(job.layered))
        with rundir.only_writer(RunDir(folder)):
            return _search(optuna, layered, job, folder, trials, tell)


def _search(
    optuna: Any, layered: Layered, job: Job, folder: Path, trials: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    tell(f"plan    {trials} recipes in {folder}; the same command with --out {folder} goes on where this one stops")
    metric, states = job.recipe.train.metric_for_best_model, optuna.trial.TrialState
    study = _study(optuna, folder, "minimize" if metric == "loss" else "maximize")
    # A sampler that began anew with the same seed would draw its first recipes again.
    study.sampler = optuna.samplers.TPESampler(seed=_SEED + len(study.get_trials(deepcopy=False)))
    if not study.get_trials(deepcopy=False):  # what it is to be better than
        study.enqueue_trial(_as_it_is(job))
    for stopped in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        study.tell(stopped.number, state=states.FAIL)
        study.enqueue_trial(stopped.params)
    while (done := len(study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED)))) < trials:
        trial = study.ask()
        values = _suggest(trial, layered, job)
        wanted = layered.override(values | {"data.test": (), "train.baselines": False, "train.refit": "off"}, "tune")
        try:
            scores = train_once(RunDir(folder / "trials" / _name(values)), wanted)
        except DivergedError:
            study.tell(trial, state=states.PRUNED)
            tell(f"trial   {done + 1}/{trials}  diverged  {_told(values)}")
            continue
        study.tell(trial, scores[metric])
        reached = f"{metric} {scores[metric]:.4f} (best {study.best_value:.4f})"
        tell(f"trial   {done + 1}/{trials}  {reached}  {_told(values)}")
    if not study.get_trials(deepcopy=False, states=(states.COMPLETE,)):
        raise DivergedError(
            "tune.diverged",
            f"All {trials} recipes diverged.",
            where=str(folder),
            mend="a smaller train.learning_rate to search around, and another --out",
        )
    best = _suggest(optuna.trial.FixedTrial(study.best_params), layered, job)
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


def _check(layered: Layered) -> None:
    """What the recipe fixes is not searched.

    Raises:
        RecipeError: nothing is left to search.
    """
    if not _open_settings(layered):
        raise RecipeError(
            "tune.nothing",
            f"The recipe fixes all that is searched: {some(_SEARCHED, 9)}.",
            where="tune",
            mend="leave some of them out of --set, or take --recipe default",
        )


def _open_settings(layered: Layered) -> tuple[str, ...]:
    """What is searched: all that neither recipe nor `--set` fixes; an adapter to start from fixes its LoRA."""
    fixed = set(layered.origins)
    if "lora.lora_alpha" in fixed:
        fixed.add("lora.r")
    if layered.recipe.lora.init_from:
        fixed |= {key for key in _SEARCHED if key.startswith("lora.")}
    if layered.origins.get("train.learning_rate") == "tune":  # was to be searched
        fixed.discard("train.learning_rate")
    return tuple(key for key in _SEARCHED if key not in fixed)


def _study(optuna: Any, folder: Path, direction: str) -> Any:
    """The study in the folder, new or as it stands.

    Raises:
        ArtefactError: its file is damaged.
    """
    from sqlalchemy.exc import SQLAlchemyError

    file = folder / "study.db"
    try:
        return optuna.create_study(
            study_name="trimtab",
            storage=f"sqlite:///{file}",
            load_if_exists=True,
            direction=direction,
        )
    except SQLAlchemyError as error:
        raise ArtefactError(
            "tune.study",
            f"The record of the search is damaged: {str(error).splitlines()[0]}",
            where=str(file),
            mend=f"delete {file}: recipes that have been tried are found in trials/, and not trained again",
        ) from None


def _as_it_is(job: Job) -> dict[str, object]:
    """The recipe that the search starts from, in the words of `_suggest`."""
    lora, train = job.recipe.lora, job.recipe.train
    return {
        "r": lora.r,
        "target_modules": "all-linear",
        "learning_rate": train.learning_rate,
        "num_epochs": train.num_epochs,
    }


def _suggest(trial: Any, layered: Layered, job: Job) -> dict[str, object]:
    """Settings of a trial; lora_alpha follows the rank, so that the scale of B A stays 2."""
    wanted, values = _open_settings(layered), dict[str, object]()
    centre, epochs = float(job.recipe.train.learning_rate), int(job.recipe.train.num_epochs)
    if "lora.r" in wanted:
        rank = trial.suggest_categorical("r", _RANKS)
        values |= {"lora.r": rank, "lora.lora_alpha": 2 * rank}
    if "lora.target_modules" in wanted:
        values["lora.target_modules"] = trial.suggest_categorical("target_modules", _TARGETS)
    if "train.learning_rate" in wanted:
        rate = trial.suggest_float("learning_rate", centre / _RATE_RANGE, centre * _RATE_RANGE, log=True)
        values["train.learning_rate"] = float(f"{rate:.3g}")
    if "train.num_epochs" in wanted:
        values["train.num_epochs"] = trial.suggest_int("num_epochs", _EPOCHS[0], max(_EPOCHS[1], epochs))
    return values


def _name(values: dict[str, object]) -> str:
    return "-".join(f"{key.partition('.')[2]}-{value}" for key, value in values.items() if key != "lora.lora_alpha")


def _told(values: dict[str, object]) -> str:
    return ", ".join(f"{key.partition('.')[2]} {value}" for key, value in values.items() if key != "lora.lora_alpha")
