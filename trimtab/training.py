"""The file to read: recipe -> run. Resolve, build, loop, evaluate, keep the best, save, verify.

Randomness is stateless: row order is a function of (seed, epoch), dropout of (seed, batch). So a run that was
stopped goes on from its last checkpoint as if it had not been.
"""

import csv
import hashlib
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trimtab import adapter, batching, checkpoint, config, estimate, report, rundir
from trimtab.classification import compute_logits, loss_sum, metrics
from trimtab.config import MINILM, Layered, TrainSettings
from trimtab.data import Reject
from trimtab.errors import ArtefactError, DivergedError, ResourceError, TrimtabError
from trimtab.estimate import Estimate
from trimtab.evaluation import write_predictions
from trimtab.forward import Engine, Forward, choose
from trimtab.hub import find_base
from trimtab.machine import give_back_freed_memory, peak_rss_bytes
from trimtab.model import count, head_modules, inject, load_base, load_config, resolve_targets, trainable
from trimtab.resolve import Job, Part, resolve
from trimtab.rundir import RunDir

Observer = Callable[[Mapping[str, Any]], None]
"""Receives every event of a run, and `progress` events that are not stored."""

_LOWER_IS_BETTER = {"loss"}
_GIVE_BACK_STEPS = 16  # between giving freed memory back: 9 ms, where the heap grew by 2 MB a step
_FORECAST_STEPS = 20  # after which the remaining time is told again, from steps that were done


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    metrics: dict[str, Any] = field(repr=False)

    @property
    def adapter(self) -> Path:
        """The adapter folder, for `trimtab.load` or `peft.PeftModel.from_pretrained`."""
        return self.path / "adapter"


