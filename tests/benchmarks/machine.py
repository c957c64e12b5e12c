"""What the numbers depend on, apart from the options: the machine, the versions, the commit."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

_LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
_NATIVE = ("avx512f", "avx512_bf16", "amx_bf16")


def facts() -> dict[str, str]:
    """A line of RESULTS.md each."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((x.split(":", 1)[1].strip() for x in cpu.splitlines() if x.startswith("model name")), "?")
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    return {
        "commit": commit(),
        "CPU": f"{model}, {os.cpu_count()} cores, {', '.join(name for name in _NATIVE if name in cpu)}",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": str(torch.get_num_threads()),
        "load average at the end (1, 5, 15 min)": load,
        "Python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }


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
