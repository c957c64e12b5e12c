"""Read the parts of decoder layers by their roles, whatever a model calls them."""

from typing import Any

from torch import Tensor, nn

from halfbyte.fast import latent_reading, members
from halfbyte.fast.gate import Gate
from halfbyte.fast.norm import Norm
from halfbyte.fast.parts import (
    AttentionParts,
    Decoder,
    DirectMaps,
    Form,
    Linears,
    MlpParts,
    QueryScale,
    Uncovered,
)

# What models call a part, by its role. The first that a module has, whole, is it.
ATTENTIONS = ("self_attn", "attn", "attention")
MLPS = ("mlp", "feed_forward", "shared_mlp")
_QKV = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_proj", "k_proj"),
    ("qkv_proj",),
    ("c_attn",),
    ("query_key_value",),
)
_OUT = (("o_proj",), ("out_proj",), ("dense",), ("c_proj",))
_HEAD_NORMS = (
    ("q_norm", "k_norm", "v_norm"),
    ("q_norm", "k_norm"),
    ("query_layernorm", "key_layernorm"),
    ("q_layernorm", "k_layernorm"),
)
_GATED = (("gate_proj", "up_proj"), ("gate_up_proj",), ("w1", "w3"), ("input_linear",))
_PLAIN = (("up_proj",), ("c_fc",), ("fc1",), ("fc_in",), ("dense_h_to_4h",))
_DOWN = (("down_proj",), ("c_proj",), ("fc2",), ("fc_out",), ("w2",), ("dense_4h_to_h",), ("output_linear",))
_ACTIVATIONS = (("act_fn",), ("activation_fn",), ("activation",), ("act",))
# Norms of a layer: before and after attention, before and after the MLP.
_NORMS: tuple[tuple[str | None, str | None, str | None, str | None], ...] = (
    (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", None, "input_layernorm", None),
    ("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2"),
    ("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm"),
    ("input_layernorm", None, "pre_feedforward_layernorm", None),
    ("input_layernorm", None, "pre_ff_layernorm", None),
    ("attention_layernorm", None, "feedforward_layernorm", None),
    ("ln_1", None, "ln_2", None),
    ("ln_1", None, "ln_1", None),
    ("self_attn_layer_norm", None, "final_layer_norm", None),
    ("operator_norm", None, "ffn_norm", None),
    ("attention_norm", None, "ffn_norm", None),
)
_LAYER_SCALES = ("layer_scalar",)
# What the output of each half is multiplied by.
_FACTORS = ("residual_multiplier", "residual_scale")


def read(layer: nn.Module, form: Form) -> Decoder:
    """Return the parts of ``layer`` put together in ``form``; raise :class:`Uncovered` if it has others."""
    attention, mlp = members.part(layer, ATTENTIONS), members.part(layer, MLPS) or layer
    if not isinstance(attention, nn.Module):
        raise Uncovered(f"{type(layer).__name__} is not one of the layers that are fused")
    before, after, before_mlp, after_mlp = norms = _arrangement(layer)
    own = {attention, mlp, *(getattr(layer, name) for name in norms if name is not None)}
    factor = next((float(getattr(layer, name)) for name in _FACTORS if hasattr(layer, name)), 1.0)
    decoder = Decoder(
        attention=read_attention(
            attention,
            form,
            _name(layer, attention),
            members.norm(layer, before, form),
            members.norm(layer, after, form),
            factor,
        ),
        mlp=read_mlp(
            mlp, form, members.norm(layer, before_mlp, form), members.norm(layer, after_mlp, form), factor
        ),
        parallel=form.parallel,
        layer_scale=next((name for name in _LAYER_SCALES if hasattr(layer, name)), None),
    )
    members.check_whole(layer, own | set(decoder.linears))
    return decoder


def read_part(module: nn.Module, form: Form, name: str) -> AttentionParts | MlpParts:
    """Return the parts of ``module``, an attention or MLP that its layer calls ``name``, without what is around it."""
    return read_attention(module, form, name) if is_attention(module) else read_mlp(module, form)


def has_one_map(module: nn.Module) -> bool:
    """Whether one linear map in ``module`` makes queries, keys and values."""
    single = {names[0] for names in _QKV if len(names) == 1}
    return any(name.rpartition(".")[2] in single for name, _ in module.named_modules())


def is_attention(module: nn.Module) -> bool:
    """Whether ``module`` has the linear maps of an attention."""
    made = latent_reading.is_latent(module) or members.linears(module, _QKV) is not None
    return made and members.linears(module, _OUT) is not None


def read_attention(
    attention: Any,
    form: Form,
    name: str = "",
    norm: Norm | None = None,
    closing: Norm | None = None,
    factor: float = 1.0,
) -> AttentionParts:
    """Return the parts of the module ``attention``, called ``name`` in its layer, with the norms around it."""
    if not getattr(attention, "is_causal", True):
        raise Uncovered("attention is not causal")
    shared = getattr(getattr(attention, "config", None), "num_kv_shared_layers", 0)
    if shared and getattr(attention, "store_full_length_kv", False):
        raise Uncovered("later layers read the keys and values")
    read_maps = latent_reading.read if latent_reading.is_latent(attention) else _direct
    out = members.linears(attention, _OUT)
    if out is None or not hasattr(attention, "config"):
        raise Uncovered(f"{type(attention).__name__} is not an attention that is fused")
    maps, heads, kv_heads, size, value_size = read_maps(attention, out, form, name)
    scale = getattr(attention, "scaling", None)
    return AttentionParts(
        norm=norm,
        maps=maps,
        out=out,
        closing=closing,
        factor=factor,
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        value_size=value_size,
        scale=size**-0.5 if scale is None else scale,
        window=window(attention),
        softcap=getattr(attention, "attn_logit_softcapping", None),
        sinks=sinks(attention) is not None,
        rotary=form.rotary,
        query_scale=_query_scale(attention.config),
        module=attention,
    )


def read_mlp(
    mlp: Any, form: Form, norm: Norm | None = None, closing: Norm | None = None, factor: float = 1.0
) -> MlpParts:
    """Return the parts of the module ``mlp``, or of the layer that has them itself, with the norms around them."""
    gated = members.linears(mlp, _GATED)
    gate_up, down = gated or members.linears(mlp, _PLAIN), members.linears(mlp, _DOWN)
    if gate_up is None or down is None:
        raise Uncovered(f"{type(mlp).__name__} is not an MLP that is fused")
    activation: Any = next(
        (found for names in _ACTIVATIONS if (found := members.part(mlp, names)) is not None), nn.SiLU()
    )
    gate = Gate.of(activation, plain=gated is None)
    if gate is None:
        raise Uncovered(f"activation {type(activation).__name__}")
    features = members.width(down[0], "in_features")
    if sum(members.width(each, "out_features") for each in gate_up) != features * (1 if gate.plain else 2):
        raise Uncovered(f"{type(mlp).__name__} has more than gate, up and down")
    if not any(isinstance(members.part(mlp, (name,)), nn.Module) for name in ATTENTIONS):
        members.check_whole(mlp, {*gate_up, *down, activation})
    return MlpParts(norm, gate_up, gate, down, closing, factor, mlp)


def window(attention: Any) -> int | None:
    """The sliding window of the attention in tokens, if it has one."""
    kinds, index = getattr(attention.config, "layer_types", None), getattr(attention, "layer_idx", None)
    kind = getattr(attention, "layer_type", None) or (kinds[index] if kinds and index is not None else None)
    if kind == "full_attention":
        return None
    window = getattr(attention, "sliding_window", None)
    return window if window is not None else getattr(attention.config, "sliding_window", None)


def sinks(attention: Any) -> Tensor | None:
    """The score of each head ``[Nq]`` that takes part in its softmax and has no value, if ``attention`` has them."""
    found = getattr(attention, "sinks", None)
    if not isinstance(found, Tensor):
        return None
    if found.requires_grad:
        raise Uncovered("attention sinks are trained")
    return found


def _direct(attention: Any, out: Linears, form: Form, name: str) -> tuple[DirectMaps, int, int, int, int]:
    """The maps to queries, keys and values; the heads of queries and of keys, and their sizes."""
    qkv = members.linears(attention, _QKV)
    size = next((s for s in (getattr(attention, n, None) for n in ("head_dim", "head_size")) if s), None)
    if qkv is None or size is None:
        raise Uncovered(f"{type(attention).__name__} is not an attention that is fused")
    heads, rest = divmod(members.width(out[0], "in_features"), size)
    queries = heads * size
    gated = len(qkv) > 1 and members.width(qkv[0], "out_features") == 2 * queries
    kv_width = sum(members.width(each, "out_features") for each in qkv) - queries * (2 if gated else 1)
    kv_heads, odd = divmod(kv_width, size if len(qkv) == 2 else 2 * size)
    if rest or odd or kv_heads < 1 or heads % kv_heads:
        raise Uncovered(f"{type(attention).__name__} has more than queries, keys and values")
    found = next(
        (names for names in _HEAD_NORMS if all(members.part(attention, (n,)) is not None for n in names)), ()
    )
    norms = [members.norm(attention, each, form, name) for each in found] + [None] * (3 - len(found))
    members.check_whole(attention, {*qkv, *out, *(getattr(attention, each) for each in found)})
    maps = DirectMaps(
        qkv=qkv,
        query_norm=norms[0],
        key_norm=norms[1],
        value_norm=norms[2],
        rotated_first=form.rotated_first,
        gated=gated,
        by_head=form.by_head and len(qkv) == 1,
        shared_values=len(qkv) == 2,
    )
    return maps, heads, kv_heads, size, size


def _arrangement(layer: Any) -> tuple[str | None, str | None, str | None, str | None]:
    """The one arrangement of norms whose names are those of the norms that ``layer`` has."""
    has = {name for name, child in layer.named_children() if members.is_norm(child) or "norm" in name}
    for names in _NORMS:
        if {name for name in names if name is not None} == has:
            return names
    raise Uncovered(f"the norms of {type(layer).__name__}: {', '.join(sorted(has)) or 'none'}")


def _query_scale(config: Any) -> QueryScale | None:
    rotary = getattr(config, "rope_parameters", None) or {}
    beta, length = rotary.get("llama_4_scaling_beta"), rotary.get("original_max_position_embeddings")
    return QueryScale(beta, length) if beta and length else None


def _name(layer: nn.Module, child: nn.Module) -> str:
    return next(name for name, each in layer.named_children() if each is child)
