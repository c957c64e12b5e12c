"""Attention by all of its scores, for what PyTorch's attention functions do not have: a soft cap, sinks."""

import torch
from torch import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the output for scores ``q k' * scale``, causal or under ``mask``.

    All are ``[B, N, T, D]``; queries are those of the last keys, ``mask`` is bool, or added to the scores. A
    ``softcap`` bounds them: ``softcap * tanh(score / softcap)``. ``sinks`` ``[N]`` are scores of a further key without
    a value.
    """
    scores = q @ k.transpose(2, 3) * (scale if softcap is None else scale / softcap)
    if softcap is not None:
        scores = torch.tanh(scores) * softcap
    if mask is None:
        causal = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device)
        mask = causal.tril(k.shape[2] - q.shape[2])
    least = torch.finfo(scores.dtype).min  # finite: a padded query may see nothing
    scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)[..., : k.shape[2]] @ v
