"""Which form of the elementwise steps a tensor gets: Triton's kernels on CUDA, torch elsewhere."""

import importlib
import importlib.util
from functools import cache
from types import ModuleType

from torch import Tensor


def kernels(x: Tensor) -> ModuleType | None:
    """:mod:`halfbyte.fast.kernels` if they run where ``x`` is; PyTorch for CUDA brings Triton."""
    return _kernels() if x.is_cuda else None


@cache
def _kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("halfbyte.fast.kernels")
