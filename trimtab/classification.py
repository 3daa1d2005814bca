"""What is special to text classification: labels and their names, the loss, the forward to logits, the metrics."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from trimtab import findings, interrupts
from trimtab.batching import evaluation_plan
from trimtab.errors import DivergedError, RecipeError, did_you_mean, some
from trimtab.forward import Forward
from trimtab.tokens import Encoded

NAME_LANGUAGES = ("zh", "en")
"""In the order in which a display name such as 差评/negative holds them."""


LONGEST_SERVED_LABEL = 200
"""Characters: a server's answers repeat a label for each text."""


@dataclass(frozen=True)
class Labels:
    """The labels in their fixed order; index i is the model's logit i."""

    values: tuple[str, ...]
    """As they stand in the training file."""
    names: tuple[str, ...] = ()
    """Display names `zh/en`, one for each value; empty: the values are the names."""

    def __len__(self) -> int:
        return len(self.values)

    def index(self) -> dict[str, int]:
        """From label to its logit."""
        return {value: i for i, value in enumerate(self.values)}

    def name(self, i: int, language: str = "") -> str:
        """The display name of label i: in one language, or `zh/en` as given where `language` is empty."""
        if not self.names or self.names[i] == self.values[i]:  # not named: a label may hold a slash of its own
            return self.values[i]
        parts = self.names[i].split("/")
        return (
            parts[NAME_LANGUAGES.index(language)] if language and len(parts) == len(NAME_LANGUAGES) else self.names[i]
        )

    def shown(self, label: str, language: str = "") -> str:
        """The display name of a label; what is none of the labels, such as `unsure`, is shown as it stands."""
        return self.name(self.values.index(label), language) if label in self.values else label


def make_labels(values: Sequence[str], names: Mapping[str, str]) -> Labels:
    """Joins the labels of the data with the display names of the recipe.

    Raises:
        RecipeError: a name is given for a label that the data does not have.
    """
    unknown = [label for label in names if label not in values]
    if unknown:
        raise RecipeError(
            "data.names",
            f'"{unknown[0]}" gets a name, but no row has that label. Labels: {some(values, 20)}.'
            + did_you_mean(unknown[0], values),
            where="data.names",
            mend="--names LABEL=NAME,LABEL=NAME with the labels as they stand in the file",
        )
    return Labels(tuple(values), tuple(names.get(value, value) for value in values) if names else ())


def loss_sum(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Cross-entropy summed over rows: logits float32[B, C], labels int64[B], weights [C] or None -> scalar."""
    return torch.nn.functional.cross_entropy(logits, labels, weight=weights, reduction="sum")


def class_weights(labels: npt.NDArray[np.int64], classes: int) -> torch.Tensor:
    """float32[C]: n / (C x rows of the class), so that every class counts alike and a row counts 1 on average.

    King & Zeng 2001, "Logistic Regression in Rare Events Data"; scikit-learn's `balanced`. A class without rows: 0.
    """
    counts = np.bincount(labels, minlength=classes)
    weights = np.divide(len(labels), classes * counts, out=np.zeros(classes), where=counts > 0)
    return torch.from_numpy(weights.astype(np.float32))


def compute_logits(
    forward: Forward,
    encoded: Encoded,
    *,
    after_batch: Callable[[int], None] = lambda rows: None,
) -> npt.NDArray[np.float32]:
    """Every row's logits without dropout and gradients: float32[n, C], in the order of the rows.

    Raises:
        DivergedError: a logit is not finite.
    """
    pieces: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]] = []
    with torch.inference_mode():
        for rows in evaluation_plan(encoded.lengths):
            interrupts.check()
            pieces.append((rows, forward(encoded, rows).cpu().numpy()))
            after_batch(len(rows))
    if not pieces:
        return np.zeros((0, 0), np.float32)
    logits = np.zeros((len(encoded), pieces[0][1].shape[1]), np.float32)
    for rows, piece in pieces:
        logits[rows] = piece
    if not np.isfinite(logits).all():
        broken = int((~np.isfinite(logits)).any(axis=1).sum())
        raise DivergedError(
            "logits.not_finite",
            f"{broken:,} of {len(logits):,} rows got logits that are not finite.",
            mend="in training, a smaller train.learning_rate; of an adapter, copy the whole folder again",
        )
    return logits


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Probabilities float64[n, C]."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


class ByClass(NamedTuple):
    """Scores of each of C classes, 0 where nothing is divided by nothing; float[C]."""

    precision: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]
    f1: npt.NDArray[np.float64]
    rows: npt.NDArray[np.int64]
    macro_f1: float
    """The mean f1 of the classes that occur or are answered."""


def by_class(answers: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], classes: int) -> ByClass:
    """How n answers, int64[n], do against labels, int64[n]; as sklearn's, whose import is 126 MB of a run's peak."""
    right, told, rows = (np.bincount(one, minlength=classes) for one in (labels[answers == labels], answers, labels))
    f1 = 2 * right / np.maximum(told + rows, 1)
    return ByClass(
        right / np.maximum(told, 1), right / np.maximum(rows, 1), f1, rows, float(f1[(told > 0) | (rows > 0)].mean())
    )


def without_known(
    logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], known: npt.NDArray[np.bool_], names: Sequence[str]
) -> dict[str, Any]:
    """How many of n rows are `known`, bool[n], from training, and the headline without them.

    Returns:
        overlap_rows, and where it is neither none nor all of them clean: eval_rows, accuracy, accuracy_ci95, macro_f1.
    """
    found: dict[str, Any] = {"overlap_rows": int(known.sum())}
    if known.any() and not known.all():
        scores = metrics(logits[~known], labels[~known], names)
        found["clean"] = {key: scores[key] for key in ("eval_rows", "accuracy", "accuracy_ci95", "macro_f1")}
    return found


def metrics(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], names: Sequence[str]) -> dict[str, Any]:
    """Scores of n rows, logits float32[n, C] against labels int64[n].

    Returns:
        eval_rows, loss (mean negative log-likelihood), ece (`calibration_error`), accuracy, accuracy_ci95 [low, high],
        macro_f1 (over the classes that occur or are answered), majority_accuracy (always answering the commonest of
        these rows), and
        per_class: precision, recall, f1, rows for each label.
    """
    answers = logits.argmax(axis=1)
    correct = int((answers == labels).sum())
    classes = by_class(answers, labels, len(names))
    return {
        "eval_rows": len(labels),
        "loss": mean_loss(logits, labels),
        "ece": calibration_error(logits, labels),
        "accuracy": correct / len(labels),
        "accuracy_ci95": list(wilson(correct, len(labels))),
        "macro_f1": classes.macro_f1,
        "majority_accuracy": float(np.bincount(labels).max() / len(labels)),
        "per_class": {
            name: {
                "precision": float(classes.precision[i]),
                "recall": float(classes.recall[i]),
                "f1": float(classes.f1[i]),
                "rows": int(classes.rows[i]),
            }
            for i, name in enumerate(names)
        },
    }


def mean_loss(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float:
    """Mean negative log-likelihood of labels int64[n] under logits float32[n, C]."""
    exact = logits.astype(np.float64)
    return float((np.logaddexp.reduce(exact, axis=1) - exact[np.arange(len(labels)), labels]).mean())


def calibration_error(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float:
    """Expected calibration error of logits float32[n, C] against labels int64[n]: that of the report's diagram."""
    return findings.calibration_error(findings.confidence_bins(softmax(logits), labels))


def wilson(correct: int, rows: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927); it stays within 0 and 1 and holds for few rows."""
    share = correct / rows
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return max(0.0, centre - half), min(1.0, centre + half)
