"""Decoder layers that are computed fused: the ``forward`` that takes the place of their own, call by call."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from halfbyte.fast import family
from halfbyte.fast.attention import attention
from halfbyte.fast.family import Decoder, Uncovered
from halfbyte.fast.forest import Forest
from halfbyte.fast.layer_call import LEVELS, LayerCall
from halfbyte.fast.rope import Rotary

__all__ = ["LEVELS", "FusedForward", "fell_back", "fuse", "fused_layers", "unfuse"]

# Keyword arguments that the fused form computes with.
READ = frozenset({"attention_mask", "position_ids", "position_embeddings", "cu_seq_lens_q"})
# Arguments that change nothing in a layer of the family. They repeat what is read, concern a cache (an argument of its
# own), or pass through the layers on their way to losses and to other kinds of layers.
WITHOUT_EFFECT = frozenset(
    {
        "cu_seq_lens_k",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "seq_idx",
        "shift_labels",
        "use_cache",
    }
)
# A KV cache, as transformers calls it in 5.23 and from 5.24.
_CACHES = ("past_key_values", "cache")


def fuse(layer: nn.Module, adapter: str = "default", level: int = 0) -> str | None:
    """Compute ``layer`` fused from now on, at save ``level``; return None, or why it is not covered.

    Only the instance's ``forward`` changes: modules, parameters and their names stay PEFT's, and gradients go to the
    PEFT parameters. A call that the fused form does not cover (a KV cache, several active adapters, an argument that
    it does not know) runs the original ``forward``, with activation checkpointing if the model has it on. Transformers
    checkpoints inside a layer class's ``forward`` (from 5.23), so the fused form does not see that switch: it does its
    own recomputation.
    """
    assert level in LEVELS, level
    try:
        decoder = family.read(layer)
        family.check_adapter(layer, decoder, adapter)
    except Uncovered as reason:
        return str(reason)
    layer.forward = FusedForward(layer, decoder, level)
    return None


def unfuse(layer: nn.Module) -> None:
    """Give ``layer`` its own forward back."""
    layer.__dict__.pop("forward", None)


def never_fused(layer: nn.Module, hidden: Tensor) -> str | None:
    """Return why no training call of a fused ``layer`` on tensors like ``hidden`` will be computed fused, or None."""
    assert isinstance(layer.forward, FusedForward)
    try:
        family.check_call(layer.forward.decoder, True, hidden)
    except Uncovered as reason:
        return str(reason)
    return None


def fell_back(model: nn.Module) -> dict[str, int]:
    """Return why fused layers of ``model`` ran their original forward while training, and how often in all."""
    reasons: Counter[str] = Counter()
    for each in fused_layers(model):
        reasons += each.reasons
    return dict(reasons)


def fused_layers(model: nn.Module) -> list["FusedForward"]:
    """Return the forwards of the layers of ``model`` that are fused."""
    return [each.forward for each in model.modules() if isinstance(each.forward, FusedForward)]


class FusedForward:
    """The ``forward`` of a fused decoder layer.

    ``reason`` says why the latest call ran the original forward, None if it did not; ``reasons`` counts such calls
    under autograd.
    """

    def __init__(self, layer: nn.Module, decoder: Decoder, level: int) -> None:
        self.layer, self.decoder, self.level = layer, decoder, level
        self.reason: str | None = None
        self.reasons: Counter[str] = Counter()

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output for ``hidden_states``, both ``[B, T, H]``.

        Every argument reaches the original forward as it was given, where that is what runs.
        """
        try:
            call = self._prepare(hidden_states, args, kwargs)
        except Uncovered as reason:
            self.reason = str(reason)
            self.reasons[self.reason] += torch.is_grad_enabled()
            return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        self.reason = None
        return call.apply(hidden_states)

    def _prepare(self, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LayerCall:
        """Read one call; raise :class:`Uncovered` if it may not be computed fused."""
        _check_arguments(args, kwargs)
        decoder, mask = self.decoder, kwargs.get("attention_mask")
        family.check_call(decoder, self.layer.training, hidden)
        forest = self._forest(hidden, mask, kwargs)
        if mask is not None and mask.dim() != 4:
            raise Uncovered("a mask for flash attention")
        if mask is not None and mask.dtype != torch.int32 and self._beyond_window(hidden, forest):
            forest = None  # the model's mask has both the sequences and the window
        if forest is not None:
            mask = None
        if mask is None and forest is None and self._beyond_window(hidden, forest):
            raise Uncovered("a sequence longer than the sliding window, and no mask")
        position_embeddings: tuple[Tensor, Tensor] | None = kwargs.get("position_embeddings")
        if position_embeddings is None or position_embeddings[0].shape[-1] != decoder.head_size:
            raise Uncovered("rotary positions on a part of the head")
        cos, sin = position_embeddings
        qkv, out, gate_up, down = family.projections(decoder)
        return LayerCall(
            decoder,
            qkv,
            out,
            gate_up,
            down,
            rotary=Rotary(cos, sin, hidden.dtype),
            attention=attention(hidden.device, hidden.dtype, decoder.scale, mask, forest, decoder.window),
            level=self.level,
        )

    def _forest(self, hidden: Tensor, mask: Tensor | None, kwargs: Mapping[str, Any]) -> Forest | None:
        """The sequences of a padding-free row, as cumulative lengths, the mask or positions tell them.

        An integer mask is :meth:`Forest.tensor` and says nothing else.
        """
        if mask is not None and mask.dtype == torch.int32:
            return Forest.of_tensor(mask)
        cumulative = kwargs.get("cu_seq_lens_q")
        if cumulative is not None and len(hidden) == 1:
            return Forest.of_cumulative(cumulative)
        positions = kwargs.get("position_ids")
        if mask is None and self._positions_tell(positions):
            return Forest.of_positions(positions)
        return None

    def _positions_tell(self, positions: Tensor | None) -> TypeGuard[Tensor]:
        """Whether positions that begin again are sequences: for flash attention, which gets no mask, in one row."""
        return (
            self.decoder.implementation.startswith("flash") and positions is not None and len(positions) == 1
        )

    def _beyond_window(self, hidden: Tensor, forest: Forest | None) -> bool:
        longest = hidden.shape[1] if forest is None else forest.longest
        return self.decoder.window is not None and longest > self.decoder.window


def _check_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise :class:`Uncovered` for an argument that the fused form does not know: none is dropped silently."""
    if args:
        raise Uncovered("arguments given by position")
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
