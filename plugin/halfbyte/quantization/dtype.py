"""Which dtype the 4-bit base computes in, decided by what this device does natively."""

import time
from collections.abc import Callable

import torch


def choose_compute_dtype(
    device: torch.device,
    *,
    capability: Callable[[torch.device], tuple[int, int]] = torch.cuda.get_device_capability,
    bfloat16_is_faster: Callable[[], bool] | None = None,
) -> torch.dtype:
    """Return bfloat16 where it is native, else what the device is fast and safe in.

    CUDA: bfloat16 from compute capability 8.0; below it float16 (to be run with a gradient scaler), since
    bfloat16 is emulated there. CPU: the faster of bfloat16 and float32 by measurement, since bfloat16
    without AVX512-BF16 or AMX can be a hundred times slower.
    """
    if device.type == "cuda":
        return torch.bfloat16 if capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu":
        faster = bfloat16_is_faster or _cpu_bfloat16_is_faster
        return torch.bfloat16 if faster() else torch.float32
    return torch.bfloat16


def _cpu_bfloat16_is_faster() -> bool:
    """Time one matrix product of training size in both dtypes, the best of five runs each."""
    return _best_time(torch.bfloat16) < _best_time(torch.float32)


def _best_time(dtype: torch.dtype) -> float:
    a = torch.ones(256, 512, dtype=dtype)
    b = torch.ones(512, 512, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return best
