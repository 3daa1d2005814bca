"""The loop: batches -> better weights, from the newest checkpoint to the last epoch or the last that helped.

It owns time: optimizer, schedule, evaluation, saving. Randomness is stateless: row order is a function of (seed,
epoch), dropout of (seed, batch). So a run that was stopped goes on from its last checkpoint as if it had not been.
"""

import difflib
import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from trimtab import checkpoint, estimate, interrupts
from trimtab.classification import class_weights, compute_logits, loss_sum, metrics
from trimtab.config import TrainSettings
from trimtab.errors import ArtefactError, DivergedError, ResourceError, quoted
from trimtab.forward import Forward
from trimtab.machine import give_back_freed_memory
from trimtab.model import trainable
from trimtab.resolve import Job
from trimtab.rundir import RunDir

Observer = Callable[[Mapping[str, Any]], None]
"""Receives every event of a run, and `progress` events that are not stored."""

_LOWER_IS_BETTER = {"loss"}
_WORTH_WAITING = 1e-4  # of loss: less is seen in no digit that is printed
_MOST_LEFT_OUT = 3  # steps in a row without a finite loss or gradient; one more ends the run
_GIVE_BACK_STEPS = 16  # between giving freed memory back: 9 ms, where the heap grew by 2 MB a step
_FORECAST_STEPS = 20  # after which the remaining time is told again, from steps that were done


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
    updates: int = 0
    """Steps that changed the weights: all but those whose loss or gradient was not finite."""
    left_out: int = 0
    """Steps in a row, up to now, that did not."""
    recipe: str = ""
    """The recipe.toml that the run was started with."""
    train_seconds: float = 0.0
    """Of earlier processes and this one, up to the last checkpoint."""
    core_seconds: float = 0.0
    """Processor time of the same span, all threads together."""


@dataclass(frozen=True)
class _Loop:
    """What stays the same from step to step."""

    run: RunDir
    job: Job
    forward: Forward
    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.AdamW
    tell: Callable[..., None]
    observe: Observer
    weights: torch.Tensor | None
    """Of the classes, float32[C]; None: every row counts alike."""
    checkpoints: Path
    first_step: int
    """Steps that earlier processes have done."""
    epochs: int
    """That it goes through at most; the schedule is always that of all epochs."""
    epoch_tokens: int
    eval_tokens: int
    """0: no epoch is judged."""
    tokens_after: int
    """Of the training on all rows that follows."""
    seconds_after: float = 0.0
    """Of the start of its head: what the first one took, where this process saw it."""

    @property
    def settings(self) -> TrainSettings:
        return self.job.recipe.train

    @property
    def total_steps(self) -> int:
        return self.job.steps_per_epoch * self.epochs

    @property
    def scheduled_steps(self) -> int:
        """Of the schedule: those of all epochs."""
        return self.job.steps_per_epoch * int(self.settings.num_epochs)


class _Saver:
    """Checkpoints, by time and when told; a disk that takes none costs a warning, and the run goes on."""

    def __init__(self, loop: _Loop, progress: Progress) -> None:
        self.loop, self.saved_step, self.earlier = loop, progress.step, progress
        self.began = self.last = time.monotonic()
        self.core_began = time.process_time()

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self.last > self.loop.settings.save_every_s

    def save(self, progress: Progress, best: Mapping[str, torch.Tensor], *, evaluated: bool) -> Progress:
        """Writes a checkpoint, or warns; returns the progress with the time that has gone by."""
        try:
            return self._write(progress, best, evaluated=evaluated)
        except ResourceError as error:
            self.loop.tell("warning", text=f"{error.what} Training goes on")
            return progress

    def save_what_is_new(self, progress: Progress, best: Mapping[str, torch.Tensor]) -> None:
        """Before a stop: what cannot be saved is an error then."""
        if progress.step > self.saved_step:
            self._write(progress, best, evaluated=False)

    def _write(self, progress: Progress, best: Mapping[str, torch.Tensor], *, evaluated: bool) -> Progress:
        loop, self.last = self.loop, time.monotonic()
        progress = replace(
            progress,
            train_seconds=self.earlier.train_seconds + self.last - self.began,
            core_seconds=self.earlier.core_seconds + time.process_time() - self.core_began,
        )
        tensors = _state_tensors(loop.parameters, loop.optimizer)
        tensors |= {f"best/{name}": tensor for name, tensor in best.items()}
        folder = loop.checkpoints
        path = checkpoint.write(folder, progress.step, tensors, asdict(progress), evaluated=evaluated)
        self.saved_step = progress.step
        loop.tell("checkpoint", step=progress.step, path=path.name)
        try:
            checkpoint.prune(folder, progress.best_step)
        except OSError as error:
            loop.tell("warning", text=f"old checkpoints cannot be deleted: {error.strerror}")
        return progress


