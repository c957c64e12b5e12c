"""Entries of the store that grow: written part by part, so that an interrupted build continues where it was.

The manifest lists the parts that are whole, and is replaced after each. One process builds at a time; others may read.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from halfbyte import locks, store
from halfbyte.files import delete, read, remove_leftovers, replace_file, sync
from halfbyte.store import Kind
from halfbyte.terminal.wording import say


class Parts:
    """One entry of ``kind``, named by ``description``, and its parts by name; to be closed.

    ``label`` says in ``halfbyte cache ls`` what it is for. Raises OSError where the store cannot be used.
    """

    def __init__(self, kind: Kind, description: Mapping[str, Any], label: str) -> None:
        self.place = store.root(kind) / store.key_of(description)
        self.place.parent.mkdir(parents=True, exist_ok=True)
        self._kind, self._label = kind, label
        self._description = {"base": label, **description}
        self._build: int | None = None
        self._holds = False
        self._damaged: set[str] = set()
        self._lock = locks.share(store.beside(self.place, store.LOCK), otherwise=self.place)
        with suppress(OSError):  # a read-only cache
            os.utime(self._lock)

    def close(self) -> None:
        """Release the locks."""
        for lock in (self._build, self._lock):
            if lock is not None:
                os.close(lock)

    def read(self, name: str) -> bytes | None:
        """Return the part ``name`` as it was written, or None; one line says so where it is damaged."""
        _, files = store.read_manifest(self.place)
        if name not in files:
            return None
        try:
            content = read(self.place / name)
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        else:
            if hashlib.sha256(content).hexdigest() == files[name]["sha256"]:
                return content
            problem = "has changed content (sha256)"
        if name not in self._damaged:
            self._damaged.add(name)
            say(f"the {self._kind.noun} {self.place / name} {problem}; it is computed again", error=True)
        return None

    def try_to_build(self) -> bool:
        """Take the right to :meth:`add` and return True, or return False while another process has it."""
        if self._build is None:
            self._build = locks.open_lock(store.beside(self.place, store.BUILD_LOCK))
        if self._holds:
            return True
        self._holds = locks.try_to_hold(self._build)
        if self._holds:
            if not store.read_manifest(self.place)[1] and os.path.lexists(
                self.place
            ):  # without a valid manifest
                delete(self.place)
            self.place.mkdir(exist_ok=True)
            remove_leftovers(self.place)
        return self._holds

    def add(self, name: str, content: bytes, total: int) -> None:
        """Write the part ``name``, one of ``total``, durably; it counts from when the manifest lists it.

        Raises OSError; what was there before is as it was.
        """
        assert self._holds
        path = self.place / name
        replace_file(path, content)
        sync(self.place)
        entry = {
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "mtime_ns": path.stat().st_mtime_ns,
        }
        files = {**store.read_manifest(self.place)[1], name: entry}
        label = self._label if len(files) == total else f"{self._label}, {len(files)} of {total} parts"
        about = {"label": label, "description": self._description, "files": files}
        replace_file(self.place / store.MANIFEST, json.dumps(about, indent=2).encode())
        sync(self.place)
        if len(files) == total:
            store.evict(keep=self.place)


def names_of(kind: Kind, description: Mapping[str, Any]) -> set[str]:
    """Return the names of the parts that are stored of an entry; nothing is verified, and no lock taken."""
    with suppress(OSError):
        return set(store.read_manifest(store.root(kind) / store.key_of(description))[1])
    return set()


def holds(kind: Kind, **described: Any) -> bool:
    """Return whether the store has an entry of ``kind`` with these items in its description."""
    found: list[Path] = []
    with suppress(OSError):
        found = [path for path in store.root(kind).iterdir() if path.is_dir()]
    return any(
        described.items() <= store.read_manifest(path)[0].get("description", {}).items() for path in found
    )
