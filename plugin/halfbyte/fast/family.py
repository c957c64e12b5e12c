"""The decoder layers of the Llama family: which ones a fused layer covers, and their parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor

from halfbyte.fast.gate import Gate
from halfbyte.fast.norm import Norm
from halfbyte.fast.projections import Adapter, Projections, compute_dtype

# transformers' layers that are norm, attention, norm and gated MLP, and nothing else.
_LAYERS = {"llama", "mistral", "qwen2", "qwen3", "gemma"}
_ATTENTIONS = ("sdpa", "flash_attention")

Linears = tuple[nn.Module, ...]


@dataclass(frozen=True)
class Decoder:
    """The parts of one decoder layer; ``heads`` is Nq, ``kv_heads`` Nkv, ``head_size`` D, ``window`` in tokens."""

    input_norm: Norm
    qkv: Linears
    query_norm: Norm | None
    key_norm: Norm | None
    out: Linears
    mlp_norm: Norm
    gate_up: Linears
    gate: Gate
    down: Linears
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    window: int | None
    attention: Any  # the module: what it is set to may change between calls

    @property
    def implementation(self) -> str:
        """Transformers' name of the attention implementation that is set now."""
        name: str = self.attention.config._attn_implementation
        return name

    @property
    def linears(self) -> Linears:
        """Every linear map, in the order of application."""
        return (*self.qkv, *self.out, *self.gate_up, *self.down)


class Uncovered(Exception):  # noqa: N818 -- a reason, which the caller reports; nothing went wrong
    """The reason why a layer, or one call of it, is not computed fused."""


def read(layer: nn.Module) -> Decoder:
    """Return the parts of ``layer``; raise :class:`Uncovered` if it is not of the family or was extended."""
    family = type(layer).__module__.removeprefix("transformers.models.").split(".")[0]
    if family not in _LAYERS or not type(layer).__name__.endswith("DecoderLayer"):
        raise Uncovered(f"{type(layer).__name__} is not one of the layers that are fused")
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    if not attention.is_causal:
        raise Uncovered("attention is not causal")
    gate = Gate.of(mlp.act_fn)
    if gate is None:
        raise Uncovered(f"activation {type(mlp.act_fn).__name__}")
    decoder = Decoder(
        input_norm=_norm(layer.input_layernorm),
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        out=(attention.o_proj,),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=(mlp.gate_proj, mlp.up_proj),
        gate=gate,
        down=(mlp.down_proj,),
        heads=attention.config.num_attention_heads,
        kv_heads=attention.config.num_key_value_heads,
        head_size=attention.head_dim,
        scale=attention.scaling,
        window=window(attention),
        attention=attention,
    )
    _check_attention(decoder)
    for name, linear in _named_linears(layer, decoder):
        _check_linear(name, linear)
    return decoder


def check_adapter(layer: nn.Module, decoder: Decoder, adapter: str) -> None:
    """Raise :class:`Uncovered` if ``adapter`` is more than LoRA on some linear map of the layer."""
    for name, linear in _named_linears(layer, decoder):
        if isinstance(linear, LoraLayer) and adapter in linear.lora_A:
            reason = _beyond_lora(linear, adapter)
            if reason is not None:
                raise Uncovered(f"{name}: {reason}")


def projections(decoder: Decoder) -> tuple[Projections, Projections, Projections, Projections]:
    """Return the maps of ``decoder`` with the adapters that are active now: query-key-value, out, gate-up, down.

    Raises :class:`Uncovered` for several active adapters, merged ones, one that is more than LoRA, and weights that
    are sharded at this moment.
    """

    def of(maps: Linears) -> Projections:
        return Projections([_base(each) for each in maps], [_active(each) for each in maps])

    return of(decoder.qkv), of(decoder.out), of(decoder.gate_up), of(decoder.down)


def check_call(decoder: Decoder, training: bool, hidden: torch.Tensor) -> None:
    """Raise :class:`Uncovered` if a call on ``hidden`` ``[B, T, H]`` may not be computed fused at this moment."""
    _check_attention(decoder)
    for linear in decoder.linears:
        base = _base(linear)
        if isinstance(base, Linear4bit) and compute_dtype(base, hidden) != hidden.dtype:
            raise Uncovered(f"products in another dtype than the model's {hidden.dtype}")
    if training and decoder.attention.attention_dropout > 0:
        raise Uncovered("dropout inside attention")


def _check_attention(decoder: Decoder) -> None:
    if not decoder.implementation.startswith(_ATTENTIONS):
        raise Uncovered(f"attention implementation {decoder.implementation}")


def _norm(module: Any) -> Norm:
    name = type(module).__name__
    if not name.endswith("RMSNorm"):
        raise Uncovered(f"norm {name}")
    if module.weight.requires_grad:
        raise Uncovered("norms are trained")
    gemma = name == "GemmaRMSNorm"
    return Norm(module, eps=module.eps if gemma else module.variance_epsilon, unit_offset=gemma)


def window(attention: Any) -> int | None:
    """The sliding window of the attention in tokens, if it has one."""
    kinds, index = getattr(attention.config, "layer_types", None), getattr(attention, "layer_idx", None)
    kind = getattr(attention, "layer_type", None) or (kinds[index] if kinds and index is not None else None)
    if kind == "full_attention":
        return None
    window = getattr(attention, "sliding_window", None)
    return window if window is not None else getattr(attention.config, "sliding_window", None)


def _named_linears(layer: nn.Module, decoder: Decoder) -> Sequence[tuple[str, nn.Module]]:
    names = {module: name for name, module in layer.named_modules()}
    return [(names[linear].rpartition(".")[2], linear) for linear in decoder.linears]


def _check_linear(name: str, linear: nn.Module) -> None:
    base = _base(linear)
    if type(base) not in (nn.Linear, Linear4bit):
        raise Uncovered(f"{name} is a {type(base).__name__}")
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        raise Uncovered(f"{name}: its own weights are trained")
    if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise Uncovered(f"{name} is packed for inference")
    if linear._forward_hooks or linear._forward_pre_hooks or base._forward_hooks or base._forward_pre_hooks:
        raise Uncovered(f"{name} has hooks, which a fused layer would not run")


def _base(linear: Any) -> nn.Linear:
    base: nn.Linear = linear.base_layer if isinstance(linear, LoraLayer) else linear
    return base


def _active(linear: nn.Module) -> Adapter | None:
    """The one LoRA of ``linear`` that is active at this moment, with its dropout in training mode."""
    if isinstance(_base(linear).weight, DTensor):
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
