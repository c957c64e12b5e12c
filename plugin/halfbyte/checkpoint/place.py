"""Whether a run can write where ``output_dir`` points: found out by looking, before anything is loaded or made."""

import os
from pathlib import Path

from halfbyte.terminal.wording import shorten


def obstacle(output_dir: str) -> str | None:
    """Why no run can write into ``output_dir``, or None; nothing is created."""
    if "\0" in output_dir:
        return "contains a NUL character; choose another"
    if not output_dir.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in output_dir):
        return f"{shorten(output_dir)} is not UTF-8, and no weights can be saved there; choose another"
    try:
        return _obstacle(output_dir)
    except (OSError, RuntimeError) as error:  # a name or path that is too long; links that form a circle
        reason = getattr(error, "strerror", None) or error
        return f"{shorten(output_dir)} cannot be used: {reason}; choose another"


def lock_beside(directory: Path) -> Path:
    """The lock file of the run in ``directory``, a resolved path: see :mod:`halfbyte.checkpoint.held`."""
    return directory.with_name(f".{directory.name}.lock")


def _obstacle(output_dir: str) -> str | None:
    given = Path(output_dir)
    if given.is_symlink() and not given.exists():
        return (
            f"{given} is a link to {os.readlink(given)}, which does not exist; create that or choose another"
        )
    place = given.resolve()
    if place == Path(place.anchor):
        return f"{given} is the root directory; choose another"
    there = next(path for path in (place, *place.parents) if os.path.lexists(path))
    if there == place and not there.is_dir():
        return f"{given} is a file; name a directory"
    if not there.is_dir():
        return f"{given} is below {there}, which is no directory; choose another"
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
        return f"{given} cannot be written: {there} is read-only for this user; choose another"
    return None