def run_loop(
    run: RunDir,
    job: Job,
    model: Any,
    forward: Forward,
    tell: Callable[..., None],
    observe: Observer,
    start: Callable[[], object] = lambda: None,
) -> tuple[Progress, dict[str, torch.Tensor]]:
    """Trains from the newest checkpoint, or from the start, to the last epoch or the last that helped.

    `start` is called where there is no checkpoint to go on from; its time counts as training.

    Returns:
        Where the run stands, and the best epoch's tensors: `parameter/NAME` and `eval_logits`.

    Raises:
        DivergedError: too many steps in a row without a finite loss.
        ArtefactError: the checkpoints belong to another recipe.
        Interrupted: a signal asked to stop; what had been done is saved.
    """
    settings = job.recipe.train
    loop, progress, best = _begin(run, job, model, forward, tell, observe)
    saver = _Saver(loop, progress)
    if progress.step == 0:
        start()
        if job.all_rows:
            loop = replace(loop, seconds_after=time.monotonic() - saver.began)
    while progress.epoch < int(settings.num_epochs) and not _is_over(progress, settings):
        progress = _train_epoch(loop, progress, best, saver)
        try:
            progress, logits = _evaluate(loop, progress)
        except interrupts.Interrupted:
            saver.save_what_is_new(progress, best)
            raise
        if progress.best_step == progress.step:
            best = {f"parameter/{name}": tensor.detach().cpu().clone() for name, tensor in loop.parameters.items()}
            best["eval_logits"] = torch.from_numpy(logits)
        progress = saver.save(replace(progress, epoch=progress.epoch + 1, batch=0), best, evaluated=True)
    if progress.epoch < int(settings.num_epochs):
        tell(
            "warning",
            text=f"stopped after epoch {progress.epoch} of {settings.num_epochs}: none of the last "
            f"{settings.early_stopping_patience} was better by {_WORTH_WAITING:.4f} or more "
            "(train.early_stopping_patience)",
        )
    return progress, best


def refit(
    run: RunDir,
    job: Job,
    model: Any,
    forward: Forward,
    tell: Callable[..., None],
    observe: Observer,
    start: Callable[[], object],
    epochs: int,
) -> Progress:
    """Trains for so many epochs of the same schedule, from the newest checkpoint of `refit` or the start; judges none.

    Raises:
        DivergedError, ArtefactError, Interrupted: as `run_loop`.
    """

    def observe_refit(event: Mapping[str, Any]) -> None:
        observe({**event, "refit": True})

    told = partial(tell, refit=True)
    loop, progress, _ = _begin(run, job, model, forward, told, observe_refit, refit_epochs=epochs)
    saver = _Saver(loop, progress)
    if progress.step == 0:
        start()
    while progress.epoch < epochs:
        progress = _train_epoch(loop, progress, {}, saver)
        progress = saver.save(replace(progress, epoch=progress.epoch + 1, batch=0), {}, evaluated=False)
    return progress


