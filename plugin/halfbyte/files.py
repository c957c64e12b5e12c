"""Files that survive a crash: written aside and renamed, forced to disk, identified by their sha256."""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LONGEST_TEXT = 1 << 28  # bytes of a configuration, template, tokenizer or record; more would fill the memory
_CHUNK = 1 << 20


def read(path: Path, most: int | None = None) -> bytes:
    """The content of the regular file at ``path``.

    Raises OSError for anything else, such as a pipe, which would block, and for more than ``most`` bytes.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if most is not None and state.st_size > most:
            raise OSError(errno.EFBIG, f"more than {most:,} bytes", str(path))
        return file.read()


def replace_file(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` atomically and durably, creating the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_file(temporary, content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Remove what a process that was killed inside :func:`replace_file` left in ``directory``, which no other uses."""
    for path in directory.glob(".*.[0-9]*.tmp"):
        path.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` and force it to disk."""
    with named(path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Have an OSError of the block name ``path``: that of a write or a flush names nothing."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def overwrite_file(path: Path, content: bytes) -> bool:
    """Put ``content`` into the file at ``path`` in place; False if that may need more room: for a disk that is full."""
    if len(content) > path.stat().st_blocks * 512:
        return False
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()
    return True


def follow_umask(directory: Path) -> None:
    """Give the files below ``directory`` the mode of a file that is created there: safetensors writes 0600."""
    probe = directory / f".mode.{os.getpid()}.tmp"
    try:
        probe.touch(exist_ok=False)
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
    for path in directory.rglob("*"):
        found = path.lstat().st_mode
        if stat.S_ISREG(found) and stat.S_IMODE(found) != mode:
            with suppress(OSError):  # a file system without modes
                path.chmod(mode)


def digest(path: Path) -> str:
    """The sha256 of the file at ``path``."""
    return entry(path)["sha256"]  # type: ignore[return-value]


def digest_of(value: object) -> str:
    """The sha256 of a value in JSON's types, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(text: str) -> str:
    """The sha256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def entry(path: Path, *, durable: bool = False) -> dict[str, int | str]:
    """Size in bytes and sha256 of the file at ``path``; with ``durable`` its content is forced to disk as well."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while chunk := file.read(_CHUNK):
            found.update(chunk)
        if durable:
            os.fsync(file.fileno())
    return {"size": size, "sha256": found.hexdigest()}


def sync(directory: Path) -> None:
    """Force the entries of ``directory`` to disk: after a file was created in it, or renamed into it."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def next_free(directory: Path, stem: str = "") -> Path:
    """The first of ``directory``/``stem``1, ``stem``2, ... that does not exist."""
    number = 1
    while (candidate := directory / f"{stem}{number}").exists():
        number += 1
    return candidate


def delete(path: Path) -> None:
    """Delete a file, a symbolic link or a whole directory; a path that does not exist is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def total_size(path: Path) -> int:
    """Return the bytes of the regular files at and below ``path``, without following links."""
    size = 0
    for found in (path, *path.rglob("*")):
        with suppress(OSError):
            state = found.lstat()
            size += state.st_size if stat.S_ISREG(state.st_mode) else 0
    return size
