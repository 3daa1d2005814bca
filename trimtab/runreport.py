"""The report of a run: what it knows becomes findings, and those become report.html, Markdown and the adapter's card.

A run that has just ended knows everything in memory; one of yesterday has its files. Both give the same findings. A
run that was written before there were reports lacks some of it, and its report those parts.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trimtab import durable, findings, markdown, page, predictions
from trimtab.classification import Labels, make_labels, softmax
from trimtab.config import load_recipe
from trimtab.data import Example
from trimtab.errors import ArtefactError, TrimtabError
from trimtab.findings import Findings, Label, Scored, StepLoss
from trimtab.predictions import Stored
from trimtab.rundir import RunDir, locate, not_ended

if TYPE_CHECKING:
    from trimtab.resolve import Job  # with it come transformers and peft, which take seconds


def card(
    job: "Job",
    metrics: Mapping[str, Any],
    examples: list[Example],
    logits: npt.NDArray[np.float32],
    environment: Mapping[str, Any],
) -> str:
    """README.md of the adapter of a run that has just ended.

    Args:
        job: What was trained.
        metrics: What metrics.json will say, as far as it is known.
        examples: The rows of the headline.
        logits: float32[n, C], theirs.
        environment: What environment.json says.
    """
    index = job.labels.index()
    found = findings.find(
        metrics,
        labels=_labels(job.labels),
        scored=_scored(
            Stored(
                tuple(example.text for example in examples),
                tuple(predictions.place(example.file, example.line) for example in examples),
                np.array([index[example.label] for example in examples], np.int64),
                logits,
            ),
            metrics,
        ),
        data_report=job.data_report,
        recipe=job.recipe,
        environment=environment,
        base=job.base.hub_id or job.base.folder.name,
    )
    return markdown.card(found)


def read(path: str | Path, metrics: Mapping[str, Any] | None = None) -> Findings:
    """The findings of a run from its files.

    Args:
        path: The run directory.
        metrics: What metrics.json will say, where it is not written yet.

    Raises:
        ArtefactError: it is no run, has not come to its end, or its predictions are damaged.
    """
    run = RunDir(locate(path))
    if not run.recipe.is_file():
        raise ArtefactError(
            "run.not_a_run",
            "This is not a run directory: it has no recipe.toml.",
            where=str(run.path),
            mend="a run directory such as runs/latest; an adapter's own report is its README.md",
        )
    known = _object(run.metrics) if metrics is None else metrics
    if metrics is None and not run.metrics.is_file():
        why, mend = not_ended(run)
        raise ArtefactError("run.unfinished", f"This run has no scores: {why}.", where=str(run.metrics), mend=mend)
    try:
        return _find(run, known)
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, TrimtabError):
            raise
        raise ArtefactError(
            "run.damaged",
            f"A file of this run does not say what a run writes there: {type(error).__name__}: {error}",
            where=f"{run.metrics}, or data_report.json or environment.json beside it",
            mend="bring the folder back from a copy; or train it again",
        ) from None


def _find(run: RunDir, known: Mapping[str, Any]) -> Findings:
    events = _events(run)
    start = events.get("start", {})
    recipe = load_recipe(str(run.recipe)).recipe
    report = _object(run.data_report)
    values = list(known["per_class"])
    labels = make_labels(values, {label: name for label, name in recipe.data.names.items() if label in values})
    base = _object(run.adapter / "trimtab.json").get("base", {})
    counted = {f"{key}_parameters": start.get("parameters", {}).get(key) for key in ("base", "total", "lora", "head")}
    return findings.find(
        counted | dict(known),
        labels=_labels(labels),
        scored=_predictions(run, labels, known),
        data_report=report,
        recipe=recipe,
        environment=_object(run.environment),
        base=base.get("hub_id") or Path(recipe.base.model).name,
        steps=events["steps"],
        started=start.get("time"),
        run=str(run.path),
    )


def write(run: RunDir, found: Findings) -> None:
    """Writes report.html.

    Raises:
        OSError: the disk is full, or nothing can be written there.
    """
    durable.replace(run.report, page.render(found).encode())


def _labels(labels: Labels) -> list[Label]:
    return [Label(value, labels.name(i, "zh"), labels.name(i, "en")) for i, value in enumerate(labels.values)]


def _scored(stored: Stored, metrics: Mapping[str, Any]) -> Scored:
    temperature = (metrics.get("calibration") or {}).get("temperature")
    # 1 changes nothing, and there is no second curve to draw.
    calibrated = softmax(stored.logits / np.float32(temperature)) if temperature not in (None, 1.0) else None
    return Scored(stored.texts, stored.places, stored.truth, softmax(stored.logits), calibrated)


def _predictions(run: RunDir, labels: Labels, metrics: Mapping[str, Any]) -> Scored | None:
    """The rows of predictions.parquet; None where it is not there any more."""
    if not run.predictions.is_file():
        return None
    stored = predictions.read(run.predictions, labels)
    return _scored(stored, metrics)


def first_start(run: RunDir) -> dict[str, Any]:
    """What a run's first process told when it began: rows, parameters, estimate; empty where that line is lost."""
    return dict(_events(run).get("start", {}))


def _events(run: RunDir) -> dict[str, Any]:
    """The first start, and the logged training losses by step; a step that was done again counts once."""
    steps: dict[int, StepLoss] = {}
    found: dict[str, Any] = {}
    # A link to a device has no end.
    lines = run.events.read_bytes().split(b"\n") if run.events.is_file() else []
    for line in lines:
        try:
            event = json.loads(line)
            if event["event"] == "step" and not event.get("refit"):
                steps[event["step"]] = StepLoss(event["step"], event["epoch"], event["loss"])
            elif event["event"] == "start":
                found.setdefault("start", event)
        except (ValueError, KeyError, TypeError):  # half a line, of a process that was killed
            continue
    return found | {"steps": [steps[step] for step in sorted(steps)]}


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is not there or damaged: the report goes without it."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
