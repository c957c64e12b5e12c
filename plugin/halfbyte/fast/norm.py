"""RMSNorm and its gradient: float32 inside, whatever the dtype outside, one pass over the data each way."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.fast.device import blocks, kernels


@dataclass(frozen=True)
class Norm:
    """One RMSNorm of a model: ``y = x / sqrt(mean(x^2) + eps) * scale``.

    ``unit_offset`` is Gemma's form: the scale is ``1 + weight`` and is applied before rounding to the dtype
    of ``x``; elsewhere it is ``weight``, applied after (transformers' ``GemmaRMSNorm``, ``LlamaRMSNorm``).
    """

    module: Any
    eps: float
    unit_offset: bool

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize the last dimension of ``x`` ``[..., H]``; return it and ``1 / rms``, float32 ``[rows, 1]``."""
        weight: Tensor = self.module.weight.detach()
        fused = kernels(x)
        forward = norm_forward if fused is None else fused.norm_forward
        return forward(x, weight, self.eps, self.unit_offset)

    def backward(self, dy: Tensor, x: Tensor, inverse: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the gradient of ``x`` ``[..., H]`` plus ``residual``, its gradient around the norm."""
        weight: Tensor = self.module.weight.detach()
        fused = kernels(x)
        backward = norm_backward if fused is None else fused.norm_backward
        return backward(dy, x, inverse, weight, self.unit_offset, residual)


def norm_forward(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    """Return :meth:`Norm.forward` of ``x`` ``[..., H]`` and ``weight`` ``[H]``, block by block."""
    rows = x.reshape(-1, x.shape[-1])
    y = torch.empty_like(rows)
    inverse = rows.new_empty(len(rows), 1, dtype=torch.float32)
    scale = weight.float() + 1.0 if unit_offset else weight.to(x.dtype)
    for block in blocks(rows):
        value, result, rate = rows[block].float(), y[block], inverse[block]
        torch.linalg.vector_norm(value, dim=1, keepdim=True, out=rate)
        rate.square_().div_(rows.shape[1]).add_(eps).rsqrt_()
        if unit_offset:
            result.copy_((value * rate).mul_(scale))
        else:
            torch.mul(value, rate, out=result).mul_(scale)
    return y.view(x.shape), inverse


def norm_backward(
    dy: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, unit_offset: bool, residual: Tensor | None
) -> Tensor:
    """Return :meth:`Norm.backward` for ``dy`` and ``x`` ``[..., H]``, block by block."""
    rows, gradients = x.reshape(-1, x.shape[-1]), dy.reshape(-1, x.shape[-1])
    around = residual.reshape(rows.shape) if residual is not None else None
    dx = torch.empty_like(rows)
    scale = weight.float() + 1.0 if unit_offset else weight.float()
    for block in blocks(rows):
        value, rate = rows[block].float(), inverse[block]
        gradient = gradients[block] * scale
        along = torch.linalg.vecdot(gradient, value, dim=1).unsqueeze(1)
        along.mul_(rate * rate * rate).div_(-rows.shape[1])
        gradient = gradient.mul_(rate) if around is None else torch.addcmul(around[block], gradient, rate)
        dx[block] = gradient.addcmul_(value, along)
    return dx.view(x.shape)
