"""Rotary positions: pairs of channels turned by an angle that grows with the position."""

import torch
from torch import Tensor

from halfbyte.fast.device import kernels


class Rotary:
    """The rotation of one batch: ``cos`` and ``sin`` as the model made them, (1 or batch, length, size).

    Both halves of the last dimension hold the same angles (transformers' ``rotate_half``): one is kept.
    """

    def __init__(self, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> None:
        half = cos.shape[-1] // 2
        self.cos = cos[..., None, :half].to(dtype)
        self.sin = sin[..., None, :half].to(dtype)

    def rotate_(self, x: Tensor, *, back: bool = False) -> Tensor:
        """Turn ``x`` (batch, length, heads, head size) in place; ``back`` turns the other way.

        A rotation's inverse is its transpose, so turning back is also how a gradient passes through it.
        """
        sin = -self.sin if back else self.sin
        fused = kernels(x)
        turn = rotate_ if fused is None else fused.rotate_
        return turn(x, self.cos, sin)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned_first = (first * cos).addcmul_(second, sin, value=-1)
    turned_second = (second * cos).addcmul_(first, sin)
    first.copy_(turned_first)
    second.copy_(turned_second)
    return x
