"""Read the maps of multi-head latent attention by their names, which all of transformers' models share."""

from typing import Any

from halfbyte.fast import members
from halfbyte.fast.parts import Form, LatentMaps, Linears, Uncovered

_LATENT, _NORM, _KEY_VALUE = ("kv_a_proj_with_mqa",), "kv_a_layernorm", ("kv_b_proj",)
_QUERIES, _LOW, _QUERY_NORM, _OF_LOW = ("q_proj",), ("q_a_proj",), "q_a_layernorm", ("q_b_proj",)


def is_latent(attention: Any) -> bool:
    """Whether ``attention`` makes keys and values of a latent."""
    return members.linears(attention, (_LATENT,)) is not None


def read(attention: Any, out: Linears, form: Form, name: str) -> tuple[LatentMaps, int, int, int, int]:
    """Return the maps; the heads of queries and of keys, and the sizes of keys and of values.

    ``attention`` is called ``name`` in its layer. Raises :class:`Uncovered` if it has other maps.
    """
    latent, key_value = (members.linears(attention, (each,)) for each in (_LATENT, _KEY_VALUE))
    queries = members.linears(attention, (_QUERIES,))
    low = queries or members.linears(attention, (_LOW,))
    query = () if queries else members.linears(attention, (_OF_LOW,))
    size = getattr(attention, "qk_head_dim", None)
    if latent is None or key_value is None or low is None or query is None or size is None:
        raise Uncovered(f"{type(attention).__name__} is not a latent attention that is fused")
    rotated = members.width(latent[0], "out_features") - members.width(key_value[0], "in_features")
    heads, odd = divmod(members.width((*low, *query)[-1], "out_features"), size)
    value_size, rest = divmod(members.width(out[0], "in_features"), max(heads, 1))
    made = members.width(key_value[0], "out_features")
    if odd or rest or not 0 < rotated <= size or made != heads * (size - rotated + value_size):
        raise Uncovered(f"{type(attention).__name__} has more than queries, keys and values")
    norm = members.norm(attention, _NORM, form, name)
    query_norm = members.norm(attention, _QUERY_NORM if query else None, form, name)
    maps = LatentMaps(
        low=low,
        query_norm=query_norm,
        query=query,
        latent=latent,
        norm=norm,
        key_value=key_value,
        rotated=rotated,
    )
    norms = {getattr(attention, each, None) for each in (_NORM, _QUERY_NORM)}
    members.check_whole(attention, {*maps.linears, *out, *norms})
    return maps, heads, heads, size, value_size
