"""What a run will cost, told before it is paid: seconds and bytes, from one batch of it that is tried out here.

The batch is a usual one of the run's own plan, on its own model: shapes, dropout, threads and whatever else keeps this
machine busy are in the figure, and no table of machines has to be right. A few seconds buy it.
"""

import importlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch

from trimtab import batching, interrupts
from trimtab.classification import loss_sum
from trimtab.errors import RecipeError, ResourceError
from trimtab.forward import Engine, Forward
from trimtab.machine import available_memory, peak_rss_bytes
from trimtab.resolve import Job
from trimtab.tokens import Encoded
from trimtab.trunk import Trunk, compute, forward_in_memory, missing

_MOST_TOKENS = 1_024  # of the batch that is tried out: a larger one costs the same a token
_FEWEST_TRIED = 8  # rows by which memory is told: of one or two it is noise, and was up to 30 times too much
_MOST_TIMES, _PATIENCE_S = 7, 2.5  # it is repeated: half a second alone may take a third more or less
_FEWEST_EPOCHS = 2  # a budget takes epochs down to this, then rows
_EVALUATION_SHARE = 0.2  # of a budget; what is left of the evaluation rows still gives an interval
_FEWEST_ROWS = 100  # that a budget leaves for evaluation, and for training
_SPARE = 0.95  # of a budget, for what the machine may do meanwhile


@dataclass(frozen=True)
class Speed:
    """What a unit of work costs here, see `work`; and memory."""

    train_seconds: float
    """Forward and backward, a unit."""
    eval_seconds: float
    """Forward alone, a unit."""
    train_bytes: float
    """A token of the largest batch of a training step."""
    eval_bytes: float
    resident_bytes: int
    """With the model loaded, before any batch of size."""
    trunk_seconds: float = 0.0
    """The layers below LoRA, forward alone, a unit of the whole model; 0 where they are not kept."""


@dataclass(frozen=True)
class Ahead:
    """What is computed of training rows before the first step, as their numbers: the start of a new head."""

    probed: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """The probe's rows, passed forward."""
    taught: Sequence[npt.NDArray[np.int64]] = ()
    """Batches with which LoRA learns sentence vectors: each row of them is passed forward once before."""


@dataclass(frozen=True)
class Estimate:
    """What a run will take."""

    epochs: int
    steps: int
    """Optimizer steps, all epochs together."""
    epoch_seconds: float
    eval_seconds: float
    """One pass over the evaluation rows, after each epoch."""
    test_seconds: float
    needed_bytes: int
    """Resident at once."""
    peak_bytes: int
    """As a finished run tells it: the most that this process had at once, before the run too."""
    available_bytes: int
    """That the machine or its container had left when this was told."""
    trunk_seconds: float = 0.0
    """Before training: the layers below LoRA once for all rows, where they are kept and are not yet."""
    probe_seconds: float = 0.0
    """Before the first step: the probe that a new head begins as."""
    probe_rows: int = 0
    sentence_seconds: float = 0.0
    """Before the probe: LoRA learns sentence vectors."""
    refit_seconds: float = 0.0
    """After the last evaluation: the start of the head and all epochs once more, on all rows."""

    @property
    def train_seconds(self) -> float:
        """From the start of the head to the last step or evaluation, as `train_seconds` of a finished run."""
        judged = self.epochs * (self.epoch_seconds + self.eval_seconds)
        return self.sentence_seconds + self.probe_seconds + judged + self.refit_seconds

    def as_dict(self) -> dict[str, Any]:
        """For events and programs."""
        return {
            "train_seconds": round(self.train_seconds, 1),
            "epoch_seconds": round(self.epoch_seconds, 1),
            "eval_seconds": round(self.eval_seconds, 1),
            "test_seconds": round(self.test_seconds, 1),
            "trunk_seconds": round(self.trunk_seconds, 1),
            "head_start_seconds": round(self.sentence_seconds + self.probe_seconds, 1),
            "refit_seconds": round(self.refit_seconds, 1),
            "epochs": self.epochs,
            "steps": self.steps,
            "peak_bytes": self.peak_bytes,
            "available_bytes": self.available_bytes,
        }