@dataclass(frozen=True)
class Progress:
    """Where a run stands; with the tensors, all that a checkpoint holds."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """The epoch that is under way, from 0."""
    batch: int = 0
    """Batches of this epoch that are done."""
    window_loss: float = 0.0
    """Loss summed over the rows since the last log line."""
    window_rows: int = 0
    best_step: int = -1
    epochs_without_better: int = 0
    evaluations: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    """Real tokens trained on."""
    step_seconds: float = 0.0
    eval_seconds: float = 0.0
    recipe_sha256: str = ""
    """Of the recipe.toml that the run was started with."""
    train_seconds: float = 0.0
    """Of earlier processes and this one, up to the last checkpoint."""


def train(layered: Layered, *, out: str | None = None, budget: str = "", observe: Observer = lambda event: None) -> Run:
    """Trains as the recipe says, in a new run directory.

    Args:
        layered: The recipe; `trimtab.config.assemble` builds one.
        out: The run directory; None: a new one under ./runs.
        budget: Time that training may take, such as `5m`: epochs and rows are chosen to fit; empty: no limit.
        observe: Receives every event as it happens.

    Raises:
        TrimtabError: whatever cannot be, before anything is written; DivergedError while training.
    """
    started = time.monotonic()
    planned = plan(layered, budget)
    job = planned.ready.job
    estimate.check_memory(job, planned.speed, planned.estimate)
    run = rundir.create(out, Path(job.recipe.data.train[0]).name.partition(".")[0])
    with _disk_errors(run):
        run.recipe.write_text(config.dump(job.layered), "utf-8")
        _describe(run, job, planned.ready.engine)
        return _run(run, planned.ready, planned.estimate, started, observe)


def resume(path: str | Path, *, observe: Observer = lambda event: None) -> Run:
    """Goes on with a run that was stopped, from its newest whole checkpoint; a finished run is left as it is.

    Raises:
        ArtefactError: it is no run directory.
        DataError: data or base are not what they were.
    """
    started = time.monotonic()
    run = RunDir(rundir.locate(path))
    if not run.recipe.is_file():
        raise ArtefactError(
            "run.not_a_run",
            "This is not a run directory: it has no recipe.toml.",
            where=str(run.path),
            mend="trimtab train FILE",
        )
    if run.adapter.is_dir() and _is_whole(run.metrics):
        metrics = json.loads(run.metrics.read_text("utf-8"))
        observe({"event": "warning", "text": "this run was finished already; nothing in it was changed"})
        observe({"event": "end", "run": str(run.path), "metrics": metrics})
        return Run(run.path, metrics)
    for draft in (*run.checkpoints.glob(".tmp-*"), *run.path.glob(".adapter-*")):  # of a process that was killed
        shutil.rmtree(draft, ignore_errors=True)
    ready = make_ready(resolve(config.load_recipe(str(run.recipe))))
    with _disk_errors(run):
        return _run(run, ready, None, started, observe)


@dataclass(frozen=True)
class Ready:
    """A run before its first step: the job, the model that it will train, and what computes it."""

    job: Job
    model: Any
    head: list[str]
    """The modules that are trained in full."""
    parameters: dict[str, Any]
    """The parameter report."""
    engine: Engine


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
            "eval_rows": len(job.eval.examples),
            "test_rows": len(job.test.examples) if job.test else 0,
            "tokens": int(job.train.encoded.lengths.sum()),
            "on": f"{job.placement.line}, {self.ready.engine.line}",
            "budget": _chosen_by_budget(job),
            "estimate": self.estimate.as_dict(),
        }


def plan(layered: Layered, budget: str = "") -> Planned:
    """Makes a run ready and tries out a batch of it; with a budget, chooses epochs and rows that fit.

    Raises:
        TrimtabError: whatever cannot be.
    """
    seconds = estimate.parse_budget(budget) if budget else math.inf
    ready = make_ready(resolve(layered))
    speed = estimate.measure(ready.job, ready.model, ready.engine)
    found = estimate.estimate(ready.job, ready.model, ready.engine, speed)
    if values := estimate.within(seconds, found, len(ready.job.train.encoded), len(ready.job.eval.encoded)):
        ready = replace(ready, job=resolve(ready.job.layered.override(values, f"--budget {budget}")))
        found = estimate.estimate(ready.job, ready.model, ready.engine, speed)
    return Planned(ready, speed, found)


def make_ready(job: Job) -> Ready:
    """Builds the model of a job and chooses its forward; a function of the job and its seed."""
    recipe = job.recipe
    give_back_freed_memory()  # the files have been read, the model has not been built
    torch.manual_seed(recipe.train.seed)
    loaded = load_base(job.base.folder, job.model_config)
    head = head_modules(loaded.model, loaded.new_parameters, recipe.lora.also_saved)
    targets = recipe.lora.target_modules
    parameters = count(loaded.model, recipe.lora, targets, head).as_dict()
    model = inject(loaded.model, recipe.lora, targets, head, job.base.recorded_as).to(job.placement.device)
    engine = choose(model, job.tokenizer.pad_id, job.placement.device, recipe.runtime)
    return Ready(job, model, head, parameters, engine)


def _chosen_by_budget(job: Job) -> dict[str, Any]:
    """What `--budget` has settled, by key."""
    tables = job.recipe.model_dump(mode="json")
    keys = [key for key, origin in job.layered.origins.items() if origin.startswith("--budget")]
    return {key: tables[key.partition(".")[0]][key.partition(".")[2]] for key in keys}


def count_parameters(layered: Layered, num_labels: int) -> dict[str, Any]:
    """The parameter report of a base without any data: what LoRA would train, layer by layer.

    Raises:
        BaseModelError, RecipeError: the base or a setting cannot be.
    """
    recipe = layered.recipe
    base = find_base(recipe.base.model)
    loaded = load_base(base.folder, load_config(base.folder, num_labels=num_labels, dropout="config", pad_id=0))
    head = head_modules(loaded.model, loaded.new_parameters, recipe.lora.also_saved)
    return count(
        loaded.model, recipe.lora, resolve_targets(loaded.model, recipe.lora.target_modules, head), head
    ).as_dict()


def _is_whole(metrics: Path) -> bool:
    try:
        return isinstance(json.loads(metrics.read_text("utf-8")), dict)
    except (OSError, ValueError):
        return False


@contextmanager
def _disk_errors(run: RunDir) -> Iterator[None]:
    """Whatever the system refuses while a run is under way is told with the way to go on."""
    try:
        yield
    except OSError as error:
        if isinstance(error, TrimtabError | BrokenPipeError):  # a closed pipe is the reader's, not the disk's
            raise
        raise ResourceError(
            "run.write",
            f"The run cannot be written: {error.strerror or error}. Its checkpoints stand as they were.",
            where=str(error.filename or run.path),
            mend=f"make room, then: trimtab train --resume {run.path}",
        ) from error


def _run(run: RunDir, ready: Ready, found: Estimate | None, started: float, observe: Observer) -> Run:
    job, model, engine = ready.job, ready.model, ready.engine

    def tell(event: str, **values: Any) -> None:
        line = {"event": event, "time": round(time.time(), 3), **values}
        run.append(line)
        observe(line)

    load_seconds = time.monotonic() - started
    tell(
        "start",
        run=str(run.path),
        rows=len(job.train.examples),
        eval_rows=len(job.eval.examples),
        test_rows=len(job.test.examples) if job.test else 0,
        labels=list(job.labels.values),
        base_line=_base_line(job),
        steps_per_epoch=job.steps_per_epoch,
        parameters={key: value for key, value in ready.parameters.items() if key != "layers"},
        placement=f"{job.placement.line}, {engine.line}",
        budget=_chosen_by_budget(job),
        estimate=found.as_dict() if found else None,
        recipe=job.recipe.model_dump(mode="json", exclude={"sha256"}),
    )
    for warning in job.warnings:
        tell("warning", text=warning)

    progress = _loop(run, job, model, engine.forward, tell, observe)
    best = checkpoint.read(run.checkpoints / f"step-{progress.best_step:06d}")
    _restore(model, best.tensors)
    scored, logits, scores = _score(job, engine.forward, best)
    chosen = next(entry for entry in progress.evaluations if entry["step"] == progress.best_step)
    card = report.model_card(job, scores, int(chosen["epoch"]), ready.parameters)
    write_predictions(run.predictions, scored.examples, logits, job.labels)
    shutil.rmtree(run.adapter, ignore_errors=True)  # of an earlier process that was stopped, or damaged since
    adapter.write(
        run.adapter,
        model,
        engine.forward,
        labels=job.labels,
        max_length=int(job.recipe.data.max_length),
        tokenizer=job.tokenizer,
        base=job.base,
        head=ready.head,
        card=card,
        computed_in=engine.dtype,
    )
    verification = _verify_in_fresh_process(run)
    # The fast forward computes no padding.
    padding = 0.0 if engine.name == "fast" else batching.padding_pct(job.train.encoded.lengths, job.batches(0))
    result = scores | {
        "scored_on": "test" if job.test else "eval",
        "epoch": int(chosen["epoch"]),
        "step": progress.best_step,
        "evaluations": progress.evaluations,
        "trainable_parameters": ready.parameters["trainable"],
        "adapter_bytes": sum(file.stat().st_size for file in run.adapter.glob("adapter_*")),
        "largest_difference_after_reload": verification["largest_difference"],
        "tokens_per_s": progress.tokens / max(progress.step_seconds, 1e-9),
        "padding_pct": padding,
        "load_seconds": load_seconds,
        "train_seconds": progress.train_seconds,
        "estimated_train_seconds": found.train_seconds if found else None,
        "estimated_peak_bytes": found.peak_bytes if found else None,
        "verify_seconds": verification["seconds"],
        "total_seconds": time.monotonic() - started,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    rundir.write_json(run.metrics, result)
    tell("end", metrics=result)
    return Run(run.path, result)


def _loop(
    run: RunDir, job: Job, model: Any, forward: Forward, tell: Callable[..., None], observe: Observer
) -> Progress:
    """Trains from the newest checkpoint, or from the start, to the last epoch or the last that helped."""
    settings = job.recipe.train
    parameters = trainable(model)
    optimizer = make_optimizer(parameters, settings)
    total_steps = job.steps_per_epoch * int(settings.num_epochs)
    progress = _load_newest(run, parameters, optimizer, tell)
    began = last_save = time.monotonic()
    earlier, first_step = progress.train_seconds, progress.step
    epoch_tokens, eval_tokens = int(job.train.encoded.lengths.sum()), int(job.eval.encoded.lengths.sum())

    def save(progress: Progress, logits: npt.NDArray[np.float32] | None = None) -> Progress:
        nonlocal last_save
        last_save = time.monotonic()
        progress = replace(progress, train_seconds=earlier + last_save - began)
        tensors = _state_tensors(parameters, optimizer)
        if logits is not None:
            tensors["eval_logits"] = torch.from_numpy(logits)
        path = checkpoint.write(run.checkpoints, progress.step, tensors, asdict(progress))
        checkpoint.prune(run.checkpoints, progress.best_step)
        tell("checkpoint", step=progress.step, path=path.name)
        return progress

    while progress.epoch < int(settings.num_epochs) and not _is_over(progress, settings):
        batches = job.batches(progress.epoch)
        while progress.batch < len(batches):
            group = batches[progress.batch : progress.batch + settings.gradient_accumulation_steps]
            step_began = time.monotonic()
            rate = float(settings.learning_rate) * schedule(progress.step, total_steps, settings.warmup_ratio)
            first_batch = progress.epoch * len(batches) + progress.batch
            loss, rows, tokens = _step(job, forward, parameters, optimizer, group, rate, first_batch)
            progress = replace(
                progress,
                step=progress.step + 1,
                batch=progress.batch + len(group),
                window_loss=progress.window_loss + loss,
                window_rows=progress.window_rows + rows,
                tokens=progress.tokens + tokens,
                step_seconds=progress.step_seconds + time.monotonic() - step_began,
            )
            epoch_done = progress.epoch + progress.batch / len(batches)
            remaining = estimate.remaining_seconds(
                step_seconds=progress.step_seconds,
                tokens=progress.tokens,
                tokens_left=epoch_tokens * int(settings.num_epochs) - progress.tokens,
                eval_seconds=progress.eval_seconds,
                evals=len(progress.evaluations),
                evals_left=int(settings.num_epochs) - len(progress.evaluations),
                eval_tokens=eval_tokens,
            )
            observe(
                {
                    "event": "progress",
                    "step": progress.step,
                    "steps": total_steps,
                    "epoch": epoch_done,
                    "loss": loss / rows,
                    "tokens_per_s": progress.tokens / max(progress.step_seconds, 1e-9),
                    "remaining_s": remaining,
                }
            )
            if progress.step % _GIVE_BACK_STEPS == 0:
                give_back_freed_memory()
            if progress.step - first_step == _FORECAST_STEPS < total_steps - first_step:
                tell("forecast", step=progress.step, remaining_s=round(remaining, 1))
            if progress.step % settings.log_every_steps == 0:
                tell(
                    "step",
                    step=progress.step,
                    steps=total_steps,
                    epoch=round(epoch_done, 3),
                    loss=progress.window_loss / progress.window_rows,
                    learning_rate=rate,
                    tokens_per_s=progress.tokens / max(progress.step_seconds, 1e-9),
                )
                progress = replace(progress, window_loss=0.0, window_rows=0)
            if time.monotonic() - last_save > settings.save_every_s and progress.batch < len(batches):
                progress = save(progress)
        progress, logits = _evaluate(job, forward, progress, tell, observe)
        progress = save(replace(progress, epoch=progress.epoch + 1, batch=0), logits)
    if progress.epoch < int(settings.num_epochs):
        tell(
            "warning",
            text=f"stopped after epoch {progress.epoch} of {settings.num_epochs}: none of the last "
            f"{settings.early_stopping_patience} was better (train.early_stopping_patience)",
        )
    return progress


def _step(
    job: Job,
    forward: Forward,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    group: list[npt.NDArray[np.int64]],
    rate: float,
    first_batch: int,
) -> tuple[float, int, int]:
    """One optimizer step over a group of batches: (loss summed over rows, rows, real tokens).

    Raises:
        DivergedError: loss or gradients are not finite; the weights were not changed.
    """
    settings = job.recipe.train
    encoded = job.train.encoded
    rows_in_group = sum(len(rows) for rows in group)
    total, tokens = 0.0, 0
    for i, rows in enumerate(group):
        logits = forward(encoded, rows, dropout_seed(settings.seed, first_batch + i))
        loss = loss_sum(logits, torch.from_numpy(encoded.labels[rows]).to(logits.device))
        (loss / rows_in_group).backward()  # type: ignore[no-untyped-call]
        total += loss.item()
        tokens += int(encoded.lengths[rows].sum())
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm or math.inf)
    if not (math.isfinite(total) and math.isfinite(norm.item())):
        raise DivergedError(
            "train.diverged",
            f"The loss is {total / rows_in_group:g} and the gradient norm {norm.item():g}; "
            "the weights were not changed.",
            where=f"batch {first_batch + 1}, learning rate {rate:g}",
            mend=f"--set train.learning_rate={float(settings.learning_rate) / 3:.1g}",
        )
    for parameter_group in optimizer.param_groups:
        parameter_group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return total, rows_in_group, tokens


def _evaluate(
    job: Job, forward: Forward, progress: Progress, tell: Callable[..., None], observe: Observer
) -> tuple[Progress, npt.NDArray[np.float32]]:
    """Scores the evaluation part at the end of an epoch and notes whether it is the best so far."""
    metric = job.recipe.train.metric_for_best_model
    done = 0

    def after_batch(rows: int) -> None:
        nonlocal done
        done += rows
        observe({"event": "progress", "evaluated": done, "eval_rows": len(job.eval.encoded)})

    began = time.monotonic()
    logits = compute_logits(forward, job.eval.encoded, after_batch=after_batch)
    scores = metrics(logits, job.eval.encoded.labels, job.labels.values)
    entry = {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        **{k: scores[k] for k in ("loss", "accuracy", "macro_f1")},
    }
    better = _is_better(entry, progress, metric)
    progress = replace(
        progress,
        eval_seconds=progress.eval_seconds + time.monotonic() - began,
        evaluations=[*progress.evaluations, entry],
        best_step=progress.step if better else progress.best_step,
        epochs_without_better=0 if better else progress.epochs_without_better + 1,
    )
    tell("eval", **entry, best=better)
    return progress, logits


def _is_better(entry: Mapping[str, float], progress: Progress, metric: str) -> bool:
    """Whether an epoch beats the best so far; a tie goes to the lower loss, then to the earlier epoch."""
    if progress.best_step < 0:
        return True
    best = next(e for e in progress.evaluations if e["step"] == progress.best_step)
    if entry[metric] != best[metric]:
        return (entry[metric] < best[metric]) == (metric in _LOWER_IS_BETTER)
    return entry["loss"] < best["loss"]


def _is_over(progress: Progress, settings: TrainSettings) -> bool:
    return 0 < settings.early_stopping_patience <= progress.epochs_without_better


def _base_line(job: Job) -> str:
    """Which base it is, from where, and how that is known."""
    hint = "; slower and better: --base roberta-base" if job.base.hub_id == MINILM else ""
    place = {
        "folder": "a folder",
        "package": "an installed package",
        "cache": "the hub's cache",
        "hub": "the hub",
    }
    known = "checked" if job.base.hub_id == MINILM else job.base.weights_sha256[:12]
    return f"{job.base.name} from {place[job.base.source]}, sha256 of the weights {known}{hint}"


def make_optimizer(parameters: Mapping[str, torch.nn.Parameter], settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with Trainer's betas and epsilon; only matrices decay."""
    decay = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    free = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=(0.9, 0.999), eps=1e-8)


