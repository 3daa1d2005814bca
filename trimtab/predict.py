"""An adapter in use: texts -> predictions. The one place where logits become labels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trimtab import adapter as adapter_folder
from trimtab import tokens
from trimtab.adapter import Adapter
from trimtab.classification import Labels, compute_logits, softmax
from trimtab.config import RuntimeSettings
from trimtab.data import text_problem
from trimtab.device import place
from trimtab.errors import ArtefactError, DataError, RecipeError, some
from trimtab.forward import Engine
from trimtab.hub import Base
from trimtab.rundir import adapter_in

UNSURE = "unsure"
"""The label of an answer whose score is below what was asked for."""


@dataclass(frozen=True)
class Prediction:
    """The answer for one text."""

    text: str
    label: str
    """The label as it stands in the training file, or `unsure`."""
    score: float
    """Its probability."""
    scores: dict[str, float]
    """The probability of every label."""
    truncated: bool
    """Whether the text was cut: the model did not see all of it."""


@dataclass(frozen=True)
class Classifier:
    """A base model with one adapter, ready to answer."""

    adapter: Adapter
    base: Base
    engine: Engine

    @property
    def labels(self) -> Labels:
        """The labels in the order of the logits."""
        return self.adapter.labels

    def encode(self, texts: Sequence[str], labels: Sequence[int] | None = None) -> tokens.Encoded:
        """Tokens as in training: the adapter's own tokenizer and length."""
        try:
            return tokens.encode(texts, self.adapter.tokenizer, self.adapter.max_length, labels, keep=self.adapter.keep)
        except OverflowError as error:
            raise self._beyond_the_base(error) from None

    def logits(
        self, encoded: tokens.Encoded, after_batch: Callable[[int], None] = lambda rows: None
    ) -> npt.NDArray[np.float32]:
        """Logits float32[n, C].

        Raises:
            ArtefactError: the adapter's tokenizer or length asks for what its base does not have.
        """
        try:
            return compute_logits(self.engine.forward, encoded, after_batch=after_batch)
        except IndexError as error:
            raise self._beyond_the_base(error) from None

    def _beyond_the_base(self, error: Exception) -> ArtefactError:
        return ArtefactError(
            "adapter.tokens",
            f"This adapter makes tokens or positions that its base has no vectors for: {error}",
            where=str(self.adapter.folder),
            mend="copy the whole adapter folder again; if training wrote it so, please report it",
        )

    def predict(self, texts: Sequence[str], *, min_score: float = 0.0, raw_scores: bool = False) -> list[Prediction]:
        """Answers texts, one prediction each, in their order.

        Args:
            texts: A list of strings.
            min_score: An answer with a lower score gets the label `unsure`.
            raw_scores: Scores as the model gives them, without the adapter's temperature.

        Raises:
            TypeError: `texts` is a single string, or holds something else than strings.
            RecipeError: `min_score` is no probability, or a label of the adapter's own is `unsure`.
            DataError: a text holds half a character: a surrogate without its other half.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError("predict takes a list of strings: classifier.predict(['a text', 'another'])")
        if not 0 <= min_score <= 1 or (min_score and UNSURE in self.labels.values):
            raise RecipeError(
                "predict.min_score",
                f'"{UNSURE}" is a label of this adapter, so nothing else can be called so.'
                if 0 <= min_score <= 1
                else f"A score is a probability from 0 to 1, not {min_score:g}.",
                where="--min-score",
                mend="leave it out, and read the scores" if 0 <= min_score <= 1 else "--min-score 0.8",
            )
        if halves := [i for i, text in enumerate(texts) if text_problem(text) == "half a character"]:
            raise DataError(
                "data.half_character",
                f"Half a character (an escape without its other half, a byte that is no UTF-8) in text {some(halves)}.",
                where="texts, counted from 0",
                mend="write these texts again",
            )
        encoded = self.encode(texts)
        logits = self.logits(encoded) / np.float32(1.0 if raw_scores else self.adapter.temperature)
        return decode(texts, logits, encoded.truncated, self.labels, min_score)


def decode(
    texts: Sequence[str],
    logits: npt.NDArray[np.float32],
    truncated: npt.NDArray[np.bool_],
    labels: Labels,
    min_score: float = 0.0,
) -> list[Prediction]:
    """Logits float32[n, C] -> predictions: softmax, the first of the most probable labels or `unsure`."""
    if not len(texts):
        return []
    probabilities = softmax(logits)
    return [
        Prediction(
            text,
            labels.values[int(row.argmax())] if row.max() >= min_score else UNSURE,
            float(row.max()),
            {label: float(p) for label, p in zip(labels.values, row, strict=True)},
            bool(cut),
        )
        for text, row, cut in zip(texts, probabilities, truncated, strict=True)
    ]


def load(path: str | Path, *, base: str | Path | None = None, runtime: RuntimeSettings | None = None) -> Classifier:
    """Loads a run or an adapter folder; the adapter alone is enough, it knows its base and its labels.

    Args:
        path: A run directory (`runs/latest`) or an adapter folder.
        base: Where its base is, if not where it was; it must be the same one, by sha256.
        runtime: Device and threads; the defaults choose.

    Raises:
        ArtefactError: nothing there, damaged, or another base than the one it was trained on.
        BaseModelError: the base was not found.
    """
    adapter = adapter_folder.read(adapter_in(path))
    found = adapter_folder.locate_base(adapter, None if base is None else str(base))
    settings = runtime or RuntimeSettings()
    return Classifier(adapter, found, adapter_folder.load_engine(adapter, found, place(settings).device, settings))