def _begin(
    run: RunDir,
    job: Job,
    model: Any,
    forward: Forward,
    tell: Callable[..., None],
    observe: Observer,
    *,
    refit_epochs: int = 0,
) -> tuple[_Loop, Progress, dict[str, torch.Tensor]]:
    """What a training needs, where it stands, and the best epoch's tensors so far."""
    settings = job.recipe.train
    checkpoints, epochs = run.checkpoints, int(settings.num_epochs)
    if refit_epochs:
        checkpoints, epochs = run.refit_checkpoints, refit_epochs
    parameters = trainable(model)
    optimizer = make_optimizer(parameters, settings)
    progress, best = _load_newest(run, checkpoints, parameters, optimizer, tell)
    weights = None
    if settings.class_weights == "auto":
        weights = class_weights(job.train.encoded.labels, len(job.labels)).to(job.placement.device)
    loop = _Loop(
        run=run,
        job=job,
        forward=forward,
        parameters=parameters,
        optimizer=optimizer,
        tell=tell,
        observe=observe,
        weights=weights,
        checkpoints=checkpoints,
        first_step=progress.step,
        epochs=epochs,
        epoch_tokens=int(job.train.encoded.lengths.sum()),
        eval_tokens=0 if refit_epochs else int(job.eval.encoded.lengths.sum()),
        tokens_after=epochs * int(job.all_rows.encoded.lengths.sum()) if job.all_rows else 0,
    )
    return loop, progress, best


def _train_epoch(loop: _Loop, progress: Progress, best: Mapping[str, torch.Tensor], saver: _Saver) -> Progress:
    """The rest of an epoch, step by step."""
    settings = loop.settings
    batches = loop.job.batches(progress.epoch)
    while progress.batch < len(batches):
        group = batches[progress.batch : progress.batch + settings.gradient_accumulation_steps]
        began = time.monotonic()
        rate = float(settings.learning_rate) * schedule(progress.step, loop.scheduled_steps, settings.warmup_ratio)
        try:
            done = _step(loop, group, rate, progress.epoch * len(batches) + progress.batch)
        except interrupts.Interrupted:
            saver.save_what_is_new(progress, best)
            raise
        progress = replace(
            progress,
            step=progress.step + 1,
            batch=progress.batch + len(group),
            window_loss=progress.window_loss + (done.loss if done.finite else 0.0),
            window_rows=progress.window_rows + (done.rows if done.finite else 0),
            updates=progress.updates + done.finite,
            left_out=0 if done.finite else progress.left_out + 1,
            tokens=progress.tokens + done.tokens,
            step_seconds=progress.step_seconds + time.monotonic() - began,
        )
        if not done.finite:
            _tell_not_finite(loop, done, progress, group, rate)
        if progress.step % _GIVE_BACK_STEPS == 0:
            give_back_freed_memory()
        progress = _tell_step(loop, progress, done, rate, progress.epoch + progress.batch / len(batches))
        if saver.is_due and progress.batch < len(batches):
            progress = saver.save(progress, best, evaluated=False)
    return progress


def _tell_step(loop: _Loop, progress: Progress, done: "Step", rate: float, epoch: float) -> Progress:
    """The events of a step: progress for the screen, and now and then a forecast and a line of the log."""
    settings, evaluations = loop.settings, len(progress.evaluations)
    tokens_per_s = progress.tokens / max(progress.step_seconds, 1e-9)
    remaining = estimate.remaining_seconds(
        step_seconds=progress.step_seconds,
        tokens=progress.tokens,
        tokens_left=loop.epoch_tokens * loop.epochs - progress.tokens + loop.tokens_after,
        eval_seconds=progress.eval_seconds,
        evals=evaluations,
        evals_left=loop.epochs - evaluations,
        eval_tokens=loop.eval_tokens,
    )
    remaining += loop.seconds_after
    loop.observe(
        {
            "event": "progress",
            "step": progress.step,
            "steps": loop.total_steps,
            "epoch": epoch,
            "loss": done.loss / done.rows,
            "tokens_per_s": tokens_per_s,
            "remaining_s": remaining,
        }
    )
    if progress.step - loop.first_step == _FORECAST_STEPS < loop.total_steps - loop.first_step:
        loop.tell("forecast", step=progress.step, remaining_s=round(remaining, 1))
    if progress.step % settings.log_every_steps or not progress.window_rows:
        return progress
    loop.tell(
        "step",
        step=progress.step,
        steps=loop.total_steps,
        epoch=round(epoch, 3),
        loss=progress.window_loss / progress.window_rows,
        learning_rate=rate,
        tokens_per_s=tokens_per_s,
    )
    return replace(progress, window_loss=0.0, window_rows=0)


