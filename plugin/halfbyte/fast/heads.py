"""Queries, keys and values of an attention half, forward and backward: what makes them, and linear maps that do.

Heads come after tokens: queries are ``[B, T, Nq, D]``, keys ``[B, T, Nkv, D]``, values ``[B, T, Nkv, Dv]``.
:mod:`halfbyte.fast.latent_heads` makes them of latents.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.fast.around import rows
from halfbyte.fast.norm import Norm
from halfbyte.fast.parts import AttentionParts, DirectMaps
from halfbyte.fast.projections import Projections
from halfbyte.fast.rope import Rotary

# What is kept of a forward where queries, keys and values are: all that linear maps returned, and inner values.
Made = tuple[Tensor | None, ...]


class Heads(Protocol):
    """What makes queries, keys and values of ``x`` ``[B, T, H]``, and their gradients."""

    def make(self, x: Tensor) -> Made:
        """Return what :meth:`split` and :meth:`backward` read."""

    def split(self, made: Made, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Return what attention reads, normed and rotated, of an input of ``shape``."""

    def gate(self, made: Made, shape: torch.Size) -> Tensor | None:
        """Return the gate of the output before its sigmoid, ``[B, T, Nq, D]``; None where there is none."""

    def backward(
        self,
        gradients: tuple[Tensor, Tensor, Tensor],
        dgate: Tensor | None,
        made: Made,
        x: Tensor,
        need_dx: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return the gradients of ``x`` as rows (None without ``need_dx``) and of :meth:`parameters`.

        ``gradients`` are those of queries, keys and values.
        """

    def parameters(self) -> list[Tensor]:
        """Return the active adapters' A and B in the order of the gradients."""


@dataclass(frozen=True)
class DirectHeads:
    """Heads that linear maps of the input make side by side, ``[B*T, (Nq+2*Nkv)*D]``; ``factors`` are the queries'.

    Of a forward it keeps that and inner values.
    """

    parts: AttentionParts
    maps: DirectMaps
    qkv: Projections
    rotary: Rotary | None
    factors: Tensor | None = None

    def make(self, x: Tensor) -> Made:
        """Return queries, keys and values side by side, turned unless the heads are normed first.

        A head norm's gradient needs its input, so there the rotation waits until the heads are split.
        """
        qkv, inner = self.qkv.forward(rows(x), self.qkv.weight(x.dtype))
        if self._turned_first:
            self._turn(qkv, x.shape)
        return qkv, inner

    def split(self, made: Made, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        heads = self._split(_side_by_side(made), shape)
        norms = (self.maps.query_norm, self.maps.key_norm, self.maps.value_norm)
        q, k, v = (_normed(norm, head)[0] for norm, head in zip(norms, heads, strict=True))
        if not self._turned_first:
            if self.rotary is not None:
                q, k = self.rotary.rotate_(q), self.rotary.rotate_(k)
            if self.factors is not None:
                q = q.mul_(self.factors)
        return q, k, v

    def gate(self, made: Made, shape: torch.Size) -> Tensor | None:
        return self._gate(_side_by_side(made), shape) if self.maps.gated else None

    def backward(
        self,
        gradients: tuple[Tensor, Tensor, Tensor],
        dgate: Tensor | None,
        made: Made,
        x: Tensor,
        need_dx: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        qkv, inner = _side_by_side(made), made[1]
        dqkv = torch.empty_like(qkv)
        if dgate is not None:
            self._gate(dqkv, x.shape).copy_(dgate)
        self._split_backward(gradients, qkv, dqkv, x.shape)
        return self.qkv.backward(dqkv, rows(x), inner, self.qkv.weight(x.dtype) if need_dx else None)

    def parameters(self) -> list[Tensor]:
        return self.qkv.parameters()

    @property
    def _turned_first(self) -> bool:
        return self.maps.query_norm is None or self.maps.rotated_first

    def _split_backward(
        self, gradients: tuple[Tensor, Tensor, Tensor], qkv: Tensor, dqkv: Tensor, shape: torch.Size
    ) -> None:
        """Write the gradient of ``qkv`` before rotation and norms to ``dqkv``, side by side."""
        dheads = self._split(dqkv, shape)
        if self.maps.shared_values:
            dheads = (*dheads[:2], gradients[2])
        for dhead, gradient in zip(dheads, gradients, strict=True):
            dhead.copy_(gradient)
        if not self.maps.rotated_first:
            self._turn(dqkv, shape, back=True)
        norms = (self.maps.query_norm, self.maps.key_norm, self.maps.value_norm)
        for norm, dhead, head in zip(norms, dheads, self._split(qkv, shape), strict=True):
            if norm is not None:
                normed, statistics = _normed(norm, head)
                flat, dflat = (_as_normed(norm, each) for each in (head, dhead))
                dhead.copy_(norm.backward(dflat, flat, statistics).view(normed.shape))
        if self.maps.shared_values:
            dheads[1].add_(dheads[2])
        if self.maps.rotated_first:
            self._turn(dqkv, shape, back=True)

    def _split(self, qkv: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Views of queries, keys and values, which the keys may be too; a gate follows the query of its head."""
        if self.maps.by_head:
            q, k, v = qkv.view(*shape[:2], self.parts.heads, 3, self.parts.head_size).unbind(3)
            return q, k, v
        queries = self.parts.heads * (2 if self.maps.gated else 1)
        q, k, *values = qkv.view(*shape[:2], -1, self.parts.head_size).tensor_split(
            (queries, queries + self.parts.kv_heads), dim=2
        )
        return (q[:, :, ::2] if self.maps.gated else q), k, (k if self.maps.shared_values else values[0])

    def _turn(self, qkv: Tensor, shape: torch.Size, *, back: bool = False) -> None:
        """Rotate queries and keys of ``qkv`` in place, and scale the queries."""
        heads = qkv.view(*shape[:2], -1, self.parts.head_size)
        q, k, _ = self._split(qkv, shape)
        apart = self.maps.gated or self.maps.by_head
        turned = (q, k) if apart else (heads[:, :, : self.parts.heads + self.parts.kv_heads],)
        if self.rotary is not None:
            for each in turned:
                self.rotary.rotate_(each, back=back)
        if self.factors is not None:
            q.mul_(self.factors)

    def _gate(self, qkv: Tensor, shape: torch.Size) -> Tensor:
        heads = qkv.view(*shape[:2], -1, self.parts.head_size)
        return heads[:, :, 1 : 2 * self.parts.heads : 2]


def _side_by_side(made: Made) -> Tensor:
    assert made[0] is not None
    return made[0]


def _as_normed(norm: Norm, heads: Tensor) -> Tensor:
    """Heads ``[B, T, N, D]``, side by side where the norm is of all of them."""
    wide = norm.weight is not None and norm.weight.numel() != heads.shape[-1]
    return heads.flatten(2) if wide else heads


def _normed(norm: Norm | None, heads: Tensor) -> tuple[Tensor, Tensor]:
    """Heads ``[B, T, N, D]`` after their norm, and its statistics."""
    if norm is None:
        return heads, heads.new_empty(0)
    y, statistics = norm.forward(_as_normed(norm, heads))
    return y.view(heads.shape), statistics
