"""Directories that never change, kept under the user's cache by a key that decides their content.

Quantized bases are one kind; whatever else is expensive to make and the same for all runs can be another. An entry is
named by a hash of all that decides its bytes. It is written aside, verified, and renamed into place; from then on it
is never written again, since running processes map it into memory. A file lock beside it is held shared by whoever
uses it, so that nothing in use is removed.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import platformdirs

from halfbyte.files import digest, entry, sync, write_file
from halfbyte.wording import say

# The least recently used entries of all kinds are removed when they take more than this together.
BOUND = 200 * 2**30
# Entries up to this size are hashed at every load (3 s for an 8B base, whose pages the load then finds in
# memory); of larger ones only files whose modification time is not the recorded one.
HASHED = 8 * 2**30
_MANIFEST = "manifest.json"
_LOCK, _ASIDE = ".lock", ".tmp-"
_MALFORMED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)

M = TypeVar("M")
_in_use: list[int] = []  # open lock files: the kernel releases them when this process ends, however it ends


@dataclass(frozen=True)
class Kind:
    """One kind of entry: the directory that holds it, and what to call one."""

    name: str
    noun: str


BASES = Kind("bases", "quantized base")
KINDS = (BASES,)


@dataclass(frozen=True)
class Entry:
    """One stored directory; ``base`` is what it was made from, for people. ``damaged``: its manifest is unreadable."""

    key: str
    base: str
    size: int
    used: float
    in_use: bool
    kind: str
    damaged: bool = False


def cache_directory() -> Path:
    """The user's cache for halfbyte, by the platform's convention. Raises OSError where there is no home."""
    try:
        return platformdirs.user_cache_path("halfbyte", appauthor=False)
    except RuntimeError as error:  # neither HOME nor a password entry, as in some containers
        raise FileNotFoundError("there is no home directory; set XDG_CACHE_HOME") from error


def root(kind: Kind = BASES) -> Path:
    """Where the entries of ``kind`` are."""
    return cache_directory() / kind.name


def obtain(
    kind: Kind,
    description: Mapping[str, Any],
    label: str,
    make: Callable[[], M],
    load: Callable[[Path], M],
    save: Callable[[M, Path], None],
) -> M:
    """Return ``load(entry)``, after ``save(make(), entry)`` if there is no sound entry yet.

    ``description`` holds all that decides the entry's bytes, ``label`` names it for people. ``save`` raises
    ValueError when what it wrote would load as something else. A cache that cannot be written, or an entry that is
    damaged while others use it, is reported in a line, and what ``make`` returns is used as it is.
    """
    key = _key(description)
    try:
        place = root(kind) / key
        lock = _lock_to_use(kind, key)
    except OSError as error:
        return _not_kept(kind, _reason(error), make())
    if lock is None:  # a cache that is read-only
        return load(place) if _is_sound(place) else _not_kept(kind, f"{place.parent} is read-only", make())
    if not _is_sound(place):
        with _building(kind, key):
            if not _is_sound(place):  # still: nobody has built it while this process waited
                if place.exists() and not _remove(kind, key, lock):
                    return _not_kept(
                        kind, "its entry in the store is damaged, and in use by another process", make()
                    )
                fcntl.flock(lock, fcntl.LOCK_SH)
                made = make()
                try:
                    _publish(made, place, {"label": label, "description": description}, save)
                except Exception as error:  # of the disk, or of a format's own library
                    return _not_kept(kind, _reason(error), made)
                del made
    with suppress(OSError):
        os.utime(lock)
    _in_use.append(lock)
    _evict(keep=(kind.name, key))
    return load(place)


def entries() -> list[Entry]:
    """What is stored of all kinds, the latest used first."""
    found = []
    for kind in KINDS:
        with suppress(OSError):
            for path in root(kind).iterdir():
                if path.suffix == _LOCK or _ASIDE in path.name:
                    continue  # being written, or left by a process that died
                with suppress(OSError):  # removed since
                    found.append(_entry(kind, path))
    return sorted(found, key=lambda each: -each.used)


def remove(kind: str, key: str) -> bool:
    """Remove the entry ``key`` and what was written aside for it; False if it is in use."""
    of_kind = next(each for each in KINDS if each.name == kind)
    lock = _open(of_kind, key)
    try:
        return _remove(of_kind, key, lock)
    finally:
        os.close(lock)


def _key(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:24]


def _entry(kind: Kind, path: Path) -> Entry:
    lock = path.with_name(f"{path.name}{_LOCK}")
    used = lock.stat().st_mtime if lock.exists() else path.lstat().st_mtime
    try:
        manifest = _manifest(path)
        size = sum(file["size"] for file in manifest["files"].values())
        # Entries of the first version name what they were made from in their description.
        label = str(manifest["label"] if "label" in manifest else manifest["description"]["base"])
        damaged = False
    except _MALFORMED:
        size = (
            sum(file.lstat().st_size for file in path.rglob("*")) if path.is_dir() else path.lstat().st_size
        )
        label, damaged = "", True
    return Entry(path.name, label, size, used, _is_in_use(kind, path.name), kind.name, damaged)


def _manifest(place: Path) -> dict[str, Any]:
    return dict(json.loads((place / _MANIFEST).read_text(encoding="utf-8")))


def _publish(made: M, place: Path, about: Mapping[str, Any], save: Callable[[M, Path], None]) -> None:
    for left in place.parent.glob(f"{place.name}{_ASIDE}*"):  # of a process that died: we hold the lock
        shutil.rmtree(left)
    aside = place.parent / f"{place.name}{_ASIDE}{os.getpid()}"
    try:
        aside.mkdir()
        save(made, aside)
        files = {}
        for path in sorted(aside.iterdir()):
            files[path.name] = {**entry(path, durable=True), "mtime_ns": path.stat().st_mtime_ns}
        write_file(aside / _MANIFEST, json.dumps({**about, "files": files}, indent=2).encode())
        aside.rename(place)
        sync(place.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_sound(place: Path) -> bool:
    """Whether every file is there as it was written."""
    try:
        files = _manifest(place)["files"]
        hash_all = sum(file["size"] for file in files.values()) <= HASHED
        for name, recorded in files.items():
            state = (place / name).stat()
            if state.st_size != recorded["size"]:
                return False
            changed = hash_all or state.st_mtime_ns != recorded["mtime_ns"]
            if changed and digest(place / name) != recorded["sha256"]:
                return False
    except _MALFORMED:
        return False
    return bool(files)


def _remove(kind: Kind, key: str, lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    place = root(kind) / key
    if place.exists() or place.is_symlink():
        place.rename(
            place.with_name(f"{key}{_ASIDE}gone-{os.getpid()}")
        )  # at once: no reader sees half an entry
    for path in place.parent.glob(f"{key}{_ASIDE}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return True


def _evict(keep: tuple[str, str]) -> None:
    stored = entries()
    total = sum(each.size for each in stored)
    for each in reversed(stored):
        if total <= BOUND:
            break
        with suppress(OSError):  # another user's
            if (each.kind, each.key) != keep and remove(each.kind, each.key):
                total -= each.size


def _is_in_use(kind: Kind, key: str) -> bool:
    try:
        lock = os.open(root(kind) / f"{key}{_LOCK}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


@contextmanager
def _building(kind: Kind, key: str) -> Iterator[None]:
    """Let one process build at a time; the others wait, and find the entry when they get here."""
    descriptor = _open(kind, f"{key}.build")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock_to_use(kind: Kind, key: str) -> int | None:
    """A lock on ``key``, held shared; None where an existing store cannot be written."""
    try:
        root(kind).mkdir(parents=True, exist_ok=True)
        lock = _open(kind, key)
    except OSError:
        if not (root(kind) / key).is_dir():
            raise
        return None
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def _open(kind: Kind, name: str) -> int:
    return os.open(root(kind) / f"{name}{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _not_kept(kind: Kind, reason: str, made: M) -> M:
    say(f"the {kind.noun} is not kept for later runs: {reason}", error=True)
    return made


def _reason(error: Exception) -> str:
    place = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    return f"{error.strerror if isinstance(error, OSError) and error.strerror else error}{place}"
