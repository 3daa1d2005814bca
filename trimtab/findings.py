"""What a finished run has to tell, as one value: scores, curves, mistakes, calibration, data, cost, how to repeat it.

A pure function of what a run knows. Page and Markdown show this value and count nothing themselves, so they cannot
disagree. Texts and labels are cleaned and cut here, once: what is shown is bounded whatever the data.
"""

import math
import shlex
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.config import Recipe, as_toml

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BINS = 15  # of the confidence, equally wide (Guo et al. 2017, "On Calibration of Modern Neural Networks")
_MOST_MISTAKES = 20
_MOST_PAIRS = 10
_MOST_CLASSES = 100  # rows of the table; a page for 1,000 labels would be one nobody reads
_MATRIX_CLASSES = 12  # columns that fit on a sheet of paper
_CELL_EXAMPLES = 3
_MATRIX_EXAMPLES = 160  # over all cells; with the longest texts they take 100 kB of a page
_MOST_STEPS = 200  # points of a curve that is 400 pixels wide
_MOST_LINES = 20  # files, sums, warnings
_LONGEST_TEXT, _LONGEST_EXAMPLE, _LONGEST_LABEL, _LONGEST_NAME, _LONGEST_WARNING = 200, 100, 40, 60, 400
_LONGEST_COMMAND = 2_000
_PATHS = {("data", "train"), ("data", "eval"), ("data", "test"), ("base", "model"), ("lora", "init_from")}
# They change the order of the characters around them, and would do so to a whole line.
_BIDI = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}


@dataclass(frozen=True)
class Label:
    """A label as it stands in the data, and its display names."""

    value: str
    zh: str
    en: str


@dataclass(frozen=True)
class Scored:
    """The rows that the headline is about, and what the model made of them."""

    texts: Sequence[str]
    places: Sequence[str]
    """File name and line of each row."""
    labels: Ints
    """int64[n]"""
    probabilities: Floats
    """float64[n, C], as trained: temperature 1."""
    calibrated: Floats | None = None
    """float64[n, C], after the temperature; None: there is none."""

    @property
    def answered(self) -> Floats:
        """The probabilities that users get."""
        return self.probabilities if self.calibrated is None else self.calibrated


@dataclass(frozen=True)
class Contender:
    """The adapter, or a baseline that it must beat."""

    name: str
    """adapter, probe, tfidf or majority"""
    accuracy: float
    interval: tuple[float, float] | None = None
    macro_f1: float | None = None
    difference: float | None = None
    """Accuracy of the adapter minus this one's."""
    difference_interval: tuple[float, float] | None = None
    verdict: str = ""
    """Of the adapter against it: better, worse or not resolved; empty for the adapter itself."""
    p: float | None = None
    """McNemar's, of that difference."""

    @property
    def chance_decides(self) -> bool:
        """The interval leaves zero out, but so few rows differ that p does not resolve it."""
        low, high = self.difference_interval or (0.0, 0.0)
        return self.verdict == "not resolved" and self.p is not None and not low <= 0 <= high


@dataclass(frozen=True)
class Headline:
    """The scores that count, and on which rows."""

    rows: int
    scored_on: str
    """test, or eval: then these rows also chose the epoch."""
    accuracy: float
    interval: tuple[float, float]
    macro_f1: float
    loss: float
    epoch: int
    refit_rows: int = 0
    """That the adapter was trained on once more in the end, those kept for evaluation among them; 0: it was not."""
    clean_rows: int = 0
    """Rows whose texts stand in no other file of the run, where others do; 0: all or none of them."""
    clean_accuracy: float = 0.0
    overlap_rows: int = 0
    """Rows whose texts stand in a file that taught or chose before."""


@dataclass(frozen=True)
class StepLoss:
    """Mean training loss of the steps up to here."""

    step: int
    epoch: float
    loss: float


@dataclass(frozen=True)
class Evaluation:
    """The evaluation rows at the end of an epoch."""

    epoch: int
    step: int
    loss: float
    accuracy: float
    macro_f1: float
    train_loss: float | None = None
    """Mean of the steps of this epoch that were logged."""


