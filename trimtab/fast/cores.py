"""One batch on two cores: its rows are cut into two parts, and each core takes one through every layer.

Two cores on one product must meet after each, and whatever is no product leaves one of them idle. Parts meet once a
pass. How many there are depends on the tokens alone, so that another number of threads computes the same sums; four
threads give each part two, and of three one is idle.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

_LEAST_TOKENS = 512  # fewer are not worth reading the weights twice for: 0.7 to 0.9 of the speed
_T = TypeVar("_T")


def cut(lengths: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Row numbers in two parts of nearly as many tokens, or in one where there are few.

    Each row, the longest first, goes to the part that has the fewer tokens (Graham 1969).
    """
    if len(lengths) == 1 or lengths.sum() < _LEAST_TOKENS:
        return [np.arange(len(lengths))]
    parts: tuple[list[int], list[int]] = ([], [])
    ahead = 0  # tokens of the first less those of the second
    for row in np.argsort(-lengths, kind="stable").tolist():
        parts[ahead > 0].append(row)
        ahead += int(lengths[row]) * (-1 if ahead > 0 else 1)
    return [np.array(part, np.int64) for part in parts]


def run(tasks: Sequence[Callable[[], _T]]) -> list[_T]:
    """What some tasks give, computed side by side without gradients; torch's threads are shared out among them."""
    threads = torch.get_num_threads()
    workers = min(threads, len(tasks))
    if workers == 1:
        with torch.no_grad():
            return [task() for task in tasks]

    def on_its_own(task: Callable[[], _T]) -> _T:
        if torch.get_num_threads() != threads // workers:  # once: a thread keeps its number
            torch.set_num_threads(threads // workers)
        with torch.no_grad():
            return task()

    futures: list[Future[_T]] = []
    try:
        for task in tasks:
            futures.append(_pool(workers).submit(on_its_own, task))
        return [future.result() for future in futures]
    finally:  # whatever fails, and on Ctrl-C: they write to memory that the next batch takes
        wait(futures)
        torch.set_num_threads(threads)  # it is also what threads that begin later start with


@cache
def _pool(size: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(size, thread_name_prefix="part")


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads, and would wait for them
    os.register_at_fork(after_in_child=_pool.cache_clear)
