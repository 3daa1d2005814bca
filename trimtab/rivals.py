"""What LoRA is compared to: full fine-tuning, and a linear probe on the frozen base. They leave answers, no adapter.

`python -m trimtab.rivals FOLDER` carries out the trial that FOLDER describes, in a process of its own, so that its
memory and its processor time are its own too.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab import baselines, calibration, config, interrupts, predictions, rundir
from trimtab.build import make_ready
from trimtab.classification import compute_logits, metrics
from trimtab.forward import stock
from trimtab.loop import run_loop
from trimtab.machine import peak_rss_bytes
from trimtab.model import load_base, trainable
from trimtab.resolve import Job, resolve
from trimtab.rundir import RunDir

METHODS = ("head", "full")


def run(folder: Path) -> None:
    """Trains the method that `method.json` in the folder names, by its recipe.toml, and writes answers and metrics.

    Raises:
        TrimtabError: whatever cannot be.
    """
    there = RunDir(folder)
    asked = json.loads((folder / "method.json").read_text("utf-8"))
    job = resolve(config.load_recipe(str(there.recipe)))
    with interrupts.heard(), interrupts.postponed(), rundir.only_writer(there):
        found = _full(there, job) if asked["method"] == "full" else _head(job, float(asked["c"]))
        assert job.test is not None
        predictions.write(there.predictions, job.test.examples, found.pop("logits"), job.labels)
        rundir.write_json(there.metrics, found | {"scored_on": "test", "peak_rss_bytes": peak_rss_bytes()})
    shutil.rmtree(there.checkpoints, ignore_errors=True)  # hundreds of MB, of use to nobody any more


def _full(there: RunDir, job: Job) -> dict[str, Any]:
    """Full fine-tuning: every weight of the base and the head, in the same loop."""
    torch.manual_seed(job.recipe.train.seed)
    model = load_base(job.base.folder, job.model_config).model.to(job.placement.device)
    forward = stock(model, job.tokenizer.pad_id)

    def tell(event: str, **values: Any) -> None:
        there.append({"event": event, "time": round(time.time(), 3), **values})

    progress, best = run_loop(there, job, model, forward, tell, lambda event: None)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.copy_(best[f"parameter/{name}"])
    assert job.test is not None
    logits = compute_logits(forward, job.test.encoded)
    trained = sum(tensor.numel() for name, tensor in best.items() if name.startswith("parameter/"))
    return _scores(job, logits, best["eval_logits"].numpy()) | {
        "trainable_parameters": trained,
        "adapter_bytes": 4 * trained,
        "train_seconds": progress.train_seconds,
        "core_seconds": progress.core_seconds,
        "logits": logits,
    }


def _head(job: Job, c: float) -> dict[str, Any]:
    """A linear probe: logistic regression on the base's own sentence vectors, no weight of the base changed."""
    from sklearn.linear_model import LogisticRegression

    ready = make_ready(job)
    began, core_began = time.monotonic(), time.process_time()
    assert ready.engine.vectors is not None
    assert job.test is not None
    encode = baselines.encoder(ready.engine.vectors, job.base.folder)
    train, evaluation, test = (
        encode(part.encoded, np.arange(len(part.examples))) for part in (job.train, job.eval, job.test)
    )
    fitted = LogisticRegression(C=c, max_iter=1_000).fit(train, job.train.encoded.labels)

    def logits(vectors: Any) -> Any:
        """float32[n, C] in the order of the labels; a class without training rows gets what no other falls below."""
        probabilities = fitted.predict_log_proba(vectors)
        whole = np.full((len(vectors), len(job.labels)), probabilities.min() - 1, np.float32)
        whole[:, fitted.classes_] = probabilities
        return whole

    parameters = fitted.coef_.size + fitted.intercept_.size
    told = logits(test)
    return _scores(job, told, logits(evaluation)) | {
        "trainable_parameters": parameters,
        "adapter_bytes": 4 * parameters,
        "train_seconds": time.monotonic() - began,
        "core_seconds": time.process_time() - core_began,
        "logits": told,
    }


def _scores(job: Job, logits: Any, eval_logits: Any) -> dict[str, Any]:
    assert job.test is not None
    labels, eval_labels = job.test.encoded.labels, job.eval.encoded.labels
    chosen = metrics(eval_logits, eval_labels, job.labels.values)
    return metrics(logits, labels, job.labels.values) | {
        **{f"chosen_on_{key}": chosen[key] for key in ("accuracy", "macro_f1", "loss")},
        "calibration": calibration.judge(eval_logits, eval_labels, (logits, labels)),
    }


if __name__ == "__main__":
    from trimtab.errors import TrimtabError

    try:
        run(Path(sys.argv[1]))
    except TrimtabError as error:
        print(f"error [{error.code}]: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except interrupts.Interrupted as stop:
        sys.exit(stop.exit_code)
