"""Findings of runs that never were: of any size, with whatever texts and labels, as quick to make as to read."""

from typing import Any

import numpy as np

from trimtab import findings
from trimtab.classification import metrics, softmax
from trimtab.config import Recipe, assemble
from trimtab.findings import Findings, Label, Scored, StepLoss

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)> </td></table> `|` \\| ``` **b** ~~s~~ "
    "[l](https://evil.example/x) ![i](//evil.example/i.png) "
    "\"q\" 'a' &amp; {{ 7*7 }} {% raw %} @someone https://evil.example www.evil.example "
    "\u202eright to left\x1b[31m\x00 </style> --> ]]> <svg onload=alert(3)>"
)


def scored(rows: int, classes: int, *, text: str = "a row", temperature: float = 0.0, spread: float = 1.6) -> Scored:
    """Rows of which most are answered rightly; of more than two labels the last has no row."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, max(2, classes - 1), rows)
    logits = rng.normal(size=(rows, classes)) * spread
    logits[np.arange(rows), labels] += 3.0
    logits = logits.astype(np.float32)
    return Scored(
        texts=[f"{text} {i}" for i in range(rows)],
        places=[f"sealed.csv:{i + 2}" for i in range(rows)],
        labels=labels,
        probabilities=softmax(logits),
        calibrated=softmax(logits / np.float32(temperature)) if temperature else None,
    )


def all_metrics(rows: Scored, values: list[str], *, epochs: int = 4, baselines: bool = True) -> dict[str, Any]:
    """What metrics.json says of such rows, with every key that it may have."""
    found = metrics(np.log(rows.probabilities + 1e-30).astype(np.float32), rows.labels, values)
    score = found["accuracy"]
    found |= {
        "scored_on": "test",
        "epoch": min(2, epochs),
        "evaluations": [
            {"epoch": e, "step": 60 * e, "loss": 0.9 / e, "accuracy": score - 0.05 / e, "macro_f1": score - 0.08 / e}
            for e in range(1, epochs + 1)
        ],
        "base_parameters": 22_713_986,
        "total_parameters": 23_045_762,
        "lora_parameters": 331_776,
        "head_parameters": 770,
        "trainable_parameters": 332_546,
        "adapter_bytes": 1_341_539,
        "load_seconds": 4.2,
        "train_seconds": 212.5,
        "baseline_seconds": 5.0,
        "verify_seconds": 5.5,
        "total_seconds": 243.0,
        "estimated_train_seconds": 198.0,
        "peak_rss_bytes": 1_760_000_000,
        "estimated_peak_bytes": 1.6e9,
        "tokens_per_s": 4312.3,
        "padding_pct": 12.5,
        "largest_difference_after_reload": 2e-6,
    }
    if baselines:
        against = {"c": 1.0, "rows": 1_000, "of_rows": 1_000}
        found["baselines"] = {
            "majority": {"accuracy": found["majority_accuracy"]},
            "tfidf": against
            | {"accuracy": score - 0.06, "accuracy_ci95": [score - 0.09, score - 0.03], "macro_f1": score - 0.07}
            | {"difference": 0.06, "difference_ci95": [0.03, 0.09], "verdict": "better"},
            "probe": against
            | {"accuracy": score - 0.01, "accuracy_ci95": [score - 0.04, score + 0.02], "macro_f1": score - 0.01}
            | {"difference": 0.01, "difference_ci95": [-0.02, 0.04], "verdict": "not resolved"},
        }
    if rows.calibrated is not None:
        found["calibration"] = {
            "temperature": 1.3,
            "fitted_rows": 500,
            "reported_on": "halves",
            "loss_before": 0.5,
            "loss_after": 0.4,
            "ece_before": 0.081,
            "ece_after": 0.022,
        }
    return found


def recipe(**settings: object) -> Recipe:
    """A resolved recipe."""
    values: dict[str, object] = {
        "data.train": ("/data/reviews.csv",),
        "data.test": ("/data/sealed.csv",),
        "data.text": "text",
        "data.label": "label",
        "data.max_length": 64,
        "base.model": "/bases/minilm",
        "lora.target_modules": ("query", "value"),
        "train.num_epochs": 4,
        "train.learning_rate": 1e-3,
    }
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    found = assemble().override(values, "test").recipe
    return found.model_copy(update={"sha256": {"/data/reviews.csv": "60" * 32, "/bases/minilm": "53" * 32}})


def sample(
    rows: int = 300,
    classes: int = 2,
    *,
    text: str = "a row",
    label: str = "",
    epochs: int = 4,
    temperature: float = 1.3,
    baselines: bool = True,
    **changed: Any,
) -> Findings:
    """Findings of a run; `label` begins every label, `changed` replaces arguments of `findings.find`."""
    values = [f"{i}{label}" for i in range(classes)]
    names = {0: ("差评", "negative"), 1: ("好评", "positive")} if classes == 2 and not label else {}
    rows_of = scored(rows, classes, text=text, temperature=temperature)
    counts = np.bincount(rows_of.labels, minlength=classes).tolist()
    part = {
        "rows_in": rows + 7,
        "rows_skipped": {"empty": 7},
        "rows_used": rows,
        "rows_per_label": dict(zip(values, counts, strict=True)),
        "majority_share": max(counts) / rows,
        "duplicate_rows": 3,
        "conflicting_texts": 1,
        "tokens": 40 * rows,
        "tokens_cut": rows,
        "rows_cut": rows // 20,
    }
    split = {"files": "split from the training files", "rows_in": None, "rows_skipped": None, "overlap_rows": 0}
    arguments: dict[str, Any] = {
        "metrics": all_metrics(rows_of, values, epochs=epochs, baselines=baselines),
        "labels": [Label(value, *names.get(i, (value, value))) for i, value in enumerate(values)],
        "scored": rows_of,
        "data_report": {
            "labels": values,
            "warnings": [f"/data/reviews.csv: 3 of the training rows repeat an earlier one {text}"],
            "train": part | {"files": [{"path": "/data/reviews.csv", "sha256": "60" * 32, "rows": rows}]},
            "eval": part | split,
        },
        "recipe": recipe(),
        "environment": {
            "versions": {"trimtab": "0.1.0", "python": "3.11.7", "torch": "2.13.0"},
            "system": "Linux x86_64",
            "processor": {"name": "a processor", "features": ["avx2"]},
            "cores": 2,
            "device": "cpu",
            "threads": 2,
            "dtype": "float32",
            "forward": "fast",
        },
        "base": "sentence-transformers/all-MiniLM-L6-v2",
        "steps": [StepLoss(10 * i, i / 6, 0.7 / i + 0.1) for i in range(1, 6 * epochs)],
        "started": 1_795_550_454.6,
        "run": "/home/li/runs/20261124-101530-reviews",
    }
    return findings.find(**arguments | changed)
