"""A store of directories, keyed by content: built once per user and machine, used by every rank and run.

An entry is named by a hash of everything that decides its bytes, written beside its final name, verified and renamed
into place. Its files are never written again: running processes map them into memory. Each process that uses an entry
shares the lock beside it, so that none in use is removed. Entries that grow file by file: :mod:`halfbyte.parts`.
"""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import platformdirs

from halfbyte import files as disk
from halfbyte import locks
from halfbyte.caches import is_homeless
from halfbyte.files import delete, digest, digest_of, entry, follow_umask, sync, total_size, write_file
from halfbyte.terminal.wording import first_line, say

# The least recently used entries of all kinds are removed when the store grows beyond this many bytes.
BOUND = 200 * 2**30
# Entries up to this many bytes are hashed at every load (3 s for an 8B base, whose pages the load then finds in
# memory). In larger ones only files whose modification time differs from the recorded one are hashed.
HASHED = 8 * 2**30
MANIFEST, LOCK, BUILD_LOCK, _ASIDE = "manifest.json", ".lock", ".build.lock", ".tmp-"

M = TypeVar("M")
_in_use: list[int] = []  # open lock files: the kernel releases them when this process ends, however it ends


@dataclass(frozen=True)
class Kind:
    """One kind of entry: its directory in the cache, and its name in messages."""

    name: str
    noun: str


BASES = Kind("bases", "quantized base")
REFERENCES = Kind("references", "reference cache")
# `halfbyte cache` and the size bound cover these.
KINDS: tuple[Kind, ...] = (BASES, REFERENCES)


@dataclass(frozen=True)
class Entry:
    """One stored directory: its size in bytes, its last use in seconds since the epoch.

    ``base`` is its label. A damaged entry has no valid manifest, or lacks a file.
    """

    key: str
    base: str
    size: int
    used: float
    in_use: bool
    kind: str
    damaged: bool = False


def cache_directory() -> Path:
    """Return halfbyte's directory in the user's cache, by the platform's convention.

    Raises OSError where the user has no home directory and ``XDG_CACHE_HOME`` is not set.
    """
    if not os.environ.get("XDG_CACHE_HOME") and is_homeless():  # as in some containers
        raise FileNotFoundError("there is no home directory; set XDG_CACHE_HOME")
    return platformdirs.user_cache_path("halfbyte", appauthor=False)


