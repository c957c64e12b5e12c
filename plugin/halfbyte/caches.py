"""A place for what libraries cache, where their own cannot be written: no home directory, or a read-only one."""

import os
import stat
import tempfile
from functools import cache
from pathlib import Path

from halfbyte.errors import UserError
from halfbyte.terminal.wording import say


def provide() -> None:
    """Name a place for each cache that has none that can be written, in this process's environment, and say so.

    A container's user may have no home directory, or models that are mounted read-only. What is set and can be written
    stays as it is. To be called before the libraries are imported: they read these variables then.
    """
    moved = {}
    if is_homeless():
        moved["HOME"] = os.environ["HOME"] = str(place())
    home = Path.home()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    hub = Path(os.environ.get("HF_HOME") or caches / "huggingface").expanduser()
    usual = {
        "HF_HOME": hub,
        "HF_DATASETS_CACHE": hub / "datasets",
        "HF_MODULES_CACHE": hub / "modules",
        "MPLCONFIGDIR": home / ".config" / "matplotlib",
        "TRITON_HOME": home,
        "WANDB_CACHE_DIR": caches / "wandb",
        "WANDB_CONFIG_DIR": home / ".config" / "wandb",
        "WANDB_DATA_DIR": home / ".local" / "share" / "wandb",
    }
    for name, path in usual.items():
        # Models that are there are read from where they are.
        kept = name == "HF_HOME" and path.exists()
        if not kept and not _is_writable(Path(os.environ.get(name) or path).expanduser()):
            moved[name] = os.environ[name] = str(place() / name.lower())
    if moved:
        say(f"caches that cannot be written are in {place()} instead: {', '.join(moved)}", error=True)


def is_homeless() -> bool:
    """Whether the user has no home directory: neither HOME nor a password entry, or only :func:`place`."""
    home = os.path.expanduser("~")
    return not os.path.isabs(home) or Path(home) == _shared()


@cache
def place() -> Path:
    """This user's own directory among the temporary ones, which the processes of a job share."""
    shared = _shared()
    try:
        shared.mkdir(mode=0o700, exist_ok=True)
        found = shared.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return shared
        return Path(tempfile.mkdtemp(prefix="halfbyte-"))  # someone else's
    except OSError as error:
        raise UserError(
            f"cannot write to {shared.parent}: {error.strerror}; set TMPDIR to a directory"
        ) from error


def _shared() -> Path:
    return Path(tempfile.gettempdir()) / f"halfbyte-{os.getuid()}"


def _is_writable(path: Path) -> bool:
    there = next(above for above in (path, *path.absolute().parents) if os.path.lexists(above))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK, effective_ids=True)
