"""Signals that ask a run to stop: obeyed at once while nothing is written, later at the next safe point.

While a run is under way a handler that worked could meet a half-done update, so it only takes a note; the loop, the
evaluation and the tokenizing look at it between two pieces of work with `check`.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")  # SIGUSR1: SLURM's and LSF's early warning
_SECOND_CTRL_C = 130

_asked: signal.Signals | None = None
_is_postponed = False


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop, where that is safe. A KeyboardInterrupt, as notebooks expect of Ctrl-C."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later, which here is to resume

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@contextmanager
def heard() -> Iterator[None]:
    """Within it, the signals that ask to stop raise `Interrupted`; within `postponed`, not before `check`.

    A signal that is ignored stays so: nohup ignores SIGHUP, and a shell SIGINT for what it runs in the background.
    Only the main thread may set handlers; in any other this does nothing.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    _asked = None
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _note)
    try:
        yield
    finally:
        _asked = None
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextmanager
def postponed() -> Iterator[None]:
    """Within it, a signal is only noted, and raised by `check`; a second Ctrl-C ends the process at once."""
    global _is_postponed
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, _is_postponed = _is_postponed, True
    try:
        yield
    finally:
        _is_postponed = before


def check() -> None:
    """A safe point.

    Raises:
        Interrupted: a signal has asked to stop.
    """
    if _asked is not None:
        raise Interrupted(_asked.name)


def _note(number: int, frame: FrameType | None) -> None:
    global _asked
    if _asked == signal.SIGINT == number:
        os._exit(_SECOND_CTRL_C)
    _asked = signal.Signals(number)
    if not _is_postponed:
        raise Interrupted(_asked.name)
    if number == signal.SIGINT:
        with suppress(OSError):  # os.write: print may be at work in what was interrupted
            os.write(2, b"\nstopping at the next safe point; Ctrl-C again stops at once, and loses what is not saved\n")
