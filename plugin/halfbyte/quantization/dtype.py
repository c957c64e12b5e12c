"""The dtype that a 4-bit base computes in: the one that this device supports natively."""

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from halfbyte import files, store


def choose_compute_dtype(
    device: torch.device,
    *,
    capability: Callable[[torch.device], tuple[int, int]] = torch.cuda.get_device_capability,
    bfloat16_is_faster: Callable[[], bool] | None = None,
) -> torch.dtype:
    """Return bfloat16 where it is native, else a dtype that is fast and safe on the device.

    CUDA: bfloat16 from compute capability 8.0. Below it float16, which requires a gradient scaler, since bfloat16
    is emulated there. CPU: the faster of bfloat16 and float32, measured, since bfloat16 without AVX512-BF16 or AMX
    can be a hundred times slower.
    """
    if device.type == "cuda":
        return torch.bfloat16 if capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu":
        faster = bfloat16_is_faster or cpu_bfloat16_is_faster
        return torch.bfloat16 if faster() else torch.float32
    return torch.bfloat16


def cpu_bfloat16_is_faster() -> bool:
    """Return whether this CPU multiplies bfloat16 faster than float32. The times are kept in the user's cache.

    They are measured again with another torch, CPU or number of threads, and where the file is damaged.
    """
    seconds = _read()
    if seconds is None:
        seconds = {name: _best_time(getattr(torch, name)) for name in ("bfloat16", "float32")}
        content = json.dumps({"machine": _machine(), "seconds": seconds})
        with suppress(OSError):  # without a cache a run measures again, in a few milliseconds
            files.replace_file(_record(), content.encode())
    return seconds["bfloat16"] < seconds["float32"]


def _record() -> Path:
    """The file that keeps the times on this machine. Raises OSError if the user has no cache."""
    key = files.digest_of(_machine())[:16]
    return store.cache_directory() / "dtype" / f"{key}.json"


def _machine() -> dict[str, Any]:
    """Everything that decides which dtype is faster."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = [next((x for x in lines if x.startswith(name)), "") for name in ("model name", "flags")]
    except OSError:
        cpu = [platform.processor(), platform.machine()]
    return {
        "cpu": cpu,
        # Both cap the instructions that are used.
        "capped": [os.environ.get(name) for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _read() -> dict[str, float] | None:
    try:
        seconds = json.loads(_record().read_text(encoding="utf-8"))["seconds"]
        return {name: float(seconds[name]) for name in ("bfloat16", "float32")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _best_time(dtype: torch.dtype) -> float:
    """Seconds of one matrix product [256, 512] x [512, 512], the best of five."""
    a = torch.ones(256, 512, dtype=dtype)
    b = torch.ones(512, 512, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return best
