"""A file is its content: read once, and again when anything about it changed that no one can set by hand."""

import json
import os
import shutil
from pathlib import Path

import pytest

from halfbyte import files, identity


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read, in a cache of their own; a file counts as settled at once."""
    found: list[Path] = []
    digest = files.digest

    def counting(path: Path) -> str:
        found.append(path)
        return digest(path)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(identity.files, "digest", counting)
    monkeypatch.setattr(identity, "_SETTLED", -1)
    return found


def overwrite(path: Path, content: bytes) -> None:
    """Other content of the same size, with the modification time that the file had."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path, content: bytes) -> None:
    """As rsync and tar: another file with the same name, size and modification time."""
    other = path.with_name("other")
    other.write_bytes(content)
    shutil.copystat(path, other)
    os.replace(other, path)


def test_a_file_that_did_not_change_is_read_once(tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    assert identity.sha256(path) == identity.sha256(path) == files.entry(path)["sha256"]
    assert reads == [path]
    (tmp_path / "link").symlink_to(path)
    assert identity.sha256(tmp_path / "link") == identity.sha256(path)
    assert reads == [path]


@pytest.mark.parametrize("edit", [overwrite, replace])
def test_edits_that_keep_size_and_time_are_seen(tmp_path: Path, reads: list[Path], edit) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first, before = identity.sha256(path), path.stat()
    edit(path, b"two")
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert identity.sha256(path) == files.entry(path)["sha256"] != first


def test_a_file_that_has_just_changed_is_not_remembered(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_SETTLED", 10**12)
    path = tmp_path / "a"
    path.write_bytes(b"one")
    assert identity.sha256(path) == identity.sha256(path)
    assert reads == [path, path]


@pytest.mark.parametrize("memory", ["", "[]", "{}", "null", '{"state": 1, "sha256": 2}', "[" * 10**5, "\0"])
def test_a_memory_of_any_content_is_made_again(tmp_path: Path, reads: list[Path], memory: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    identity.sha256(path)
    (kept,) = (tmp_path / "cache" / "halfbyte" / "identities").iterdir()
    kept.write_text(memory)
    assert identity.sha256(path) == files.entry(path)["sha256"]
    assert json.loads(kept.read_text())["sha256"] == files.entry(path)["sha256"]


def test_no_cache_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # a file
    assert identity.sha256(path) == files.entry(path)["sha256"]
