"""One run at a time in an output directory: a lock beside it, from the first look at it to the end."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from accelerate import PartialState

from halfbyte import distributed, locks
from halfbyte.checkpoint import place
from halfbyte.errors import UserError
from halfbyte.terminal.wording import say, shorten

_MOST = 1000  # bytes of a signature


@contextmanager
def held(output_dir: str | None) -> Iterator[None]:
    """Hold ``output_dir`` for this run, on rank 0; what was created for it is removed at the end.

    The lock is the kernel's: it ends with the process, so that a killed run never blocks the next. Raises
    :class:`UserError` on every rank for a place where no run can write, or naming the run that holds the directory.
    """
    lock, problem = None, None
    missing: list[Path] = []
    if output_dir is not None and PartialState().is_main_process:
        problem = place.obstacle(output_dir)
        if problem is None:
            directory = Path(output_dir).resolve()
            path = place.lock_beside(directory)
            missing = [folder for folder in path.parents if not folder.exists()]
            lock, other = _hold(path, directory)
            problem = f"{output_dir} is in use by {other}; choose another" if other is not None else None
    try:
        if (problem := distributed.agree(problem)) is not None:
            raise UserError(problem, option="output_dir")
        yield
    finally:
        if lock is not None:
            path.unlink(missing_ok=True)
            os.close(lock)
        _remove_empty(missing)


def _hold(path: Path, directory: Path) -> tuple[int | None, str | None]:
    """The lock, or None; and who holds it already, or None.

    It is the file ``path`` beside ``directory``, or ``directory`` itself where nothing can be created beside it. A
    file system without locks is said.
    """
    try:
        return _acquire(path)
    except OSError as error:
        reason = error.strerror
    with suppress(OSError):
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(OSError):
            if locks.try_to_hold(lock):
                return lock, None
            os.close(lock)
            return None, "another run"
        os.close(lock)
    say(f"{directory} cannot be locked ({reason}): a second run in it would not be noticed", error=True)
    return None, None


def _acquire(path: Path) -> tuple[int | None, str | None]:
    """The lock at ``path``, held and signed, or None and who holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        lock = locks.open_lock(path)
        try:
            if not locks.try_to_hold(lock):
                holder = _holder(lock)
                os.close(lock)
                return None, holder
        except OSError:  # a file system without locks
            path.unlink(missing_ok=True)
            os.close(lock)
            raise
        # The run before may have removed the file between the two calls: then this lock is nobody's.
        with suppress(FileNotFoundError):
            if os.fstat(lock).st_ino == path.lstat().st_ino:
                _sign(lock)
                return lock, None
        os.close(lock)


def _sign(lock: int) -> None:
    since = datetime.now().isoformat(sep=" ", timespec="seconds")
    signed = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    with suppress(OSError):  # a full disk: the lock holds unsigned
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(signed).encode(), 0)


def _holder(lock: int) -> str:
    try:
        signed = json.loads(os.pread(lock, _MOST, 0))
        who = f"process {signed['pid']} on {signed['host']}, since {signed['since']}"
        return f"another run: {shorten(who, 120)}"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # not signed yet
        return "another run"


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:  # the innermost first
        with suppress(OSError):
            folder.rmdir()
