"""Heads of several sizes for kernels that take one: values are often smaller than keys where these are of a latent."""

from torch import Tensor
from torch.nn import functional


def alike(*heads: Tensor) -> list[Tensor]:
    """Return ``heads`` ``[..., D]`` in the size of the largest, zeros behind their own channels.

    Scores, outputs and gradients of their own channels stay the same.
    """
    size = max(x.shape[-1] for x in heads)
    return [x if x.shape[-1] == size else functional.pad(x, (0, size - x.shape[-1])) for x in heads]


def own(x: Tensor, like: Tensor) -> Tensor:
    """Return the own channels of ``x``, as many as ``like`` has, apart from those of :func:`alike`."""
    size = like.shape[-1]
    return x if x.shape[-1] == size else x[..., :size].contiguous()