@dataclass(frozen=True)
class Example:
    """A row, cut for show. `label` and `answer` are indices of labels."""

    text: str
    place: str
    label: int
    answer: int
    confidence: float
    """Probability of the answer."""


@dataclass(frozen=True)
class Doubt:
    """A row whose label the model disputes with confidence."""

    example: Example
    threshold: float
    """Mean probability of the answer's class over the rows that are labelled so."""


@dataclass(frozen=True)
class Matrix:
    """Rows by label (down) and answer (across), for the labels shown; where some are left out, together at the end."""

    shown: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    left_out: int
    """Labels that share the last row and column; 0: every label has its own."""
    left_out_rows: int
    examples: Mapping[tuple[int, int], tuple[Example, ...]]
    """By position in `counts`: the surest mistakes, and on the diagonal the least sure right answers."""


@dataclass(frozen=True)
class ClassScore:
    """One label's scores."""

    label: int
    precision: float
    recall: float
    f1: float
    rows: int
    train_rows: int | None


@dataclass(frozen=True)
class Pair:
    """Two labels that are taken for each other."""

    first: int
    second: int
    first_as_second: int
    second_as_first: int

    @property
    def rows(self) -> int:
        """Mistakes in both directions."""
        return self.first_as_second + self.second_as_first


@dataclass(frozen=True)
class Bin:
    """The rows whose confidence lies in (low, high]."""

    low: float
    high: float
    rows: int
    confidence: float
    """Mean; 0 without rows."""
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Whether 80 % sure is right in 80 of 100 cases."""

    before: tuple[Bin, ...]
    error_before: float
    """Expected calibration error: mean distance of confidence and accuracy over the bins, by rows."""
    after: tuple[Bin, ...] = ()
    error_after: float | None = None
    temperature: float | None = None
    fitted_rows: int = 0
    reported_on: str = ""
    """test, or halves: fitted on one half and measured on the other, in turn."""


@dataclass(frozen=True)
class Part:
    """What was found in the rows of one role."""

    role: str
    files: tuple[str, ...]
    rows_in: int | None
    skipped: int
    used: int
    label_names: int
    """The labels' names that were training rows too."""
    labels: int
    majority_share: float
    duplicates: int
    conflicts: int
    overlap: int | None
    texts_cut: float
    """Share of the rows."""
    tokens: int | None
    tokens_cut: float
    """Share of the tokens."""


@dataclass(frozen=True)
class Cost:
    """What the run took. None: not known."""

    base_parameters: int | None = None
    """With its head: what full fine-tuning would train."""
    total_parameters: int | None = None
    """Base, head and LoRA."""
    lora_parameters: int | None = None
    head_parameters: int | None = None
    trainable_parameters: int | None = None
    adapter_bytes: int | None = None
    seconds: tuple[tuple[str, float], ...] = ()
    """search, load, trunk, train, baselines, verify and other, in the order in which they happened."""
    total_seconds: float | None = None
    estimated_train_seconds: float | None = None
    peak_rss_bytes: int | None = None
    estimated_peak_bytes: int | None = None
    tokens_per_s: float | None = None
    padding_pct: float | None = None
    largest_difference: float | None = None
    """Of a logit, when the saved adapter was loaded again in a fresh process."""
    machine: tuple[str, ...] = ()
    """Processor, system, device, threads, forward."""


@dataclass(frozen=True)
class Repeat:
    """What it takes to do it again."""

    command: str
    """From the files alone; empty where it would be too long to type."""
    from_run: str
    """From the run directory; empty in a card."""
    settings: tuple[tuple[str, str, str], ...]
    """Key, value and default of each setting that differs."""
    sums: tuple[tuple[str, str], ...]
    """Name and sha256 of data files and of the base's weights."""
    sums_left_out: int
    versions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Findings:
    """All of it."""

    run: str
    """The name of its directory; empty: not told."""
    started: float | None
    """Seconds since 1970; None: not known, or not told."""
    base: str
    labels: tuple[Label, ...]
    headline: Headline
    contenders: tuple[Contender, ...]
    """The adapter first, then the baselines from the strongest."""
    steps: tuple[StepLoss, ...]
    evaluations: tuple[Evaluation, ...]
    matrix: Matrix | None
    classes: tuple[ClassScore, ...]
    classes_left_out: int
    mistakes: tuple[Example, ...]
    mistake_rows: int
    pairs: tuple[Pair, ...]
    doubts: tuple[Doubt, ...]
    doubt_rows: int
    calibration: Calibration | None
    parts: tuple[Part, ...]
    warnings: tuple[str, ...]
    cost: Cost
    recipe: Recipe = field(repr=False)
    repeat: Repeat

    @property
    def doubts_are_mistakes(self) -> bool:
        """The rows of `doubts` are the first of `mistakes`, in their order, as they mostly are with two labels."""
        return tuple(doubt.example for doubt in self.doubts) == self.mistakes[: len(self.doubts)]


