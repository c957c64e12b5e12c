"""Runs with a fault in them: in this process, or launched on two."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import launch, packages, tiny
from tests.checkpoint import runs as checkpointed
from tests.checkpoint import saboteur

ENDED_SECONDS = 30


@pytest.fixture
def saboteur_options(tmp_path: Path, model_dir) -> Callable[..., list[str]]:
    """The words of a run that would go on for ever, evaluating and saving every five steps."""

    def get(**options: object) -> list[str]:
        rows = tiny.write_rows(tmp_path / "rows", tiny.conversations(44))
        chosen = {
            "model_name_or_path": model_dir("llama"),
            "dataset_name": rows,
            "output_dir": tmp_path / "run",
            "dtype": "float32",
            "max_steps": 100_000,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "logging_steps": 1,
            "save_steps": 5,
            "eval_strategy": "steps",
            "eval_steps": 5,
            "report_to": "none",
            **options,
        }
        return [word for key, value in chosen.items() for word in (f"--{key}", str(value))]

    return get


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, model_dir) -> checkpointed.Finished:
    """An uninterrupted run to hold others against, made once."""
    root = tmp_path_factory.mktemp("finished")
    made = checkpointed.Finished(
        root / "run", model_dir("llama"), tiny.write_rows(root / "rows", tiny.conversations(12))
    )
    assert checkpointed.run("sft", made.options(made.output)) == 0
    return made


@pytest.fixture(scope="session")
def sabotaged_site(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH on which the saboteur is installed."""
    installed = packages.write(tmp_path_factory.mktemp("site"), "saboteur", saboteur.ENTRY_POINTS)
    return f"{installed}:{launch.ROOT}:{os.environ.get('PYTHONPATH', '')}"


class Launched:
    """A launched run: what it printed, how it ended, and its processes."""

    def __init__(self, command: list[str], site: str, log: Path) -> None:
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, env=launch.environment(PYTHONPATH=site, SABOTEUR=str(log)), stdout=file, stderr=file
            )
        self._mark = f"SABOTEUR={log}".encode()

    @property
    def printed(self) -> str:
        return self._log.read_text(errors="replace")

    def left(self) -> list[int]:
        """The processes of this run that are alive, its launcher and loader workers among them."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self._mark in (entry / "environ").read_bytes():
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    found += [int(entry.name)] if state != "Z" else []
            except OSError:
                continue
        return found

    def kill(self) -> None:
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def launched(tmp_path: Path, sabotaged_site: str, saboteur_options):
    """``launched("torchrun", **options)``: start a sabotaged run; whatever is left of it is killed in the end."""
    runs: list[Launched] = []

    def start(launcher: str, **options: object) -> Launched:
        commands = {
            "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"],
            "accelerate": [
                *("accelerate.commands.launch", "--config_file", str(launch.ROOT / "launch" / "cpu.yaml")),
                *("--num_processes", "2", "--main_process_port", "0", "-m"),
            ],
            "accelerate-1": [
                *(
                    "accelerate.commands.launch",
                    "--config_file",
                    str(launch.ROOT / "launch" / "one_gpu.yaml"),
                ),
                "-m",
            ],
        }
        words = [sys.executable, "-m", *commands[launcher], "halfbyte", "saboteur"]
        run = Launched([*words, *saboteur_options(**options)], sabotaged_site, tmp_path / "log.txt")
        runs.append(run)
        return run

    yield start
    for run in runs:
        run.kill()
