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
class DirectMaps:
    """Linear maps from what attention reads to queries, keys and values: ``qkv``, three or one, and the heads' norms.

    With two the keys are the values too (``shared_values``), before norm and rotation. Where attention is ``gated`` a
    gate of the output follows the query of each head. A head norm is of a head or of all heads at once.
    """

    qkv: Linears
    query_norm: Norm | None
    key_norm: Norm | None
    value_norm: Norm | None
    rotated_first: bool
    gated: bool
    by_head: bool
    shared_values: bool

    @property
    def linears(self) -> Linears:
        """Every linear map, in the order of application."""
        return self.qkv


@dataclass(frozen=True)
class LatentMaps:
    """Maps of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    ``low`` makes the queries, or their latent, of which ``query`` makes them after ``query_norm``. ``latent`` makes the
    latent of keys and values and beside it the last ``rotated`` channels of the keys, which all heads have in common.
    Of the latent after ``norm``, ``key_value`` makes the other channels of each head's key, and its value.
    """

    low: Linears
    query_norm: Norm | None
    query: Linears
    latent: Linears
    norm: Norm | None
    key_value: Linears
    rotated: int

    @property
    def linears(self) -> Linears:
        """Every linear map, in the order of application."""
        return (*self.low, *self.query, *self.latent, *self.key_value)


@dataclass(frozen=True)
class AttentionParts:
    """Attention and the norms around it; ``heads`` is Nq, ``kv_heads`` Nkv, ``window`` in tokens.

    ``maps`` make queries and keys of ``head_size`` D and values of ``value_size``. With ``sinks`` the module has a
    score of each head that takes part in its softmax and has no value.
    """

    norm: Norm | None
    maps: DirectMaps | LatentMaps
    out: Linears
    closing: Norm | None
    factor: float
    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    scale: float
    window: int | None
    softcap: float | None
    sinks: bool
    rotary: Pairing | None
    query_scale: QueryScale | None
    module: Any  # what it is set to may change between calls

    @property
    def implementation(self) -> str:
        """Transformers' name of the attention implementation that is set now."""
        name: str = self.module.config._attn_implementation
        return name

    @property
    def linears(self) -> Linears:
        """Every linear map, in the order of application."""
        return (*self.maps.linears, *self.out)


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
