"""Memory for the large tensors of a batch, taken once and used again for every batch.

Batches differ in their number of tokens. Left to malloc, every size is another piece, and the heap of a training run
grew from 1.2 GB to 2.7 GB in 189 steps; mapped anew each time, 225,000 page faults a step cost a third of it.
"""

import math
import mmap
import threading

import torch
from torch import Tensor


class Workspace:
    """Buffers by name. What is taken under a name lives until that name is taken again."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[object, ...], Tensor] = {}
        self.batches = 0
        """How many batches have begun here; a backward checks that no other has overwritten its own."""
        self.lock = threading.RLock()
        self._parts: list[Workspace] = [self]

    def of_part(self, number: int) -> "Workspace":
        """Where that part of a batch is computed; the first is here."""
        while len(self._parts) <= number:
            self._parts.append(Workspace())
        return self._parts[number]

    def take(self, *name: object, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor. Half as much again is reserved: pages that are never touched cost nothing."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            self._buffers.pop(name, None)
            # Of the system and not of malloc, whose heap keeps touched pages: a quarter of the peak.
            # Private: a process that forks must not share them with its children.
            memory = mmap.mmap(-1, max(1, size + size // 2) * dtype.itemsize, access=mmap.ACCESS_COPY)
            with torch.inference_mode(False):  # else what an evaluation takes first, training may not write to
                buffer = self._buffers[name] = torch.frombuffer(memory, dtype=dtype)
        return buffer[:size].view(shape)
