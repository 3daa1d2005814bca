"""The file to read: recipe -> run. Resolve, build, tell the cost, loop, keep the best, save, verify.

What is written, and when, is decided here; the steps themselves are in `loop`.
"""

import csv
import errno
import io
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trimtab import (
    adapter,
    baselines,
    batching,
    calibration,
    checkpoint,
    config,
    durable,
    estimate,
    evaluation,
    interrupts,
    predictions,
    rundir,
    runreport,
    search,
)
from trimtab.build import Ready, make_ready, with_trunk
from trimtab.classification import compute_logits, metrics, without_known
from trimtab.config import MINILM, Layered
from trimtab.data import Reject
from trimtab.errors import ArtefactError, DataError, DivergedError, RecipeError, ResourceError, TrimtabError, quoted
from trimtab.estimate import Estimate
from trimtab.headstart import start_head, work_ahead
from trimtab.hub import find_base
from trimtab.loop import Observer, Progress, refit, run_loop
from trimtab.machine import peak_rss_bytes
from trimtab.model import count, head_modules, load_base, load_config, on_layers, resolve_targets, trainable
from trimtab.resolve import Job, Part, adapter_to_start_from, resolve, with_settings_of
from trimtab.rundir import RunDir
from trimtab.trunk import choose_trunk

_DECIDE_BYTES = {
    *("trimtab", "torch", "transformers", "peft", "tokenizers", "numpy", "pyarrow", "safetensors"),
    *("processor", "device", "threads", "dtype", "forward", "trunk"),
}
_DISK_RESERVE = 16 << 20  # bytes, for events, reports and what else is small


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    metrics: dict[str, Any] = field(repr=False)

    @property
    def report(self) -> Path:
        """The report of the run as a page, for any browser."""
        return RunDir(self.path).report

    @property
    def adapter(self) -> Path:
        """The adapter folder, for `trimtab.load` or `peft.PeftModel.from_pretrained`."""
        return self.path / "adapter"


@dataclass(frozen=True)
class Planned:
    """A run that is ready, and what it will cost."""

    ready: Ready
    speed: estimate.Speed
    estimate: Estimate

    def as_dict(self) -> dict[str, Any]:
        """For `trimtab estimate`."""
        job = self.ready.job
        return {
            "rows": len(job.train.examples),
            "label_names": job.data_report["train"]["label_names"],
            "eval_rows": len(job.eval.examples),
            "test_rows": len(job.test.examples) if job.test else 0,
            "tokens": int(job.train.encoded.lengths.sum()),
            "on": self.ready.line,
            "budget": _chosen_by_budget(job),
            "estimate": self.estimate.as_dict(),
        }


def train(layered: Layered, *, out: str | None = None, budget: str = "", observe: Observer = lambda event: None) -> Run:
    """Trains as the recipe says, in a new run directory.

    Args:
        layered: The recipe; `trimtab.config.assemble` builds one.
        out: The run directory; None: a new one under ./runs.
        budget: Time that training may take, such as `5m`: epochs and rows are chosen to fit; empty: no limit.
        observe: Receives every event as it happens, until an OSError of its own.

    Raises:
        TrimtabError: whatever cannot be, before anything is written; DivergedError while training.
        Interrupted: a signal asked to stop; what had been done is saved. A KeyboardInterrupt, in the main thread only.
    """
    with interrupts.heard():
        return _train(layered, out, budget, _heard(observe))


def _heard(observe: Observer) -> Observer:
    """An observer whose stream fails (a closed terminal, a full disk behind stderr) costs its words and not the run."""
    deaf = False

    def tell(event: Mapping[str, Any]) -> None:
        nonlocal deaf
        if not deaf:
            try:
                observe(event)
            except OSError:
                deaf = True

    return tell


