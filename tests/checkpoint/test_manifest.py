"""A manifest notices every change to what it lists, and opens nothing that it should not."""

import json
import os
from pathlib import Path

import pytest

from halfbyte.checkpoint import manifest
from halfbyte.checkpoint.manifest import Manifest

FILES = {"a.bin": b"some bytes", "empty": b"", "deeper/b.json": b"{}"}


def recorded(**given) -> Manifest:
    values = {
        "step": 3,
        "run_id": "x",
        "world_size": 1,
        "config": {"learning_rate": 1e-4},
        "config_hash": "h",
        "inputs": {},
        "data_position": {},
        "finite": True,
        "resumable": True,
    }
    return Manifest(**{**values, **given})


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint-3"
    for name, content in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    manifest.write(directory, recorded())
    return directory


def test_what_is_whole_verifies(sealed: Path) -> None:
    found, problems = manifest.check(sealed)
    assert (found, problems) == (recorded(), [])
    assert set(json.loads((sealed / "manifest.json").read_text())["files"]) == set(FILES)


DAMAGES = ("truncated", "flipped", "emptied", "deleted", "longer")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (name, damage)
        for name in (*FILES, "manifest.json")
        for damage in (DAMAGES if FILES.get(name, b"x") else ("deleted", "longer"))
    ],
)
def test_every_damage_is_named(sealed: Path, name: str, damage: str) -> None:
    path = sealed / name
    content = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    elif damage == "longer":
        path.write_bytes(content + b"x")
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"truncated": content[:middle], "flipped": flipped, "emptied": b""}[damage])
    _, problems = manifest.check(sealed)
    assert len(problems) == 1
    assert name in problems[0]


@pytest.mark.parametrize("where", ["adapter_model.bin", "deeper/more", "new/adapter_model.safetensors"])
def test_a_file_that_was_not_saved_is_named(sealed: Path, where: str) -> None:
    (sealed / where).parent.mkdir(exist_ok=True)
    (sealed / where).write_bytes(b"")
    assert manifest.check(sealed)[1] == [f"{where} is not in the manifest; remove it"]


def test_what_file_systems_leave_behind_is_passed_over(sealed: Path) -> None:
    (sealed / ".nfs000001").write_bytes(b"")
    assert manifest.check(sealed)[1] == []


@pytest.mark.parametrize("name", ["a.bin", "manifest.json", "deeper"])
def test_links_are_not_followed(sealed: Path, tmp_path: Path, name: str) -> None:
    (sealed / name).rename(tmp_path / "outside")
    (sealed / name).symlink_to(tmp_path / "outside")
    assert "link" in manifest.check(sealed)[1][0]


def test_a_pipe_is_not_opened(sealed: Path) -> None:
    os.mkfifo(sealed / "pipe")
    assert "pipe is a link or a device" in manifest.check(sealed)[1][0]


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b'{"files": 1}', b"[" * 100_000, b"\xff\xfe", b'{"format": 1, "sha256": 0}'],
)
def test_any_other_content_is_damage(sealed: Path, content: bytes) -> None:
    (sealed / "manifest.json").write_bytes(content)
    assert manifest.check(sealed) == (None, ["manifest.json is damaged"])


def test_without_a_manifest_nothing_is_relied_on(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text("{}")
    assert "no manifest.json" in manifest.check(tmp_path)[1][0]
