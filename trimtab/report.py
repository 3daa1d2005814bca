"""Results as lines of a terminal: the parameter report, the scores, what was found in the data."""

from collections.abc import Mapping
from typing import Any

from rich.cells import cell_len

from trimtab.errors import plain

_LONGEST_LABEL = 40  # characters that a line shows
_HARM = 1.05  # times the loss: of temperatures near 1, halves of 500 rows say 1.01 by themselves


def parameter_lines(parameters: Mapping[str, Any]) -> list[str]:
    """The parameter report for people; `parameters` is `Parameters.as_dict()`."""
    p = parameters
    return [
        f"full fine-tuning  {p['base']:>13,} of {p['base']:,} parameters (100 %)",
        f"LoRA alone        {p['lora']:>13,} ({p['lora_pct']:.2f} %)",
        f"head              {p['head']:>13,} ({100 * p['head'] / p['total']:.2f} %), trained in full",
        f"trained together  {p['trainable']:>13,} of {p['total']:,} ({p['trainable_pct']:.2f} %)",
    ]


BASELINES = {"tfidf": "counting words (TF-IDF)", "probe": "the untrained base (probe)"}
"""What stands in metrics.json beside the commonest label, in words."""


def score_line(scores: Mapping[str, Any]) -> str:
    """Accuracy with its interval, its baselines, and what it was measured on; beside it that of the clean rows."""
    low, high = scores["accuracy_ci95"]
    clean = scores.get("clean")
    beside = {name: one["accuracy"] for name, one in scores.get("baselines", {}).items() if name in BASELINES}
    return (
        f"accuracy {scores['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}, {scores['eval_rows']:,} rows), "
        f"macro F1 {scores['macro_f1']:.3f}; always answering the commonest label: {scores['majority_accuracy']:.3f}"
        + "".join(f", {BASELINES[name]}: {accuracy:.3f}" for name, accuracy in beside.items())
        + (
            f"; on the {clean['eval_rows']:,} rows that are in no other file of the run: {clean['accuracy']:.3f}"
            if clean
            else ""
        )
    )


def verdict_lines(scores: Mapping[str, Any]) -> list[str]:
    """Whether the adapter beats its baselines: the paired differences; a warning for each that it does not beat."""
    better, lines = [], []
    for name, one in scores.get("baselines", {}).items():
        if name not in BASELINES:
            continue
        low, high = one["difference_ci95"]
        size = f"{one['difference']:+.3f} (95 % interval {low:+.3f} to {high:+.3f}, same rows)"
        if one["verdict"] == "better":
            better.append(f"{BASELINES[name]} by {size}")
        else:
            worse = "is worse than" if one["verdict"] == "worse" else "is not seen to beat"
            few = (
                f"; so few rows differ that chance may have done it (McNemar p {one['difference_p']:.2g})"
                if one["verdict"] == "not resolved" and low > 0 and "difference_p" in one
                else ""
            )
            lines.append(f"! this adapter {worse} {BASELINES[name]}: {size}{few}")
        if one["rows"] < one["of_rows"]:
            lines.append(f"{BASELINES[name]} learned from {one['rows']:,} of {one['of_rows']:,} rows, to save time")
    if missing := scores.get("baselines_missing"):
        lines.append(f"no other baseline: {missing}")
    return ([f"better than {' and '.join(better)}"] if better else []) + lines


def calibration_lines(scores: Mapping[str, Any]) -> list[str]:
    """What the temperature does to scores, on rows that it was not fitted on."""
    if not (found := scores.get("calibration")):
        return []
    where = "the test rows" if found["reported_on"] == "test" else "halves of the evaluation rows, each by the other's"
    line = (
        f"scores at temperature {found['temperature']:.2f}: calibration error {found['ece_before']:.3f} -> "
        f"{found['ece_after']:.3f}, loss {found['loss_before']:.3f} -> {found['loss_after']:.3f} ({where})"
    )
    if found["loss_after"] > _HARM * found["loss_before"] and found["ece_after"] > found["ece_before"]:
        return [f"! {line}: they are worse for it; it was fitted on {found['fitted_rows']:,} rows"]
    return [line]


