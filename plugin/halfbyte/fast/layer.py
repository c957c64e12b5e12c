"""Decoder layers, attentions and MLPs that are computed fused: the ``forward`` in the place of their own."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.fast import adapted, arguments
from halfbyte.fast.attention_half import AttentionHalf
from halfbyte.fast.layer_call import LEVELS, FusedAttention, FusedMlp, LayerCall
from halfbyte.fast.mlp_half import MlpHalf
from halfbyte.fast.parts import AttentionParts, Decoder, MlpParts, Uncovered

__all__ = ["LEVELS", "FusedForward", "fell_back", "fuse", "fused_layers", "unfuse"]

Parts = Decoder | AttentionParts | MlpParts


def fuse(
    module: nn.Module, parts: Parts, adapter: str = "default", level: int = 0, *, only_read: bool = False
) -> str | None:
    """Compute ``module``, which has these ``parts``, fused from now on; return None, or why it is not covered.

    ``level`` is the save level of a layer; with ``only_read`` it returns the tokens whose output is read, where a batch
    says which. Only the instance's ``forward`` changes: modules, parameters and their names
    stay PEFT's, and gradients go to the PEFT parameters. A call that the fused form does not cover (a KV cache, several
    active adapters, an argument that it does not know) runs the original ``forward``, with activation checkpointing if
    the model has it on. Transformers checkpoints inside a layer class's ``forward`` (from 5.23), so the fused form of a
    layer does not see that switch: it does its own recomputation. Attention or an MLP alone is checkpointed with its
    layer.
    """
    assert level in LEVELS, level
    try:
        adapted.check(module, parts)
        adapted.check_adapter(module, parts, adapter)
    except Uncovered as reason:
        return str(reason)
    module.forward = forward_of(module, parts, level, only_read=only_read)
    return None


def forward_of(module: nn.Module, parts: Parts, level: int = 0, *, only_read: bool = False) -> "_Fused":
    """Return the fused forward of ``module``, which has these ``parts``."""
    if isinstance(parts, Decoder):
        return FusedForward(module, parts, level, only_read=only_read)
    return _FusedAttention(module, parts) if isinstance(parts, AttentionParts) else _FusedMlp(module, parts)


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` is computed fused."""
    return parts_of(module) is not None


def parts_of(module: nn.Module) -> Parts | None:
    """Return the parts of ``module`` where it is computed fused, else None."""
    forward = module.__dict__.get("forward")
    return forward.parts if isinstance(forward, _Fused) else None


def unfuse(module: nn.Module) -> None:
    """Give ``module`` its own forward back, if it is fused."""
    if is_fused(module):
        del module.forward


def never_fused(module: nn.Module, hidden: Tensor) -> str | None:
    """Return why no training call of a fused ``module`` on tensors like ``hidden`` will be computed fused, or None."""
    assert isinstance(module.forward, _Fused)
    try:
        adapted.check_call(module, module.forward.parts, True, hidden)
    except Uncovered as reason:
        return str(reason)
    return None


def fell_back(model: nn.Module) -> dict[str, int]:
    """Return why what is fused of ``model`` ran its original forward while training, and how often in all."""
    reasons: Counter[str] = Counter()
    for each in model.modules():
        if isinstance(each.forward, _Fused):
            reasons += each.forward.reasons
    return dict(reasons)


def fused_layers(model: nn.Module) -> list["FusedForward"]:
    """Return the forwards of the layers of ``model`` that are fused whole."""
    return [each.forward for each in model.modules() if isinstance(each.forward, FusedForward)]


class _Fused:
    """A ``forward`` that is computed fused where a call allows it.

    ``reason`` says why the latest call ran the original forward, None if it did not; ``reasons`` counts such calls
    under autograd.
    """

    def __init__(self, module: nn.Module, parts: Parts) -> None:
        self.module, self.parts = module, parts
        self.reason: str | None = None
        self.reasons: Counter[str] = Counter()

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output for ``hidden_states`` ``[B, T, H]``.

        Every argument reaches the original forward as it was given, where that is what runs.
        """
        try:
            given = arguments.named(self.module, args, kwargs)
            adapted.check_call(self.module, self.parts, self.module.training, hidden_states)
            call = self.read(hidden_states, given)
        except Uncovered as reason:
            self.reason = str(reason)
            self.reasons[self.reason] += torch.is_grad_enabled()
            return type(self.module).forward(self.module, hidden_states, *args, **kwargs)
        self.reason = None
        return self.apply(call, hidden_states)

    def read(self, hidden: Tensor, given: Mapping[str, Any]) -> Any:
        """Return one call, ready to apply, for its arguments by name; raise :class:`Uncovered` if it is not covered."""
        raise NotImplementedError

    def apply(self, call: Any, hidden: Tensor) -> Any:
        """Return what the module returns for ``hidden``."""
        raise NotImplementedError


class FusedForward(_Fused):
    """The ``forward`` of a fused decoder layer, at save ``level``.

    With ``only_read``, for the last one, it returns the tokens whose output is read, where a forest says which.
    """

    parts: Decoder

    def __init__(self, layer: nn.Module, decoder: Decoder, level: int, *, only_read: bool = False) -> None:
        super().__init__(layer, decoder)
        self.level, self.only_read = level, only_read

    def read(self, hidden: Tensor, given: Mapping[str, Any]) -> LayerCall:
        """Return one call of the layer."""
        scale = self.parts.layer_scale
        return LayerCall(
            arguments.attention_half(self.parts.attention, hidden, given, only_read=self.only_read),
            arguments.mlp_half(self.parts.mlp),
            self.parts.parallel,
            layer_scale=None if scale is None else getattr(self.module, scale),
            level=self.level,
        )

    def apply(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Return the layer's output, ``[B, T, H]``, or ``[1, K, H]`` of the tokens that are read."""
        return call.apply(hidden)


class _FusedAttention(_Fused):
    """The ``forward`` of attention alone; the layer around it is as it is."""

    parts: AttentionParts

    def read(self, hidden: Tensor, given: Mapping[str, Any]) -> AttentionHalf:
        return arguments.attention_half(self.parts, hidden, given)

    def apply(self, call: AttentionHalf, hidden: Tensor) -> tuple[Tensor, None]:
        """Return the output ``[B, T, H]`` and no weights, as transformers' attentions do."""
        return FusedAttention.apply(call, hidden, *call.parameters()), None


class _FusedMlp(_Fused):
    """The ``forward`` of an MLP alone; the layer around it is as it is."""

    parts: MlpParts

    def read(self, hidden: Tensor, given: Mapping[str, Any]) -> MlpHalf:
        """Return one call of the MLP, which takes no other argument."""
        if given:
            raise Uncovered("an MLP with arguments of its own")
        return arguments.mlp_half(self.parts)

    def apply(self, call: MlpHalf, hidden: Tensor) -> Tensor:
        """Return the output ``[..., H]``."""
        output: Tensor = FusedMlp.apply(call, hidden, *call.parameters())
        return output
