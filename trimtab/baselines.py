"""What an adapter must beat to be worth having: the commonest label, counted words, the untrained base.

All of them learn from the rows that the adapter learns from, and answer the rows that it is judged on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trimtab import estimate, interrupts, logistic
from trimtab.batching import evaluation_plan
from trimtab.classification import by_class, wilson
from trimtab.forward import Vectors
from trimtab.hub import pooling
from trimtab.paired import paired
from trimtab.resolve import Job, Part
from trimtab.tokens import Encoded

_SEED = 0
_MOST_COEFFICIENTS = 4_000_000  # labels times words; the solver holds some 25 copies of them in float64
_MOST_CHARACTERS = 60_000_000  # of text that words are counted in, about 45,000 film reviews
_FEWEST_FOR_SAMPLE = 2_000  # rows: fewer are all encoded, whatever their share
_PROBE_SHARE = 1 / 3  # of the arithmetic of training, that encoding for the probe may take
_BACKWARD = 2  # forwards that a backward is worth
# Chinese and Japanese put no spaces between words: there, each character is one. Elsewhere scikit-learn's own rule.
_NO_SPACES = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]{{2,}}"

FAILURES = (ArithmeticError, MemoryError, RuntimeError, ValueError)
"""What may go wrong in `compute`, and costs nobody the adapter or its scores."""


@dataclass(frozen=True)
class Baseline:
    """The answers of something simpler."""

    answers: npt.NDArray[np.int64]
    c: float
    """LogisticRegression's C, chosen by cross-validation over the training rows."""
    rows: int
    """That it learned from."""


def compute(job: Job, scored: Part, vectors: Vectors | None, model: Any, epochs: int) -> dict[str, Baseline]:
    """Fits both baselines on the training rows and lets them answer the scored ones.

    Args:
        job: Whose training rows.
        scored: The rows to answer.
        vectors: The base's sentence vectors; None: no probe.
        model: For the arithmetic of a row.
        epochs: How often the adapter saw the training rows.
    """
    found = {"tfidf": _tfidf(job, scored)}
    if vectors:
        found["probe"] = _probe(job, scored, vectors, model, epochs)
    return found


def against(
    logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], found: Mapping[str, Baseline], of_rows: int
) -> dict[str, Any]:
    """The scores of each baseline beside those of logits float32[n, C], over labels int64[n], for metrics.json."""
    ours = logits.argmax(axis=1) == labels
    told: dict[str, Any] = {"majority": {"accuracy": float(np.bincount(labels).max() / len(labels))}}
    for name, one in found.items():
        right = one.answers == labels
        compared = paired(ours, right)
        told[name] = {
            "accuracy": float(right.mean()),
            "accuracy_ci95": list(wilson(int(right.sum()), len(labels))),
            "macro_f1": by_class(one.answers, labels, logits.shape[1]).macro_f1,
            "c": one.c,
            "rows": one.rows,
            "of_rows": of_rows,
            "difference": compared.difference,
            "difference_ci95": list(compared.ci95),
            "difference_p": compared.p,
            "verdict": compared.verdict,
        }
    return told


def _tfidf(job: Job, scored: Part) -> Baseline:
    """Logistic regression on word 1- and 2-grams, tf-idf with sublinear tf."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    characters = np.array([len(example.text) for example in job.train.examples])
    rows = _sample(len(characters), min(1.0, _MOST_CHARACTERS / max(1, int(characters.sum()))))
    counter = TfidfVectorizer(
        ngram_range=(1, 2),
        sublinear_tf=True,
        token_pattern=_WORD,
        dtype=np.float32,
        max_features=_MOST_COEFFICIENTS // max(2, len(job.labels)),
    )
    try:
        # The document frequencies are those of all rows: the folds choose C alone.
        learned = counter.fit_transform([job.train.examples[row].text for row in rows])
    except ValueError:  # no text has a word: always the commonest label
        commonest = np.bincount(job.train.encoded.labels).argmax()
        return Baseline(np.full(len(scored.examples), commonest), logistic.CS[0], len(rows))
    asked = counter.transform([example.text for example in scored.examples])
    answers, c = _logistic(learned, job.train.encoded.labels[rows], asked)
    return Baseline(answers, c, len(rows))


def _probe(job: Job, scored: Part, vectors: Vectors, model: Any, epochs: int) -> Baseline:
    """Logistic regression on the sentence vectors of the base as it was before training."""
    learning, asking = (float(estimate.work(model, part.encoded.lengths).sum()) for part in (job.train, scored))
    training = epochs * ((1 + _BACKWARD) * learning + asking)
    share = min(1.0, max(0.0, _PROBE_SHARE * training - asking) / learning)
    rows = _sample(len(job.train.examples), share if len(job.train.examples) > _FEWEST_FOR_SAMPLE else 1.0)
    encode = encoder(vectors, job.base.folder)
    learned, asked = encode(job.train.encoded, rows), encode(scored.encoded, np.arange(len(scored.examples)))
    answers, c = _logistic(learned, job.train.encoded.labels[rows], asked)
    return Baseline(answers, c, len(rows))


def encoder(vectors: Vectors, base: Path) -> Callable[[Encoded, npt.NDArray[np.int64]], npt.NDArray[np.float32]]:
    """From rows to the base's own sentence vectors, pooled as its folder says; the mean where it says nothing."""
    first_only = pooling(base) == "first"

    def encode(encoded: Encoded, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Vectors float32[n, D] of length 1."""
        found: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]] = []
        with torch.inference_mode():
            for places in evaluation_plan(encoded.lengths[rows]):
                interrupts.check()
                found.append((places, vectors(encoded, rows[places], first_only=first_only).cpu().numpy()))
        whole = np.zeros((len(rows), found[0][1].shape[1]), np.float32)
        for places, part in found:
            whole[places] = part
        whole /= np.maximum(np.linalg.norm(whole, axis=1, keepdims=True), 1e-12)
        return whole

    return encode


def _sample(rows: int, share: float) -> npt.NDArray[np.int64]:
    """All rows, or a share of them drawn at random, at least one."""
    if share >= 1:
        return np.arange(rows)
    return np.sort(np.random.default_rng(_SEED).permutation(rows)[: max(1, int(share * rows))])


def _logistic(learned: Any, labels: npt.NDArray[np.int64], asked: Any) -> tuple[npt.NDArray[np.int64], float]:
    """Fits on learned [n, D] and labels int64[n], answers asked [m, D]; returns the answers and the chosen C."""
    if len(np.unique(labels)) == 1:
        return np.full(asked.shape[0], labels[0]), logistic.CS[0]
    fitted, c = logistic.fit(learned, labels)
    return fitted.predict(asked), c
