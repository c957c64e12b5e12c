"""The experts of a layer on a GPU: all dequantized for a pass, one stack after the other, and grouped products.

With hundreds of experts a loop over them would wait for the launches of its kernels. Tokens are ordered by expert: rows
``x`` are ``[S, I]``, S the pairs of a token and an expert; ``offsets`` int32 ``[E]`` are where each expert's rows end.
"""

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.fast.expert_maps import Activation, Gradients, Map, Pass, by_expert

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


def forward(
    x: Tensor, index: Tensor, weights: Tensor, maps: tuple[Map, Map], activation: Activation
) -> tuple[Tensor, Pass]:
    """Return the weighted sums, ``[N, H]``, and what :func:`backward` reads of this pass."""
    up, down = maps
    order, offsets = by_expert(index, up.experts)
    experts = index.reshape(-1)[order]
    inner = _forward(up, x[order // index.shape[1]], offsets, experts)
    y = _forward(down, activation.forward(inner), offsets, experts)
    result = _unordered(y * weights[order, None], order, index.shape)
    return result, Pass(x, index, weights, order, offsets, inner)


def backward(grad: Tensor, kept: Pass, maps: tuple[Map, Map], activation: Activation) -> Gradients:
    """Return the gradients for ``grad`` ``[N, H]`` of the sums."""
    up, down = maps
    x, order, offsets, tokens = kept.x, kept.order, kept.offsets, kept.tokens
    up_gradients, down_gradients = up.gradients(), down.gradients()
    dy, share = grad[tokens].to(x.dtype), kept.weights[order, None].to(x.dtype)
    activations = activation.forward(kept.inner)
    # As in looped_experts.py: the weights g are left out of dy and put into what it meets.
    dactivations = _backward(down, dy, activations * share, offsets, down_gradients)
    dweights = torch.empty_like(kept.weights)
    dweights[order] = torch.linalg.vecdot(dactivations.float(), activations.float())
    if down.bias is not None:
        bias = down.bias[kept.index.reshape(-1)[order]]
        dweights[order] += torch.linalg.vecdot(dy.float(), bias.float())
    dinner = activation.backward(dactivations.mul_(share), kept.inner)
    dx = _backward(up, dinner, x[tokens], offsets, up_gradients).float()
    return Gradients(_unordered(dx, order, kept.index.shape), dweights, up_gradients, down_gradients)


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
