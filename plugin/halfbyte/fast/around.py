"""What is around a half of a layer: the norm before it, the norm that closes it, the factor, and the residual."""

from collections.abc import Callable

import torch
from torch import Tensor

from halfbyte.fast.norm import Norm
from halfbyte.fast.parts import AttentionParts, MlpParts
from halfbyte.fast.projections import Projections


def rows(x: Tensor) -> Tensor:
    """``[..., width]`` as ``[rows, width]``."""
    return x.reshape(-1, x.shape[-1])


def close(
    map_: Projections, parts: AttentionParts | MlpParts, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the output of a half that ends with ``map_(x)``, the input of its closing norm, and inner values."""
    around = None if residual is None else rows(residual)
    if parts.closing is None and parts.factor == 1:
        y, inner = map_.forward(x, map_.weight(x.dtype), residual=around)
        return y, None, inner
    y, inner = map_.forward(x, map_.weight(x.dtype))
    projected = None
    if parts.closing is not None:
        projected, y = y, parts.closing.forward(y)[0]
    return (y if around is None else torch.add(around, y, alpha=parts.factor)), projected, inner


def reopen(
    map_: Projections,
    parts: AttentionParts | MlpParts,
    dy: Tensor,
    projected: Tensor | None,
    input_: Callable[[], Tensor],
) -> Tensor:
    """Return the gradient of what ``map_`` returned, for ``dy`` of the half's output; ``input_`` makes its input."""
    if parts.factor != 1:
        dy = dy * parts.factor
    if parts.closing is None:
        return dy
    if projected is None:
        x = input_()
        projected = map_.forward(x, map_.weight(x.dtype))[0]
    return parts.closing.backward(dy, projected, parts.closing.forward(projected)[1])


def normed(norm: Norm | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return what a half reads, and the statistics of its norm."""
    return (x, None) if norm is None else norm.forward(x)


def normed_backward(
    norm: Norm | None, dx: Tensor, stream: Tensor, statistics: Tensor | None, around: Tensor | None
) -> Tensor:
    """Return the gradient of ``stream``, through the norm and around the half."""
    if norm is None or statistics is None:
        dstream = dx.view(stream.shape)
        return dstream if around is None else dstream.add_(around)
    return norm.backward(dx, stream, statistics, residual=around)
