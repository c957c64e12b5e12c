"""What identifies a file: its content, remembered so that a large file is read once."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from halfbyte import files, store

# A file that changed within this many nanoseconds may change again without another time stamp: not remembered.
_SETTLED = 2 * 10**9


def sha256(path: Path) -> str:
    """Return the sha256 of the file at ``path``.

    It is read again where its size, inode, or one of its times of change differ from those remembered for this path:
    the modification time can be set by hand (`cp -p`, rsync, tar), the time of the inode's change cannot.
    """
    real = path.resolve()
    state = _state(real)
    try:
        memory = store.cache_directory() / "identities" / files.digest_of(str(real))[:32]
    except OSError:  # no home directory
        return files.digest(real)
    if (known := _remembered(memory, state)) is not None:
        return known
    found = files.digest(real)
    if _state(real) == state and time.time_ns() - max(state[2:4]) > _SETTLED:
        with suppress(OSError):  # a read-only cache, a full disk
            files.replace_file(memory, json.dumps({"state": state, "sha256": found}).encode())
    return found


def _state(path: Path) -> list[int]:
    found = os.stat(path)
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_dev]


def _remembered(memory: Path, state: list[int]) -> str | None:
    with suppress(OSError, ValueError, RecursionError):
        held: Any = json.loads(files.read(memory, 10_000))
        if isinstance(held, dict) and held.get("state") == state and isinstance(held.get("sha256"), str):
            return str(held["sha256"])
    return None
