"""How a batch is cut into parts, and what running them side by side keeps."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.fast import cores


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@given(st.lists(st.integers(1, 512), min_size=1, max_size=200))
def test_parts_hold_every_row_once_and_differ_by_one_row_at_most(lengths: list[int]) -> None:
    sizes = np.array(lengths)
    parts = cores.cut(sizes)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    assert len(parts) == (2 if len(lengths) > 1 and sum(lengths) >= 512 else 1)
    tokens = [int(sizes[part].sum()) for part in parts]
    assert max(tokens) - min(tokens) <= max(lengths) or len(parts) == 1


def test_tasks_run_beside_each_other_without_gradients_and_share_the_threads() -> None:
    meet = threading.Barrier(2, timeout=30)  # broken where the second waits for the first to end

    def task() -> tuple[bool, int]:
        meet.wait()
        return torch.is_grad_enabled(), torch.get_num_threads()

    for threads in (4, 2, 6):  # the pool's threads take the new number
        torch.set_num_threads(threads)
        assert cores.run([task, task]) == [(False, threads // 2)] * 2
        assert torch.get_num_threads() == threads


def test_a_task_that_fails_ends_after_all_others() -> None:
    done = threading.Event()

    def slow() -> None:
        done.wait(0.2)
        done.set()

    def fails() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        cores.run([fails, slow])
    assert done.is_set()


def test_ctrl_c_waits_for_the_parts() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    begun, done = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        time.sleep(0.5)
        done.set()

    def presses() -> None:
        begun.wait(30)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            cores.run([slow, presses])
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.is_set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own() -> None:
    tasks = [os.getpid, os.getpid]
    assert cores.run(tasks) == [os.getpid()] * 2
    child = os.fork()
    if child == 0:
        failed = True
        try:
            failed = cores.run(tasks) != [os.getpid()] * 2
        finally:  # a child that fails must not go on with the other tests
            os._exit(failed)
    until = time.monotonic() + 20
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < until:
        time.sleep(0.05)
    if not ended[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)
