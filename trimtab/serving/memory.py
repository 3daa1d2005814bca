"""Memory for adapters: pieces of equal size cut from large mappings, so that loading and evicting are copies.

Beyond the numbers themselves an adapter costs its share of one mapping's rounding, less than 1 %. Pages that no
adapter has touched cost nothing. Mapped privately and filled by copying: a user's file that is cut while it serves
harms nobody.
"""

import mmap
import threading

import torch
from torch import Tensor

_MAPPING = 16 << 20  # bytes, or one piece where that is larger


class Pieces:
    """Hands out pieces of memory and takes them back. Pieces of one size share mappings."""

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        """uint8[size], uninitialised."""
        with self._lock:
            free = self._free.setdefault(size, [])
            if not free:
                count = max(1, _MAPPING // size)
                mapping = mmap.mmap(-1, count * size, access=mmap.ACCESS_COPY)
                free += torch.frombuffer(mapping, dtype=torch.uint8).view(count, size).unbind()
                free.reverse()  # so that pages are touched from the first on
            return free.pop()

    def give_back(self, piece: Tensor) -> None:
        """Makes a piece free for the next adapter of its size."""
        with self._lock:
            self._free[piece.numel()].append(piece)