def find(
    metrics: Mapping[str, Any],
    *,
    labels: Sequence[Label],
    scored: Scored | None,
    data_report: Mapping[str, Any],
    recipe: Recipe,
    environment: Mapping[str, Any],
    base: str,
    steps: Sequence[StepLoss] = (),
    started: float | None = None,
    run: str = "",
) -> Findings:
    """Draws the findings from what a run knows; what an older run does not know is left out.

    Args:
        metrics: As in metrics.json.
        labels: All of them, in the order of the logits.
        scored: The rows of the headline; None: they are not there any more.
        data_report: As in data_report.json; may be empty.
        recipe: The resolved recipe.
        environment: As in environment.json; may be empty.
        base: What people call the base.
        steps: Logged training losses.
        started: When the run began, in seconds since 1970.
        run: The run directory; empty: not told.
    """
    parts = {role: data_report[role] for role in ("train", "eval", "test") if role in data_report}
    classes = _classes(metrics, parts)
    mistakes, mistake_rows = worst_mistakes(scored) if scored else ((), 0)
    doubts, doubt_rows = label_doubts(scored) if scored else ((), 0)
    return Findings(
        run=shown(PurePath(run).name, _LONGEST_NAME),
        started=started,
        base=shown(base, _LONGEST_TEXT),
        labels=tuple(
            Label(*(shown(name, _LONGEST_LABEL) for name in (label.value, label.zh, label.en))) for label in labels
        ),
        headline=_headline(metrics),
        contenders=_contenders(metrics),
        steps=_thinned(steps),
        evaluations=_evaluations(metrics, steps),
        matrix=_matrix(scored, len(labels)) if scored else None,
        classes=tuple(_weakest(classes)),
        classes_left_out=max(0, len(classes) - _MOST_CLASSES),
        mistakes=mistakes,
        mistake_rows=mistake_rows,
        pairs=confused_pairs(scored, len(labels)) if scored else (),
        doubts=doubts,
        doubt_rows=doubt_rows,
        calibration=_calibration(metrics, scored) if scored else None,
        parts=tuple(_part(role, one) for role, one in parts.items()),
        warnings=_warnings(data_report, parts),
        cost=_cost(metrics, environment),
        recipe=recipe,
        repeat=_repeat(recipe, base, environment, run),
    )


def lasting(found: Findings) -> Findings:
    """The same without what depends on clock, machine or place: a recipe that is run again gives the same value.

    Logged steps go too: a loss of power may take lines of events.jsonl that the resumed run does not write again.
    """
    return replace(
        found,
        run="",
        started=None,
        steps=(),
        evaluations=tuple(replace(one, train_loss=None) for one in found.evaluations),
        cost=Cost(
            base_parameters=found.cost.base_parameters,
            total_parameters=found.cost.total_parameters,
            lora_parameters=found.cost.lora_parameters,
            head_parameters=found.cost.head_parameters,
            trainable_parameters=found.cost.trainable_parameters,
        ),
        repeat=replace(found.repeat, from_run=""),
    )


def shown(text: str, most: int) -> str:
    """A text on one line, without characters that act on what stands around them, cut to `most` characters."""
    words = " ".join(text[: 4 * most].split())
    clean = "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") or ord(c) in _BIDI else c for c in words)
    return clean if len(clean) <= most and len(text) <= 4 * most else clean[: most - 1].rstrip() + "…"


