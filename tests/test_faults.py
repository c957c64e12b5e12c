"""Interruptions and bad places to write: a clear end, and nothing half-written in the way."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny
from tests.launch import ROOT, environment, halfbyte

ModelDir = Callable[..., Path]


def options(model: Path, rows: str, output: Path, steps: int) -> list[str]:
    return [
        *("sft", "--model_name_or_path", str(model), "--dataset_name", rows, "--output_dir", str(output)),
        *("--max_steps", str(steps), "--logging_steps", "1", "--per_device_train_batch_size", "2"),
        *("--save_strategy", "no", "--report_to", "none", "--dtype", "float32"),
    ]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return tiny.write_rows(tmp_path / "rows", tiny.conversations(24))


@pytest.mark.faults
def test_an_interrupt_ends_with_130_and_is_recorded(model_dir: ModelDir, tmp_path: Path, rows: str) -> None:
    output = tmp_path / "run"
    command = [sys.executable, "-u", "-m", "halfbyte", *options(model_dir("llama"), rows, output, 100_000)]
    process = subprocess.Popen(
        command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:  # the first row that is logged: training is under way
            if line.startswith("step 1/"):
                break
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in error
    assert json.loads((output / "run.json").read_text())["status"] == "interrupted"
    assert (output / "metrics.jsonl").read_text().count("\n") >= 1


@pytest.mark.faults
def test_an_output_directory_that_cannot_be_made(model_dir: ModelDir, tmp_path: Path, rows: str) -> None:
    (tmp_path / "file").write_text("not a directory")
    done = halfbyte(*options(model_dir("llama"), rows, tmp_path / "file" / "run", 1))
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert str(tmp_path / "file") in done.stderr
    assert (tmp_path / "file").read_text() == "not a directory"


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing"])
def test_a_damaged_base_is_named_and_writes_nothing(
    model_dir: ModelDir, tmp_path: Path, rows: str, damage: str
) -> None:
    base = tmp_path / "base"
    tiny.save_model(base)
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "missing":
        weights.unlink()
    else:
        content[8] ^= 0xFF  # the first byte of the header
        changed = {"truncated": bytes(content[:100]), "flipped": bytes(content), "empty": b""}
        weights.write_bytes(changed[damage])
    done = halfbyte(*options(base, rows, tmp_path / "run", 1))
    assert done.returncode == 2
    assert str(base) in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
def test_a_hub_token_is_in_no_file(model_dir: ModelDir, tmp_path: Path, rows: str) -> None:
    output, token = tmp_path / "run", "hf_" + "canary" * 6
    arguments = options(model_dir("llama"), rows, output, 1)
    arguments[arguments.index("--save_strategy") + 1] = "steps"
    done = halfbyte(*arguments, "--save_steps", "1", "--hub_token", token)
    assert done.returncode == 0, done.stderr
    files = [Path(at) / name for at, _, names in os.walk(output) for name in names]
    assert any(file.name == "training_args.json" for file in files)
    assert not any(file.name == "training_args.bin" for file in files)
    assert not [file for file in files if token.encode() in file.read_bytes()]