def root(kind: Kind = BASES) -> Path:
    """Return the directory that holds the entries of ``kind``."""
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

    ``description`` is JSON, everything that decides the entry's bytes; ``label`` names it for people. ``save`` writes
    files into a new directory, and raises ValueError if they would load as something else. If the entry cannot be
    written, or is damaged and in use by another process, one line says so and the result of ``make`` is returned.
    """
    try:
        place = root(kind) / key_of(description)
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = locks.share(beside(place, LOCK), otherwise=place)
    except OSError as error:
        return not_kept(kind, error, make())
    # Older versions read the label as the description's base.
    about = {"label": label, "description": {"base": label, **description}}
    try:
        made = _build_missing(kind, place, lock, about, make, save)
    except BaseException:
        os.close(lock)
        raise
    if made is not None:
        os.close(lock)
        return made[0]
    _in_use.append(lock)
    with suppress(OSError):  # a read-only cache
        os.utime(lock)
        evict(keep=place)
    return load(place)


def entries() -> list[Entry]:
    """Return what is stored of all kinds, the most recently used first; an entry that is being written is left out."""
    found = []
    for kind in KINDS:
        with suppress(OSError):
            names = {path.name.partition(_ASIDE)[0] for path in root(kind).iterdir() if path.suffix != LOCK}
            for name in names - {""}:
                with suppress(OSError):  # removed since
                    found.append(_entry(kind, root(kind) / name))
    return sorted((each for each in found if each is not None), key=lambda each: -each.used)


def remove(kind: str, key: str) -> bool:
    """Remove an entry and what interrupted builds left beside it. Return False if it is in use.

    Raises OSError if it cannot be removed.
    """
    place = cache_directory() / kind / key
    if beside(place, LOCK).is_dir():  # not made by the store
        delete(beside(place, LOCK))
    lock = locks.open_lock(beside(place, LOCK))
    try:
        return _remove(place, lock)
    finally:
        os.close(lock)


def key_of(description: Mapping[str, Any]) -> str:
    """Return the name of the entry that ``description`` decides."""
    return digest_of(description)[:24]


def _build_missing(
    kind: Kind,
    place: Path,
    lock: int,
    about: Mapping[str, Any],
    make: Callable[[], M],
    save: Callable[[M, Path], None],
) -> tuple[M] | None:
    """Build the entry unless it is sound. Return what was made if it cannot be kept."""
    if _is_sound(place):
        return None
    try:
        building = locks.hold(beside(place, BUILD_LOCK))
    except OSError as error:
        return (not_kept(kind, error, make()),)
    try:
        if _is_sound(place):  # another process built it while this one waited for the lock
            return None
        try:
            if os.path.lexists(place) and not _remove(place, lock):
                raise OSError("its entry in the store is damaged, and in use by another process")
            locks.share_open(lock)
        except OSError as error:
            return (not_kept(kind, error, make()),)
        made = make()
        try:
            _publish(made, place, about, save)
        except Exception as error:  # of the disk, or of a format's own library
            return (not_kept(kind, error, made),)
    finally:
        os.close(building)
    return None


def _publish(made: M, place: Path, about: Mapping[str, Any], save: Callable[[M, Path], None]) -> None:
    _delete_leftovers(place)  # this process holds the build lock
    aside = beside(place, f"{_ASIDE}{os.getpid()}")
    try:
        aside.mkdir()
        save(made, aside)
        follow_umask(aside)
        files = {
            path.name: {**entry(path, durable=True), "mtime_ns": path.stat().st_mtime_ns}
            for path in sorted(aside.iterdir())
        }
        write_file(aside / MANIFEST, json.dumps({**about, "files": files}, indent=2).encode())
        aside.rename(place)
        sync(place.parent)
    finally:
        with suppress(OSError):
            delete(aside)


def _entry(kind: Kind, place: Path) -> Entry | None:
    in_use = locks.is_in_use(beside(place, LOCK))
    if in_use and not os.path.lexists(place):
        return None  # being written
    manifest, files = read_manifest(place)
    size = sum(file["size"] for file in files.values())
    if damaged := not _is_complete(place, files):
        size = sum(map(total_size, (place, *_leftovers(place))))
    used = 0.0
    for path in (place, beside(place, LOCK)):
        with suppress(OSError):
            used = path.lstat().st_mtime
    # Entries of older versions have the label in their description alone.
    label = manifest.get("label") or manifest.get("description", {}).get("base", "")
    return Entry(place.name, str(label), size, used, in_use, kind.name, damaged)


def read_manifest(place: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the entry's manifest, and its size, sha256 and modification time of each file; both empty if invalid."""
    path = place / MANIFEST
    try:
        manifest = json.loads(disk.read(path, disk.LONGEST_TEXT))
        files = manifest["files"]
        sizes = [file["size"] for file in files.values() if file["sha256"] and file["mtime_ns"]]
        if isinstance(manifest["description"], dict) and all(type(size) is int for size in sizes):
            return manifest, files
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return {}, {}


def _is_complete(place: Path, files: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether every file has the size that was written."""
    with suppress(OSError, ValueError):
        return bool(files) and all(
            (place / name).is_file() and (place / name).stat().st_size == file["size"]
            for name, file in files.items()
        )
    return False


def _is_sound(place: Path) -> bool:
    """Return whether every file is as it was written."""
    _, files = read_manifest(place)
    hash_all = sum(file["size"] for file in files.values()) <= HASHED
    with suppress(OSError):
        return _is_complete(place, files) and all(
            digest(place / name) == file["sha256"]
            for name, file in files.items()
            if hash_all or (place / name).stat().st_mtime_ns != file["mtime_ns"]
        )
    return False


def _remove(place: Path, lock: int) -> bool:
    if not locks.try_to_hold(lock):
        return False
    if os.path.lexists(place):
        # In one step, so that no reader sees half an entry.
        place.rename(beside(place, f"{_ASIDE}gone-{os.getpid()}"))
    _delete_leftovers(place)
    return True


def _leftovers(place: Path) -> list[Path]:
    """Return what interrupted builds and removals left beside ``place``."""
    return [path for path in place.parent.iterdir() if path.name.startswith(f"{place.name}{_ASIDE}")]


def _delete_leftovers(place: Path) -> None:
    for path in _leftovers(place):
        with suppress(OSError):
            delete(path)


def evict(keep: Path) -> None:
    """Remove the least recently used entries of a store that is too large, but not ``keep``."""
    stored = entries()
    total = sum(each.size for each in stored)
    for each in reversed(stored):
        if total <= BOUND:
            break
        with suppress(OSError):  # another user's
            if (each.kind, each.key) != (keep.parent.name, keep.name) and remove(each.kind, each.key):
                total -= each.size


def beside(place: Path, ending: str) -> Path:
    """Return the path of what lies beside the entry ``place``, such as its lock."""
    return place.with_name(f"{place.name}{ending}")


def not_kept(kind: Kind, error: Exception, made: M) -> M:
    """Say in a line why an entry is not in the store, and return what was ``made`` for it."""
    why = getattr(error, "strerror", None) or first_line(error)
    if filename := getattr(error, "filename", None):
        why = f"{why} ({filename})"
    say(f"the {kind.noun} is not kept for later runs: {why}", error=True)
    return made
