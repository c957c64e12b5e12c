"""The arguments of one call of a fused part: what each says, and which the fused form does not know."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from halfbyte.fast import adapted, reading
from halfbyte.fast.attention import attention
from halfbyte.fast.attention_half import AttentionHalf
from halfbyte.fast.forest import Forest, read_tokens
from halfbyte.fast.heads import DirectHeads, Heads
from halfbyte.fast.latent_heads import LatentHeads
from halfbyte.fast.mlp_half import MlpHalf
from halfbyte.fast.parts import AttentionParts, DirectMaps, LatentMaps, MlpParts, Uncovered
from halfbyte.fast.rope import Rotary

# Keyword arguments that the fused form computes with.
READ = frozenset({"attention_mask", "position_ids", "position_embeddings", "cu_seq_lens_q"})
# Arguments that change nothing in a layer that is fused. They repeat what is read, concern a cache (an argument of its
# own) or layers that share it, or pass through the layers on their way to losses and to other kinds of layers.
WITHOUT_EFFECT = frozenset(
    {
        "cu_seq_lens_k",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "seq_idx",
        "shared_kv_states",
        "shift_labels",
        "use_cache",
    }
)
# A KV cache, as transformers calls it in 5.23 and from 5.24.
_CACHES = ("past_key_values", "cache")


def mlp_half(parts: MlpParts) -> MlpHalf:
    """Return one call of an MLP with the adapters that are active now."""
    return MlpHalf(parts, adapted.projections(parts.gate_up), adapted.projections(parts.down))


def attention_half(
    parts: AttentionParts, hidden: Tensor, kwargs: Mapping[str, Any], *, only_read: bool = False
) -> AttentionHalf:
    """Return one call of attention on ``hidden``; raise :class:`Uncovered` if its arguments are not covered.

    With ``only_read`` it returns the output of the tokens that are read, where a forest says which.
    """
    _check_arguments(kwargs)
    mask = kwargs.get("attention_mask")
    forest = _forest(parts, hidden, mask, kwargs)
    if mask is not None and mask.dim() != 4:
        raise Uncovered("a mask for flash attention")
    if forest is not None:
        mask = None  # the sequences and the window say what it does, and some models' (gpt-oss) has the window alone
        if not only_read or (
            isinstance(parts.maps, DirectMaps) and parts.maps.gated
        ):  # whose gates are those of all tokens
            forest = forest.whole
    if mask is None and forest is None and parts.window is not None and hidden.shape[1] > parts.window:
        raise Uncovered("a sequence longer than the sliding window, and no mask")
    return AttentionHalf(
        parts,
        _heads(parts, hidden, kwargs),
        adapted.projections(parts.out),
        attention(
            hidden.device,
            hidden.dtype,
            parts.scale,
            mask,
            forest,
            parts.window,
            cap=parts.softcap,
            sinks=_sinks(parts),
        ),
        None if forest is None else read_tokens(forest, hidden.device),
    )


def _heads(parts: AttentionParts, hidden: Tensor, kwargs: Mapping[str, Any]) -> Heads:
    rotary = _rotary(parts, hidden, kwargs.get("position_embeddings"))
    factors = _factors(parts, kwargs.get("position_ids"))
    maps = parts.maps
    if isinstance(maps, DirectMaps):
        return DirectHeads(parts, maps, adapted.projections(maps.qkv), rotary, factors)
    return LatentHeads(
        parts,
        maps,
        adapted.projections(maps.low),
        adapted.projections(maps.query) if maps.query else None,
        adapted.projections(maps.latent),
        adapted.projections(maps.key_value),
        rotary,
        factors,
    )


def _rotary(parts: AttentionParts, hidden: Tensor, angles: Any) -> Rotary | None:
    if parts.rotary is None:
        return None
    rotated = parts.maps.rotated if isinstance(parts.maps, LatentMaps) else None
    if rotated and isinstance(angles, Tensor) and angles.is_complex():  # DeepSeek-V2's, each angle once
        angles = tuple(torch.cat((x, x), -1) for x in (angles.real, angles.imag))
    rotary = None
    if isinstance(angles, tuple) and len(angles) == 2:
        rotary = Rotary(*angles, hidden.dtype, parts.rotary)
    if rotary is None or rotary.width > (rotated or parts.head_size):
        raise Uncovered("rotary positions of another shape")
    return rotary


def _sinks(parts: AttentionParts) -> Tensor | None:
    sinks = reading.sinks(parts.module) if parts.sinks else None
    if sinks is not None and (isinstance(sinks, DTensor) or sinks.numel() != parts.heads):
        raise Uncovered("weights are sharded")
    return sinks


def _factors(parts: AttentionParts, positions: Tensor | None) -> Tensor | None:
    if parts.query_scale is None:
        return None
    if positions is None:
        raise Uncovered("queries are scaled by position, and no positions are given")
    return parts.query_scale.factors(positions)


def _forest(
    parts: AttentionParts, hidden: Tensor, mask: Tensor | None, kwargs: Mapping[str, Any]
) -> Forest | None:
    """The sequences of a padding-free row, as cumulative lengths, the mask or positions tell them.

    An integer mask is :meth:`Forest.tensor` and says nothing else.
    """
    if mask is not None and mask.dtype == torch.int32:
        return Forest.of_tensor(mask)
    cumulative = kwargs.get("cu_seq_lens_q")
    if cumulative is not None and len(hidden) == 1:
        return Forest.of_cumulative(cumulative)
    positions: Tensor | None = kwargs.get("position_ids")
    if mask is None and _positions_tell(positions, parts):
        return Forest.of_positions(positions)
    return None


def _positions_tell(positions: Tensor | None, parts: AttentionParts) -> TypeGuard[Tensor]:
    """Whether positions that begin again are sequences: for flash attention, which gets no mask, in one row."""
    return parts.implementation.startswith("flash") and positions is not None and len(positions) == 1


def named(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments of a call beside the hidden states by name; raise :class:`Uncovered` if they have none."""
    if not args:
        return kwargs
    names = by_position(type(module).forward)[1:]
    if len(args) > len(names):
        raise Uncovered("arguments given by position")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _check_arguments(kwargs: Mapping[str, Any]) -> None:
    """Raise :class:`Uncovered` for an argument that the fused form does not know: none is dropped silently."""
    if any(kwargs.get(name) is not None for name in _CACHES):
        raise Uncovered("a KV cache")
    if kwargs.get("output_attentions"):
        raise Uncovered("attention weights are requested")
    for name, value in kwargs.items():
        if (
            value is not None
            and name not in READ
            and name not in WITHOUT_EFFECT
            and name != "output_attentions"
        ):
            raise Uncovered(f"the argument {name!r}, which fused layers do not know")


@functools.cache
def by_position(forward: Any) -> tuple[str, ...]:
    """Return the names of the arguments of a module's ``forward`` that may be given by position, in their order."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)
