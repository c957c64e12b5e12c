"""Attention with a soft cap on its scores, which PyTorch's attention functions do not have."""

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Return the output for scores ``softcap * tanh(q k' * scale / softcap)``, causal or under ``mask``.

    All are ``[B, N, T, D]``; ``mask`` is bool, or added to the scores.
    """
    scores = torch.tanh(q @ k.transpose(2, 3) * (scale / softcap)) * softcap
    if mask is None:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    least = torch.finfo(scores.dtype).min  # finite: a padded query may see nothing
    scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v
