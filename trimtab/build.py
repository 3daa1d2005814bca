"""Job -> a model that can be trained, and what computes its logits."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from trimtab import adapter
from trimtab.errors import some
from trimtab.forward import Engine, Forward, choose
from trimtab.machine import give_back_freed_memory
from trimtab.model import count, head_modules, inject, load_base, on_layers
from trimtab.resolve import Job, WarmStart
from trimtab.trunk import Trunk, choose_trunk, load_trunk


@dataclass(frozen=True)
class Ready:
    """A run before its first step: the job, the model that it will train, and what computes it."""

    job: Job
    model: Any
    head: list[str]
    """The modules that are trained in full."""
    head_is_new: bool
    """Whether the base brought no answer layer of its own."""
    parameters: dict[str, Any]
    """The parameter report."""
    engine: Engine
    trunk: Trunk
    """Which layers are read and not computed."""
    forward: Forward
    """The loop's: the engine's own, or from kept states. Answers that are stored are the engine's."""
    trunk_seconds: float = 0.0
    """What finding or making the kept states took."""
    warm_start: str = ""
    """What was taken of an adapter to start from, for people."""

    @property
    def line(self) -> str:
        """Where and by what the run is computed, for people."""
        return ", ".join(filter(None, (self.job.placement.line, self.engine.line, self.trunk.line)))


def make_ready(job: Job) -> Ready:
    """Builds the model of a job and chooses its forward; a function of the job and its seed.

    Raises:
        TrimtabError: base, adapter or settings cannot be.
    """
    recipe = job.recipe
    give_back_freed_memory()  # the files have been read, the model has not been built
    torch.manual_seed(recipe.train.seed)
    loaded = load_base(job.base.folder, job.model_config)
    head = head_modules(loaded.model, loaded.new_parameters, recipe.lora.also_saved)
    targets = on_layers(loaded.model, recipe.lora.target_modules, recipe.lora, head)
    parameters = count(loaded.model, recipe.lora, targets, head).as_dict()
    model = inject(loaded.model, recipe.lora, targets, head, job.base.recorded_as).to(job.placement.device)
    warm_start, with_head = _start_from(job.warm_start, model, head, job) if job.warm_start else ("", False)
    head_is_new = bool(loaded.new_parameters) and not with_head
    engine = choose(model, job.tokenizer.pad_id, job.placement.device, recipe.runtime)
    trunk = choose_trunk(job, engine)
    return Ready(job, model, head, head_is_new, parameters, engine, trunk, engine.forward, warm_start=warm_start)


def _start_from(warm: WarmStart, model: Any, head: Sequence[str], job: Job) -> tuple[str, bool]:
    """Gives a model what it starts from; says what that is, and whether the head is in it."""
    first, reason = warm.adapter, ""
    if not warm.same_labels:
        reason = f"its labels were {some(first.labels.values, 8)}"
    elif set(first.head) != set(head):
        reason = f"it was trained in full in {some(first.head)}"
    adapter.start_from(model, first, job.base, factor=warm.factor, with_head=not reason)
    line = (
        f"A and B of {first.folder}"
        + (f", whose head is left ({reason}): a new one is drawn" if reason else ", and its head")
        + (f"; B times {warm.factor:g}, for its lora_alpha was {first.lora.lora_alpha}" if warm.factor != 1 else "")
    )
    return line, not reason


def with_trunk(ready: Ready, observe: Callable[[Mapping[str, Any]], None]) -> Ready:
    """With the kept states that the run reads, found or made now, and with what `auto` came to in its recipe.

    It is settled before the run has a folder: whatever a run reads, it reads in its first step and when it is resumed.
    """
    began = time.monotonic()
    trunk, forward = load_trunk(ready.job, ready.engine, ready.trunk, observe)
    job = ready.job
    if job.recipe.runtime.trunk_cache != trunk.settled:
        layered = job.layered.override({"runtime.trunk_cache": trunk.settled}, f"auto: {trunk.reason}")
        job = replace(job, layered=layered)
    return replace(ready, job=job, trunk=trunk, forward=forward, trunk_seconds=time.monotonic() - began)
