"""The Python API: `train`, `load`, `evaluate`, `compare`. The command line stands on the same functions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab import config, console, evaluation, training
from trimtab.comparison import compare
from trimtab.config import RuntimeSettings
from trimtab.loop import Observer
from trimtab.predict import load
from trimtab.training import Run

__all__ = ["compare", "evaluate", "load", "train"]

Files = str | Path | Sequence[str | Path]


def train(
    data: Files | None = None,
    *,
    eval: Files | None = None,
    test: Files | None = None,
    text: str | None = None,
    label: str | None = None,
    names: Mapping[str, str] | str | None = None,
    base: str | Path | None = None,
    recipe: str | Path = "default",
    settings: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    budget: str = "",
    observe: Observer | None = None,
) -> Run:
    """Fine-tunes a LoRA adapter on labelled files, judges it, and saves it in a run directory.

    Args:
        data: Training files: parquet, CSV, TSV, JSONL, a glob or hf://; None: those that the recipe names.
        eval: Files that choose the epoch; None: a tenth of the training rows, drawn from each class.
        test: Files that are scored once, at the end; their score is then the headline.
        text: Name of the text column; None: found by its name.
        label: Name of the label column; None: found by its name.
        names: Display names of labels, `{"0": "差评/negative", "1": "好评/positive"}`.
        base: A folder or a hub id; None: the recipe's.
        recipe: `default`, `tutorial`, or a TOML file such as a run's recipe.toml.
        settings: Any other setting by its key: `{"lora.r": 16, "train.num_epochs": 2}`.
        out: The run directory; None: a new one under ./runs.
        budget: Time that training may take, such as `5m` or `1h30m`: learning twice, epochs, then rows give way.
        observe: Receives every event; None: progress is printed to stderr.

    Returns:
        The run: its `path` and its `metrics`.

    Raises:
        TrimtabError: one of its kinds, with what was found, where, and the mend. Bad data leaves no run behind.
    """
    flags: dict[str, object] = {
        "data.train": files(data),
        "data.eval": files(eval),
        "data.test": files(test),
        "data.text": text,
        "data.label": label,
        "data.names": names,
        "base.model": None if base is None else str(base),
    }
    layered = config.assemble(str(recipe), {key: value for key, value in flags.items() if value is not None})
    layered = layered.override(settings or {}, "settings")
    with console.progress() as printed:
        return training.train(layered, out=None if out is None else str(out), budget=budget, observe=observe or printed)


def evaluate(
    path: str | Path,
    data: Files,
    *,
    base: str | Path | None = None,
    text: str | None = None,
    label: str | None = None,
    skip_bad: bool = False,
    raw_scores: bool = False,
    runtime: RuntimeSettings | None = None,
) -> dict[str, Any]:
    """Scores a run or an adapter on labelled files.

    Args:
        path: A run directory or an adapter folder.
        data: Labelled files, as `train` takes them.
        base: Where its base is, if not where it was.
        text: Name of the text column; None: found by its name.
        label: Name of the label column; None: found by its name.
        skip_bad: Set rows that cannot be used aside and count them, instead of raising.
        raw_scores: Judge the scores as the model gives them, without the adapter's temperature.
        runtime: Device and threads; the defaults choose.

    Returns:
        eval_rows, accuracy, accuracy_ci95, macro_f1, per_class, loss, ece, temperature, majority_accuracy, baselines,
        rows_cut, rows_skipped, rows_per_s, total_seconds, peak_rss_bytes; baselines_missing, why an adapter alone has
        one only.

    Raises:
        TrimtabError: one of its kinds, with what was found, where, and the mend.
    """
    return evaluation.evaluate(
        path,
        files(data) or (),
        base=None if base is None else str(base),
        text=text or "auto",
        label=label or "auto",
        skip_bad=skip_bad,
        raw_scores=raw_scores,
        runtime=runtime,
    )


def files(given: Files | None) -> tuple[str, ...] | None:
    """One path or several, as the recipe holds them."""
    if given is None:
        return None
    return (str(given),) if isinstance(given, str | Path) else tuple(str(path) for path in given)
