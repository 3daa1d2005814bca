"""Logistic regression whose rows choose, by cross-validation, how strongly it is held back."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab import interrupts

CS = (1.0, 10.0)  # inverse strengths of regularisation to choose from
_FOLDS = 3
_SEED = 0


def fit(learned: Any, labels: npt.NDArray[np.int64], cs: Sequence[float] = CS) -> tuple[Any, float]:
    """Fits scikit-learn's LogisticRegression on learned [n, D], dense or sparse; returns it and the C chosen of `cs`.

    Raises:
        ValueError: all labels are the same.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    def with_c(c: float, rows: npt.NDArray[np.int64]) -> Any:
        interrupts.check()
        return LogisticRegression(C=c, max_iter=1_000).fit(learned[rows], labels[rows])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", UserWarning)  # of a class with fewer rows than folds
        right = dict.fromkeys(cs, 0)
        if len(cs) > 1 and np.bincount(labels).max() >= _FOLDS:
            folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=_SEED)
            for known, held in folds.split(np.zeros(len(labels)), labels):
                if len(np.unique(labels[known])) > 1:
                    for c in cs:
                        right[c] += int((with_c(c, known).predict(learned[held]) == labels[held]).sum())
        best = max(cs, key=lambda c: right[c])
        return with_c(best, np.arange(len(labels))), best
