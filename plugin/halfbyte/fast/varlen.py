"""Attention along the paths of a forest, as transformers calls attention: a function, and one that makes its mask.

transformers' own masks of a padding-free row cost T^2 values: here the mask stays a :class:`Forest`, and attention runs
segment by segment (one variable-length kernel on CUDA). What else attention is called for is left to sdpa.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from halfbyte.fast import reading
from halfbyte.fast.attention import attention as attention_of
from halfbyte.fast.forest import Forest, once_per_tensor

IMPLEMENTATION = "sdpa_varlen"
# The same in the place of eager attention, for a soft cap or sinks: transformers refuses these every name with sdpa.
IN_PLACE_OF_EAGER = "varlen_eager"


Observer = Callable[[nn.Module, Forest | None], None]
_observers: list[Observer] = []


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Call ``observer`` with every module that a forest reaches here, or none, before it attends along it."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def observe(module: nn.Module, forest: Forest | None) -> None:
    """Show the observers that ``module`` runs on ``forest``."""
    for each in _observers:
        each(module, forest)


def register() -> None:
    """Register :data:`IMPLEMENTATION` with transformers, for the process; registering twice changes nothing."""
    for name in (IMPLEMENTATION, IN_PLACE_OF_EAGER):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention; along the paths of a forest where one is given.

    ``query`` is ``[B, Nq, T, D]``, ``key`` ``[B, Nkv, T, D]``, ``value`` ``[B, Nkv, T, Dv]``; returns
    ``[B, T, Nq, Dv]``. B is 1 where a forest is given: in the place of the mask, as :meth:`Forest.tensor` encodes it,
    or as ``cu_seq_lens_q`` where there is no mask at all. A mask beside these may be that of a window alone (gpt-oss):
    it holds within each sequence. The signature is that of transformers' attention functions.
    """
    forest = _forest_of(attention_mask, kwargs)
    # What sdpa adds to the scores, and attention in both directions.
    beyond = kwargs.get("position_bias") is not None or getattr(module, "is_causal", True) is False
    observe(module, None if beyond else forest)
    cumulative = kwargs.get("cu_seq_lens_q")
    if forest is None and attention_mask is not None and cumulative is not None:
        attention_mask = _within(attention_mask, Forest.of_cumulative(cumulative))
    cap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    alike = cap is None and sinks is None
    if alike and (forest is None or query.shape[0] != 1 or beyond):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout and forest is not None:
        return _with_dropout(forest, module, (query, key, value), dropout, scaling, kwargs), None
    call = attention_of(
        query.device,
        query.dtype,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        None if forest is not None else attention_mask,
        forest,
        kwargs["sliding_window"] if "sliding_window" in kwargs else reading.window(module),
        cap=cap,
        sinks=sinks,
    )
    return call.attend(*(x.transpose(1, 2) for x in (query, key, value))), None


def _forest_of(attention_mask: Tensor | None, kwargs: dict[str, Any]) -> Forest | None:
    if attention_mask is not None:
        return Forest.of_tensor(attention_mask).whole if attention_mask.dtype == torch.int32 else None
    cumulative = kwargs.get("cu_seq_lens_q")
    return None if cumulative is None else Forest.of_cumulative(cumulative)


@once_per_tensor
def _within(mask: Tensor, forest: Forest) -> Tensor:
    """``mask`` ``[1, 1, T, T]``, bool or added to the scores, that hides from a query what its sequence has not."""
    at = torch.arange(forest.ends[-1], device=mask.device)
    sequence = torch.bucketize(at, torch.tensor(forest.ends, device=mask.device), right=True)
    same = sequence[:, None] == sequence
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, torch.finfo(mask.dtype).min)


def _with_dropout(
    forest: Forest,
    module: torch.nn.Module,
    states: tuple[Tensor, Tensor, Tensor],
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """PyTorch's attention with dropout, sequence by sequence."""
    assert not forest.branches
    lengths = [end - start for start, end in forest.spans]
    # Split, not sliced: the gradient of each slice would be as long as the row.
    sequences = zip(*(x.split(lengths, dim=2) for x in states), strict=True)
    given = {**kwargs, "is_causal": True, "dropout": dropout, "scaling": scaling}
    parts = [sdpa_attention_forward(module, q, k, v, None, **given)[0] for q, k, v in sequences]
    return torch.cat(parts, dim=1)


def mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """Return transformers' sdpa mask, or a forest where the mask is causal within each sequence and no more.

    The mask is bool ``[B, 1, T, T]`` or None, the forest what :meth:`Forest.tensor` returns. The signature is that of
    transformers' mask functions.
    """
    forest = None
    # A mask that may be skipped is plainly causal or padded; one applied with vmap is a custom one.
    packed = not kwargs.get("allow_is_causal_skip", True) and not kwargs.get("use_vmap")
    if packed and batch_size == 1 and q_length == kv_length and kwargs.get("attention_mask") is None:
        forest = _sequences(q_length, kwargs["mask_function"], kwargs.get("device", "cpu"))
    if forest is None:
        return sdpa_mask(batch_size, q_length, kv_length, **kwargs)
    return forest.tensor(kwargs.get("device", "cpu"))


def _sequences(tokens: int, mask_function: Any, device: Any) -> Forest | None:
    """Read sequence boundaries off a mask: a token sees the one before it unless it is the first of its sequence."""
    zero = torch.zeros(1, dtype=torch.long, device=device)
    at = torch.arange(tokens, device=device)
    sees_last = mask_function(zero, zero, at[1:], at[:-1])
    begins = (~sees_last).nonzero().squeeze(1) + 1
    cumulative = torch.cat([zero, begins, zero + tokens])
    first, last = cumulative[:-1], cumulative[1:] - 1
    sees_first = mask_function(zero, zero, last, first)  # no, where a window is shorter than the sequence
    sees_next = mask_function(zero, zero, at[:-1], at[1:])  # yes, where a block is not causal
    if not bool(sees_first.all()) or bool(sees_next.any()):
        return None
    return Forest.of_cumulative(cumulative)
