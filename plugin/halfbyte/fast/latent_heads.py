"""Heads of multi-head latent attention: keys and values are made of a latent, queries directly or of one too.

    low = low(x)                  query_h = query_h(norm(low)), or low itself, with its last channels rotated
    latent, key = latent(x)       key_h = [key_value_h(norm(latent)), rotated key]; value_h is the rest of the map

A forward keeps what the maps returned. The keys, in which every head has the rotated channels again, are put together
for attention each time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.fast.around import normed, normed_backward, rows
from halfbyte.fast.heads import Made
from halfbyte.fast.norm import Norm
from halfbyte.fast.parts import AttentionParts, LatentMaps
from halfbyte.fast.projections import Projections
from halfbyte.fast.rope import Rotary


@dataclass(frozen=True)
class LatentHeads:
    """Heads that are made of latents; ``factors`` are the queries'.

    The maps are applied in the order of the model's own forward, in which dropout draws. Of a forward it keeps what
    each returned, with the channels rotated, and its inner values.
    """

    parts: AttentionParts
    maps: LatentMaps
    low: Projections
    query: Projections | None
    latent: Projections
    key_value: Projections
    rotary: Rotary | None
    factors: Tensor | None = None

    def make(self, x: Tensor) -> Made:
        flat = rows(x)
        query = query_inner = None
        low, low_inner = self.low.forward(flat, self.low.weight(x.dtype))
        if self.query is not None:
            given = normed(self.maps.query_norm, low)[0]
            query, query_inner = self.query.forward(given, self.query.weight(x.dtype))
        latent, latent_inner = self.latent.forward(flat, self.latent.weight(x.dtype))
        given = normed(self.maps.norm, self._without_key(latent))[0]
        key_value, inner = self.key_value.forward(given, self.key_value.weight(x.dtype))
        self._turn(low if query is None else query, latent, x.shape)
        return low, low_inner, query, query_inner, latent, latent_inner, key_value, inner

    def split(self, made: Made, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        low, _, query, _, latent, _, key_value, _ = made
        assert low is not None
        assert latent is not None
        assert key_value is not None
        plain, v = self._of_heads(key_value, shape)
        k = plain.new_empty(*plain.shape[:3], self.parts.head_size)
        for channels, given in zip(self._channels(k), (plain, self._key(latent, shape)), strict=True):
            channels.copy_(given)
        return self._queries(low if query is None else query, shape), k, v

    def gate(self, made: Made, shape: torch.Size) -> None:
        return None

    def backward(
        self,
        gradients: tuple[Tensor, Tensor, Tensor],
        dgate: Tensor | None,
        made: Made,
        x: Tensor,
        need_dx: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        low, low_inner, query, query_inner, latent, latent_inner, key_value, inner = made
        assert low is not None
        assert latent is not None
        assert key_value is not None
        dq, dk, dv = gradients
        dqueries, dlatent = torch.empty_like(low if query is None else query), torch.empty_like(latent)
        self._queries(dqueries, x.shape).copy_(dq)
        dplain, dshared = self._channels(dk)
        torch.sum(dshared, 2, keepdim=True, out=self._key(dlatent, x.shape))
        self._turn(dqueries, dlatent, x.shape, back=True)
        dlow: Tensor = dqueries
        of_query: list[Tensor] = []
        if self.query is not None:
            dlow, of_query = _through(self.query, self.maps.query_norm, dqueries, low, query_inner)
        dx, of_low = self.low.backward(
            dlow, rows(x), low_inner, self.low.weight(x.dtype) if need_dx else None
        )
        dkey_value = torch.empty_like(key_value)
        for channels, given in zip(self._of_heads(dkey_value, x.shape), (dplain, dv), strict=True):
            channels.copy_(given)
        own = self._without_key(latent)
        found, of_key_value = _through(self.key_value, self.maps.norm, dkey_value, own, inner)
        self._without_key(dlatent).copy_(found)
        more, of_latent = self.latent.backward(
            dlatent, rows(x), latent_inner, self.latent.weight(x.dtype) if need_dx else None
        )
        if dx is not None and more is not None:
            dx.add_(more)
        return dx, of_low + of_query + of_latent + of_key_value

    def parameters(self) -> list[Tensor]:
        maps = (self.low, self.query, self.latent, self.key_value)
        return [each for map_ in maps if map_ is not None for each in map_.parameters()]

    def _queries(self, flat: Tensor, shape: torch.Size) -> Tensor:
        return flat.view(*shape[:2], self.parts.heads, self.parts.head_size)

    def _without_key(self, latent: Tensor) -> Tensor:
        """The latent of keys and values alone, a view."""
        return latent[:, : -self.maps.rotated]

    def _key(self, latent: Tensor, shape: torch.Size) -> Tensor:
        """The rotated channels of the keys, a view ``[B, T, 1, rotated]``."""
        return latent[:, -self.maps.rotated :].view(*shape[:2], 1, self.maps.rotated)

    def _channels(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the channels of ``heads`` ``[B, T, N, D]`` before those that are rotated, and of these."""
        return heads[..., : -self.maps.rotated], heads[..., -self.maps.rotated :]

    def _of_heads(self, key_value: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Views of each head's own channels of its key, and of its value."""
        heads = key_value.view(*shape[:2], self.parts.heads, -1)
        return heads[..., : -self.parts.value_size], heads[..., -self.parts.value_size :]

    def _turn(self, queries: Tensor, latent: Tensor, shape: torch.Size, *, back: bool = False) -> None:
        """Rotate the last channels of queries and keys in place, and scale the queries."""
        heads = self._queries(queries, shape)
        if self.rotary is not None:
            for each in (self._channels(heads)[1], self._key(latent, shape)):
                self.rotary.rotate_(each, back=back)
        if self.factors is not None:
            heads.mul_(self.factors)


def _through(
    map_: Projections, norm: Norm | None, dy: Tensor, latent: Tensor, inner: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of ``latent``, which ``map_`` reads after its norm, and of the adapters."""
    x, statistics = normed(norm, latent)
    dx, gradients = map_.backward(dy, x, inner, map_.weight(x.dtype))
    assert dx is not None
    return normed_backward(norm, dx, latent, statistics, None), gradients
