"""Triton kernels; nothing is usable yet."""

from torch import Tensor


def usable(x: Tensor) -> bool:
    return False