def _headline(metrics: Mapping[str, Any]) -> Headline:
    low, high = metrics["accuracy_ci95"]
    clean = metrics.get("clean") or {}
    return Headline(
        rows=metrics["eval_rows"],
        scored_on=metrics["scored_on"],
        accuracy=metrics["accuracy"],
        interval=(low, high),
        macro_f1=metrics["macro_f1"],
        loss=metrics["loss"],
        epoch=metrics["epoch"],
        refit_rows=metrics.get("refit_rows", 0),
        clean_rows=clean.get("eval_rows", 0),
        clean_accuracy=clean.get("accuracy", 0.0),
        overlap_rows=metrics.get("overlap_rows", 0),
    )


def _contenders(metrics: Mapping[str, Any]) -> tuple[Contender, ...]:
    low, high = metrics["accuracy_ci95"]
    accuracy = metrics["accuracy"]
    adapter = Contender("adapter", accuracy, (low, high), metrics["macro_f1"])
    baselines = dict(metrics.get("baselines") or {})
    if "majority" not in baselines and "majority_accuracy" in metrics:
        baselines["majority"] = {"accuracy": metrics["majority_accuracy"]}
    found = []
    for name in ("probe", "tfidf", "majority"):
        if "accuracy" not in (one := baselines.get(name) or {}):
            continue
        # Nothing is drawn for the commonest label, so the adapter's own interval decides.
        beside = "better" if low > one["accuracy"] else "worse" if high < one["accuracy"] else "not resolved"
        found.append(
            Contender(
                name,
                one["accuracy"],
                _interval(one.get("accuracy_ci95")),
                one.get("macro_f1"),
                one.get("difference", accuracy - one["accuracy"]),
                _interval(one.get("difference_ci95")),
                one.get("verdict") or beside,
                one.get("difference_p"),
            )
        )
    return (adapter, *sorted(found, key=lambda one: -one.accuracy))


def _interval(said: Sequence[float] | None) -> tuple[float, float] | None:
    return (said[0], said[1]) if said else None


def _thinned(steps: Sequence[StepLoss]) -> tuple[StepLoss, ...]:
    """At most `_MOST_STEPS` points: means of neighbours."""
    width = math.ceil(len(steps) / _MOST_STEPS) or 1
    groups = [steps[i : i + width] for i in range(0, len(steps), width)]
    return tuple(StepLoss(g[-1].step, g[-1].epoch, sum(one.loss for one in g) / len(g)) for g in groups)


def _evaluations(metrics: Mapping[str, Any], steps: Sequence[StepLoss]) -> tuple[Evaluation, ...]:
    found = []
    for one in metrics.get("evaluations", ()):
        epoch = int(one["epoch"])
        logged = [step.loss for step in steps if epoch - 1 < step.epoch <= epoch]
        mean = sum(logged) / len(logged) if logged else None
        found.append(Evaluation(epoch, int(one["step"]), one["loss"], one["accuracy"], one["macro_f1"], mean))
    return tuple(found)


