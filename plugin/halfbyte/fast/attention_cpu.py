"""Causal attention on a CPU as matrix products: a block of queries at a time with all the keys that it sees.

The products of a block take several heads at once, with the queries of a group as rows of the head whose keys they
share, and the softmax of whole rows lies between them. What a block cannot see is not computed, except half of its own
square. All tensors are float32: oneDNN compiles a bfloat16 product for each new shape (0.6 ms) and rounds the scores.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

# Rows of one product, and scores computed at a time, which stay in the second-level cache. With 64 rows a branch of 300
# tokens behind a prefix of 1,100 takes 9% longer forward and 14% longer backward.
_ROWS = 128
_SCORES = 1 << 18


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float,
    softcap: float | None = None,
    *,
    with_sums: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, T, Nq, Dv]`` of ``q`` ``[B, T, Nq, D]`` over ``k`` and ``v`` ``[B, keys, Nkv, D or Dv]``.

    The queries are those of the last T keys; each attends to ``window`` keys, its own the last of them, or to all
    before it. A ``softcap`` bounds the scores: ``softcap * tanh(score / softcap)``. The log-sums ``[B, Nq, T]`` beside
    the output are zeros unless they are requested (``with_sums``).
    """
    kv_heads = k.shape[2]
    query, key, value = _packed(q, kv_heads).mul_(scale), _packed(k, kv_heads), _packed(v, kv_heads)
    output, memory = torch.empty(*query.shape[:2], v.shape[3]), torch.empty(0)
    sums = torch.zeros(query.shape[:2])
    for heads, rows, seen, hidden in _blocks(q, k, window):
        wanted = sums[heads, rows] if with_sums else None
        weights, _ = _weights(query[heads, rows], key[heads, seen], hidden, memory, softcap, wanted)
        output[heads, rows] = torch.bmm(weights, value[heads, seen])
    return _unpacked(output, q), _unpacked(sums[..., None], q).squeeze(-1).transpose(1, 2)


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    window: int | None,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``q``, ``k`` and ``v`` for ``do``, that of :func:`forward`'s output ``o``."""
    kv_heads = k.shape[2]
    query, key, value = _packed(q, kv_heads).mul_(scale), _packed(k, kv_heads), _packed(v, kv_heads)
    doutput, along = _packed(do, kv_heads), _packed((do * o).sum(-1, keepdim=True), kv_heads)
    dquery, dkey, dvalue = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    memory, others = torch.empty(0), torch.empty(0)
    for heads, rows, seen, hidden in _blocks(q, k, window):
        asked, answer, found = query[heads, rows], doutput[heads, rows], key[heads, seen]
        weights, slope = _weights(asked, found, hidden, memory, softcap)
        dvalue[heads, seen].baddbmm_(weights.transpose(1, 2), answer)
        dscores = torch.bmm(answer, value[heads, seen].transpose(1, 2), out=_view(others, weights.shape))
        dscores.sub_(along[heads, rows]).mul_(weights)
        if slope is not None:
            dscores.mul_(slope)
        dquery[heads, rows] = torch.bmm(dscores, found)
        dkey[heads, seen].baddbmm_(dscores.transpose(1, 2), asked)
    return _unpacked(dquery.mul_(scale), q), _unpacked(dkey, k), _unpacked(dvalue, v)


def _weights(
    query: Tensor,
    key: Tensor,
    hidden: Tensor,
    memory: Tensor,
    softcap: float | None,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The weights of scaled queries, ``[heads, rows, keys]``, in ``memory``, and the slope of the soft cap.

    ``hidden`` belongs to the last keys. The log-sums are written to ``sums`` ``[heads, rows]``.
    """
    shape = torch.Size((len(query), query.shape[1], key.shape[1]))
    scores = torch.bmm(query, key.transpose(1, 2), out=_view(memory, shape))
    slope = None
    if softcap is not None:
        scores.div_(softcap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(softcap)
    scores[..., shape[2] - hidden.shape[1] :].add_(hidden)
    highest = None if sums is None else scores.amax(-1)
    torch.softmax(scores, -1, out=scores)
    if sums is not None and highest is not None:
        sums.copy_(highest.sub_(scores.amax(-1).log_()))  # whose weight is 1 / sum(exp(score - highest))
    return scores, slope


def _blocks(q: Tensor, k: Tensor, window: int | None) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Blocks of queries: packed heads, their rows, the keys that they see, and what is added to the last scores."""
    groups = q.shape[2] // k.shape[2]
    before = k.shape[1] - q.shape[1]
    step = max(1, _ROWS // groups)
    for start in range(0, q.shape[1], step):
        count = min(step, q.shape[1] - start)
        at = before + start
        low = 0 if window is None else max(0, at + 1 - window)
        if window is None:
            hidden = _hidden(step, groups, 0, step, None)[: count * groups, :count]
        else:
            hidden = _hidden(count, groups, at - low, at - low + count, window)
        rows, seen = slice(start * groups, (start + count) * groups), slice(low, at + count)
        several = max(1, _SCORES // (count * groups * (at + count - low)))
        for head in range(0, k.shape[0] * k.shape[2], several):
            yield slice(head, head + several), rows, seen, hidden


@lru_cache(maxsize=64)
def _hidden(queries: int, groups: int, before: int, keys: int, window: int | None) -> Tensor:
    """0 where a query attends, -inf elsewhere, ``[queries * groups, keys]``; the first query is the key ``before``."""
    query = torch.arange(before, before + queries).repeat_interleave(groups).unsqueeze(1)
    key = torch.arange(keys)
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))


def _packed(x: Tensor, kv_heads: int) -> Tensor:
    """A copy of ``[B, T, N, D]`` as ``[B * Nkv, T * groups, D]``: the queries of a token and group are neighbours."""
    batch, tokens, heads, size = x.shape
    packed = torch.empty(batch, kv_heads, tokens, heads // kv_heads, size)
    packed.copy_(x.unflatten(2, (kv_heads, -1)).transpose(1, 2))
    return packed.view(batch * kv_heads, -1, size)


def _unpacked(packed: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`_packed`, with the tokens and heads of ``like``."""
    batch, tokens, heads, _ = like.shape
    kv_heads, size = len(packed) // batch, packed.shape[-1]
    return packed.view(batch, kv_heads, tokens, -1, size).transpose(1, 2).reshape(batch, tokens, heads, size)


def _view(memory: Tensor, shape: torch.Size) -> Tensor:
    """The beginning of ``memory``, which grows: memory that is new for each block costs page faults."""
    if memory.numel() < shape.numel():
        memory.resize_(shape.numel())
    return memory[: shape.numel()].view(shape)
