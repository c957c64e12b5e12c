"""Standard streams that never end a run: what a closed pipe, a full disk or a closed descriptor refuses is dropped."""

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any


class _Lasting(io.FileIO):
    """A file that takes every write; what the system refuses is dropped, so that no buffer above keeps it."""

    refused: OSError | None = None

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        try:
            written = super().write(data)
        except OSError as error:
            self.refused = error
            return size
        return size if written is None else written  # None: a pipe that does not block, and is full


def last() -> None:
    """Have this process's standard streams take every write until it ends, whoever writes, in Python or beneath it.

    For the process's entry: a process that was started without streams gets /dev/null for them, before a file of the
    run takes their descriptors.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number is this one
    if sys.stdout is sys.__stdout__:
        sys.stdout = lasting(sys.__stdout__, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = lasting(sys.__stderr__, 2)


def refused() -> str | None:
    """Why standard output lacks some of what was printed, or None; a reader that left (`| head`) has what it wanted."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    error: OSError | None = getattr(raw, "refused", None)  # of a stream of ours
    return None if error is None or error.errno == errno.EPIPE else error.strerror


def lasting(stream: Any, descriptor: int) -> io.TextIOWrapper:
    """A stream like ``stream``, which Python opened on ``descriptor`` or not at all, that takes every write.

    A character that its encoding lacks is written as an escape.
    """
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    with suppress(OSError):
        stream.flush()
    raw = _Lasting(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
