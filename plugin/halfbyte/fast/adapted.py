"""The linear maps of a fused part at one moment: what prevents a fused call, and the adapters that are active."""

from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor

from halfbyte.fast.parts import AttentionParts, Decoder, Linears, MlpParts, Uncovered
from halfbyte.fast.projections import Adapter, Projections, compute_dtype

Parts = AttentionParts | MlpParts | Decoder

_ATTENTIONS = ("sdpa", "flash_attention", "varlen")
# Attributes of modules that are probabilities of dropout.
_DROPOUTS = ("attention_dropout", "dropout", "residual_dropout", "hidden_dropout", "activation_dropout")


def check(module: nn.Module, parts: Parts) -> None:
    """Raise :class:`Uncovered` if a linear map of ``parts`` of ``module``, or the attention set, is not covered."""
    if attention := _attention(parts):
        _check_attention(attention)
    check_linears(module, parts)


def check_linears(module: nn.Module, parts: Parts) -> None:
    """Raise :class:`Uncovered` if a linear map of ``parts`` of ``module`` is not covered."""
    for name, linear in _named(module, parts):
        _check_linear(name, linear)


def check_adapter(module: nn.Module, parts: Parts, adapter: str) -> None:
    """Raise :class:`Uncovered` if ``adapter`` is more than LoRA on some linear map of ``parts`` of ``module``."""
    for name, linear in _named(module, parts):
        if isinstance(linear, LoraLayer) and adapter in linear.lora_A:
            reason = _beyond_lora(linear, adapter)
            if reason is not None:
                raise Uncovered(f"{name}: {reason}")


def check_call(module: nn.Module, parts: Parts, training: bool, hidden: torch.Tensor) -> None:
    """Raise :class:`Uncovered` if the fused form does not support a call on ``hidden`` ``[B, T, H]`` now."""
    if attention := _attention(parts):
        _check_attention(attention)
    for linear in parts.linears:
        linear = base(linear)
        if isinstance(linear, Linear4bit) and compute_dtype(linear, hidden) != hidden.dtype:
            raise Uncovered(f"products in another dtype than the model's {hidden.dtype}")
    if training:
        if attention and _drops(attention.module):
            raise Uncovered("dropout inside attention")
        if _drops(module) or (isinstance(parts, Decoder) and _drops(parts.mlp.module)):
            raise Uncovered("dropout in the layer")


def projections(maps: Linears) -> Projections:
    """Return ``maps`` of the same input with the adapters that are active now.

    Raises :class:`Uncovered` for several active adapters, merged ones, one that is more than LoRA, and weights that
    are sharded at this moment.
    """
    return Projections([base(each) for each in maps], [_active(each) for each in maps])


def base(linear: Any) -> nn.Linear:
    """Return the frozen map under the adapters of ``linear``."""
    found: nn.Linear = linear.base_layer if isinstance(linear, LoraLayer) else linear
    return found


def _attention(parts: Parts) -> AttentionParts | None:
    if isinstance(parts, Decoder):
        return parts.attention
    return parts if isinstance(parts, AttentionParts) else None


def _check_attention(attention: AttentionParts) -> None:
    """Transformers has no sdpa with a soft cap or sinks: models that have them run eager."""
    name = attention.implementation
    eager = attention.softcap is not None or attention.sinks
    if not name.startswith(_ATTENTIONS) and not (name == "eager" and eager):
        raise Uncovered(f"attention implementation {name}")


def _drops(module: nn.Module) -> bool:
    """Whether ``module`` has dropout of its own now."""
    if any(isinstance(p := getattr(module, name, None), float) and p > 0 for name in _DROPOUTS):
        return True
    return any(isinstance(each, nn.Dropout) and each.p > 0 for each in module.children())


def _named(module: nn.Module, parts: Parts) -> list[tuple[str, nn.Module]]:
    names = {each: name for name, each in module.named_modules()}
    return [(names[linear].rpartition(".")[2], linear) for linear in parts.linears]


def _check_linear(name: str, linear: nn.Module) -> None:
    map_ = base(linear)
    if type(map_) not in (nn.Linear, Linear4bit):
        raise Uncovered(f"{name} is a {type(map_).__name__}")
    if map_.weight.requires_grad or (map_.bias is not None and map_.bias.requires_grad):
        raise Uncovered(f"{name}: its own weights are trained")
    if getattr(getattr(map_.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise Uncovered(f"{name} is packed for inference")
    if linear._forward_hooks or linear._forward_pre_hooks or map_._forward_hooks or map_._forward_pre_hooks:
        raise Uncovered(f"{name} has hooks, which a fused layer would not run")


def _active(linear: nn.Module) -> Adapter | None:
    """The one LoRA of ``linear`` that is active at this moment, with its dropout in training mode."""
    if isinstance(base(linear).weight, DTensor):
        raise Uncovered("weights are sharded")
    if not isinstance(linear, LoraLayer) or linear.disable_adapters:
        return None
    if linear.merged:
        raise Uncovered("adapters are merged")
    names = [name for name in linear.active_adapters if name in linear.lora_A]
    if not names:
        return None
    if len(names) > 1:
        raise Uncovered("several adapters are active")
    name = names[0]
    reason = _beyond_lora(linear, name)
    if reason is not None:
        raise Uncovered(reason)
    adapter = Adapter.of(linear, name)
    if isinstance(adapter.a, DTensor) or isinstance(adapter.b, DTensor):
        raise Uncovered("weights are sharded")
    return adapter


def _beyond_lora(linear: LoraLayer, adapter: str) -> str | None:
    """What ``adapter`` has beyond plain LoRA, if anything."""
    if adapter in linear.lora_variant:
        return f"{type(linear.lora_variant[adapter]).__name__.removesuffix('LinearVariant')} adapter"
    if linear.lora_B[adapter].bias is not None:
        return "adapter with a bias"
    if getattr(linear, "fan_in_fan_out", False):
        return "transposed weight"
    return None
