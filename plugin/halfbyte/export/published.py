"""A new directory that is there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte import files, locks
from halfbyte.errors import UserError
from halfbyte.terminal.wording import memory


@contextmanager
def published(output: Path, needed: int) -> Iterator[Path]:
    """Give a directory beside ``output``, which is renamed to it when the block ends without an error.

    What an interrupted attempt left is removed first. Raises :class:`UserError` where ``output`` has content already,
    where another process writes it, and where its disk has not the ``needed`` bytes.
    """
    output = output.absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not empty; name another directory", option="--output_dir")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = output.with_name(f".{output.name}.unfinished")
        lock = locks.open_lock(output.with_name(f".{output.name}.lock"))
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or output}: {error.strerror}", option="--output_dir"
        ) from error
    try:
        if not locks.try_to_hold(lock):
            raise UserError(f"another process is writing {output}", option="--output_dir")
        files.delete(aside)
        if (free := shutil.disk_usage(output.parent).free) < needed:
            raise UserError(
                f"{output.parent} has {memory(free)} free, and {memory(needed)} are needed",
                option="--output_dir",
            )
        aside.mkdir()
        try:
            yield aside
            files.follow_umask(aside)
            if output.is_dir():
                output.rmdir()
            aside.rename(output)
            files.sync(output.parent)
        finally:
            files.delete(aside)
    finally:
        os.close(lock)
        output.with_name(f".{output.name}.lock").unlink(missing_ok=True)
