"""A rank that raises, dies or is stopped ends the whole job soon, with one message and no process left."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import launch, tiny

SECONDS = 30
CPU = ["--config_file", str(launch.ROOT / "launch" / "cpu.yaml"), "--main_process_port", "0"]
PRODUCT = f"{launch.ROOT / 'plugin'}:{launch.ROOT / 'recipes'}"


def command(
    site: str, model: Path, rows: str, output: Path, *options: str, launcher: list[str] = CPU
) -> list[str]:
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", *launcher, "-m", "halfbyte", "witness-sft"),
        *("--model_name_or_path", str(model), "--dataset_name", rows, "--output_dir", str(output)),
        *("--max_steps", "100000", "--logging_steps", "1", "--per_device_train_batch_size", "2"),
        *("--save_strategy", "no", "--report_to", "none", "--dtype", "float32", *options),
    ]


def start(words: list[str], site: str, cwd: Path) -> subprocess.Popen[str]:
    environment = launch.environment(PYTHONPATH=f"{PRODUCT}:{site}")
    return subprocess.Popen(
        words, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ranks(job: subprocess.Popen[str]) -> list[psutil.Process]:
    return [p for p in psutil.Process(job.pid).children(recursive=True) if "LOCAL_RANK" in p.environ()]


def until_step(job: subprocess.Popen[str], step: int) -> None:
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(job.stderr.read()[-3000:] if job.stderr else "no output")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return tiny.write_rows(tmp_path / "rows", tiny.conversations(24))


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.faults), 1])
def test_killing_a_rank_ends_the_job(model_dir, tmp_path: Path, rows: str, site: str, victim: int) -> None:
    job = start(command(site, model_dir("llama"), rows, tmp_path / "run"), site, tmp_path)
    try:
        until_step(job, 2)
        processes = {int(p.environ()["LOCAL_RANK"]): p for p in ranks(job)}
        assert processes.keys() == {0, 1}
        begun = time.monotonic()
        processes[victim].kill()
        _, error = job.communicate(timeout=SECONDS)
        assert time.monotonic() - begun < SECONDS
    finally:
        job.kill()
    assert job.returncode != 0
    assert not [p for p in processes.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert error.count("\nerror: ") <= 1


@pytest.mark.faults
@pytest.mark.parametrize("place", ["build", "step"])
def test_a_rank_that_raises_says_so_once(model_dir, tmp_path: Path, rows: str, site: str, place: str) -> None:
    options = ("--failing_rank", "1", "--failing_at", place)
    begun = time.monotonic()
    job = start(command(site, model_dir("llama"), rows, tmp_path / "run", *options), site, tmp_path)
    try:
        _, error = job.communicate(timeout=240)
    finally:
        job.kill()
    assert job.returncode != 0
    assert time.monotonic() - begun < 240
    messages = re.findall(r"^(?:rank \d: )?error: .*", error, flags=re.MULTILINE)
    assert len(messages) == 1, error[-3000:]
    assert "only rank 1 fails" in messages[0]
    if place == "step":
        assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    else:
        assert not (tmp_path / "run").exists()


@pytest.mark.faults
def test_a_stopped_rank_is_named(model_dir, tmp_path: Path, rows: str, site: str) -> None:
    words = command(site, model_dir("llama"), rows, tmp_path / "run", "--ddp_timeout", "6")
    job = start(words, site, tmp_path)
    processes: list[psutil.Process] = []
    try:
        until_step(job, 2)
        processes = ranks(job)
        stopped = next(p for p in processes if p.environ()["LOCAL_RANK"] == "1")
        os.kill(stopped.pid, signal.SIGSTOP)
        os.set_blocking(job.stderr.fileno(), True)  # type: ignore[union-attr]
        begun, named = time.monotonic(), ""
        assert job.stderr is not None
        for line in job.stderr:
            if "rank 1 (" in line:
                named = line
                break
        assert "behind the others" in named
        assert f"process {stopped.pid}" in named
        assert time.monotonic() - begun < SECONDS
        os.kill(stopped.pid, signal.SIGCONT)
        job.communicate(timeout=SECONDS)
    finally:
        for process in processes:
            if process.is_running():
                process.kill()
        job.kill()
    assert job.returncode != 0


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        (["--cpu", "--num_processes", "2"], "2 processes were requested, but this one trains alone"),
        pytest.param(
            [*CPU, "--mixed_precision", "bf16"],
            "sets mixed_precision bf16, but the run computes in float32",
            marks=pytest.mark.distributed,
        ),
        pytest.param(
            ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"],
            "2 processes on GPUs were requested, and this machine has no visible GPU; to train on CPUs: "
            "accelerate launch",
            marks=pytest.mark.distributed,
        ),
    ],
)
def test_a_wrong_launch_is_exit_2_with_the_right_line(
    model_dir, tmp_path: Path, rows: str, site: str, launcher: list[str], words: str
) -> None:
    job = start(command(site, model_dir("llama"), rows, tmp_path / "run", launcher=launcher), site, tmp_path)
    try:
        _, error = job.communicate(timeout=240)
    finally:
        job.kill()
    assert job.returncode != 0
    messages = re.findall(r"^(?:rank \d: )?error: .*", error, flags=re.MULTILINE)
    assert len(messages) == 1, error[-3000:]
    assert words in messages[0]
    assert "exit status 2" in error or "exitcode  : 2" in error
    assert not (tmp_path / "run").exists()
