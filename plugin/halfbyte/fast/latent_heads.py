"""Heads of multi-head latent attention: keys and values are made of a latent, queries directly or of one too.

    latent, key = first(x)                     the latent of keys and values, and the rotated channels of the keys
    k_h = [key_value_h(norm(latent)), rotate(key)]        for each head h; its value is the rest of key_value_h

A forward keeps what the maps returned; the keys, in which every head has the rotated channels again, are put together
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

    Of a forward it keeps what ``first``, ``query``, where there is one, and ``key_value`` returned, with the channels
    rotated, and their inner values.
    """

    parts: AttentionParts
    maps: LatentMaps
    first: Projections
    query: Projections | None
    key_value: Projections
    rotary: Rotary | None
    factors: Tensor | None = None

    def make(self, x: Tensor) -> Made:
        first, first_inner = self.first.forward(rows(x), self.first.weight(x.dtype))
        low, latent, _ = self._parts_of(first)
        query = query_inner = None
        if self.query is not None:
            given = normed(self.maps.query_norm, low)[0]
            query, query_inner = self.query.forward(given, self.query.weight(x.dtype))
        given = _times(self.maps.factor, normed(self.maps.norm, latent)[0])
        key_value, inner = self.key_value.forward(given, self.key_value.weight(x.dtype))
        self._turn(first, query, x.shape)
        return first, first_inner, query, query_inner, key_value, inner

    def split(self, made: Made, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        first, _, query, _, key_value, _ = made
        assert first is not None
        assert key_value is not None
        plain, v = self._of_heads(key_value, shape)
        k = plain.new_empty(*plain.shape[:3], self.parts.head_size)
        for part, channels in zip(self._channels(k), (plain, self._key(first, shape)), strict=True):
            part.copy_(channels)
        return self._queries(first, query, shape), k, v

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
        first, first_inner, query, query_inner, key_value, inner = made
        assert first is not None
        assert key_value is not None
        dq, dk, dv = gradients
        dfirst, dquery = torch.empty_like(first), None if query is None else torch.empty_like(query)
        self._queries(dfirst, dquery, x.shape).copy_(dq)
        dplain, dshared = self._channels(dk)
        torch.sum(dshared, 2, keepdim=True, out=self._key(dfirst, x.shape))
        self._turn(dfirst, dquery, x.shape, back=True)
        dkey_value = torch.empty_like(key_value)
        for part, gradient in zip(self._of_heads(dkey_value, x.shape), (dplain, dv), strict=True):
            part.copy_(gradient)
        low, latent, _ = self._parts_of(first)
        dlow, dlatent, _ = self._parts_of(dfirst)
        found: list[Tensor] = []
        if self.query is not None and dquery is not None:
            found += self._latent_backward(
                self.query, self.maps.query_norm, 1.0, dquery, low, query_inner, dlow
            )
        found += self._latent_backward(
            self.key_value, self.maps.norm, self.maps.factor, dkey_value, latent, inner, dlatent
        )
        weight = self.first.weight(x.dtype) if need_dx else None
        dx, of_first = self.first.backward(dfirst, rows(x), first_inner, weight)
        return dx, of_first + found

    def parameters(self) -> list[Tensor]:
        of_query = [] if self.query is None else self.query.parameters()
        return self.first.parameters() + of_query + self.key_value.parameters()

    def _latent_backward(
        self,
        map_: Projections,
        norm: Norm | None,
        factor: float,
        dy: Tensor,
        latent: Tensor,
        inner: Tensor | None,
        dlatent: Tensor,
    ) -> list[Tensor]:
        """Write the gradient of ``latent``, which ``map_`` reads normed, and return those of its adapters."""
        x, statistics = normed(norm, latent)
        dx, found = map_.backward(dy, _times(factor, x), inner, map_.weight(x.dtype))
        assert dx is not None
        dlatent.copy_(normed_backward(norm, _times(factor, dx), latent, statistics, None))
        return found

    def _parts_of(self, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the queries or their latent, the latent of keys and values, and what all heads' keys share."""
        latent = self.key_value.bases[0].in_features
        low = first.shape[1] - latent - self.maps.rotated
        low_, latent_, key = first.split((low, latent, self.maps.rotated), dim=1)
        return low_, latent_, key

    def _queries(self, first: Tensor, query: Tensor | None, shape: torch.Size) -> Tensor:
        flat = self._parts_of(first)[0] if query is None else query
        return flat.view(*shape[:2], self.parts.heads, self.parts.head_size)

    def _key(self, first: Tensor, shape: torch.Size) -> Tensor:
        """The rotated channels of the keys, ``[B, T, 1, rotated]``."""
        return self._parts_of(first)[2].view(*shape[:2], 1, self.maps.rotated)

    def _channels(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the channels of ``heads`` ``[B, T, N, D]`` before those that are rotated, and of these."""
        plain, rotated = heads.split((self.parts.head_size - self.maps.rotated, self.maps.rotated), dim=3)
        return plain, rotated

    def _of_heads(self, key_value: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Views of each head's own channels of its key, and of its value."""
        heads = key_value.view(*shape[:2], self.parts.heads, -1)
        plain, values = heads.split((self.parts.head_size - self.maps.rotated, self.parts.value_size), dim=3)
        return plain, values

    def _turn(self, first: Tensor, query: Tensor | None, shape: torch.Size, *, back: bool = False) -> None:
        """Rotate the last channels of queries and keys in place, and scale the queries."""
        queries = self._queries(first, query, shape)
        if self.rotary is not None:
            for each in (self._channels(queries)[1], self._key(first, shape)):
                self.rotary.rotate_(each, back=back)
        if self.factors is not None:
            queries.mul_(self.factors)


def _times(factor: float, x: Tensor) -> Tensor:
    return x if factor == 1 else x * factor
