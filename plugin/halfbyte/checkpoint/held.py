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
from halfbyte.errors import UserError


@contextmanager
def held(output_dir: str | None) -> Iterator[None]:
    """Hold ``output_dir`` for this run, on rank 0; what was created for it is removed at the end.

    The lock is the kernel's: it ends with the process, so that a killed run never blocks the next. Where the file
    system has no locks, or the place cannot be written, nothing is held. Raises :class:`UserError` on every rank,
    naming the other run, if a process holds the directory already.
    """
    lock, other = None, None
    if output_dir is not None and PartialState().is_main_process:
        path = _path(output_dir)
        missing = [folder for folder in path.parents if not folder.exists()]
        try:
            lock, other = _acquire(path)
        except OSError:
            _remove_empty(missing)
    try:
        if (other := distributed.agree(other)) is not None:
            raise UserError(f"{output_dir} is in use by {other}; choose another", option="output_dir")
        yield
    finally:
        if lock is not None:
            path.unlink(missing_ok=True)
            os.close(lock)
            _remove_empty(missing)


def _path(output_dir: str) -> Path:
    place = Path(output_dir).resolve()
    return place.with_name(f".{place.name}.lock")


def _acquire(path: Path) -> tuple[int | None, str | None]:
    """The lock at ``path``, held and signed, or None and who holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        lock = locks.open_lock(path)
        if not locks.try_to_hold(lock):
            os.close(lock)
            return None, _holder(path)
        # The run before may have removed the file between the two calls: then this lock is nobody's.
        with suppress(FileNotFoundError):
            if os.fstat(lock).st_ino == path.stat().st_ino:
                os.ftruncate(lock, 0)
                since = datetime.now().isoformat(sep=" ", timespec="seconds")
                signed = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
                os.write(lock, json.dumps(signed).encode())
                return lock, None
        os.close(lock)


def _holder(path: Path) -> str:
    try:
        signed = json.loads(path.read_text(encoding="utf-8"))
        return f"another run: process {signed['pid']} on {signed['host']}, since {signed['since']}"
    except (OSError, ValueError, TypeError, KeyError):  # not signed yet
        return "another run"


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:  # the innermost first
        with suppress(OSError):
            folder.rmdir()
