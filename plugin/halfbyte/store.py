"""Quantized bases, kept: each is made once per user and machine, and loaded by every rank, run and recipe.

An entry is a directory of safetensors named by a hash of all that decides its bytes. It is written aside,
checked, and renamed into place; from then on it is never written again, since running processes map it
into memory. A file lock beside it is held shared by whoever uses it, so that nothing in use is removed.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from halfbyte.quantization.checkpoint import directory_of

FORMAT = 1
# The least recently used entries go when the store grows beyond this.
BOUND = 200 * 2**30
# Entries up to this size are hashed at every load (3 s for an 8B base, whose pages the load then finds in
# memory); of larger ones only files whose modification time is not the recorded one.
HASHED = 8 * 2**30
_MANIFEST = "manifest.json"

M = TypeVar("M")
_in_use: list[int] = []  # open lock files: the kernel releases them when this process ends, however it ends


@dataclass(frozen=True)
class Entry:
    """One stored base."""

    key: str
    base: str
    size: int
    used: float
    in_use: bool


def root() -> Path:
    """The store's directory, by the platform's convention for caches."""
    if sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "halfbyte" / "bases"


def describe(name: str, revision: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """All that decides an entry's bytes, or None if the checkpoint's files are not at hand.

    No weight is read: a file is told by its name in the hub's cache (a hash of its content), else by its
    path, size and modification time.
    """
    directory = directory_of(name, revision)
    if directory is None:
        return None
    weights = sorted(path for path in directory.iterdir() if path.suffix in (".safetensors", ".bin"))
    if not weights:
        return None
    return {
        "format": FORMAT,
        "base": name,
        "config": hashlib.sha256((directory / "config.json").read_bytes()).hexdigest(),
        "weights": [_identity(path) for path in weights],
        "settings": {key: str(value) for key, value in sorted(settings.items())},
        "versions": {package: version(package) for package in ("bitsandbytes", "transformers")},
    }


def obtain(
    description: dict[str, Any],
    quantize: Callable[[], M],
    load: Callable[[Path], M],
    save: Callable[[M, Path], None],
) -> M:
    """Return ``load(entry)``, after ``save(quantize(), entry)`` if there is no sound entry yet.

    ``save`` raises ValueError when what it wrote would load as something else. A store that cannot be
    written, or an entry that is damaged while others use it, is said in a line, and what ``quantize``
    returns is used as it is.
    """
    key = _key(description)
    entry = root() / key
    try:
        root().mkdir(parents=True, exist_ok=True)
        lock = _open(key)
        fcntl.flock(lock, fcntl.LOCK_SH)
    except OSError as error:
        return _without(_reason(error), quantize())
    if not _sound(entry):
        with _building(key):
            if not _sound(entry):  # still: nobody has built it while this process waited
                if entry.exists() and not _remove(key, lock):
                    return _without(
                        "its entry in the store is damaged, and in use by another process", quantize()
                    )
                fcntl.flock(lock, fcntl.LOCK_SH)
                model = quantize()
                try:
                    _publish(model, entry, description, save)
                except (OSError, ValueError, SafetensorError) as error:
                    return _without(_reason(error), model)
                del model
    os.utime(lock)
    _in_use.append(lock)
    _evict(keep=key)
    return load(entry)


def entries() -> list[Entry]:
    """What is stored, the latest used first."""
    found = []
    for path in root().glob(f"*/{_MANIFEST}"):
        key = path.parent.name
        if ".tmp-" in key:
            continue  # being written, or left by a process that died
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # removed since, or damaged: the next load of it says so
        size = sum(file["size"] for file in manifest["files"].values())
        lock = root() / f"{key}.lock"
        used = lock.stat().st_mtime if lock.exists() else path.stat().st_mtime
        found.append(Entry(key, manifest["description"]["base"], size, used, _is_in_use(key)))
    return sorted(found, key=lambda entry: -entry.used)


def remove(key: str) -> bool:
    """Remove the entry ``key`` and what was written aside for it; False if it is in use."""
    lock = _open(key)
    try:
        return _remove(key, lock)
    finally:
        os.close(lock)


def _key(description: dict[str, Any]) -> str:
    # The same files under another name are the same base.
    told = {name: value for name, value in description.items() if name != "base"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]


def _identity(path: Path) -> list[Any]:
    real = path.resolve()
    if real.parent.name == "blobs":
        return [path.name, real.name]
    return [path.name, str(real), real.stat().st_size, real.stat().st_mtime_ns]


def _publish(model: M, entry: Path, description: dict[str, Any], save: Callable[[M, Path], None]) -> None:
    for left in entry.parent.glob(f"{entry.name}.tmp-*"):  # of a process that died: we hold the lock
        shutil.rmtree(left)
    aside = entry.parent / f"{entry.name}.tmp-{os.getpid()}"
    try:
        aside.mkdir()
        save(model, aside)
        files = {}
        for path in sorted(aside.iterdir()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            state = path.stat()
            files[path.name] = {"size": state.st_size, "sha256": digest, "mtime_ns": state.st_mtime_ns}
        with (aside / _MANIFEST).open("w", encoding="utf-8") as file:
            json.dump({"description": description, "files": files}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(entry)
        _sync(entry.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sound(entry: Path) -> bool:
    """Whether every file is there as it was written."""
    try:
        files = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))["files"]
        hash_all = sum(file["size"] for file in files.values()) <= HASHED
        for name, told in files.items():
            state = (entry / name).stat()
            if state.st_size != told["size"]:
                return False
            if hash_all or state.st_mtime_ns != told["mtime_ns"]:
                with (entry / name).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != told["sha256"]:
                        return False
    except (OSError, ValueError, KeyError):
        return False
    return bool(files)


def _remove(key: str, lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    entry, gone = root() / key, root() / f"{key}.tmp-gone-{os.getpid()}"
    if entry.exists():
        entry.rename(gone)  # at once, so that no reader sees half an entry
    for path in root().glob(f"{key}.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
    return True


def _evict(keep: str) -> None:
    stored = entries()
    total = sum(entry.size for entry in stored)
    for entry in reversed(stored):
        if total <= BOUND:
            break
        if entry.key != keep and remove(entry.key):
            total -= entry.size


def _is_in_use(key: str) -> bool:
    lock = _open(key)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


@contextmanager
def _building(key: str) -> Iterator[None]:
    """One builder at a time; the others wait, and find the entry when they get here."""
    descriptor = _open(f"{key}.build")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open(name: str) -> int:
    return os.open(root() / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _without(reason: str, model: M) -> M:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"the quantized base is not kept for later runs: {reason}", file=sys.stderr)
    return model


def _reason(error: Exception) -> str:
    place = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    return f"{error.strerror if isinstance(error, OSError) and error.strerror else error}{place}"