def schedule(step: int, total_steps: int, warmup_ratio: float) -> float:
    """The share of the learning rate at optimizer step `step` (from 0): linear up, then linear down to 0.

    Warm-up takes `warmup_ratio` of all steps, at least 10 where it is above 0, and never more than half.
    """
    warmup = min(max(10, math.ceil(warmup_ratio * total_steps)), total_steps // 2) if warmup_ratio > 0 else 0
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (total_steps - step) / max(1, total_steps - warmup)


def dropout_seed(seed: int, batch: int) -> int:
    """The seed of dropout for one batch, counted over all epochs."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{batch}".encode(), digest_size=8).digest(), "big") >> 1


def _state_tensors(
    parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.AdamW
) -> dict[str, torch.Tensor]:
    """Trained parameters and AdamW's two moments, by name; the moments' step is the run's."""
    tensors = {f"parameter/{name}": parameter.data.cpu() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment].cpu()
    return tensors


def _load_newest(
    run: RunDir,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.AdamW,
    tell: Callable[..., None],
) -> Progress:
    found, skipped = checkpoint.newest(run.checkpoints, needs=lambda state: int(state["best_step"]))
    for reason in skipped:
        tell("warning", text=f"a checkpoint was passed over and set aside: {reason}")
    recipe_sha256 = hashlib.sha256(run.recipe.read_bytes()).hexdigest()
    if found is None:
        return Progress(recipe_sha256=recipe_sha256)
    progress = Progress(**found.state)
    if progress.recipe_sha256 != recipe_sha256:
        raise ArtefactError(
            "run.recipe_changed",
            "recipe.toml is not what this run was started with, so its checkpoints do not belong to it.",
            where=str(run.recipe),
            mend=f"bring the old file back; or start a run of its own: trimtab train --recipe {run.recipe} --out DIR",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(found.tensors[f"parameter/{name}"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(progress.step)),
                **{m: found.tensors[f"{m}/{name}"].to(parameter.device) for m in ("exp_avg", "exp_avg_sq")},
            }
    tell("resume", step=progress.step, path=found.path.name)
    return progress


def _restore(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.copy_(tensors[f"parameter/{name}"])


def _score(
    job: Job, forward: Forward, best: checkpoint.Checkpoint
) -> tuple[Part, npt.NDArray[np.float32], dict[str, Any]]:
    """The headline: the test rows where there are any, else the evaluation rows that also chose the epoch."""
    eval_logits = best.tensors["eval_logits"].numpy()
    eval_scores = metrics(eval_logits, job.eval.encoded.labels, job.labels.values)
    if job.test is None:
        return job.eval, eval_logits, eval_scores | {"chosen_on_these_rows": True}
    logits = compute_logits(forward, job.test.encoded)
    scores = metrics(logits, job.test.encoded.labels, job.labels.values) | {"chosen_on_these_rows": False}
    return (
        job.test,
        logits,
        scores | {f"chosen_on_{key}": eval_scores[key] for key in ("accuracy", "macro_f1", "loss")},
    )


def _verify_in_fresh_process(run: RunDir) -> dict[str, Any]:
    """Loads the saved adapter in a new process and compares logits; the run is done only if they are the same.

    Raises:
        ArtefactError: the adapter on disk does not answer as the trained model did.
    """
    began = time.monotonic()
    done = subprocess.run(
        # -P: a file of the user's beside the data, such as email.py, must not take the place of a library's.
        [sys.executable, "-P", "-m", "trimtab", "verify", str(run.path), "--json"],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode != 0:
        raise ArtefactError(
            "adapter.verification",
            "The saved adapter does not answer as the trained model did, so this run is not done."
            if done.returncode == ArtefactError.exit_code
            else "The saved adapter could not be checked in a process of its own, so this run is not done.",
            where=f"{run.adapter}: {done.stderr.strip() or done.stdout.strip()}",
            mend=f"trimtab verify {run.path} tries again; if it stays so, please report it with environment.json",
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"seconds": time.monotonic() - began}


def _describe(run: RunDir, job: Job, engine: Engine) -> None:
    """What is known before the first step: environment, data report, rows set aside."""
    rundir.write_json(
        run.environment,
        rundir.environment()
        | {
            "device": job.placement.device.type,
            "device_reason": job.placement.device_reason,
            "threads": job.placement.threads,
            "threads_reason": job.placement.threads_reason,
            "dtype": engine.dtype,
            "forward": engine.name,
            "forward_reason": engine.reason,
            "sha256": job.recipe.sha256,
        },
    )
    rundir.write_json(run.data_report, job.data_report)
    if job.rejects:
        with run.rejects.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(Reject._fields)
            writer.writerows(job.rejects)
