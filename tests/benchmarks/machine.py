"""What the numbers depend on, apart from the options: the machine, the versions, the commit."""

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

_LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
_NATIVE = ("avx512f", "avx512_bf16", "amx_bf16")


def facts() -> dict[str, str]:
    """The commit, the machine and the versions."""
    return {"commit": commit(), **_standing()}


def _standing() -> dict[str, str]:
    """What does not change from run to run."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((x.split(":", 1)[1].strip() for x in cpu.splitlines() if x.startswith("model name")), "?")
    return {
        "CPU": f"{model}, {os.cpu_count()} cores, {', '.join(name for name in _NATIVE if name in cpu) or 'no AVX-512'}",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": str(torch.get_num_threads()),
        "Python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }


def run(module: str, words: Sequence[str], taken: str) -> str:
    """One sentence on the run that a section is from: its command, commit and machine, what it took, and the load."""
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    command = shlex.join(["python", "-m", f"tests.benchmarks.{module}", *words])
    standing = _standing()
    return (
        f"By `{command}` at {commit()} on {standing['CPU']}, torch {standing['torch']}, transformers "
        f"{standing['transformers']}: {taken}; load average {load} at the end (1, 5, 15 minutes)."
    )


def commit() -> str:
    """The commit that was measured, and whether the tree had changes on top of it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", "plugin", "tests/benchmarks/*.py")
    return f"{head} with changes" if changed else head


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or ("" if done.returncode == 0 else "unknown")
