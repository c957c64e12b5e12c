"""Causal attention on a CPU as blocks of matrix products, with the softmax between them in float32.

PyTorch's kernel for CPUs is slow where its vectors do not fill, most in its backward. That backward over this one, time
by tokens of a sequence (AMD EPYC, AVX512-BF16 without AMX, one thread, medians of six in turn):

======== ============ ==== ==== ==== ==== =====
dtype    heads, size    64  128  256  512  1024
======== ============ ==== ==== ==== ==== =====
bfloat16 8 of 4, 64    2.0  2.1  1.5  1.4   1.0
bfloat16 32 of 8, 128  2.6  2.3  1.3  1.4
float32  8 of 4, 64    0.6  0.7  1.0  1.2   1.1
float32  32 of 8, 128  1.0  1.2  1.2  1.5
======== ============ ==== ==== ==== ==== =====

The forward is slower than the kernel's, but for heads of 128 from 256 tokens on (1.1 to 1.5 times as fast). Queries of
one key's heads are rows of one product, so that keys and values are shared without a copy.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Queries of a block: the scores of a block and its temporaries stay in the second-level cache.
_QUERIES = {torch.bfloat16: 128, torch.float32: 64}


def faster_forward(dtype: torch.dtype, size: int, keys: int) -> bool:
    """Whether :func:`forward` is the faster form for heads of ``size`` and so many keys."""
    return dtype in _QUERIES and size >= 128 and keys >= 256


def faster_backward(dtype: torch.dtype, size: int, keys: int) -> bool:
    """Whether :func:`backward` is the faster form for heads of ``size`` and so many keys."""
    if dtype == torch.bfloat16:
        return keys <= 1024
    return dtype == torch.float32 and keys >= (128 if size >= 128 else 384)


@dataclass(frozen=True)
class Block:
    """A range of queries, the range of keys that they may see, and where in it they may not: bool ``[queries, keys]``.

    ``hidden`` covers the last keys of the range only.
    """

    queries: slice
    keys: slice
    hidden: Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """Return output ``[B, T, Nq, D]`` and log-sums float32 ``[B, Nq, T]``.

    ``q`` is ``[B, T, Nq, D]``, ``k`` and ``v`` ``[B, K, Nkv, D]``; the last query sees the last key.
    """
    groups = q.shape[2] // k.shape[2]
    query, key, value = _queries_first(q, groups), _keys_first(k), _keys_first(v)
    out = torch.empty_like(query)
    log_sums = q.new_empty(query.shape[:3], dtype=torch.float32)
    for block in _blocks(q.shape[1], k.shape[1], q.dtype, window, groups):
        weights = _scores(_rows(query, block.queries), key[:, block.keys], scale, block)
        largest = weights.amax(-1, keepdim=True)
        weights.sub_(largest).exp_()
        total = weights.sum(-1, keepdim=True)
        product = torch.bmm(weights.to(v.dtype), value[:, block.keys])
        _put(out, block.queries, product.float().div_(total))
        _put(log_sums.unsqueeze(-1), block.queries, largest.add_(total.log_()))
    return _back(out, q.shape), log_sums.view(len(q), q.shape[2], q.shape[1])


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    log_sums: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``q``, and of ``k`` and ``v`` in float32; the arguments are those of :func:`forward`."""
    groups = q.shape[2] // k.shape[2]
    query, dout = _queries_first(q, groups), _queries_first(do, groups)
    along = torch.linalg.vecdot(o.float(), do.float()).transpose(1, 2).reshape(len(query), groups, -1, 1)
    key, value = _keys_first(k), _keys_first(v)
    sums = log_sums.reshape(len(query), groups, -1, 1)
    dquery = torch.empty_like(query)
    dkey, dvalue = (torch.zeros(x.shape, dtype=torch.float32) for x in (key, value))
    for block in _blocks(q.shape[1], k.shape[1], q.dtype, window, groups):
        rows, drows = _rows(query, block.queries), _rows(dout, block.queries)
        keys, values = key[:, block.keys], value[:, block.keys]
        weights = _scores(rows, keys, scale, block).sub_(_rows(sums, block.queries)).exp_()
        _add_product(dvalue[:, block.keys], weights.to(q.dtype), drows)
        dweights = torch.bmm(drows, values.mT).float().sub_(_rows(along, block.queries))
        dscores = dweights.mul_(weights).mul_(scale).to(q.dtype)
        _put(dquery, block.queries, torch.bmm(dscores, keys))
        _add_product(dkey[:, block.keys], dscores, rows)
    heads = (len(q), k.shape[2], *dkey.shape[1:])
    return _back(dquery, q.shape), dkey.view(heads).transpose(1, 2), dvalue.view(heads).transpose(1, 2)


def _scores(rows: Tensor, keys: Tensor, scale: float, block: Block) -> Tensor:
    """The scaled scores of a block, float32 ``[B*Nkv, groups*queries, keys]``, -inf where they are hidden."""
    if rows.dtype == torch.float32:
        scores = torch.baddbmm(rows.new_empty(()), rows, keys.mT, beta=0, alpha=scale)
    else:
        scores = torch.bmm(rows, keys.mT).float().mul_(scale)
    queries, last = block.hidden.shape
    scores.view(len(rows), -1, queries, scores.shape[2])[..., -last:].masked_fill_(
        block.hidden, float("-inf")
    )
    return scores


def _blocks(queries: int, keys: int, dtype: torch.dtype, window: int | None, groups: int) -> Iterator[Block]:
    size = max(16, _QUERIES[dtype] // groups) if groups > 2 else _QUERIES[dtype]
    offset = keys - queries
    triangle = torch.ones(size, size, dtype=torch.bool).triu_(1)
    for start in range(0, queries, size):
        end = min(start + size, queries)
        first = 0 if window is None else max(0, offset + start - window + 1)
        if window is None:
            hidden = triangle[: end - start, : end - start]
        else:
            query = torch.arange(offset + start, offset + end).unsqueeze(1)
            key = torch.arange(first, offset + end)
            hidden = (key > query) | (key <= query - window)
        yield Block(slice(start, end), slice(first, offset + end), hidden)


def _queries_first(x: Tensor, groups: int) -> Tensor:
    """``[B, T, Nq, D]`` as ``[B*Nkv, groups, T, D]``."""
    batch, tokens, heads, size = x.shape
    return x.transpose(1, 2).reshape(batch * heads // groups, groups, tokens, size)


def _keys_first(x: Tensor) -> Tensor:
    """``[B, K, Nkv, D]`` as ``[B*Nkv, K, D]``."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _rows(x: Tensor, queries: slice) -> Tensor:
    """A block of ``[B*Nkv, groups, T, width]`` as ``[B*Nkv, groups*queries, width]``."""
    return x[:, :, queries].reshape(len(x), -1, x.shape[3])


def _put(x: Tensor, queries: slice, rows: Tensor) -> None:
    """Write what :func:`_rows` would read."""
    part = x[:, :, queries]
    part.copy_(rows.view(part.shape))


def _back(x: Tensor, shape: torch.Size) -> Tensor:
    """``[B*Nkv, groups, T, D]`` as ``[B, T, Nq, D]``."""
    return x.view(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)


def _add_product(total: Tensor, rows: Tensor, other: Tensor) -> None:
    """Add ``rows' other`` to ``total``, float32."""
    if rows.dtype == torch.float32:
        total.baddbmm_(rows.mT, other)
    else:
        total.add_(torch.bmm(rows.mT, other))
