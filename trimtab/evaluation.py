"""A model against labelled rows, and against what it said before: `trimtab eval` and `trimtab verify`."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab import adapter, baselines, data, predictions, preflight
from trimtab.build import make_ready
from trimtab.classification import metrics, without_known
from trimtab.config import Recipe, RuntimeSettings, recipe_of_run
from trimtab.data import Rows
from trimtab.errors import TrimtabError
from trimtab.machine import peak_rss_bytes
from trimtab.predict import load
from trimtab.resolve import Part, read_rows, resolve
from trimtab.rundir import RunDir, adapter_in, locate
from trimtab.tokens import Encoded

_CHECKED_ROWS = 64
# Differences of logits that are rounding; where the largest logit is above 1, as a share of it.
_EXACT = 1e-4  # where float32 computed both, in practice 1e-6
_ROUNDED = 2e-2  # where bfloat16 computed both
_CONVERTED = 5e-2  # bfloat16 on one side; read by hand, MiniLM, 4,500 reviews: 0.025


@dataclass(frozen=True)
class Verification:
    """What came out when stored logits were computed again."""

    rows: int
    largest_difference: float
    same_labels: bool
    """Of the rows whose two best logits are further apart than twice the tolerance."""
    tolerance: float

    @property
    def ok(self) -> bool:
        """Same labels, and logits within the tolerance."""
        return self.same_labels and self.largest_difference <= self.tolerance


def evaluate(
    path: str | Path,
    files: Sequence[str],
    *,
    base: str | None = None,
    text: str = "auto",
    label: str = "auto",
    skip_bad: bool = False,
    raw_scores: bool = False,
    runtime: RuntimeSettings | None = None,
) -> dict[str, Any]:
    """Scores a run or an adapter on labelled files.

    A run knows the rows that it was trained on, so its baselines learn from them again and answer these rows too; an
    adapter folder alone is compared to the commonest label only.

    Returns:
        The keys of metrics.json: eval_rows, accuracy, accuracy_ci95, macro_f1, per_class, loss and ece (of the scores
        that `predict` gives; of the model's own under `raw_scores`), temperature, majority_accuracy, baselines,
        rows_cut, rows_skipped, rows_per_s, total_seconds, peak_rss_bytes; baselines_missing, why there are no more;
        of a run overlap_rows, whose texts stand in its training or evaluation files, and clean, the headline without
        them.

    Raises:
        DataError, ArtefactError, BaseModelError: as `load` and the reading of files do.
    """
    started = time.monotonic()
    classifier = load(path, base=base, runtime=runtime)
    rows = data.read_rows(files, text=text, label=label, skip_bad=skip_bad, known_labels=classifier.labels.values)
    index = classifier.labels.index()
    encoded = classifier.encode([row.text for row in rows.examples], [index[row.label] for row in rows.examples])
    begun = time.monotonic()
    logits = classifier.logits(encoded)
    seconds = time.monotonic() - begun
    temperature = 1.0 if raw_scores else classifier.adapter.temperature
    return metrics(logits / np.float32(temperature), encoded.labels, classifier.labels.values) | {
        "temperature": temperature,
        **_beside(RunDir(locate(path)), rows, encoded, logits, base),
        "rows_cut": int(encoded.truncated.sum()),
        "rows_skipped": len(rows.rejects),
        "rows_per_s": len(encoded) / max(seconds, 1e-9),
        "total_seconds": time.monotonic() - started,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _beside(
    run: RunDir, rows: Rows, encoded: Encoded, logits: npt.NDArray[np.float32], base: str | None
) -> dict[str, Any]:
    """What a run that still has its training rows says beside a score on other rows: those it knows, and baselines."""
    found: dict[str, baselines.Baseline] = {}
    missing, learned_from = "an adapter alone does not know the rows that it was trained on", 0
    overlap: dict[str, Any] = {}
    if run.recipe.is_file():
        try:
            layered = recipe_of_run(run.recipe)
            job = resolve(layered.override({"base.model": base}, "--base") if base else layered)
            # Read again: a job does not keep the rows that were not drawn.
            known = preflight.known_rows({**read_rows(job.recipe), "test": rows}, {"test": rows.examples})["test"]
            overlap = without_known(logits, encoded.labels, known, job.labels.values)
            missing = "the recipe leaves them out (train.baselines)"
            if job.recipe.train.baselines:
                ready = make_ready(job)
                then = json.loads(run.metrics.read_text("utf-8"))
                epochs, learned = len(then["evaluations"]), job.final if then.get("refit_rows") else job
                scored = Part(rows.examples, encoded, known)
                found = baselines.compute(learned, scored, ready.engine.vectors, ready.model, epochs)
                missing, learned_from = "", len(learned.train.examples)
        except (TrimtabError, OSError, KeyError, TypeError, *baselines.FAILURES) as error:
            missing = f"they could not be computed again: {error.what if isinstance(error, TrimtabError) else error}"
    told = overlap | {"baselines": baselines.against(logits, encoded.labels, found, learned_from)}
    return told | ({"baselines_missing": missing} if missing else {})


def verify(path: str | Path, *, base: str | None = None) -> Verification:
    """Computes stored logits again: those of the probe sentences, and of a run's first 64 predictions.

    Where the adapter was trained once more on all rows, predictions of the rows kept for evaluation are not its own.
    A run is checked with its own `runtime` settings; what was computed in float32, in float32 on every processor.

    Raises:
        ArtefactError, BaseModelError: as `load` does.
    """
    run = RunDir(locate(path))
    recipe = recipe_of_run(run.recipe).recipe if run.recipe.is_file() else Recipe()
    runtime, said_by_adapter = recipe.runtime, recipe.train.refit != "on" or bool(recipe.data.test)
    if runtime.dtype == "auto" and adapter.read(adapter_in(path)).computed_in == "float32":
        runtime = runtime.model_copy(update={"dtype": "float32"})
    classifier = load(path, base=base, runtime=runtime)
    texts = [text for text, _ in classifier.adapter.probes]
    stored = np.array([logits for _, logits in classifier.adapter.probes], np.float32)
    again = [classifier.logits(classifier.encode(texts))]
    said = predictions.read(run.predictions, classifier.labels, _CHECKED_ROWS) if run.predictions.is_file() else None
    if said and said_by_adapter:
        stored = np.concatenate([stored, said.logits])
        again.append(classifier.logits(classifier.encode(said.texts)))
    computed = np.concatenate(again)
    before, now = classifier.adapter.computed_in, classifier.engine.dtype
    share = _CONVERTED if before != now else _EXACT if now == "float32" else _ROUNDED
    tolerance = share * max(1.0, float(np.abs(stored).max()))
    best = np.sort(stored, axis=1)
    clear = best[:, -1] - best[:, -2] > 2 * tolerance
    return Verification(
        len(stored),
        float(np.abs(stored - computed).max()),
        bool((stored.argmax(axis=1) == computed.argmax(axis=1))[clear].all()),
        tolerance,
    )
