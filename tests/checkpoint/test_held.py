"""Two runs in one output directory: the second is refused by name, and leaves nothing; a killed one blocks nobody."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.checkpoint.held import held
from halfbyte.errors import UserError
from tests import launch
from tests.checkpoint.runs import Finished, run

HOLD = """
import os, sys
from accelerate import PartialState
from halfbyte.checkpoint.held import held
PartialState(cpu=True)
with held(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def holder(output: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=launch.environment(),
    )  # fmt: skip
    assert process.stdout is not None
    while (
        process.stdout.readline().strip() != "held"
    ):  # DeepSpeed, where it is installed, prints lines of its own
        assert process.poll() is None
    return process


def test_the_second_run_is_refused_and_leaves_nothing(finished: Finished, tmp_path: Path, capsys) -> None:
    output = tmp_path / "runs" / "sft"
    first = holder(output)
    try:
        before = sorted(tmp_path.rglob("*"))
        assert run("sft", finished.options(output)) == 2
        told = capsys.readouterr().err
        assert f"is in use by another run: process {first.pid} on " in told
        assert sorted(tmp_path.rglob("*")) == before
    finally:
        first.communicate("\n", timeout=60)
    assert sorted(tmp_path.rglob("*")) == [], "what was created for the lock is removed"


def test_a_killed_run_blocks_nobody(tmp_path: Path) -> None:
    output = tmp_path / "run"
    first = holder(output)
    first.kill()
    first.communicate(timeout=60)
    assert (tmp_path / ".run.lock").exists()
    with held(str(output)):
        assert json.loads((tmp_path / ".run.lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_under_two_names_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    with held("run"):
        for name in ("./run", str(tmp_path / "run"), "link"):
            with pytest.raises(UserError, match="is in use by another run"), held(name):
                pass
    with held("link"):
        pass


def test_a_link_in_the_place_of_the_lock_is_not_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    (tmp_path / ".run.lock").symlink_to(mine)
    with held(str(tmp_path / "run")):
        pass
    assert "cannot be locked" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    with held(str(tmp_path / "run")):  # the directory itself is locked
        pass
    assert mine.read_text() == "precious"


def test_without_an_output_directory_nothing_is_held(tmp_path: Path) -> None:
    with held(None):
        pass
