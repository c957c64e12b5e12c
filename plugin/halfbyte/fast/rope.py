"""Rotary position embeddings: pairs of channels rotated by an angle that grows with the position."""

from typing import Literal

import torch
from torch import Tensor

from halfbyte.fast.device import kernels

# Which channels make a pair, and where their angle is: a channel of the first half and its fellow in the second, or
# neighbours, with the angles of all pairs in the first half of `cos` or each twice; or halves, with each angle once.
Pairing = Literal["halves", "neighbours", "neighbours, angles twice", "halves, angles once"]
PAIRINGS: tuple[Pairing, ...] = ("halves", "neighbours", "neighbours, angles twice", "halves, angles once")


class Rotary:
    """The rotation of one batch: ``cos`` and ``sin`` as the model computes them, ``[1 or B, T, rotated channels]``.

    They are cast to ``dtype`` unless the model keeps them in float32, where it rotates in float32. Most models give
    each angle twice: one is kept. ``width`` is the number of rotated channels.
    """

    def __init__(self, cos: Tensor, sin: Tensor, dtype: torch.dtype, pairing: Pairing = "halves") -> None:
        once = pairing == "halves, angles once"
        self.width, self.neighbours = cos.shape[-1] * (2 if once else 1), pairing.startswith("neighbours")
        half = slice(None, None, 2) if pairing == "neighbours, angles twice" else slice(self.width // 2)
        dtype = torch.promote_types(cos.dtype, dtype)
        self.cos = cos[..., None, half].to(dtype)
        self.sin = sin[..., None, half].to(dtype)

    def rotate_(self, x: Tensor, *, back: bool = False) -> Tensor:
        """Rotate the first channels of ``x`` ``[B, T, N, D]`` in place and return it; ``back`` by the opposite angle.

        A rotation's inverse is its transpose, so rotating back also computes the gradient.
        """
        sin = -self.sin if back else self.sin
        fused = kernels(x)
        turn = rotate_ if fused is None else fused.rotate_
        turn(x[..., : self.width], self.cos, sin, self.neighbours)
        return x


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool = False) -> Tensor:
    """Rotate ``x`` ``[B, T, N, D]`` in place by ``cos`` and ``sin`` ``[1 or B, T, 1, D/2]``."""
    first, second = (x[..., 0::2], x[..., 1::2]) if neighbours else x.chunk(2, dim=-1)
    turned_first = (first * cos).addcmul_(second, sin, value=-1)
    turned_second = (second * cos).addcmul_(first, sin)
    first.copy_(turned_first)
    second.copy_(turned_second)
    return x
