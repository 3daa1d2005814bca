"""Memory for adapters: pieces of equal size cut from large mappings, so that loading and evicting are copies.

Beyond the numbers themselves an adapter costs its share of one mapping's rounding, less than 1 %. Pages that no
adapter has touched cost nothing, nor do those of a piece that was given back: adapters of many sizes, one after
another, would otherwise leave a mapping of each size behind. Filled by copying: a user's file that is cut while it
serves harms nobody.
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
        self._places: dict[int, tuple[mmap.mmap, int]] = {}
        """By the address of each piece: its mapping, and where it begins in it."""
        self._count: dict[int, int] = {}
        """By size: how many there are, free or not."""
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        """uint8[size], uninitialised."""
        with self._lock:
            free = self._free.setdefault(size, [])
            if not free:
                count = max(1, _MAPPING // size)
                mapping = mmap.mmap(-1, count * size, access=mmap.ACCESS_COPY)
                free += torch.frombuffer(mapping, dtype=torch.uint8).view(count, size).unbind()
                self._count[size] = self._count.get(size, 0) + count
                self._places |= {piece.data_ptr(): (mapping, number * size) for number, piece in enumerate(free)}
                free.reverse()  # so that pages are touched from the first on
            return free.pop()

    def give_back(self, piece: Tensor) -> None:
        """Makes a piece free for the next adapter of its size."""
        with self._lock:
            mapping, begin = self._places[piece.data_ptr()]
            first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
            whole = (begin + piece.numel()) // mmap.PAGESIZE * mmap.PAGESIZE - first
            if whole > 0 and hasattr(mmap, "MADV_DONTNEED"):  # the pages that it has for itself, 0.01 ms
                mapping.madvise(mmap.MADV_DONTNEED, first, whole)
            free = self._free[piece.numel()]
            free.append(piece)
            if len(free) == self._count[piece.numel()]:  # nobody has one of this size any more: its mappings go too
                for one in free:
                    del self._places[one.data_ptr()]
                del self._free[piece.numel()], self._count[piece.numel()]
