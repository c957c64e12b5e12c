"""The experts of a layer on a GPU: all dequantized for a pass, one stack after the other, and grouped products.

With hundreds of experts a loop over them would wait for the launches of its kernels. Tokens are ordered by expert: rows
``x`` are ``[S, I]``, S the pairs of a token and an expert; ``offsets`` int32 ``[E]`` are where each expert's rows end.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from halfbyte.fast.expert_maps import Activation, Map

_ALIGNED = 8  # values of bfloat16


def is_used(device: torch.device, maps: tuple[Map, Map]) -> bool:
    """Whether ``maps`` are computed in groups on ``device``.

    torch's grouped products are for bfloat16, from Ampere on, and for rows that begin at multiples of 16 bytes.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return maps[0].dtype == torch.bfloat16 and all(
        width % _ALIGNED == 0 for each in maps for width in each.widths
    )


class GroupedExperts(torch.autograd.Function):
    """Tokens ``[N, H]``, routing weights and experts ``[N, K]`` and adapters in, the weighted sums out."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weights: Tensor,
        index: Tensor,
        maps: tuple[Map, Map],
        activation: Activation,
        *parameters: Tensor,
    ) -> Tensor:
        up, down = maps
        x, flat = hidden.to(up.dtype), weights.reshape(-1).float()
        experts, order = torch.sort(index.reshape(-1), stable=True)
        offsets = torch.bincount(experts, minlength=up.experts).cumsum(0).to(torch.int32)
        with torch.autocast(x.device.type, enabled=False):
            inner = _forward(up, x[order // index.shape[1]], offsets, experts)
            y = _forward(down, activation.forward(inner), offsets, experts)
            result = _unordered(y * flat[order, None], order, index.shape)
        ctx.save_for_backward(x, flat, order, experts, offsets, inner, *parameters)
        ctx.maps, ctx.activation, ctx.dtypes, ctx.routed = (
            maps,
            activation,
            (hidden.dtype, weights.dtype),
            index.shape,
        )
        return result.to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, flat, order, experts, offsets, inner, *_ = ctx.saved_tensors
        up, down = ctx.maps
        tokens = order // ctx.routed[1]
        gradients = up.gradients(), down.gradients()
        with torch.autocast(x.device.type, enabled=False):
            dy, share = grad[tokens].to(x.dtype), flat[order, None].to(x.dtype)
            activations = ctx.activation.forward(inner)
            # As in experts.py: the weights g are left out of dy and put into what it meets.
            dactivations = _backward(down, dy, activations * share, offsets, gradients[1])
            dweights = torch.empty_like(flat)
            dweights[order] = torch.linalg.vecdot(dactivations.float(), activations.float())
            if down.bias is not None:
                dweights[order] += torch.linalg.vecdot(dy.float(), down.bias[experts].float())
            dinner = ctx.activation.backward(dactivations.mul_(share), inner)
            dx = _unordered(
                _backward(up, dinner, x[tokens], offsets, gradients[0]).float(), order, ctx.routed
            )
        hidden_dtype, weights_dtype = ctx.dtypes
        routing = dweights.view(ctx.routed).to(weights_dtype)
        return dx.to(hidden_dtype), routing, None, None, None, *gradients[0], *gradients[1]


def _unordered(rows: Tensor, order: Tensor, routed: torch.Size) -> Tensor:
    """Add up the rows ``[S, H]`` of each token, which ``order`` has put by expert: ``[N, H]``, the same each time."""
    found = torch.empty_like(rows)
    found[order] = rows
    return found.view(*routed, -1).sum(1)


def _forward(map_: Map, x: Tensor, offsets: Tensor, experts: Tensor) -> Tensor:
    """Map ``x`` by the expert of each row, ``experts`` int64 ``[S]``; return ``[S, O]``."""
    weight = map_.whole(x.dtype)
    y = functional.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    del weight
    if map_.bias is not None:
        y += map_.bias[experts].to(y.dtype)
    if map_.adapter is not None:
        a, b = map_.adapter.whole(x.dtype)
        inner = functional.grouped_mm(x, a.transpose(1, 2), offs=offsets)
        y.add_(functional.grouped_mm(inner, b.transpose(1, 2), offs=offsets), alpha=map_.adapter.scaling)
    return y


def _backward(map_: Map, dy: Tensor, x: Tensor, offsets: Tensor, gradients: list[Tensor]) -> Tensor:
    """Return the gradient of ``x`` for ``dy`` ``[S, O]``; put those of the adapter into ``gradients``."""
    weight = map_.whole(x.dtype)
    dx = functional.grouped_mm(dy, weight, offs=offsets)
    del weight
    if map_.adapter is not None:
        a, b = map_.adapter.whole(x.dtype)
        dinner = functional.grouped_mm(dy, b, offs=offsets).mul_(map_.adapter.scaling)
        dx += functional.grouped_mm(dinner, a, offs=offsets)
        inner = functional.grouped_mm(x, a.transpose(1, 2), offs=offsets)
        da, db = map_.adapter.split(*gradients)
        da.copy_(functional.grouped_mm(dinner.t(), x, offs=offsets))
        found = functional.grouped_mm(dy.t(), inner, offs=offsets).mul_(map_.adapter.scaling)
        db.copy_(found.permute(1, 2, 0))
    return dx
