"""Job -> a model that can be trained, and what computes its logits."""

from dataclasses import dataclass
from typing import Any

import torch

from trimtab.forward import Engine, choose
from trimtab.machine import give_back_freed_memory
from trimtab.model import count, head_modules, inject, load_base
from trimtab.resolve import Job


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
    return Ready(job, model, head, bool(loaded.new_parameters), parameters, engine)
