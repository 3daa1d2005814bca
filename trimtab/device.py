"""Device and threads: decided once, before the model is built, each with its reason."""

import math
import os
import re
from dataclasses import dataclass

import torch

from trimtab.config import MOST_THREADS, RuntimeSettings
from trimtab.errors import RecipeError, plain
from trimtab.machine import cgroup, keep_few_shapes, keep_freed_memory, usable_cores

_TORCH_THREADS = torch.get_num_threads()  # read before anything sets it


@dataclass(frozen=True)
class Placement:
    """Where tensors live and with how many threads, and why."""

    device: torch.device
    device_reason: str
    threads: int
    threads_reason: str

    @property
    def line(self) -> str:
        """One line for people."""
        return f"{self.device.type} ({self.device_reason}), {self.threads} threads ({self.threads_reason})"

    @property
    def throttled(self) -> str:
        """A warning where a CPU of several cores works with one thread; else empty."""
        cores = usable_cores()
        if self.device.type != "cpu" or self.threads > 1 or cores == 1:
            return ""
        return f"1 thread for {cores} cores ({self.threads_reason}): --set runtime.threads={cores} uses all of them"


def place(settings: RuntimeSettings) -> Placement:
    """Chooses the device, sets torch's threads, the allocator and what oneDNN keeps.

    Raises:
        RecipeError: the recipe asks for a device that torch does not offer here, OMP_NUM_THREADS for too many threads.
    """
    offered = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name: str = settings.device
    reason = "as the recipe says"
    if name == "auto":
        name = next(device for device, there in offered.items() if there)
        reason = "no accelerator that torch can use" if name == "cpu" else "offered by torch"
    elif not offered[name]:
        raise RecipeError(
            "runtime.device",
            f"torch {torch.__version__} offers no {name} here.",
            where="runtime.device",
            mend="--set runtime.device=auto",
        )
    threads, threads_reason = settings.threads, "as the recipe says"
    if threads == 0:
        threads, threads_reason = _threads()
    torch.set_num_threads(threads)
    if name == "cpu":
        keep_freed_memory()
        keep_few_shapes()
    return Placement(torch.device(name), reason, threads, threads_reason)


def _threads() -> tuple[int, str]:
    # Of a list, a number for each level of nesting, the first is ours; what is no number is passed over, as by OpenMP.
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if re.fullmatch("[0-9]+", asked) and asked.strip("0"):
        if len(asked) > 9 or int(asked) > MOST_THREADS:
            raise RecipeError(
                "runtime.threads",
                f"OMP_NUM_THREADS asks for {plain(asked, 20)} threads; {MOST_THREADS:,} are the most.",
                where="OMP_NUM_THREADS",
                mend=f"OMP_NUM_THREADS={usable_cores()}, or unset it",
            )
        return int(asked), "OMP_NUM_THREADS"
    cores, (quota, _) = usable_cores(), cgroup()
    if quota and quota < cores:
        return max(1, math.floor(quota)), f"the container may use {quota:g} of {cores} cores"
    # torch's own default counts physical cores, which is what matrix products want.
    return min(cores, _TORCH_THREADS), f"{cores} cores"
