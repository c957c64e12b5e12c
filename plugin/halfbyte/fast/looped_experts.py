"""The experts of a layer one after the other: each that has tokens is dequantized for its products alone.

Used where :func:`halfbyte.fast.grouped_experts.is_used` does not hold.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.fast.expert_maps import Activation, Gradients, Map, Pass, by_expert

_ROWS = 64


def forward(
    x: Tensor, index: Tensor, weights: Tensor, maps: tuple[Map, Map], activation: Activation
) -> tuple[Tensor, Pass]:
    """Return the weighted sums, float32 ``[N, H]``, and what :func:`backward` reads of this pass."""
    up, down = maps
    up_weights, down_weights = up.read(), down.read()
    order, offsets = by_expert(index, up.experts)
    # On the host, where the loop of the backward reads the numbers of rows again.
    kept = Pass(x, index, weights, order, offsets.cpu(), x.new_empty(len(order), up_weights.outputs))
    tokens = kept.tokens
    result = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert, rows in _reached(kept.offsets):
        mine, count = tokens[rows], rows.stop - rows.start
        inner = up.forward(_rows(x, mine, x.dtype), expert, up_weights.of(expert, x.dtype))
        kept.inner[rows] = inner[:count]
        y = down.forward(activation.forward(inner), expert, down_weights.of(expert, x.dtype))
        result.index_add_(0, mine, y[:count] * weights[order[rows], None])
    return result, kept


def backward(grad: Tensor, kept: Pass, maps: tuple[Map, Map], activation: Activation) -> Gradients:
    """Return the gradients for ``grad`` ``[N, H]`` of the sums."""
    up, down = maps
    x, weights, tokens = kept.x, kept.weights, kept.tokens
    dx = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    found = Gradients(dx, torch.zeros_like(weights), up.gradients(), down.gradients())
    up_weights, down_weights = up.read(), down.read()
    for expert, rows in _reached(kept.offsets):
        mine, here, count = tokens[rows], kept.order[rows], rows.stop - rows.start
        inner, dy = _rows(kept.inner, rows, x.dtype), _rows(grad, mine, x.dtype)
        share = _rows(weights[:, None], here, x.dtype)
        activations = activation.forward(inner)
        # The weights g are left out of dy and put into what it meets, so that <dy, y> = <D' dy, a> + <dy, b>.
        weight = down_weights.of(expert, x.dtype)
        dactivations = down.backward(dy, activations * share, expert, weight, found.down)
        found.weights[here] = torch.linalg.vecdot(dactivations.float(), activations.float())[:count]
        if down.bias is not None:
            found.weights[here] += torch.mv(dy.float(), down.bias[expert].float())[:count]
        dinner = activation.backward(dactivations.mul_(share), inner)
        weight = up_weights.of(expert, x.dtype)
        part = up.backward(dinner, _rows(x, mine, x.dtype), expert, weight, found.up)
        dx.index_add_(0, mine, part[:count].float())
    return found


def _rows(tensor: Tensor, at: Tensor | slice, dtype: torch.dtype) -> Tensor:
    """The rows ``at`` of ``tensor`` in ``dtype``, with zeros behind them up to a number that few products have.

    So for products in 16 bits on a CPU: oneDNN compiles and keeps a kernel for every shape, and the tokens of an expert
    are of another number every time. Those in float32 are BLAS's, which keeps nothing.
    """
    found = tensor[at].to(dtype)
    if found.is_cuda or dtype == torch.float32:
        return found
    count = len(found)
    padded = max(8, 1 << (count - 1).bit_length()) if count < _ROWS else -(-count // _ROWS) * _ROWS
    return functional.pad(found, (0, 0, 0, padded - count))


def _reached(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has tokens, with its rows among those that are ordered by expert."""
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end
