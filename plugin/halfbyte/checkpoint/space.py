"""Room for a checkpoint: required before it is written, and reported when a save failed."""

import contextlib
import errno
import shutil
from pathlib import Path

from halfbyte.checkpoint.history import checkpoints
from halfbyte.checkpoint.usable import is_usable
from halfbyte.errors import Halted
from halfbyte.terminal.wording import first_line

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SIZES = 2  # free bytes required, in sizes of a checkpoint
_LITTLE = 65_536  # free bytes of a file system that is full: a write may have been larger than what was left


class SaveError(Halted):
    """A checkpoint could not be written, and every rank knows; the one before it is as it was."""


def require_space(directory: Path, needed: int) -> None:
    """Raise OSError if the file system of ``directory`` has less than twice ``needed`` bytes free."""
    if shutil.disk_usage(directory).free < _SIZES * needed:
        raise OSError("too little space")


def explain_failure(final: Path, needed: int, error: Exception) -> str:
    """Why ``final``, a checkpoint of ``needed`` bytes, could not be saved, and which one is still good."""
    last = next((path for path in checkpoints(final.parent) if path != final and is_usable(path)), None)
    reason = first_line(error)
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(final.parent).free
        if free < _SIZES * needed or _is_full(error):
            reason += f"; it needs {_SIZES * needed:,} bytes free (twice its size), and {free:,} are"
    left = (
        f"{last} is whole, `--resume_from_checkpoint auto` resumes from it" if last else "there is none yet"
    )
    return f"cannot save {final}: {reason}. The last good checkpoint: {left}"


def explain_full_disk(error: Exception, *places: str) -> str | None:
    """What a run that ended for want of space could not write, and what to do; None for any other error.

    Where the error names no file it is the first of ``places``, directories that the run writes to, that is full.
    """
    if not _is_full(error):
        return None
    reason = getattr(error, "strerror", None) or first_line(error)
    room = {place: _free_bytes(place) for place in places}
    full = next((place for place, free in room.items() if free is not None and free < _LITTLE), places[0])
    name = getattr(error, "filename", None) or full
    if (free := _free_bytes(name)) is None:
        return f"cannot write {name}: {reason}"
    return (
        f"cannot write {name}: {reason}, {free:,} bytes are free there; free some and continue with "
        f"`--resume_from_checkpoint auto`"
    )


def _free_bytes(name: str) -> int | None:
    """The bytes that are free where ``name`` is or would be made; None if the system does not say."""
    path = Path(name).absolute()
    with contextlib.suppress(OSError):
        return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    return None


def _is_full(error: Exception) -> bool:
    """Whether a write failed for want of space, in Python's words, Rust's or those of torch's writer."""
    words = ("No space left", "PytorchStreamWriter", "unexpected pos", *(f"os error {n}" for n in _FULL))
    return getattr(error, "errno", None) in _FULL or any(word in str(error) for word in words)
