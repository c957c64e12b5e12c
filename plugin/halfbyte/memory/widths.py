"""How wide the parts of a fused layer are: values of a token in each, and their dtype."""

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from halfbyte.fast.adapted import base
from halfbyte.fast.parts import Decoder, LatentMaps, Linears


@dataclass(frozen=True)
class Widths:
    """Values of a token in the parts of one layer.

    They are those of its ``stream`` (H), of ``queries`` (Nq*D), ``keys`` (Nkv*D), ``values`` (Nkv*Dv) and ``outputs``
    (Nq*Dv) of attention, of what the MLP activates (``gate_up``), and of that after it (``features``). ``heads`` are
    queries, keys and values with what they are made of, where that is latents.
    """

    stream: int
    queries: int
    keys: int
    values: int
    outputs: int
    heads: int
    gate_up: int
    features: int

    @classmethod
    def of(cls, decoder: Decoder) -> "Widths":
        """Read the widths off a layer."""
        attention, gate_up = decoder.attention, outputs(decoder.mlp.gate_up)
        queries, keys, values = (
            attention.heads * attention.head_size,
            attention.kv_heads * attention.head_size,
            attention.kv_heads * attention.value_size,
        )
        latent = isinstance(attention.maps, LatentMaps)
        return cls(
            stream=outputs(attention.out),
            queries=queries,
            keys=keys,
            values=values,
            outputs=attention.heads * attention.value_size,
            heads=keys + outputs(attention.maps.linears) if latent else queries + keys + values,
            gate_up=gate_up,
            features=gate_up if decoder.mlp.gate.plain else gate_up // 2,
        )


def outputs(linears: Linears) -> int:
    """Return the values of a token that ``linears`` return."""
    widths: list[Any] = [each.out_features for each in linears]
    return sum(widths)


def ranks(linears: Linears) -> int:
    """Return the inner values of a token in the adapters of ``linears``."""
    return sum(max(each.r.values()) for each in linears if isinstance(each, LoraLayer))


def dtype(decoder: Decoder) -> torch.dtype:
    """Return the dtype of the stream: that of the layer's norms, or, where these have no weights, of its products."""
    attention = decoder.attention
    weights = [
        norm.weight for norm in (attention.norm, attention.closing, decoder.mlp.norm) if norm is not None
    ]
    found = next((weight.dtype for weight in weights if weight is not None), None)
    out: Any = base(attention.out[0])
    dtype: torch.dtype = found or getattr(out, "compute_dtype", None) or out.weight.dtype
    return dtype
