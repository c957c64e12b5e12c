"""Elementwise steps by device: Triton kernels on CUDA, torch operations elsewhere, block by block."""

import importlib
import importlib.util
from functools import cache
from types import ModuleType

from torch import Tensor

# Elements computed at a time on a CPU: a block and its temporaries stay in the second-level cache.
_BLOCK = 1 << 17


def kernels(x: Tensor) -> ModuleType | None:
    """Return :mod:`halfbyte.fast.kernels` if they run where ``x`` is; PyTorch for CUDA includes Triton."""
    return _kernels() if x.is_cuda else None


@cache
def _kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("halfbyte.fast.kernels")


def blocks(rows: Tensor) -> list[slice]:
    """Return ranges of rows that fit the cache, for ``rows`` of two dimensions; one range off the CPU."""
    count = len(rows)
    step = max(1, _BLOCK // rows.shape[1]) if rows.device.type == "cpu" else max(1, count)
    return [slice(start, start + step) for start in range(0, count, step)]