def _train(layered: Layered, out: str | None, budget: str, observe: Observer) -> Run:
    started = time.monotonic()
    if budget and layered.recipe.train.learning_rate == "search":
        raise RecipeError(
            "train.learning_rate",
            "A search for the learning rate takes time of its own, which no budget knows.",
            where="train.learning_rate",
            mend="--set train.learning_rate=auto; or leave --budget out",
        )
    rundir.check(out)
    layered = search.find_rate(layered, lambda line: observe({"event": "search", "text": line}))
    search_seconds = time.monotonic() - started
    planned = plan(layered, budget)
    job = planned.ready.job
    estimate.check_memory(job, planned.speed, planned.estimate)
    stem, needs = Path(job.recipe.data.train[0]).name.partition(".")[0], _disk_bytes(planned.ready)
    rundir.check(out, needs=needs)
    ready = with_trunk(planned.ready, observe)
    with interrupts.postponed():
        run = rundir.create(out, stem, needs=needs)
        with _disk_errors(run), rundir.only_writer(run):
            durable.replace(run.recipe, config.dump(ready.job.layered).encode())
            _describe(run, ready)
            return _run(run, ready, planned.estimate, job.warnings, started, search_seconds, observe)


def resume(path: str | Path, *, observe: Observer = lambda event: None) -> Run:
    """Goes on with a run that was stopped, from its newest whole checkpoint; a finished run is verified and left alone.

    Raises:
        ArtefactError: it is no run directory, its recipe was changed, or it is finished and does not verify.
        DataError: data or base are not what they were.
        ResourceError: another process is writing this run.
        Interrupted: as `train`.
    """
    with interrupts.heard():
        return _resume(path, _heard(observe))


def _resume(path: str | Path, observe: Observer) -> Run:
    started = time.monotonic()
    run = RunDir(rundir.locate(path))
    if not run.recipe.is_file():
        raise ArtefactError(
            "run.not_a_run",
            "This is not a run directory: it has no recipe.toml.",
            where=str(run.path),
            mend="trimtab train FILE",
        )
    if finished := _finished(run, observe):  # also where nothing can be written, and so no lock be had
        return finished
    with _disk_errors(run), rundir.only_writer(run):
        if finished := _finished(run, observe):  # by the process that had the lock
            return finished
        ready = with_trunk(_ready_again(run), observe)
        with interrupts.postponed():
            checkpoint.sweep(run.checkpoints)
            checkpoint.sweep(run.refit_checkpoints)
            for draft in run.path.glob(".adapter-*"):  # of a process that was killed
                shutil.rmtree(draft, ignore_errors=True)
            warnings = [*ready.job.warnings, *_changes_of_environment(run, ready)]
            _describe(run, ready)
            return _run(run, ready, None, warnings, started, 0.0, observe)


def _finished(run: RunDir, observe: Observer) -> Run | None:
    """A run that came to its end, verified and left alone; None: it did not.

    Raises:
        ArtefactError: it does not verify.
    """
    metrics = _metrics(run)
    if metrics is None or not (run.adapter.is_dir() and run.predictions.is_file()):
        return None
    _check_finished(run)
    observe({"event": "warning", "text": "this run was finished already: it verifies, and nothing was changed"})
    observe({"event": "end", "run": str(run.path), "metrics": metrics})
    return Run(run.path, metrics)


def _ready_again(run: RunDir) -> Ready:
    """The job and the model that a run began with."""
    try:
        return make_ready(resolve(config.recipe_of_run(run.recipe)))
    except DataError as error:
        if error.code != "data.changed":
            raise
        raise DataError(
            error.code,
            f"{error.what} A run goes on with the very rows that it began with.",
            where=error.where,
            mend="bring the old file back; or train anew: delete the line of that file under [sha256] in a copy "
            f"of {run.recipe}, then: trimtab train --recipe COPY",
        ) from None


def _check_finished(run: RunDir) -> None:
    found = evaluation.verify(run.path)
    if not found.ok:
        raise ArtefactError(
            "adapter.verification",
            f"This run was finished, and its adapter does not answer as it did: largest difference "
            f"{found.largest_difference:.2g} over {found.rows} stored answers.",
            where=str(run.adapter),
            mend=f"bring the folder back from a copy; or train again: trimtab train --recipe {quoted(run.recipe)}",
        )


