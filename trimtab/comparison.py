"""Finished runs against each other, over the rows that all of them answered: from their files alone, no model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimtab import predictions
from trimtab.classification import Labels, metrics
from trimtab.errors import ArtefactError, RecipeError, did_you_mean, plain, some
from trimtab.paired import Difference, paired, paired_macro_f1
from trimtab.predictions import Stored
from trimtab.rundir import RunDir, locate, not_ended

_LONGEST_LABEL, _LONGEST_TEXT = 40, 100  # characters that a line shows

METRICS = ("accuracy", "macro_f1")


@dataclass(frozen=True)
class Answers:
    """What a run answered to the rows that judged it."""

    name: str
    """As the user gave the run."""
    labels: Labels
    rows: Stored
    scored_on: str
    """`test` or `eval`."""
    before_refit: bool = False
    """Whether the adapter was trained once more after these answers, on their rows too."""


def compare(paths: Sequence[str | Path], metric: str = "accuracy") -> dict[str, Any]:
    """Compares every run to the first.

    Returns:
        rows, metric, scored_on; runs: for each its name, the scores of `metrics` and before_refit, whether they are of
        the model before the adapter was trained once more on these rows too; against: for each but the first
        its difference, ci95, verdict, only_first, only_second, p, per_class (difference of f1 and recall for
        each label) and changed: text, label, before, after of the rows that are answered otherwise.

    Raises:
        RecipeError: fewer than two runs, or a metric that does not exist.
        ArtefactError: a run has no stored answers, or the runs were judged on other rows or labels.
    """
    check_metric(metric)
    if len(paths) < 2:
        raise RecipeError(
            "compare.runs", "One run alone cannot be compared.", mend="trimtab compare RUN RUN, the old one first"
        )
    runs = [read_answers(path) for path in paths]
    for run in runs[1:]:
        _check_same_rows(runs[0], run)
    scores = [metrics(run.rows.logits, run.rows.truth, run.labels.values) for run in runs]
    return {
        "rows": len(runs[0].rows.texts),
        "metric": metric,
        "scored_on": [run.scored_on for run in runs],
        "runs": [
            {"name": run.name, "before_refit": run.before_refit, **score}
            for run, score in zip(runs, scores, strict=True)
        ],
        "against": [
            {
                "name": run.name,
                **_as_dict(difference(run, runs[0], metric)),
                "per_class": {
                    label: {
                        key: score["per_class"][label][key] - scores[0]["per_class"][label][key]
                        for key in ("recall", "f1")
                    }
                    for label in run.labels.values
                },
                "changed": _changed(runs[0], run),
            }
            for run, score in zip(runs[1:], scores[1:], strict=True)
        ],
    }


def check_metric(metric: str) -> None:
    """Raises RecipeError where there is no such metric."""
    if metric not in METRICS:
        raise RecipeError(
            "compare.metric",
            f'There is no metric "{metric}": {" or ".join(METRICS)}.{did_you_mean(metric, METRICS)}',
            where="--metric",
            mend="--metric macro_f1",
        )


def difference(run: Answers, other: Answers, metric: str) -> Difference:
    """The metric of one run minus that of another over the same rows."""
    if metric == "accuracy":
        return paired(run.rows.told == run.rows.truth, other.rows.told == other.rows.truth)
    return paired_macro_f1(run.rows.told, other.rows.told, run.rows.truth, len(run.labels))


def read_answers(path: str | Path) -> Answers:
    """The stored answers of a finished run.

    Raises:
        ArtefactError: there are none, or they are damaged.
    """
    run = RunDir(locate(path))
    if not run.metrics.is_file() or not run.predictions.is_file():
        lacks = " and ".join(file.name for file in (run.metrics, run.predictions) if not file.is_file())
        why, mend = "it is no run directory", "a run directory, with predictions.parquet in it"
        if run.recipe.is_file():
            why, mend = not_ended(run)
        raise ArtefactError(
            "compare.answers", f"{path} cannot be compared: it has no {lacks}; {why}.", where=str(run.path), mend=mend
        )
    try:
        scores = json.loads(run.metrics.read_text("utf-8"))
        labels, scored_on = Labels(tuple(scores["per_class"])), str(scores["scored_on"])
        before_refit = scored_on == "eval" and scores.get("refit_rows", 0) > 0
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtefactError(
            "compare.answers",
            f"The scores of {path} cannot be read: {type(error).__name__}: {error}",
            where=str(run.metrics),
            mend="bring the folder back from a copy; or train it again",
        ) from None
    return Answers(str(path), labels, predictions.read(run.predictions, labels), scored_on, before_refit)


def _check_same_rows(first: Answers, other: Answers) -> None:
    each_alone = f"trimtab eval {first.name} FILE and trimtab eval {other.name} FILE score both on the same rows"
    if first.labels.values != other.labels.values:
        both_know = set(first.labels.values) & set(other.labels.values)
        apart = sorted(set(first.labels.values) ^ set(other.labels.values))
        raise ArtefactError(
            "compare.labels",
            f"{first.name} and {other.name} have other labels or another order"
            + (f': "{apart[0]}" is known to one alone.' if apart else "."),
            mend="train both on the same labels"
            + (f"; where FILE has labels that both know, {each_alone}" if both_know else ""),
        )
    ours, theirs = first.rows, other.rows
    pairs = enumerate(zip(ours.texts, ours.truth, theirs.texts, theirs.truth, strict=False))
    unlike = [row for row, (a, label, b, other_label) in pairs if a != b or label != other_label]
    if len(ours.texts) != len(theirs.texts) or unlike:
        raise ArtefactError(
            "compare.rows",
            f"{first.name} was judged on {len(ours.texts):,} rows and {other.name} on {len(theirs.texts):,}"
            + (f"; row {unlike[0] + 1} is the first that differs." if unlike else "."),
            where="predictions.parquet of both",
            mend=f"{each_alone}; for a paired difference train both again with the same --test: "
            "trimtab train --recipe RUN/recipe.toml --test FILE",
        )


def _changed(first: Answers, other: Answers) -> list[dict[str, str]]:
    """The rows that are answered otherwise: those that became right first, those that became wrong last."""
    values, before, after, truth = first.labels.values, first.rows.told, other.rows.told, first.rows.truth
    worth = (after == truth).astype(int) - (before == truth).astype(int)
    return [
        {
            "text": first.rows.texts[row],
            "label": values[truth[row]],
            "before": values[before[row]],
            "after": values[after[row]],
        }
        for row in sorted(np.flatnonzero(before != after), key=lambda row: -worth[row])
    ]


def _as_dict(found: Difference) -> dict[str, Any]:
    return {**found._asdict(), "ci95": list(found.ci95), "verdict": found.verdict}


def compare_lines(found: dict[str, Any], shown: int = 10) -> list[str]:
    """A comparison for people."""
    runs = found["runs"]
    width = max(len(run["name"]) for run in runs)
    lines = [
        f"{found['rows']:,} rows that all of them answered ({', '.join(dict.fromkeys(found['scored_on']))})",
        f"{'':<{width}}  accuracy   95 % interval  macro F1    loss",
    ]
    for run in runs:
        low, high = run["accuracy_ci95"]
        lines.append(
            f"{run['name']:<{width}}  {run['accuracy']:8.3f}  {low:.3f} to {high:.3f}  {run['macro_f1']:8.3f}  "
            f"{run['loss']:6.3f}"
        )
    if told := [run["name"] for run in runs if run["before_refit"]]:
        lines.append(
            f"{some(told)}: the answers before the adapter was trained once more on these rows too (train.refit); "
            "--test FILE in training compares the adapters themselves"
        )
    for one in found["against"]:
        lines += _against_lines(one, runs[0]["name"], found["metric"], shown)
    return lines


def _against_lines(one: dict[str, Any], first: str, metric: str, shown: int) -> list[str]:
    low, high = one["ci95"]
    lines = [
        "",
        f"{one['name']} against {first}: {one['verdict']}",
        f"  {metric} {one['difference']:+.4f} (95 % interval {low:+.4f} to {high:+.4f})",
        f"  {one['only_first']:,} rows only the new one gets right, {one['only_second']:,} only the old one "
        f"({'McNemar' if metric == 'accuracy' else 'exchanging answers:'} p {one['p']:.3g})",
    ]
    classes = sorted(one["per_class"].items(), key=lambda item: -abs(item[1]["f1"]))
    moved = [(label, by) for label, by in classes if by["f1"] or by["recall"]]
    lines += [
        f"  {plain(label, _LONGEST_LABEL)}: F1 {by['f1']:+.3f}, recall {by['recall']:+.3f}"
        for label, by in moved[:shown]
    ]
    if len(moved) > shown:
        lines.append(f"  and {len(moved) - shown:,} labels that moved less")
    changed = one["changed"]
    lines.append(f"  {len(changed):,} rows are answered otherwise" + (":" if changed else ""))
    for row in changed[:shown]:
        label, before, after = (plain(row[key], _LONGEST_LABEL) for key in ("label", "before", "after"))
        lines.append(f"    {label}: {before} -> {after}  {plain(' '.join(row['text'].split()), _LONGEST_TEXT)}")
    if len(changed) > shown:
        lines.append(f"    and {len(changed) - shown:,} more: --json has them all")
    return lines
