"""What a layer that is not fused whole keeps from forward to backward, where it has a save level."""

from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from halfbyte.fast import apart, members
from halfbyte.fast.layer import parts_of
from halfbyte.fast.parts import AttentionParts, MlpParts
from halfbyte.memory.experts import kept_of_experts
from halfbyte.memory.widths import outputs, ranks

_FLOAT32 = 4


def keeps(module: nn.Module, level: int | None) -> bool:
    """Whether the layer ``module`` keeps all of its forward at ``level``; None stands for the level that it has."""
    forward = module.forward
    return isinstance(forward, apart.ApartForward) and forward.keeps(level)


def kept_per_token(layer: nn.Module, config: Any, size: int) -> int:
    """Return the bytes that ``layer`` keeps of a token where it is not recomputed, in a dtype of ``size`` bytes.

    Its input, what its fused parts and experts keep with their own inputs, and in float32 those of norms and of
    small linear maps with adapters.
    """
    parts = [found for module in layer.modules() if (found := parts_of(module)) is not None]
    stream = next(outputs(each.out) for each in parts if isinstance(each, AttentionParts))
    total = stream * size
    for each in parts:
        total += (stream + ranks(each.linears)) * size
        if isinstance(each, AttentionParts):
            attended = outputs(each.maps.linears) + each.heads * each.value_size
            total += attended * size + each.heads * _FLOAT32
        elif isinstance(each, MlpParts):
            total += (outputs(each.gate_up) + stream) * size  # and what a gate of its output multiplies
    around = [
        each
        for each in apart.outside(layer)
        if isinstance(each, LoraLayer)
        or members.is_norm(each)
        or any(parameter.dim() == 1 for parameter in each.parameters(recurse=False))
    ]
    return total + len(around) * stream * _FLOAT32 + kept_of_experts(layer, config, size)