def _changes_of_environment(run: RunDir, ready: Ready) -> list[str]:
    """A warning where libraries, processor, threads or dtype are not those that the run began with."""
    try:
        then = _flat(json.loads(run.environment.read_text("utf-8")))
    except (OSError, ValueError, TypeError, AttributeError):  # killed before it was written, or damaged
        return []
    now = _flat(_environment(ready))
    changed = [
        f"{key} {then[key]} -> {now.get(key)}" for key in then if key in _DECIDE_BYTES and then[key] != now.get(key)
    ]
    if not changed:
        return []
    return [
        f"this run began elsewhere ({', '.join(changed)}): from here on its bytes may differ from an unbroken run's"
    ]


def _flat(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "versions"} | dict(found.get("versions", {}))


def plan(layered: Layered, budget: str = "") -> Planned:
    """Makes a run ready and tries out a batch of it; with a budget, chooses epochs and rows that fit.

    Raises:
        TrimtabError: whatever cannot be.
    """
    seconds = estimate.parse_budget(budget) if budget else math.inf
    ready = make_ready(resolve(layered))
    speed = estimate.measure(ready.job, ready.model, ready.engine, ready.trunk)
    found = _estimate(ready, speed)
    values = _to_fit(seconds, ready, found)
    # Names of labels would come on top of the rows that fit.
    if values.keys() - {"train.refit"} and ready.job.recipe.data.label_names == "on":
        ready = _with(ready, {"data.label_names": "off"}, f"--budget {budget}")
        found = _estimate(ready, speed)
        values = _to_fit(seconds, ready, found)
    if values:
        ready = _with(ready, values, f"--budget {budget}")
        found = _estimate(ready, speed)
    return Planned(ready, speed, found)


def _to_fit(seconds: float, ready: Ready, found: Estimate) -> dict[str, object]:
    """Settings with which a run takes so long; none where it does."""
    return estimate.within(seconds, found, len(ready.job.train.encoded), len(ready.job.eval.encoded))


def _with(ready: Ready, values: Mapping[str, object], origin: str) -> Ready:
    job = resolve(ready.job.layered.override(values, origin))
    return replace(ready, job=job, trunk=choose_trunk(job, ready.engine))


def _estimate(ready: Ready, speed: estimate.Speed) -> Estimate:
    found = estimate.estimate(ready.job, ready.model, ready.engine, ready.trunk, work_ahead(ready), speed)
    if not ready.job.all_rows:
        return found
    again = replace(ready, job=ready.job.final)
    every_layer = replace(
        speed,
        train_seconds=speed.train_seconds + speed.trunk_seconds,
        eval_seconds=speed.eval_seconds + speed.trunk_seconds,
        trunk_seconds=0.0,
    )
    second = estimate.estimate(again.job, ready.model, ready.engine, ready.trunk, work_ahead(again), every_layer)
    return replace(found, refit_seconds=second.train_seconds - second.epochs * second.eval_seconds)


def _chosen_by_budget(job: Job) -> dict[str, Any]:
    """What `--budget` has settled, by key."""
    tables = job.recipe.model_dump(mode="json")
    keys = [key for key, origin in job.layered.origins.items() if origin.startswith("--budget")]
    return {key: tables[key.partition(".")[0]][key.partition(".")[2]] for key in keys}


def count_parameters(layered: Layered, num_labels: int) -> dict[str, Any]:
    """The parameter report of a base without any data: what LoRA would train, layer by layer.

    Raises:
        BaseModelError, RecipeError, ArtefactError: the base, a setting or an adapter to start from cannot be.
    """
    base = find_base(layered.recipe.base.model)
    loaded = load_base(base.folder, load_config(base.folder, num_labels=num_labels, dropout="config", pad_id=0))
    head = head_modules(loaded.model, loaded.new_parameters, layered.recipe.lora.also_saved)
    if first := adapter_to_start_from(layered.recipe):
        layered = with_settings_of(layered, first, base, loaded.model, head)
    recipe = layered.recipe
    targets = resolve_targets(loaded.model, recipe.lora.target_modules, head)
    return count(loaded.model, recipe.lora, on_layers(loaded.model, targets, recipe.lora, head), head).as_dict()


