"""The keys of one segment of a row, gathered from the spans of its path, and the mask of its queries."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.fast.forest import once_per_tensor

Spans = Sequence[tuple[int, int]]


def gather(x: Tensor, spans: Spans) -> Tensor:
    """Return the tokens of ``spans``, ``[B, keys, N, D]``: a view where they are neighbours."""
    if len(spans) == 1:
        return x[:, spans[0][0] : spans[0][1]]
    return torch.cat([x[:, start:end] for start, end in spans], dim=1)


def scatter_add(total: Tensor, part: Tensor, spans: Spans) -> None:
    """Add the gradient of what :func:`gather` returned to that of its input."""
    at = 0
    for start, end in spans:
        total[:, start:end] += part[:, at : at + end - start]
        at += end - start


def path_mask(
    queries: int, keys: int, window: int | None, dtype: torch.dtype, device: Any = None
) -> Tensor | None:
    """Return the mask ``[1, 1, queries, keys]`` of the last tokens of a path; None where causality suffices."""
    if keys == queries and (window is None or window >= keys):
        return None
    query = torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    key = torch.arange(keys, device=device)
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    return torch.zeros(1, 1, queries, keys, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


@once_per_tensor
def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``mask``, bool or added to the scores already, as values of ``dtype`` that are added."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
