"""Every file that a run and the store write has the mode that the umask gives."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from halfbyte.cli import main
from halfbyte.files import follow_umask
from tests import tiny


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def wrong(directory: Path, mask: int) -> list[tuple[str, str]]:
    """What is found in ``directory`` with another mode than the mask gives."""
    found = [
        (path, path.lstat().st_mode) for path in (directory, *directory.rglob("*")) if not path.is_symlink()
    ]
    return [
        (oct(stat.S_IMODE(mode)), path.name)
        for path, mode in found
        if stat.S_IMODE(mode) != (0o777 if stat.S_ISDIR(mode) else 0o666) & ~mask
    ]


@pytest.mark.parametrize("mask", [0o022, 0o027])
@pytest.mark.parametrize("adapter", [True, False])
def test_a_finished_run_and_the_store(
    tmp_path: Path,
    model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    umask,
    mask: int,
    adapter: bool,
) -> None:
    umask(mask)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = tiny.write_rows(tmp_path / "rows", tiny.conversations(8))
    options = {
        **{"--model_name_or_path": str(model_dir("llama")), "--dataset_name": rows},
        **{"--output_dir": str(tmp_path / "out"), "--max_steps": "1", "--save_steps": "1"},
        **{"--report_to": "none", "--dtype": "float32"},
        **({} if adapter else {"--use_peft": "false", "--load_in_4bit": "false"}),
    }
    assert main(["sft", *(word for pair in options.items() for word in pair)]) == 0
    assert wrong(tmp_path / "out", mask) == []
    if adapter:
        assert list((tmp_path / "cache" / "halfbyte").rglob("*.safetensors"))
        assert wrong(tmp_path / "cache" / "halfbyte", mask) == []


def test_links_and_directories_keep_theirs(tmp_path: Path, umask) -> None:
    umask(0o027)
    (tmp_path / "a").mkdir(mode=0o700)
    (tmp_path / "a" / "weights").touch(mode=0o600)
    (tmp_path / "other").touch(mode=0o600)
    (tmp_path / "a" / "link").symlink_to(tmp_path / "other")
    follow_umask(tmp_path / "a")
    modes = {
        path.name: stat.S_IMODE(path.lstat().st_mode) for path in tmp_path.rglob("*") if not path.is_symlink()
    }
    assert modes == {"a": 0o700, "weights": 0o640, "other": 0o600}