def _metrics(run: RunDir) -> dict[str, Any] | None:
    """What metrics.json says; None where it is not there or not whole."""
    try:
        found: dict[str, Any] = json.loads(run.metrics.read_text("utf-8"))
        return found if found["scored_on"] in ("eval", "test") and found["accuracy_ci95"][1] >= 0 else None
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return None


@contextmanager
def _disk_errors(run: RunDir) -> Iterator[None]:
    """Whatever the system refuses while a run is under way is told with the way to go on."""
    try:
        yield
    except OSError as error:
        elsewhere = error.filename is not None and not Path(str(error.filename)).is_relative_to(run.path)
        if isinstance(error, TrimtabError) or elsewhere:
            raise
        there = [file.name for file in (run.recipe, run.metrics, run.predictions, run.adapter) if file.exists()]
        for folder in (run.checkpoints, run.refit_checkpoints):
            there += sorted(f"{folder.name}/{path.name}" for path in folder.glob("step-*"))
        raise ResourceError(
            "run.write",
            f"The run cannot be read or written: {error.strerror or error}. "
            f"What it has: {', '.join(there) or 'nothing'}.",
            where=str(error.filename or run.path),
            mend=("make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see to it that it can be written")
            + (
                f", then: trimtab train --resume {quoted(run.path)}"
                if run.recipe.is_file()
                else ", then start it again"
            ),
        ) from error


@dataclass(frozen=True)
class _Taught:
    """What training came to; the model holds the weights that the adapter will."""

    first: Progress
    second: Progress
    """Of the training on all rows; without a step where there was none."""
    chosen: Mapping[str, float]
    """The evaluation of the epoch that was best."""
    eval_logits: npt.NDArray[np.float32]
    """After that epoch, [eval rows, labels]: of the first training, where there were two."""
    job: Job
    """Whose training rows the model has learned from."""

    @property
    def tokens_per_s(self) -> float:
        seconds = self.first.step_seconds + self.second.step_seconds
        return (self.first.tokens + self.second.tokens) / max(seconds, 1e-9)


