"""A disk that is full, for real: the file, the bytes and what to do; a status that is true, and no debris."""

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from halfbyte.checkpoint.space import explain_full_disk
from halfbyte.files import overwrite_file
from halfbyte.tracking.metrics import MetricsLog
from tests.checkpoint.runs import Finished, run


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``disk("64k")``: a file system of that size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("needs the right to mount")
        return place

    yield mount
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


def test_full_before_the_first_step(disk, finished: Finished, capsys) -> None:
    output = disk("4k") / "run"
    assert run("sft", finished.options(output)) == 1
    error = capsys.readouterr().err
    assert "error: cannot write " in error
    assert "No space left on device, " in error
    assert "bytes are free there; free some and continue with" in error
    assert not output.exists()


def test_full_in_the_middle(disk, finished: Finished, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    output = disk("4m") / "run"
    append = MetricsLog.append

    def fill(self: MetricsLog, logs: dict, step: int, epoch: float | None) -> dict:
        if step == 3:
            with suppress(OSError), (output.parent / "others").open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 1024)
            logs = {**logs, "more": "x" * 10_000}  # beyond the block that the log has already
        return append(self, logs, step, epoch)

    monkeypatch.setattr(MetricsLog, "append", fill)
    assert run("sft", finished.options(output)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: cannot write {output / 'metrics.jsonl'}: ")
    assert error.endswith("free some and continue with `--resume_from_checkpoint auto`")
    record = json.loads((output / "run.json").read_text())
    assert (record["status"], record["steps"]) == ("failed", 3)
    assert not [path for path in output.rglob("*") if path.name.startswith((".", "_"))]
    monkeypatch.undo()
    (output.parent / "others").unlink()
    assert run("sft", finished.options(output), "--resume_from_checkpoint", "auto") == 0
    assert json.loads((output / "run.json").read_text())["status"] == "completed"


def test_where_no_file_is_named_it_is_the_place_that_is_full(disk, tmp_path: Path) -> None:
    full, error = disk("4k"), OSError(errno.ENOSPC, "No space left on device")
    (full / "others").write_bytes(b"x" * 4096)
    told = explain_full_disk(error, str(tmp_path / "run"), str(full / "cache"))
    assert told is not None
    assert told.startswith(
        f"cannot write {full / 'cache'}: No space left on device, 0 bytes are free there; "
    )
    (full / "others").unlink()
    assert str(explain_full_disk(error, str(tmp_path / "run"))).startswith(
        f"cannot write {tmp_path / 'run'}: "
    )
    assert explain_full_disk(ValueError("no"), str(full)) is None


def test_a_file_is_overwritten_only_where_it_has_room(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"long enough")
    os.sync()
    assert overwrite_file(path, b"short")
    assert path.read_bytes() == b"short"
    assert not overwrite_file(path, b"x" * 1_000_000)
    assert path.read_bytes() == b"short"