def _classes(metrics: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> list[ClassScore]:
    trained = Counter(parts.get("train", {}).get("rows_per_label", {}))
    if metrics.get("refit_rows") and metrics["scored_on"] == "test":
        trained.update(parts.get("eval", {}).get("rows_per_label", {}))
    return [
        ClassScore(i, one["precision"], one["recall"], one["f1"], one["rows"], trained.get(label))
        for i, (label, one) in enumerate(metrics["per_class"].items())
    ]


def _weakest(classes: Sequence[ClassScore]) -> list[ClassScore]:
    """All of them, in their order; where they are too many, those with the lowest F1."""
    return sorted(sorted(classes, key=lambda one: one.f1)[:_MOST_CLASSES], key=lambda one: one.label)


def _example(scored: Scored, row: int, answers: Ints, longest: int) -> Example:
    answer, label = int(answers[row]), int(scored.labels[row])
    return Example(
        shown(scored.texts[row], longest),
        shown(scored.places[row], _LONGEST_NAME),
        label,
        answer,
        float(scored.answered[row, answer]),
    )


def worst_mistakes(scored: Scored) -> tuple[tuple[Example, ...], int]:
    """The wrong answers that were given with the most confidence, and how many wrong answers there are."""
    answers = scored.answered.argmax(axis=1)
    wrong = np.flatnonzero(answers != scored.labels)
    order = wrong[np.argsort(-scored.answered.max(axis=1)[wrong], kind="stable")]
    worst = order[:_MOST_MISTAKES].tolist()
    return tuple(_example(scored, row, answers, _LONGEST_TEXT) for row in worst), len(wrong)


def label_doubts(scored: Scored) -> tuple[tuple[Doubt, ...], int]:
    """Rows whose label is likely wrong, the clearest first, and how many there are.

    Confident learning (Northcutt et al. 2021, arXiv 1911.00068): a class's threshold is its mean probability over the
    rows that are labelled so; a row that is answered otherwise, at or above the threshold of that other class, is
    off the diagonal of the confident joint. A class that no row is labelled with has no threshold, and disputes none.
    """
    probabilities, labels, n = scored.answered, scored.labels, len(scored.labels)
    classes = probabilities.shape[1]
    own = probabilities[np.arange(n), labels]
    rows = np.bincount(labels, minlength=classes)
    summed = np.bincount(labels, weights=own, minlength=classes)
    thresholds = np.divide(summed, rows, out=np.full(classes, np.inf), where=rows > 0)
    answers = probabilities.argmax(axis=1)
    sure = probabilities.max(axis=1)
    disputed = np.flatnonzero((answers != labels) & (sure >= thresholds[answers]))
    order = disputed[np.argsort(-(sure - own)[disputed], kind="stable")]
    doubts = [
        Doubt(_example(scored, row, answers, _LONGEST_TEXT), float(thresholds[answers[row]]))
        for row in order[:_MOST_MISTAKES].tolist()
    ]
    return tuple(doubts), len(disputed)


def confused_pairs(scored: Scored, classes: int) -> tuple[Pair, ...]:
    """The labels that are taken for each other most; of two labels there is one pair, and the matrix says it all."""
    if classes < 3:
        return ()
    counts = _counts(scored, classes)
    both = np.triu(counts + counts.T, 1)
    order = np.argsort(-both, axis=None, kind="stable")[:_MOST_PAIRS].tolist()
    pairs = ((place // classes, place % classes) for place in order)
    return tuple(Pair(i, j, int(counts[i, j]), int(counts[j, i])) for i, j in pairs if both[i, j])


def _counts(scored: Scored, classes: int) -> Ints:
    """int64[C, C]: rows by label and answer."""
    places = scored.labels * classes + scored.answered.argmax(axis=1)
    return np.bincount(places, minlength=classes * classes).reshape(classes, classes)


def _matrix(scored: Scored, classes: int) -> Matrix:
    counts = _counts(scored, classes)
    chosen = list(range(classes))
    if classes > _MATRIX_CLASSES:
        wrong = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
        by_mistakes = sorted(chosen, key=lambda i: (-wrong[i], -counts[i].sum()))
        chosen = sorted(by_mistakes[:_MATRIX_CLASSES])
    position = np.full(classes, len(chosen))
    position[chosen] = np.arange(len(chosen))
    width = len(chosen) + (len(chosen) < classes)
    table = np.zeros((width, width), np.int64)
    np.add.at(table, (position[:, None], position[None, :]), counts)
    return Matrix(
        shown=tuple(chosen),
        counts=tuple(tuple(row) for row in table.tolist()),
        left_out=classes - len(chosen),
        left_out_rows=int(table[-1].sum()) if len(chosen) < classes else 0,
        examples=_cell_examples(scored, position, len(chosen)),
    )


def _cell_examples(scored: Scored, position: Ints, width: int) -> dict[tuple[int, int], tuple[Example, ...]]:
    """Some rows of each cell; where that would be too many, of the cells of mistakes first."""
    answers, sure = scored.answered.argmax(axis=1), scored.answered.max(axis=1)
    cells: dict[tuple[int, int], list[int]] = {}
    right = answers == scored.labels
    # Mistakes from the surest down; right answers from the least sure up.
    for row in np.lexsort((np.where(right, sure, -sure), right)).tolist():
        cell = int(position[scored.labels[row]]), int(position[answers[row]])
        if max(cell) < width and len(rows := cells.setdefault(cell, [])) < _CELL_EXAMPLES:
            rows.append(row)
    kept: dict[tuple[int, int], list[Example]] = {}
    left = _MATRIX_EXAMPLES
    for number in range(_CELL_EXAMPLES):
        for cell, rows in cells.items():
            if number < len(rows) and left:
                kept.setdefault(cell, []).append(_example(scored, rows[number], answers, _LONGEST_EXAMPLE))
                left -= 1
    return {cell: tuple(examples) for cell, examples in kept.items()}


def confidence_bins(probabilities: Floats, labels: Ints) -> tuple[Bin, ...]:
    """All `BINS` bins (low, high] of the confidence, those without rows too."""
    sure = probabilities.max(axis=1)
    right = (probabilities.argmax(axis=1) == labels).astype(np.float64)
    number = np.clip(np.ceil(sure * BINS).astype(np.int64) - 1, 0, BINS - 1)
    rows, confidence, accuracy = (np.bincount(number, weights=w, minlength=BINS) for w in (None, sure, right))
    return tuple(
        Bin(
            i / BINS,
            (i + 1) / BINS,
            int(n),
            float(confidence[i] / n) if n else 0.0,
            float(accuracy[i] / n) if n else 0.0,
        )
        for i, n in enumerate(rows.tolist())
    )


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: the mean distance of confidence and accuracy, weighed by rows."""
    return sum(one.rows * abs(one.accuracy - one.confidence) for one in bins) / max(1, sum(one.rows for one in bins))


def _calibration(metrics: Mapping[str, Any], scored: Scored) -> Calibration:
    before = confidence_bins(scored.probabilities, scored.labels)
    said = metrics.get("calibration") or {}
    if scored.calibrated is None:
        return Calibration(before, calibration_error(before))
    after = confidence_bins(scored.calibrated, scored.labels)
    return Calibration(
        before,
        said.get("ece_before", calibration_error(before)),
        after,
        said.get("ece_after", calibration_error(after)),
        said["temperature"],
        said.get("fitted_rows", 0),
        said.get("reported_on", ""),
    )


def _part(role: str, one: Mapping[str, Any]) -> Part:
    files = _list(one.get("files"))  # of a part that was split off, it is a sentence
    names = [shown(PurePath(file["path"]).name, _LONGEST_NAME) for file in files]
    more = [f"+ {len(names) - _MOST_LINES:,}"] if len(names) > _MOST_LINES else []
    tokens, tokens_cut = one.get("tokens"), one.get("tokens_cut", 0)
    return Part(
        role=role,
        files=(*names[:_MOST_LINES], *more),
        rows_in=one.get("rows_in"),
        skipped=sum(_mapping(one.get("rows_skipped")).values()),
        used=one["rows_used"],
        label_names=one.get("label_names", 0),
        labels=sum(1 for rows in one["rows_per_label"].values() if rows),
        majority_share=one["majority_share"],
        duplicates=one.get("duplicate_rows", 0),
        conflicts=one.get("conflicting_texts", 0),
        overlap=one.get("overlap_rows"),
        texts_cut=one.get("rows_cut", 0) / max(1, one["rows_used"]),
        tokens=tokens,
        tokens_cut=tokens_cut / max(1, (tokens or 0) + tokens_cut),
    )


def _warnings(data_report: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """As they were told before training, files by their names."""
    lines = list(data_report.get("warnings", ()))
    for one in parts.values():
        for file in _list(one.get("files")):
            lines = [line.replace(file["path"], PurePath(file["path"]).name) for line in lines]
    more = [f"+ {len(lines) - _MOST_LINES:,}"] if len(lines) > _MOST_LINES else []
    return (*(shown(line, _LONGEST_WARNING) for line in lines[:_MOST_LINES]), *more)


def _cost(metrics: Mapping[str, Any], environment: Mapping[str, Any]) -> Cost:
    seconds = [
        ("search", metrics.get("search_seconds")),
        ("load", metrics.get("load_seconds")),
        ("trunk", metrics.get("trunk_seconds")),
        ("train", metrics.get("train_seconds")),
        ("baselines", metrics.get("baseline_seconds")),
        ("verify", metrics.get("verify_seconds")),
    ]
    known = [(name, float(value)) for name, value in seconds if value]
    total = metrics.get("total_seconds")
    # Of a run that was stopped and resumed, the total is the last process's, and training all of them's.
    if known and total and (other := total - sum(value for _, value in known)) > 0:
        known.append(("other", other))
    return Cost(
        base_parameters=metrics.get("base_parameters"),
        total_parameters=metrics.get("total_parameters"),
        lora_parameters=metrics.get("lora_parameters"),
        head_parameters=metrics.get("head_parameters"),
        trainable_parameters=metrics.get("trainable_parameters"),
        adapter_bytes=metrics.get("adapter_bytes"),
        seconds=tuple(known),
        total_seconds=total,
        estimated_train_seconds=metrics.get("estimated_train_seconds"),
        peak_rss_bytes=metrics.get("peak_rss_bytes"),
        estimated_peak_bytes=metrics.get("estimated_peak_bytes"),
        tokens_per_s=metrics.get("tokens_per_s"),
        padding_pct=metrics.get("padding_pct"),
        largest_difference=metrics.get("largest_difference_after_reload"),
        machine=_machine(environment),
    )


def _machine(environment: Mapping[str, Any]) -> tuple[str, ...]:
    processor = _mapping(environment.get("processor"))
    lines = [
        " ".join([str(processor.get("name", "")), *map(str, _list(processor.get("features")))]),
        str(environment.get("system", "")),
        f"{environment['device']}, {environment.get('dtype', '')}" if "device" in environment else "",
        f"threads: {environment['threads']}, cores: {environment.get('cores', '?')}"
        if "threads" in environment
        else "",
        f"forward: {environment['forward']}" if "forward" in environment else "",
    ]
    return tuple(shown(line, _LONGEST_NAME) for line in lines if line.strip())


def _repeat(recipe: Recipe, base: str, environment: Mapping[str, Any], run: str) -> Repeat:
    differ = _differing(recipe)
    flags = ["trimtab", "train", *(PurePath(file).name for file in recipe.data.train)]
    for role, files in (("eval", recipe.data.eval), ("test", recipe.data.test)):
        flags += [word for file in files for word in (f"--{role}", PurePath(file).name)]
    if base != Recipe().base.model:
        flags += ["--base", base]
    if recipe.lora.init_from:
        flags += ["--set", f"lora.init_from={PurePath(recipe.lora.init_from).name}"]
    flags += [word for key, (value, _) in differ.items() for word in ("--set", f"{key}={value}")]
    command = shlex.join(flags)
    from_run = shlex.join(["trimtab", "train", "--recipe", str(PurePath(run) / "recipe.toml")])
    sums = [
        (shown(base, _LONGEST_TEXT) if path == recipe.base.model else shown(PurePath(path).name, _LONGEST_NAME), digest)
        for path, digest in sorted(recipe.sha256.items(), key=lambda one: one[0] != recipe.base.model)  # the base first
    ]
    return Repeat(
        command=command if len(command) <= _LONGEST_COMMAND and command.isprintable() else "",
        from_run=from_run if run and from_run.isprintable() else "",
        settings=tuple(
            (key, shown(value, _LONGEST_TEXT), shown(default, _LONGEST_TEXT))
            for key, (value, default) in differ.items()
        ),
        sums=tuple(sums[:_MOST_LINES]),
        sums_left_out=max(0, len(sums) - _MOST_LINES),
        versions=tuple(
            (shown(str(name), _LONGEST_NAME), shown(str(version), _LONGEST_NAME))
            for name, version in _mapping(environment.get("versions")).items()
        ),
    )


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _differing(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """Value and default of each setting that is not as a recipe begins, as TOML; files and base are told elsewhere."""
    found = {}
    defaults = Recipe().model_dump()
    for section, table in recipe.model_dump().items():
        if section == "sha256":
            continue
        for name, value in table.items():
            if value != defaults[section][name] and (section, name) not in _PATHS:
                found[f"{section}.{name}"] = as_toml(value), as_toml(defaults[section][name])
    return found
