"""Signals: a flag first, which the trainer reads at step boundaries, and an end for ranks that reach none."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from halfbyte.errors import Stopped
from halfbyte.terminal.wording import on_rank_0, say_on_this_rank

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
BOUNDARY_SECONDS = 10.0  # a rank that reaches no boundary for so long hangs, or is too slow to be saved
GRACE_SECONDS = 30.0  # what torchrun, and Kubernetes by default, give a process before SIGKILL
RESERVE_SECONDS = 5.0  # of these, for what comes after a save
# A launcher passes on a signal that its group, its pod or its job step was sent as a whole.
SAME_SECONDS = 3.0

# A forked child must find it, and a process has one set of handlers.
_listening: "Signals | None" = None
_registered = False


class Signals:
    """The signals of this process, received by a thread of its own while the ``with`` block runs.

    A Python signal handler waits for the main thread, which may be inside a collective that never returns; the
    wake-up file descriptor is written by the C handler at once. ``abandon`` is called, in that thread, before the
    process is ended without having reached a boundary. Off the main thread signals are left as they are. SIGHUP, which
    a closed terminal sends, counts as SIGTERM unless the process ignores it (nohup).
    """

    def __init__(self, abandon: Callable[[int], None]) -> None:
        self.received: int | None = None
        self.since = 0.0
        self.boundary = False  # reached after the signal, or inside a save: the main thread is alive
        self._abandon = abandon
        self._parent, self._orphaned = os.getppid(), False
        self._read = self._write = self._wakeup = -1
        self._thread: threading.Thread | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        global _listening, _registered
        if threading.current_thread() is not threading.main_thread():
            return self
        if not _registered:
            _registered = True
            os.register_at_fork(after_in_child=_in_a_fork)
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
        self._handlers = {number: signal.signal(number, _seen) for number in (*SIGNALS, *hangup)}
        self._thread = threading.Thread(target=self._run, name="halfbyte-signals", daemon=True)
        self._thread.start()
        _listening = self
        return self

    def __exit__(self, *_: object) -> None:
        """Put the earlier handlers back."""
        global _listening
        if self._thread is None:
            return
        _listening = None
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._write, b"\0")
        self._thread.join()
        self._thread = None
        os.close(self._read)
        os.close(self._write)

    def elapsed(self) -> float:
        """Seconds since the first signal."""
        return time.monotonic() - self.since

    def _run(self) -> None:
        while True:
            wait = None
            if self.received is not None:
                wait = max(0.0, BOUNDARY_SECONDS - self.elapsed()) if not self.boundary else 0.5
            if not select.select([self._read], [], [], wait)[0]:
                if not self.boundary and self.elapsed() >= BOUNDARY_SECONDS:
                    self._end(f"no step ended within {BOUNDARY_SECONDS:.0f} s of it")
                continue
            for number in os.read(self._read, 64):
                if number == 0:
                    return
                if number == signal.SIGHUP:
                    number = signal.SIGTERM
                if number in SIGNALS:
                    self._arrived(number)

    def _arrived(self, number: int) -> None:
        orphaned = os.getppid() != self._parent and not self._orphaned
        self._orphaned = self._orphaned or orphaned
        if self.received is None:
            self.since = time.monotonic()
            self.received = number
            what = "the launcher has ended" if orphaned else f"{signal.Signals(number).name} received"
            say_on_this_rank(f"{what}: saving at the end of this step; a second signal stops at once")
        elif not orphaned and self.elapsed() > SAME_SECONDS:
            self._end("a second signal")

    def _end(self, why: str) -> None:
        assert self.received is not None
        name = signal.Signals(self.received).name
        say_on_this_rank(f"stopped at once by {name}: {why}; nothing more is saved")
        with suppress(Exception):
            self._abandon(self.received)
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(128 + self.received)


@contextmanager
def stops_raised() -> Iterator[None]:
    """Have what would kill the process raise Stopped on the main thread, outside of :class:`Signals`.

    What was created before the first step is then removed again. On rank 0 alone: the other ranks create nothing.
    """
    if threading.current_thread() is not threading.main_thread() or not on_rank_0():
        yield
        return
    numbers = [number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
               if signal.getsignal(number) is signal.SIG_DFL]  # fmt: skip
    for number in numbers:
        signal.signal(number, _raise_stopped)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    ends = signal.SIGTERM if number == signal.SIGHUP else number
    raise Stopped(ends, f"stopped by {signal.Signals(number).name} outside of training")


def _seen(number: int, frame: FrameType | None) -> None:
    """The Python half of a handler; the thread has received the signal already."""


def _in_a_fork() -> None:
    """Keep loader workers from answering for their parent: they share its pipe, and Ctrl-C reaches them too."""
    if _listening is not None:
        with suppress(ValueError):
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