def _run(
    run: RunDir,
    ready: Ready,
    found: Estimate | None,
    warnings: Sequence[str],
    started: float,
    search_seconds: float,
    observe: Observer,
) -> Run:
    job, engine = ready.job, ready.engine
    tell = _log(run, observe)
    load_seconds = time.monotonic() - started - search_seconds - ready.trunk_seconds
    _tell_start(run, ready, found, warnings, tell)
    taught = _teach(run, ready, tell, observe)
    if job.test:
        observe({"event": "progress", "doing": "scoring the test rows"})
    scored, logits, scores = _score(ready, taught.eval_logits)
    compared = time.monotonic()
    if job.recipe.train.baselines:
        observe({"event": "progress", "doing": "asking what is simpler: counted words, the untrained base"})
    scores |= _baselines(ready, taught, scored, logits, tell)
    baseline_seconds = time.monotonic() - compared
    scores |= {
        "scored_on": "test" if job.test else "eval",
        "epoch": int(taught.chosen["epoch"]),
        "step": taught.first.best_step,
        "refit_rows": len(taught.job.train.examples) - job.data_report["train"]["label_names"]
        if taught.second.step
        else 0,
        "evaluations": taught.first.evaluations,
        **{f"{key}_parameters": ready.parameters[key] for key in ("base", "total", "lora", "head", "trainable")},
    }
    _save(run, ready, scored, logits, scores)
    observe({"event": "progress", "doing": "loading the saved adapter in a fresh process, to compare its answers"})
    verification = _verify_in_fresh_process(run)
    told = runreport.first_start(run).get("estimate") or {}  # a run that was resumed keeps what its first process told
    result = scores | {
        "adapter_bytes": sum(file.stat().st_size for file in run.adapter.glob("adapter_*")),
        "largest_difference_after_reload": verification["largest_difference"],
        "tokens_per_s": taught.tokens_per_s,
        # The fast forward computes no padding.
        "padding_pct": 0.0
        if engine.name == "fast"
        else batching.padding_pct(job.train.encoded.lengths, job.batches(0)),
        "search_seconds": search_seconds,
        "load_seconds": load_seconds,
        "trunk_seconds": ready.trunk_seconds,
        "train_seconds": taught.first.train_seconds + taught.second.train_seconds,
        "core_seconds": taught.first.core_seconds + taught.second.core_seconds,
        "estimated_train_seconds": told.get("train_seconds"),
        "estimated_peak_bytes": told.get("peak_bytes"),
        "baseline_seconds": baseline_seconds,
        "verify_seconds": verification["seconds"],
        "total_seconds": time.monotonic() - started,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    runreport.write(run, runreport.read(run.path, result))
    rundir.write_json(run.metrics, result)  # last: it is what says that the run is finished
    tell("end", metrics=result)
    return Run(run.path, result)


def _log(run: RunDir, observe: Observer) -> Callable[..., None]:
    """Tells events to the observer and to events.jsonl."""
    events_are_written = True

    def tell(event: str, **values: Any) -> None:
        nonlocal events_are_written
        line = {"event": event, "time": round(time.time(), 3), **values}
        try:
            run.append(line)
        except OSError as error:  # a full disk must not cost the run
            if events_are_written:
                observe({"event": "warning", "text": f"events.jsonl cannot be written: {error.strerror}"})
            events_are_written = False
        observe(line)

    return tell


def _tell_start(
    run: RunDir, ready: Ready, found: Estimate | None, warnings: Sequence[str], tell: Callable[..., None]
) -> None:
    job = ready.job
    tell(
        "start",
        run=str(run.path),
        rows=len(job.train.examples),
        eval_rows=len(job.eval.examples),
        test_rows=len(job.test.examples) if job.test else 0,
        data=job.data_report,
        labels=list(job.labels.values),
        base_line=_base_line(job),
        warm_start=ready.warm_start,
        steps_per_epoch=job.steps_per_epoch,
        parameters={key: value for key, value in ready.parameters.items() if key != "layers"},
        placement=ready.line,
        budget=_chosen_by_budget(job),
        estimate=found.as_dict() if found else None,
        recipe=job.recipe.model_dump(mode="json", exclude={"sha256"}),
    )
    for warning in warnings:
        tell("warning", text=warning)


def _teach(run: RunDir, ready: Ready, tell: Callable[..., None], observe: Observer) -> _Taught:
    """Trains, keeps the best epoch, and trains once more on all rows where the recipe wants that."""
    job, model = ready.job, ready.model
    untrained: dict[str, torch.Tensor] = {}
    if job.all_rows:
        untrained = {f"parameter/{name}": tensor.detach().clone() for name, tensor in trainable(model).items()}
    first, best = run_loop(
        run, job, model, ready.forward, tell, observe, lambda: start_head(ready, lambda line: tell("head", text=line))
    )
    _restore(model, best)
    chosen = next(entry for entry in first.evaluations if entry["step"] == first.best_step)
    eval_logits = best["eval_logits"].numpy()
    if ready.trunk.depth and job.test is None:
        # What is stored is what the model answers when it is used; kept states, which are rounded, only chose.
        eval_logits = compute_logits(ready.engine.forward, job.eval.encoded)
    second = Progress()
    if job.all_rows:
        try:
            second = _refit(run, ready, untrained, int(chosen["epoch"]), tell, observe)
        except DivergedError as error:  # no reason to lose what the first training came to
            tell("warning", text=f"trained once more, it diverged, and the adapter is that of before: {error.what}")
            _restore(model, best)
    return _Taught(first, second, chosen, eval_logits, job.final if second.step else job)


def _base_line(job: Job) -> str:
    """Which base it is, from where, and how that is known."""
    hint = "; slower and better on English: --base roberta-base" if job.base.hub_id == MINILM else ""
    place = {
        "folder": "a folder",
        "package": "an installed package",
        "cache": "the hub's cache",
        "hub": "the hub",
    }
    known = "checked" if job.base.hub_id == MINILM else job.base.weights_sha256[:12]
    known_folder = job.base.source == "folder" and job.base.hub_id
    where = str(job.base.folder) if known_folder else place[job.base.source]
    return f"{job.base.hub_id or job.base.name} from {where}, sha256 of the weights {known}{hint}"


def _refit(
    run: RunDir,
    ready: Ready,
    untrained: Mapping[str, torch.Tensor],
    epochs: int,
    tell: Callable[..., None],
    observe: Observer,
) -> Progress:
    """Trains the model from the start again, on all rows, for as many epochs as were best on those that were kept.

    Raises:
        DivergedError: as `run_loop`.
    """
    again = replace(ready, job=ready.job.final)

    def start() -> None:
        tell(
            "refit",
            rows=len(again.job.train.examples),
            label_names=again.job.data_report["train"]["label_names"],
            epochs=epochs,
        )
        _restore(again.model, untrained)
        start_head(again, lambda line: tell("head", text=line, refit=True))

    return refit(run, again.job, again.model, again.engine.forward, tell, observe, start, epochs)


def _restore(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.copy_(tensors[f"parameter/{name}"])


def _score(ready: Ready, eval_logits: npt.NDArray[np.float32]) -> tuple[Part, npt.NDArray[np.float32], dict[str, Any]]:
    """The headline: the test rows where there are any, else the evaluation rows that also chose the epoch."""
    job = ready.job
    eval_labels = job.eval.encoded.labels
    eval_scores = metrics(eval_logits, eval_labels, job.labels.values)
    if job.test is None:
        eval_scores |= {"calibration": calibration.judge(eval_logits, eval_labels, None), "chosen_on_these_rows": True}
        eval_scores |= without_known(eval_logits, eval_labels, job.eval.known, job.labels.values)
        return job.eval, eval_logits, eval_scores
    logits = compute_logits(ready.engine.forward, job.test.encoded)
    scores = metrics(logits, job.test.encoded.labels, job.labels.values) | {"chosen_on_these_rows": False}
    scores |= {"calibration": calibration.judge(eval_logits, eval_labels, (logits, job.test.encoded.labels))}
    scores |= without_known(logits, job.test.encoded.labels, job.test.known, job.labels.values)
    return (
        job.test,
        logits,
        scores | {f"chosen_on_{key}": eval_scores[key] for key in ("accuracy", "macro_f1", "loss")},
    )


def _baselines(
    ready: Ready, taught: _Taught, scored: Part, logits: npt.NDArray[np.float32], tell: Callable[..., None]
) -> dict[str, Any]:
    """What simpler ways come to on the same rows, or why that is not known; the majority always is."""
    # Evaluation rows are judged by the model of before, which has not learned from them.
    job = taught.job if ready.job.test else ready.job
    found: dict[str, Any] = {}
    simpler: dict[str, baselines.Baseline] = {}
    if job.recipe.train.baselines:
        try:
            simpler = baselines.compute(job, scored, ready.engine.vectors, ready.model, len(taught.first.evaluations))
        except baselines.FAILURES as error:
            found["baselines_missing"] = f"they could not be computed: {type(error).__name__}: {error}"
            tell("warning", text=f"baselines could not be computed: {type(error).__name__}: {error}")
    against = baselines.against(logits, scored.encoded.labels, simpler, len(job.train.examples))
    return found | {"baselines": against}


def _save(run: RunDir, ready: Ready, scored: Part, logits: npt.NDArray[np.float32], scores: Mapping[str, Any]) -> None:
    """Writes the predictions, and the adapter with its card."""
    job = ready.job
    temperature = scores["calibration"]["temperature"]
    card = runreport.card(job, scores, scored.examples, logits, _environment(ready))
    if run.metrics.exists():  # of a run that lost a file since: from here on it is not finished
        run.metrics.unlink()
        durable.sync_folder(run.path)
    predictions.write(run.predictions, scored.examples, logits, job.labels, temperature)
    shutil.rmtree(run.adapter, ignore_errors=True)  # of an earlier process that was stopped, or damaged since
    adapter.write(
        run.adapter,
        ready.model,
        ready.engine.forward,
        labels=job.labels,
        max_length=int(job.recipe.data.max_length),
        keep=job.recipe.data.keep,
        tokenizer=job.tokenizer,
        base=job.base,
        head=ready.head,
        card=card,
        computed_in=ready.engine.dtype,
        temperature=temperature,
    )


def _verify_in_fresh_process(run: RunDir) -> dict[str, Any]:
    """Loads the saved adapter in a new process and compares logits; the run is done only if they are the same.

    Raises:
        ArtefactError: the adapter on disk does not answer as the trained model did.
    """
    began = time.monotonic()
    # -P: a file of the user's beside the data, such as email.py, must not take the place of a library's.
    command = [sys.executable, "-P", "-m", "trimtab", "verify", str(run.path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") as process:
        while True:
            try:
                out, err = process.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                try:
                    interrupts.check()
                except interrupts.Interrupted:
                    process.kill()
                    raise
    interrupts.check()  # Ctrl-C reaches the whole group, and this process has ended by it
    if process.returncode != 0:
        raise ArtefactError(
            "adapter.verification",
            "The saved adapter does not answer as the trained model did, so this run is not done."
            if process.returncode == ArtefactError.exit_code
            else "The saved adapter could not be checked in a process of its own, so this run is not done.",
            where=f"{run.adapter}: {err.strip() or out.strip()}",
            mend=f"trimtab verify {quoted(run.path)} tries again; if it stays so, please report it with "
            "environment.json",
        )
    found: dict[str, Any] = json.loads(out)
    return found | {"seconds": time.monotonic() - began}


def _describe(run: RunDir, ready: Ready) -> None:
    """What is known before the first step: environment, data report, rows set aside; what is there already stays."""
    job = ready.job
    if not run.environment.exists():
        rundir.write_json(run.environment, _environment(ready))
    if not run.data_report.exists():
        rundir.write_json(run.data_report, job.data_report)
    if job.rejects and not run.rejects.exists():
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(Reject._fields)
        writer.writerows(job.rejects)
        durable.replace(run.rejects, text.getvalue().encode())


def _environment(ready: Ready) -> dict[str, Any]:
    job, engine, trunk = ready.job, ready.engine, ready.trunk
    return rundir.environment() | {
        "device": job.placement.device.type,
        "device_reason": job.placement.device_reason,
        "threads": job.placement.threads,
        "threads_reason": job.placement.threads_reason,
        "dtype": engine.dtype,
        "forward": engine.name,
        "forward_reason": engine.reason,
        "trunk": f"lower {trunk.depth} of {trunk.layers} layers cached" if trunk.depth else "computed",
        "trunk_reason": trunk.reason,
        "sha256": job.recipe.sha256,
    }


def _disk_bytes(ready: Ready) -> int:
    """What a run writes at most at one time: checkpoints, three and a draft of a training, adapter, predictions."""
    job = ready.job
    trained = 4 * int(ready.parameters["trainable"])
    logits = 4 * len(job.eval.examples) * len(job.labels)
    scored = (job.test or job.eval).examples
    texts = sum(len(example.text.encode("utf-8", "replace")) for example in scored)
    trainings = 2 if job.all_rows else 1
    return trainings * 4 * (4 * trained + logits) + trained + len(job.tokenizer.json) + texts + logits + _DISK_RESERVE