def work(model: Any, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Multiply-adds of a forward, by row: a product with every weight for each token, and attention for each pair.

    Used for proportions alone. Models that share layers or name their sizes otherwise get no term for pairs.
    """
    embeddings = model.get_input_embeddings().weight.shape[0]
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2 and p.shape[0] != embeddings)
    config = model.config
    pairs = 2 * getattr(config, "num_hidden_layers", 0) * getattr(config, "hidden_size", 0)
    units: npt.NDArray[np.float64] = lengths * (weights + pairs * lengths.astype(np.float64))
    return units


def measure(job: Job, model: Any, engine: Engine, trunk: Trunk) -> Speed:
    """Tries out one usual batch, forward and backward, from kept states where the run will do so; no weight changes.

    Memory is what the process grew by; it is scaled by tokens afterwards, so a shorter part goes ahead that pays for
    whatever libraries take once. Where a batch has few rows, those of more batches tell it.
    """
    encoded, plan = job.train.encoded, job.batches(0)
    lengths = encoded.lengths
    tokens = np.array([lengths[rows].sum() for rows in plan])
    usual = encoded.only(_middle(plan[int(np.argsort(tokens)[len(plan) // 2])], lengths))
    several = usual
    if len(usual) < _FEWEST_TRIED:
        several = encoded.only(_middle(np.concatenate(plan)[: 2 * _FEWEST_TRIED], lengths))
    first = _beginning(several)
    process = psutil.Process()

    def over(part: Encoded) -> Forward:
        if trunk.depth and engine.encoder is not None:
            return forward_in_memory(engine.encoder, part, trunk.depth)
        return engine.forward

    def forward_only(forward: Forward, part: Encoded) -> None:
        with torch.inference_mode():
            forward(part, np.arange(len(part)))

    def step(forward: Forward, part: Encoded) -> None:
        labels = torch.from_numpy(part.labels).to(job.placement.device)
        loss_sum(forward(part, np.arange(len(part)), 0), labels).backward()  # type: ignore[no-untyped-call]

    def lower_layers() -> None:
        if trunk.depth and engine.encoder is not None:
            list(compute(engine.encoder, usual, trunk.depth))

    if job.recipe.train.baselines or job.recipe.train.head_start != "random":
        importlib.import_module("sklearn.linear_model")  # 105 MB that the run will have
    of_first, of_several, of_usual = over(first), over(several), over(usual)
    step(of_first, first)
    resident = int(process.memory_info().rss)
    forward_only(of_several, several)
    after_forward = int(process.memory_info().rss)
    step(of_several, several)
    after_step = int(process.memory_info().rss)
    grown_by = max(1, len(several.ids) - len(first.ids))
    units = float(work(model, usual.lengths).sum())
    found = Speed(
        train_seconds=_seconds(lambda: step(of_usual, usual)) / units,
        eval_seconds=_seconds(lambda: forward_only(of_usual, usual)) / units,
        train_bytes=max(0, after_step - resident) / grown_by,
        eval_bytes=max(0, after_forward - resident) / grown_by,
        resident_bytes=resident,
        trunk_seconds=_seconds(lower_layers) / units if trunk.depth else 0.0,
    )
    model.zero_grad(set_to_none=True)
    return found


def _beginning(part: Encoded) -> Encoded:
    """The first text, cut to a quarter of all tokens."""
    end = max(1, min(int(part.lengths[0]), len(part.ids) // 4))
    return replace(part.only(np.zeros(1, np.int64)), ids=part.ids[:end], offsets=np.array([0, end]))


def _middle(rows: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The rows of middle length, at most `_MOST_TOKENS` together; an even number, for each core takes one half.

    Of reviews in any order the larger half is 1 % above the mean then (median of 100 seeds; 7 % at most); of the first
    rows of a batch that fit, 7 % (24 %).
    """
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    for count in (*range(len(rows) // 2 * 2, 0, -2), 1):
        middle = rows[(len(rows) - count) // 2 :][:count]
        if lengths[middle].sum() <= _MOST_TOKENS:
            break
    return middle


def _seconds(action: Callable[[], object]) -> float:
    """The median of `_MOST_TIMES`, or of those that patience allows."""
    found: list[float] = []
    while len(found) < _MOST_TIMES and sum(found) < _PATIENCE_S:
        interrupts.check()
        began = time.perf_counter()
        action()
        found.append(time.perf_counter() - began)
    return float(np.median(found))


def estimate(job: Job, model: Any, engine: Engine, trunk: Trunk, ahead: Ahead, speed: Speed) -> Estimate:
    """What the whole run takes at that speed."""
    pads = engine.name != "fast"

    def units(lengths: npt.NDArray[np.int64], batches: Sequence[npt.NDArray[np.int64]]) -> float:
        computed = [np.full(len(rows), lengths[rows].max()) if pads else lengths[rows] for rows in batches if len(rows)]
        return float(work(model, np.concatenate(computed)).sum()) if computed else 0.0

    def pass_seconds(lengths: npt.NDArray[np.int64]) -> float:
        return units(lengths, batching.evaluation_plan(lengths)) * speed.eval_seconds

    def largest(lengths: npt.NDArray[np.int64], batches: list[npt.NDArray[np.int64]]) -> int:
        return max(
            (int(lengths[rows].max()) * len(rows) if pads else int(lengths[rows].sum()) for rows in batches), default=0
        )

    settings = job.recipe.train
    plan, lengths, eval_lengths = job.batches(0), job.train.encoded.lengths, job.eval.encoded.lengths
    passed = [eval_lengths, job.test.encoded.lengths if job.test else eval_lengths]
    if settings.baselines or len(ahead.probed):
        passed.append(lengths)
    grown = max(
        speed.train_bytes * largest(lengths, plan),
        speed.eval_bytes * max(largest(one, batching.evaluation_plan(one)) for one in passed),
    )
    needed = speed.resident_bytes + int(grown)
    return Estimate(
        epochs=int(settings.num_epochs),
        steps=job.steps_per_epoch * int(settings.num_epochs),
        epoch_seconds=units(lengths, plan) * speed.train_seconds,
        eval_seconds=pass_seconds(eval_lengths),
        test_seconds=pass_seconds(job.test.encoded.lengths) if job.test else 0.0,
        needed_bytes=needed,
        peak_bytes=max(peak_rss_bytes(), needed),
        available_bytes=available_memory(),
        trunk_seconds=sum(float(work(model, entry.texts.lengths).sum()) for entry in missing(trunk))
        * speed.trunk_seconds,
        # Every layer is computed there, kept or not.
        probe_seconds=units(lengths, [ahead.probed]) * (speed.eval_seconds + speed.trunk_seconds),
        probe_rows=len(ahead.probed),
        sentence_seconds=units(lengths, [np.unique(np.concatenate(ahead.taught))] if ahead.taught else [])
        * (speed.eval_seconds + speed.trunk_seconds)
        + units(lengths, ahead.taught) * (speed.train_seconds + speed.trunk_seconds),
    )


def check_memory(job: Job, speed: Speed, found: Estimate) -> None:
    """Refuses what will not fit, before anything is written.

    Raises:
        ResourceError: with the batch size that fits.
    """
    now = int(psutil.Process().memory_info().rss)
    if job.placement.device.type != "cpu" or found.needed_bytes - now <= found.available_bytes:
        return
    settings = job.recipe.train
    spare = found.available_bytes + now - speed.resident_bytes
    fits = int(spare / max(1.0, speed.train_bytes) / max(1, int(job.train.encoded.lengths.max())))
    if 1 <= fits < settings.batch_size:
        accumulated = -(-settings.batch_size * settings.gradient_accumulation_steps // fits)
        mend = (
            f"--set train.batch_size={fits}; with --set train.gradient_accumulation_steps={accumulated} "
            "a step has as many rows as now"
        )
    else:
        mend = "free some memory; or a smaller --base, or --set data.max_length=128"
    raise ResourceError(
        "memory.too_little",
        f"This run would need about {found.needed_bytes / 1e9:.1f} GB, and "
        f"{(found.available_bytes + now) / 1e9:.1f} GB can be had.",
        where=f"batches of {settings.batch_size}, texts of at most {int(job.train.encoded.lengths.max())} tokens",
        mend=mend,
    )


def parse_budget(text: str) -> float:
    """`90s`, `5m`, `1h`, `1h30m` -> seconds.

    Raises:
        RecipeError: it is none of these.
    """
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip().lower().replace(" ", ""))
    parts = found.groups(default="0") if found else ("0", "0", "0")
    seconds = int(parts[0]) * 3_600 + int(parts[1]) * 60 + int(parts[2])
    if seconds <= 0:
        raise RecipeError("usage", f'"{text}" is no time.', where="--budget", mend="--budget 5m, 90s or 1h30m")
    return float(seconds)


def within(budget: float, found: Estimate, rows: int, eval_rows: int) -> dict[str, object]:
    """Settings with which a run of so many rows takes at most `budget` seconds of training: epochs first, then rows.

    What is done once for all epochs belongs to it: the layers below LoRA where they are kept, and the start of a head.
    Learning twice is left out first. Rows are worth more than a third pass over the same ones, so epochs go down to
    two, then LoRA learns no sentence vectors, and then rows are left out. Evaluation gets at most a fifth of the time,
    and both parts keep 100 rows: less judges nothing.

    Raises:
        RecipeError: two epochs of 100 rows take longer.
    """
    budget *= _SPARE
    if found.trunk_seconds + found.train_seconds <= budget:
        return {}
    values: dict[str, object] = {}
    if found.refit_seconds:
        values["train.refit"] = "off"
        found = replace(found, refit_seconds=0.0)
        if found.trunk_seconds + found.train_seconds <= budget:
            return values
    epochs = min(found.epochs, _FEWEST_EPOCHS)
    if found.sentence_seconds and found.trunk_seconds + replace(found, epochs=epochs).train_seconds > budget:
        values["train.head_start"] = "probe"
        found = replace(found, sentence_seconds=0.0)
        if found.trunk_seconds + found.train_seconds <= budget:
            return values
    budget -= found.sentence_seconds

    def judged(epochs: int) -> int:
        share = _EVALUATION_SHARE * budget / max(epochs * found.eval_seconds, 1e-9)
        return min(eval_rows, max(_FEWEST_ROWS, int(eval_rows * min(1.0, share))))

    left_to_judge = judged(epochs)
    pass_seconds = found.eval_seconds * left_to_judge / max(1, eval_rows)
    fitting = int((budget - found.trunk_seconds - found.probe_seconds) / (found.epoch_seconds + pass_seconds))
    if fitting >= epochs:
        epochs = min(found.epochs, fitting)
        left_to_judge = judged(epochs)
    else:
        a_row = (epochs * found.epoch_seconds + found.trunk_seconds) / rows
        a_probe = found.probe_seconds / max(1, found.probe_rows)
        spare = budget - epochs * pass_seconds
        left = int((spare - found.probe_seconds) / a_row)
        if left < found.probe_rows:  # the probe then reads every row that is left
            left = int(spare / (a_row + a_probe))
        if left < (fewest := min(rows, _FEWEST_ROWS)):
            shortest = (epochs * pass_seconds + fewest * a_row + min(fewest, found.probe_rows) * a_probe) / _SPARE
            raise RecipeError(
                "budget.too_short",
                f"{epochs} epochs of {fewest} rows take about {shortest:.0f} s here.",
                where="--budget",
                mend=f"--budget {-(-int(shortest) // 10) * 10 + 10}s, or a smaller --base, or --set data.max_length=64",
            )
        values["data.limit_train"] = left
    if left_to_judge < eval_rows:
        values["data.limit_eval"] = left_to_judge
    if epochs != found.epochs:
        values["train.num_epochs"] = epochs
    return values


def remaining_seconds(
    *,
    step_seconds: float,
    tokens: int,
    tokens_left: int,
    eval_seconds: float,
    evals: int,
    evals_left: int,
    eval_tokens: int,
) -> float:
    """What is left of a run that is under way, at the pace that it has had so far.

    Before the first evaluation, a token of one is taken to cost 0.4 of a token in training: forward against forward
    and backward.
    """
    a_token = step_seconds / max(1, tokens)
    a_pass = eval_seconds / evals if evals else 0.4 * a_token * eval_tokens
    return a_token * tokens_left + a_pass * evals_left
