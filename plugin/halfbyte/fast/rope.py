"""Rotary position embeddings: pairs of channels rotated by an angle that grows with the position."""

import torch
from torch import Tensor

from halfbyte.fast.device import kernels


class Rotary:
    """The rotation of one batch: ``cos`` and ``sin`` as the model computes them, ``[1 or B, T, D]``, cast to ``dtype``.

    Both halves of the last dimension hold the same angles (transformers' ``rotate_half``): one is kept.
    """

    def __init__(self, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> None:
        half = cos.shape[-1] // 2
        self.cos = cos[..., None, :half].to(dtype)
        self.sin = sin[..., None, :half].to(dtype)

    def rotate_(self, x: Tensor, *, back: bool = False) -> Tensor:
        """Rotate ``x`` ``[B, T, N, D]`` in place and return it; ``back`` rotates by the opposite angle.

        A rotation's inverse is its transpose, so rotating back also computes the gradient.
        """
        sin = -self.sin if back else self.sin
        fused = kernels(x)
        turn = rotate_ if fused is None else fused.rotate_
        return turn(x, self.cos, sin)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` ``[B, T, N, D]`` in place by ``cos`` and ``sin`` ``[1 or B, T, 1, D/2]``, all of one dtype."""
    first, second = x.chunk(2, dim=-1)
    turned_first = (first * cos).addcmul_(second, sin, value=-1)
    turned_second = (second * cos).addcmul_(first, sin)
    first.copy_(turned_first)
    second.copy_(turned_second)
    return x
