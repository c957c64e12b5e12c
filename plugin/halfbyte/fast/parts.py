"""The description of a decoder layer: its parts, and how they are put together.

    middle = stream + factor * closing(out(attention(qkv(norm(stream)))))
    output = middle + factor * closing(down(act(gate_up(norm(middle)))))

A layer may lack either norm of a half; with ``parallel`` the second line reads the stream as well.
:mod:`halfbyte.fast.reading` reads it from a module, :mod:`halfbyte.fast.proof` compares it with what that computes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from halfbyte.fast.gate import Gate
from halfbyte.fast.norm import Norm, NormForm
from halfbyte.fast.rope import Pairing

Linears = tuple[nn.Module, ...]


class Uncovered(Exception):  # noqa: N818 -- a reason, which the caller reports; nothing went wrong
    """The reason why a layer, or one call of it, is not computed fused."""


@dataclass(frozen=True)
class Form:
    """What the names of a layer's parts leave open.

    ``rotary`` says which channels are rotated together, None for a layer without rotation; heads are
    ``rotated_first`` and then normed, or the other way round; the MLP is ``parallel`` to attention or follows it;
    one map makes queries, keys and values side by side, or those of each head together (``by_head``).
    ``norms`` are by name in the layer.
    """

    rotary: Pairing | None = "halves"
    rotated_first: bool = False
    parallel: bool = False
    by_head: bool = False
    norms: Mapping[str, NormForm] = field(default_factory=dict)


@dataclass(frozen=True)
class QueryScale:
    """The factor of a query by its position: ``1 + beta * log(1 + position // length)`` (Ministral 3)."""

    beta: float
    length: int

    def factors(self, positions: Tensor) -> Tensor:
        """Return the factors ``[B, T, 1, 1]`` of ``positions`` ``[B, T]``, float32."""
        steps = positions.div(self.length, rounding_mode="floor").float()
        return steps.log1p().mul_(self.beta).add_(1)[..., None, None]


@dataclass(frozen=True)
class AttentionParts:
    """Attention and the norms around it; ``heads`` is Nq, ``kv_heads`` Nkv, ``head_size`` D, ``window`` in tokens.

    ``qkv`` are the maps to queries, keys and values, three or one; with ``shared_values`` the keys are the values too,
    before norm and rotation, and where attention is ``gated`` a gate of the output follows the query of each head. A
    head norm is of a head or of all heads at once. With ``sinks`` the module has a score of each head that takes part
    in its softmax and has no value.
    """

    norm: Norm | None
    qkv: Linears
    query_norm: Norm | None
    key_norm: Norm | None
    value_norm: Norm | None
    out: Linears
    closing: Norm | None
    factor: float
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    window: int | None
    softcap: float | None
    sinks: bool
    rotary: Pairing | None
    rotated_first: bool
    query_scale: QueryScale | None
    gated: bool
    by_head: bool
    shared_values: bool
    module: Any  # what it is set to may change between calls

    @property
    def implementation(self) -> str:
        """Transformers' name of the attention implementation that is set now."""
        name: str = self.module.config._attn_implementation
        return name

    @property
    def linears(self) -> Linears:
        """Every linear map, in the order of application."""
        return (*self.qkv, *self.out)


@dataclass(frozen=True)
class MlpParts:
    """An MLP and the norms around it; ``gate_up`` are the maps to gate and up, two or one, or to what is activated."""

    norm: Norm | None
    gate_up: Linears
    gate: Gate
    down: Linears
    closing: Norm | None
    factor: float
    module: Any

    @property
    def linears(self) -> Linears:
        """Every linear map, in the order of application."""
        return (*self.gate_up, *self.down)


@dataclass(frozen=True)
class Decoder:
    """The parts of one decoder layer; ``layer_scale`` names the attribute that multiplies its output, if one does."""

    attention: AttentionParts
    mlp: MlpParts
    parallel: bool
    layer_scale: str | None

    @property
    def linears(self) -> Linears:
        """Every linear map, in the order of application."""
        return (*self.attention.linears, *self.mlp.linears)
