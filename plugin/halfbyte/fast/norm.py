"""RMSNorm and LayerNorm and their gradients: float32 inside, whatever the dtype outside, one pass each way."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.fast.device import blocks, kernels


@dataclass(frozen=True)
class NormForm:
    """How a norm computes: ``y = (x - mean) / sqrt(variance + eps) * scale + bias``, an RMSNorm without mean and bias.

    With ``unit_offset`` the scale is ``1 + weight``. An RMSNorm that is ``scaled_first`` rounds to the dtype of ``x``
    after scaling (transformers' ``GemmaRMSNorm``, ``Olmo2RMSNorm``), another one before (``LlamaRMSNorm``).
    """

    centered: bool = False
    unit_offset: bool = False
    scaled_first: bool = False


@dataclass(frozen=True)
class Norm:
    """One norm of a model, of the last dimension: ``module`` has its weight, if any, and its bias, if any."""

    module: Any
    eps: float
    form: NormForm

    @property
    def weight(self) -> Tensor | None:
        """The gain ``[H]`` without its offset; None for a norm without gain."""
        weight = getattr(self.module, "weight", None)
        return weight.detach() if weight is not None else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize the last dimension of ``x`` ``[..., H]``; return it and statistics for :meth:`backward`.

        The statistics of an RMSNorm are ``1 / rms``, float32 ``[rows, 1]``.
        """
        if self.form.centered:
            y, mean, inverse = torch.ops.aten.native_layer_norm(x, x.shape[-1:], *self._affine(x), self.eps)
            return y, torch.stack((mean, inverse))
        fused = kernels(x)
        forward = norm_forward if fused is None else fused.norm_forward
        return forward(x, self._gain(x), self.eps, self.form.unit_offset, self.form.scaled_first)

    def backward(self, dy: Tensor, x: Tensor, statistics: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the gradient of ``x`` ``[..., H]`` plus ``residual``, its gradient around the norm."""
        if self.form.centered:
            mean, inverse = statistics
            given = (dy.contiguous(), x, x.shape[-1:], mean, inverse, *self._affine(x), [True, False, False])
            dx: Tensor = torch.ops.aten.native_layer_norm_backward(*given)[0]
            return dx if residual is None else dx.add_(residual)
        fused = kernels(x)
        backward = norm_backward if fused is None else fused.norm_backward
        return backward(dy, x, statistics, self._gain(x), self.form.unit_offset, residual)

    def _gain(self, x: Tensor) -> Tensor:
        return x.new_ones(x.shape[-1]) if self.weight is None else self.weight

    def _affine(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias as PyTorch's LayerNorm takes them."""
        weight, bias = self.weight, getattr(self.module, "bias", None)
        if weight is not None and self.form.unit_offset:
            weight = weight + 1
        if isinstance(bias, Tensor):
            bias = bias.detach().to(x.dtype)
        return (weight.to(x.dtype) if weight is not None else None), bias


def norm_forward(
    x: Tensor, weight: Tensor, eps: float, unit_offset: bool, scaled_first: bool = False
) -> tuple[Tensor, Tensor]:
    """Return :meth:`Norm.forward` of ``x`` ``[..., H]`` and ``weight`` ``[H]``, block by block."""
    rows = x.reshape(-1, x.shape[-1])
    y = torch.empty_like(rows)
    inverse = rows.new_empty(len(rows), 1, dtype=torch.float32)
    scaled_first = scaled_first or unit_offset
    scale = weight.float() + unit_offset if scaled_first else weight.to(x.dtype)
    for block in blocks(rows):
        value, result, rate = rows[block].float(), y[block], inverse[block]
        torch.linalg.vector_norm(value, dim=1, keepdim=True, out=rate)
        rate.square_().div_(rows.shape[1]).add_(eps).rsqrt_()
        if scaled_first:
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
