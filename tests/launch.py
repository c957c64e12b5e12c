"""Start a command as a user does, on one or several processes, and wait for it.

A command begins as a fork of what has imported the libraries (`forked.py`) unless it is to be ``executed``: with an
interpreter of its own, for what that shows.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests import forked

ROOT = Path(__file__).parents[1]
TIMEOUT = 300


def environment(**extra: str) -> dict[str, str]:
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("WANDB_", "ACCELERATE_", "RANK", "WORLD_SIZE"))
    }
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", **extra}


def halfbyte(
    *arguments: str, cwd: Path | None = None, executed: bool = False, **extra: str
) -> subprocess.CompletedProcess[str]:
    """``python -m halfbyte ARGUMENTS`` in one process."""
    return python("halfbyte", *arguments, cwd=cwd, executed=executed, **extra)


def python(
    module: str, *arguments: str, cwd: Path | None = None, executed: bool = False, **extra: str
) -> subprocess.CompletedProcess[str]:
    """``python -m MODULE ARGUMENTS`` in one process."""
    to = environment(**extra)
    if not executed and forked.takes(to):
        return forked.run(module, arguments, cwd, to, TIMEOUT)
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env=to,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def accelerate(
    *arguments: str,
    processes: int = 2,
    config: str = "cpu",
    module: str = "halfbyte",
    cwd: Path | None = None,
    executed: bool = False,
    **extra: str,
) -> subprocess.CompletedProcess[str]:
    """``accelerate launch --config_file launch/CONFIG.yaml -m MODULE ARGUMENTS``."""
    # Port 0 lets the launcher find a free one, so that tests never meet on a fixed port.
    options = ["--num_processes", str(processes), "--main_process_port", "0"]
    file = str(ROOT / "launch" / f"{config}.yaml")
    words = ["--config_file", file, *options, "-m", module, *arguments]
    return python("accelerate.commands.launch", *words, cwd=cwd, executed=executed, **extra)
