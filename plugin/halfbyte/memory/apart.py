"""What a layer that is not fused whole keeps from forward to backward, where it has a save level."""

from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from halfbyte.fast import apart, members
from halfbyte.fast.layer import Parts, parts_of
from halfbyte.fast.parts import AttentionParts, MlpParts
from halfbyte.memory.experts import kept_of_experts, of_experts
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
    parts, stream = _parts(layer)
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


def working(layer: nn.Module, config: Any, workload: Any, size: int) -> int:
    """Return the bytes that the backward of ``layer`` works with beside what is kept, for a batch of ``workload``.

    The gradients of the widest part and of the stream around it, what attention copies of the longest sequence, and
    what experts work with.
    """
    parts, stream = _parts(layer)
    widest = copied = 0
    for each in parts:
        if isinstance(each, AttentionParts):
            heads, attended = outputs(each.maps.linears), each.heads * each.value_size
            widest, copied = max(widest, heads + 2 * attended), max(copied, 2 * heads + 4 * attended)
        elif isinstance(each, MlpParts):
            widest = max(widest, 2 * outputs(each.gate_up))
    values = workload.tokens * (widest + 4 * stream) * size + workload.longest * copied * _FLOAT32
    experts = of_experts(layer, config, workload.tokens, size, workload.device, kept=True)
    return int(values + experts)


def _parts(layer: nn.Module) -> tuple[list[Parts], int]:
    """The fused parts in ``layer``, and the values of a token in its stream."""
    parts = [found for module in layer.modules() if (found := parts_of(module)) is not None]
    return parts, next(outputs(each.out) for each in parts if isinstance(each, AttentionParts))
