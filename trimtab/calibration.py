"""Scores that mean what they say: one temperature, fitted on rows that were not trained on.

Fine-tuned classifiers are too sure of themselves; dividing logits by one number mends most of it and changes no label
(Guo et al. 2017, arXiv 1706.04599).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.classification import calibration_error, mean_loss

_FEWEST_ROWS = 100  # fewer leave the temperature to chance: it stays 1
_LOWEST, _HIGHEST = 0.5, 20.0  # rows without a mistake would ask for ever more certainty
_SEED = 0


def fit_temperature(
    logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], *, fewest: int = _FEWEST_ROWS
) -> float:
    """What logits float32[n, C] are divided by, so that labels int64[n] are most likely; 1 for too few rows."""
    if len(labels) < fewest:
        return 1.0
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log: mean_loss(logits / np.float32(np.exp(log)), labels),
        bounds=(np.log(_LOWEST), np.log(_HIGHEST)),
        method="bounded",
    )
    return round(float(np.exp(found.x)), 4)


def judge(
    eval_logits: npt.NDArray[np.float32],
    eval_labels: npt.NDArray[np.int64],
    test: tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]] | None,
) -> dict[str, Any]:
    """A temperature fitted on the evaluation rows, and what it does to rows that it was not fitted on.

    Those are the test rows where there are any; else each half of the evaluation rows, under the temperature of the
    other half.

    Returns:
        temperature, fitted_rows, reported_on (`test` or `halves`), loss_before, loss_after, ece_before, ece_after.
    """
    temperature = fit_temperature(eval_logits, eval_labels)
    if test:
        logits, labels = test
        cooled = logits / np.float32(temperature)
    else:
        logits, labels = eval_logits, eval_labels
        order = np.random.default_rng(_SEED).permutation(len(labels))
        first, second = np.array_split(order, 2)
        cooled = logits.copy()
        for half, other in ((first, second), (second, first)):
            # A half is judged as the whole is used: with a temperature wherever the whole has one.
            fewest = 1 if len(labels) >= _FEWEST_ROWS else len(labels)
            cooled[half] /= np.float32(fit_temperature(logits[other], labels[other], fewest=fewest))
    return {
        "temperature": temperature,
        "fitted_rows": len(eval_labels),
        "reported_on": "test" if test else "halves",
        "loss_before": mean_loss(logits, labels),
        "loss_after": mean_loss(cooled, labels),
        "ece_before": calibration_error(logits, labels),
        "ece_after": calibration_error(cooled, labels),
    }
