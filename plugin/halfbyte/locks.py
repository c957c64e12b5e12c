"""File locks between processes: shared, or held by one. The kernel releases the locks of a process that ends."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path


def open_lock(path: Path) -> int:
    """Open the lock file ``path``, no link, creating it; read-only where it cannot be written. Return the open file."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError:
        with suppress(OSError):
            if path.is_file():
                return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        raise


def share(path: Path, *, otherwise: Path) -> int:
    """Wait until no process holds the lock ``path`` alone, and share it. Return the open file.

    Where the lock file does not exist and cannot be made, the directory ``otherwise`` is opened in its place: in a
    read-only copy of a cache nothing is removed.
    """
    try:
        lock = open_lock(path)
    except OSError:
        if not otherwise.is_dir():
            raise
        lock = os.open(otherwise, os.O_RDONLY | os.O_CLOEXEC)
    return _locked(lock, fcntl.LOCK_SH)


def share_open(lock: int) -> None:
    """Share the open lock file ``lock`` again, after it was held alone."""
    fcntl.flock(lock, fcntl.LOCK_SH)


def hold(path: Path) -> int:
    """Wait until no other process has the lock ``path``, and hold it alone. Return the open file."""
    return _locked(open_lock(path), fcntl.LOCK_EX)


def try_to_hold(lock: int) -> bool:
    """Hold the open lock file ``lock`` alone and return True, or return False if another process has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_in_use(path: Path) -> bool:
    """Return whether a process has the lock file ``path``, which is not created."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would block
    except OSError:
        return False
    try:
        return not try_to_hold(lock)
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(lock)


def _locked(lock: int, operation: int) -> int:
    try:
        fcntl.flock(lock, operation)
    except OSError:  # a file system without locks
        os.close(lock)
        raise
    return lock
