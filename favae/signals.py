"""How a process is told to stop: by Ctrl-C, by SIGTERM, or by the end of the launcher that started it."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends


class Terminated(KeyboardInterrupt):
    """SIGTERM has come. As Ctrl-C, it is no `Exception`."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Inside the block, SIGTERM raises `Terminated` in this process; its children end by it, as ever."""
    if threading.current_thread() is not threading.main_thread():  # only that one can have handlers
        yield
        return
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class DeferredSignals:
    """Remembers Ctrl-C and SIGTERM between `start` and `stop`, so that a training step is not torn.

    A second signal raises at once, unless torchrun is there: it passes on what a terminal has sent to all processes.

    Attributes:
        received: the number of the first signal that has come, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def start(self) -> None:
        if not self._previous and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)

    def stop(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and not _under_torchrun():
            raise exception_of(number)
        self.received = self.received or number


def exception_of(number: int) -> type[KeyboardInterrupt]:
    """What a signal raises."""
    return Terminated if number == signal.SIGTERM else KeyboardInterrupt


def end_quietly_on_signals(worker: int = 0) -> None:
    """For worker processes, which the process that started them ends.

    Ctrl-C reaches the whole group of processes, and so does a launcher's SIGTERM: that one still needs its workers.
    Its own SIGTERM, which multiprocessing sends, ends them as if they were done. Where the sender is not known (macOS),
    any does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parents_signal, daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))


def _end_with_parents_signal() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker has one
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


def end_with_launcher() -> None:
    """Lets Linux kill this process when the torchrun that started it ends without ending it, as a killed one does."""
    if _under_torchrun() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ
