"""Start a command as a user does, on one or several processes, and wait for it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT = 300


def environment(**extra: str) -> dict[str, str]:
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("WANDB_", "ACCELERATE_", "RANK", "WORLD_SIZE"))
    }
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", **extra}


def halfbyte(*arguments: str, cwd: Path | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
    """``python -m halfbyte ARGUMENTS`` in one process."""
    return python("halfbyte", *arguments, cwd=cwd, **extra)


def python(
    module: str, *arguments: str, cwd: Path | None = None, **extra: str
) -> subprocess.CompletedProcess[str]:
    """``python -m MODULE ARGUMENTS`` in one process."""
    return _run([sys.executable, "-m", module, *arguments], cwd, extra)


def accelerate(
    *arguments: str, processes: int = 2, module: str = "halfbyte", cwd: Path | None = None, **extra: str
) -> subprocess.CompletedProcess[str]:
    """``accelerate launch --config_file launch/cpu.yaml -m halfbyte ARGUMENTS``."""
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "launch" / "cpu.yaml"),
    ]
    # Port 0 lets the launcher find a free one, so that tests never meet on a fixed port.
    options = ["--num_processes", str(processes), "--main_process_port", "0"]
    return _run([*launcher, *options, "-m", module, *arguments], cwd, extra)


def _run(command: list[str], cwd: Path | None, extra: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