class Step(NamedTuple):
    """What came of an optimizer step."""

    loss: float
    """Summed over the rows."""
    rows: int
    tokens: int
    gradient_norm: float
    largest_logit: float

    @property
    def finite(self) -> bool:
        """Whether loss and gradients were; only then the weights were changed."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


def _step(loop: _Loop, group: list[npt.NDArray[np.int64]], rate: float, first_batch: int) -> Step:
    """One optimizer step over a group of batches; no weight changes where loss or gradients are not finite."""
    settings, encoded, optimizer = loop.settings, loop.job.train.encoded, loop.optimizer
    rows_in_group = sum(len(rows) for rows in group)
    total, tokens, largest = 0.0, 0, 0.0
    for i, rows in enumerate(group):
        interrupts.check()
        logits = loop.forward(encoded, rows, dropout_seed(settings.seed, first_batch + i))
        loss = loss_sum(logits, torch.from_numpy(encoded.labels[rows]).to(logits.device), loop.weights)
        (loss / rows_in_group).backward()  # type: ignore[no-untyped-call]
        total += loss.item()
        tokens += int(encoded.lengths[rows].sum())
        largest = float(np.maximum(largest, logits.detach().abs().max().item()))  # NaN stays NaN
    norm = torch.nn.utils.clip_grad_norm_(loop.parameters.values(), settings.max_grad_norm or math.inf)
    done = Step(total, rows_in_group, tokens, norm.item(), largest)
    if done.finite:
        for parameter_group in optimizer.param_groups:
            parameter_group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad()
    return done


def _tell_not_finite(
    loop: _Loop, done: Step, progress: Progress, group: list[npt.NDArray[np.int64]], rate: float
) -> None:
    """Records a step that changed nothing; after too many in a row, stops.

    Raises:
        DivergedError: more than `_MOST_LEFT_OUT` in a row; the last checkpoint stands.
    """
    examples = [loop.job.train.examples[row] for rows in group for row in rows]
    loop.tell(
        "not_finite",
        step=progress.step,
        loss=str(done.loss / done.rows),
        gradient_norm=str(done.gradient_norm),
        largest_logit=str(done.largest_logit),
        rows=[f"{Path(example.file).name}:{example.line}" for example in examples],
    )
    if progress.left_out > _MOST_LEFT_OUT:
        raise DivergedError(
            "train.diverged",
            f"Loss or gradients were not finite {progress.left_out} times in a row, the loss at last "
            f"{done.loss / done.rows:g}; these steps changed no weight, and the last checkpoint stands.",
            where=f"step {progress.step:,}, learning rate {rate:g}; events.jsonl has the rows",
            mend=f"trimtab train --recipe {quoted(loop.run.recipe)} "
            f"--set train.learning_rate={float(loop.settings.learning_rate) / 3:.1g}",
        )


def _evaluate(loop: _Loop, progress: Progress) -> tuple[Progress, npt.NDArray[np.float32]]:
    """Scores the evaluation part at the end of an epoch and notes whether it is the best so far."""
    job, metric = loop.job, loop.settings.metric_for_best_model
    done = 0

    def after_batch(rows: int) -> None:
        nonlocal done
        done += rows
        loop.observe({"event": "progress", "evaluated": done, "eval_rows": len(job.eval.encoded)})

    began = time.monotonic()
    logits = compute_logits(loop.forward, job.eval.encoded, after_batch=after_batch)
    scores = metrics(logits, job.eval.encoded.labels, job.labels.values)
    entry = {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        **{k: scores[k] for k in ("loss", "accuracy", "macro_f1")},
    }
    progress = _with_evaluation(progress, entry, metric, len(job.eval.encoded))
    progress = replace(progress, eval_seconds=progress.eval_seconds + time.monotonic() - began)
    loop.tell("eval", **entry, best=progress.best_step == progress.step)
    return progress, logits


def _with_evaluation(progress: Progress, entry: dict[str, float], metric: str, rows: int) -> Progress:
    """Progress after an epoch was scored: whether it is kept, and whether patience begins anew."""
    return replace(
        progress,
        evaluations=[*progress.evaluations, entry],
        best_step=int(entry["step"]) if _is_better(entry, progress, metric, rows) else progress.best_step,
        epochs_without_better=0 if _is_worth_it(entry, progress, metric) else progress.epochs_without_better + 1,
    )


def _is_better(entry: Mapping[str, float], progress: Progress, metric: str, rows: int) -> bool:
    """Whether an epoch is kept instead of the one that was so far, judged by so many rows.

    By loss the lowest is kept, of equal ones the earliest. Right answers are counted, and with 100 rows the luckiest of
    a few epochs is often an early one: so the latest is kept that is no more than a standard error below the highest
    (the one-standard-error rule of Breiman et al. 1984), for the last epochs have the lowest rates.
    """
    if progress.best_step < 0:
        return True
    if metric in _LOWER_IS_BETTER:
        best = next(e for e in progress.evaluations if e["step"] == progress.best_step)
        return entry[metric] < best[metric]
    highest = max(entry[metric], *(e[metric] for e in progress.evaluations))
    return entry[metric] >= highest - math.sqrt(highest * (1 - highest) / rows)


def _is_worth_it(entry: Mapping[str, float], progress: Progress, metric: str) -> bool:
    """Whether an epoch is better than the last that was worth it, its loss by what can be seen.

    A loss that falls towards 0 does so for ever: each epoch is the best so far, and brings nothing.
    """
    if not progress.evaluations:
        return True
    last = progress.evaluations[-1 - progress.epochs_without_better]
    if metric not in _LOWER_IS_BETTER and entry[metric] != last[metric]:
        return entry[metric] > last[metric]
    return last["loss"] - entry["loss"] >= _WORTH_WAITING


def _is_over(progress: Progress, settings: TrainSettings) -> bool:
    return 0 < settings.early_stopping_patience <= progress.epochs_without_better


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
    """Trained parameters and AdamW's two moments, by name; the moments' step is the run's.

    Before the first update AdamW has no moments, which is the same as zeros.
    """
    tensors = {f"parameter/{name}": parameter.data.cpu() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            found = optimizer.state[parameter].get(moment)
            tensors[f"{moment}/{name}"] = torch.zeros_like(parameter.data).cpu() if found is None else found.cpu()
    return tensors


def _load_newest(
    run: RunDir,
    checkpoints: Path,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.AdamW,
    tell: Callable[..., None],
) -> tuple[Progress, dict[str, torch.Tensor]]:
    """Where the newest whole checkpoint stands, its tensors put in place; and the best epoch's tensors so far."""
    found, skipped = checkpoint.newest(checkpoints)
    for reason in skipped:
        tell("warning", text=f"a checkpoint was passed over and set aside: {reason}")
    recipe = run.recipe.read_text("utf-8")
    if found is None:
        return Progress(recipe=recipe), {}
    progress = Progress(**found.state)
    if progress.recipe != recipe:
        lines = difflib.unified_diff(progress.recipe.splitlines(), recipe.splitlines(), lineterm="", n=0)
        changed = [line for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---")]
        raise ArtefactError(
            "run.recipe_changed",
            "recipe.toml is not what this run was started with, so its checkpoints do not belong to it.",
            where=f"{run.recipe}: " + " | ".join(" ".join(line.split()) for line in changed[:10]),
            mend=f"bring the old file back; or start a run of its own: trimtab train --recipe {quoted(run.recipe)} "
            "--out DIR",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(found.tensors[f"parameter/{name}"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(progress.updates)),
                **{m: found.tensors[f"{m}/{name}"].to(parameter.device) for m in ("exp_avg", "exp_avg_sq")},
            }
    tell("resume", step=progress.step, path=found.path.name)
    best = {name.removeprefix("best/"): t for name, t in found.tensors.items() if name.startswith("best/")}
    return progress, best