def score_lines(scores: Mapping[str, Any]) -> list[str]:
    """The scores of an evaluation for people, class by class."""
    names = {label: plain(label, _LONGEST_LABEL) for label in scores["per_class"]}
    width = max(map(cell_len, names.values()))
    lines = [score_line(scores), *verdict_lines(scores), f"{'':<{width}}  precision  recall     f1      rows"]
    for label, one in scores["per_class"].items():
        shown = names[label] + " " * (width - cell_len(names[label]))
        lines.append(f"{shown}  {one['precision']:9.3f}  {one['recall']:6.3f}  {one['f1']:5.3f}  {one['rows']:8,}")
    lines.append(
        f"scores: calibration error {scores['ece']:.3f}, loss {scores['loss']:.3f} "
        f"(temperature {scores.get('temperature', 1.0):.2f})"
    )
    if scores.get("rows_cut"):
        lines.append(f"{scores['rows_cut']:,} texts were cut: the model did not see all of them")
    if scores.get("overlap_rows"):
        lines.append(
            f"! {scores['overlap_rows']:,} of these rows stand in the run's own files too: scores on them are too good"
        )
    if scores.get("rows_skipped"):
        lines.append(f"{scores['rows_skipped']:,} rows were set aside")
    return lines


def layer_lines(parameters: Mapping[str, Any]) -> list[str]:
    """The arithmetic of thin matrices: each kind of weight once, with how often it occurs."""
    kinds: dict[tuple[str, int, int, int], int] = {}
    for name, layer in parameters["layers"].items():
        kind = (
            ".".join(part for part in name.split(".") if not part.isdigit()),
            layer["out"],
            layer["in"],
            layer["lora"],
        )
        kinds[kind] = kinds.get(kind, 0) + 1
    lines = []
    for (name, rows, columns, lora), times in kinds.items():
        lines.append(
            f"{times:>3} x {name}: {rows:,} x {columns:,} = {rows * columns:,} weights stay frozen, "
            f"A and B have {lora:,} instead ({100 * lora / (rows * columns):.1f} %)"
        )
    return lines


def next_steps(run: str) -> list[str]:
    """What to try after the demo."""
    return [
        "",
        f"everything lies in {run}: report.html, metrics.json, predictions.parquet, recipe.toml, adapter/",
        "try next:",
        f'  trimtab predict {run} "a review of yours" --lang en',
        f"  trimtab report {run}   (curves, mistakes and likely label errors; report.html shows them in a browser)",
        f"  trimtab eval {run} runs/demo-data/imdb-eval.parquet   (4,500 of its 5,000 rows chose nothing)",
        "  trimtab train YOUR_FILE.csv",
    ]


def data_lines(data_report: Mapping[str, Any], *, whole: bool = True) -> list[str]:
    """What was found in the files as a short table, a column for each part; not whole: without lines of nothing."""
    found: dict[str, Mapping[str, Any]] = {
        role: data_report[role] for role in ("train", "eval", "test") if role in data_report
    }
    roles, named = list(found), any(one.get("label_names") for one in found.values())
    rows: list[tuple[str, list[str]]] = [
        ("rows in", [_number(found[role]["rows_in"]) for role in roles]),
        ("set aside", [_number(sum((found[role]["rows_skipped"] or {}).values())) for role in roles]),
        ("used", [_number(found[role]["rows_used"]) for role in roles]),
        *([("label names", [_number(found[role].get("label_names")) for role in roles])] if named else []),
        ("labels", [_number(len(found[role]["rows_per_label"])) for role in roles]),
        ("commonest label", [f"{found[role]['majority_share']:.1%}" for role in roles]),
        ("duplicates", [_number(found[role]["duplicate_rows"]) for role in roles]),
        ("several labels", [_number(found[role]["conflicting_texts"]) for role in roles]),
        ("known before", [_number(found[role].get("overlap_rows")) for role in roles]),
        ("texts cut", [f"{found[role]['rows_cut'] / found[role]['rows_used']:.1%}" for role in roles]),
        ("tokens cut", [f"{_share(found[role]):.1%}" for role in roles]),
    ]
    return [f"{'':<16}" + "".join(f"{role:>10}" for role in roles)] + [
        f"{name:<16}" + "".join(f"{cell:>10}" for cell in cells)
        for name, cells in rows
        if whole or not {"0", "0.0%", "-"}.issuperset(cells)
    ]


def _share(one: Mapping[str, Any]) -> float:
    whole = one["tokens"] + one["tokens_cut"]
    return float(one["tokens_cut"] / whole) if whole else 0.0


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
