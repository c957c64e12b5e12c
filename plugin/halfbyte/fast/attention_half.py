"""The attention half of a decoder layer, forward and backward, outside autograd.

It adds its output to a residual where one is given. What a backward starts from is kept or None, which is recomputed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.fast.around import close, normed, normed_backward, reopen, rows
from halfbyte.fast.attention import Attention, Kept
from halfbyte.fast.norm import Norm
from halfbyte.fast.parts import AttentionParts
from halfbyte.fast.projections import Projections
from halfbyte.fast.rope import Rotary


@dataclass(frozen=True)
class Attended:
    """Intermediates of the attention half: what its backward starts from.

    ``qkv`` is ``[B*T, (Nq+2*Nkv)*D]``, ``qkv_inner`` and ``out_inner`` ``[B*T, sum of r]``, ``output``
    ``[B, T, Nq, D]``, ``projected`` ``[B*T, H]``, the input of the norm that closes the half; None is recomputed.
    """

    qkv: Tensor | None
    qkv_inner: Tensor | None
    output: Tensor
    kept: Kept
    projected: Tensor | None
    out_inner: Tensor | None


@dataclass(frozen=True)
class AttentionHalf:
    """One call of an attention half: its parts, the adapters active now, the batch's rotation and attention.

    ``factors`` of the queries are ``[B, T, 1, 1]``. ``read`` are the tokens whose output is read, int64 ``[K]``, where
    not all are: queries, outputs and their gradients are of these K, keys and values of all T.
    """

    parts: AttentionParts
    qkv: Projections
    out: Projections
    rotary: Rotary | None
    attention: Attention
    factors: Tensor | None = None
    read: Tensor | None = None

    def forward(
        self, stream: Tensor, residual: Tensor | None, *, keep_graph: bool
    ) -> tuple[Tensor, Attended]:
        """Return ``residual + out(attention(turned heads of qkv(norm(stream))))``, ``[B, T, H]``, and intermediates.

        ``residual`` is of the tokens that are read.
        """
        qkv, qkv_inner = self._make_qkv(normed(self.parts.norm, stream)[0])
        q, k, v = self._heads(qkv, stream.shape)
        q = self.those_read(q)
        output, kept = self.attention.forward(q, k, v, keep_graph=keep_graph)
        flat = rows(self._gated(output, qkv).flatten(2))
        y, projected, out_inner = close(self.out, self.parts, flat, residual)
        return y.view(*output.shape[:2], -1), Attended(qkv, qkv_inner, output, kept, projected, out_inner)

    def backward(
        self, dy: Tensor, stream: Tensor, attended: Attended, around: Tensor | None, need_dstream: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return the gradients of ``stream`` (None without ``need_dstream``) and of the half's adapters.

        ``dy`` is the gradient of what :meth:`forward` returned, ``around`` what else reaches ``stream``, both
        ``[B, T, H]``.
        """
        x, statistics = normed(self.parts.norm, stream)
        qkv, qkv_inner = attended.qkv, attended.qkv_inner
        if qkv is None:
            qkv, qkv_inner = self._make_qkv(x)
        flat = rows(self._gated(attended.output, qkv).flatten(2))
        dprojected = reopen(self.out, self.parts, rows(dy), attended.projected, lambda: flat)
        dflat, out_gradients = self.out.backward(
            dprojected, flat, attended.out_inner, self.out.weight(flat.dtype)
        )
        assert dflat is not None
        q, k, v = self._heads(qkv, stream.shape)
        q = self.those_read(q)
        dqkv = torch.empty_like(qkv)
        doutput = self._gated_backward(dflat.view(attended.output.shape), attended.output, qkv, dqkv)
        dq, dk, dv = self.attention.backward(doutput, q, k, v, attended.output, attended.kept)
        self._heads_backward((self._of_all(dq, stream), dk, dv), qkv, dqkv)
        weight = self.qkv.weight(x.dtype) if need_dstream else None
        dx, qkv_gradients = self.qkv.backward(dqkv, rows(x), qkv_inner, weight)
        if dx is None:
            return None, qkv_gradients + out_gradients
        around = None if around is None else self._of_all(around, stream)
        dstream = normed_backward(self.parts.norm, dx, stream, statistics, around)
        return dstream, qkv_gradients + out_gradients

    def parameters(self) -> list[Tensor]:
        """Return the active adapters' A and B in the order of the gradients."""
        return self.qkv.parameters() + self.out.parameters()

    def those_read(self, x: Tensor) -> Tensor:
        """Return of ``x`` ``[B, T, ...]`` the tokens whose output is read, ``[B, K, ...]``."""
        return x if self.read is None else x[:, self.read]

    def _of_all(self, dx: Tensor, stream: Tensor) -> Tensor:
        """The gradient ``[B, T, ...]`` of what :meth:`those_read` was given, for ``dx`` of what it returned."""
        if self.read is None:
            return dx
        return dx.new_zeros(*stream.shape[:2], *dx.shape[2:]).index_copy_(1, self.read, dx)

    def _make_qkv(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return queries, keys and values side by side, turned unless the heads are normed first.

        A head norm's gradient needs its input, so there the rotation waits until the heads are split.
        """
        qkv, inner = self.qkv.forward(rows(x), self.qkv.weight(x.dtype))
        if self._turned_first:
            self._turn(qkv, x.shape)
        return qkv, inner

    @property
    def _turned_first(self) -> bool:
        return self.parts.query_norm is None or self.parts.rotated_first

    def _heads(self, qkv: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Split ``qkv`` into what attention reads, normed and turned: ``[B, T, Nq, D]``, twice ``[B, T, Nkv, D]``."""
        heads = self._split(qkv, shape)
        norms = (self.parts.query_norm, self.parts.key_norm, self.parts.value_norm)
        q, k, v = (_heads_normed(norm, head)[0] for norm, head in zip(norms, heads, strict=True))
        if not self._turned_first:
            if self.rotary is not None:
                q, k = self.rotary.rotate_(q), self.rotary.rotate_(k)
            if self.factors is not None:
                q = q.mul_(self.factors)
        return q, k, v

    def _heads_backward(self, gradients: tuple[Tensor, Tensor, Tensor], qkv: Tensor, dqkv: Tensor) -> None:
        """Write the gradient of ``qkv`` before rotation and norms to ``dqkv``, side by side."""
        shape = gradients[0].shape
        dheads = self._split(dqkv, shape)
        if self.parts.shared_values:
            dheads = (*dheads[:2], gradients[2])
        for dhead, gradient in zip(dheads, gradients, strict=True):
            dhead.copy_(gradient)
        if not self.parts.rotated_first:
            self._turn(dqkv, shape, back=True)
        norms = (self.parts.query_norm, self.parts.key_norm, self.parts.value_norm)
        for norm, dhead, head in zip(norms, dheads, self._split(qkv, shape), strict=True):
            if norm is not None:
                normed, statistics = _heads_normed(norm, head)
                flat, dflat = (_as_normed(norm, each) for each in (head, dhead))
                dhead.copy_(norm.backward(dflat, flat, statistics).view(normed.shape))
        if self.parts.shared_values:
            dheads[1].add_(dheads[2])
        if self.parts.rotated_first:
            self._turn(dqkv, shape, back=True)

    def _split(self, qkv: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Views of queries, keys and values, which the keys may be too; a gate follows the query of its head."""
        if self.parts.by_head:
            q, k, v = qkv.view(*shape[:2], self.parts.heads, 3, self.parts.head_size).unbind(3)
            return q, k, v
        queries = self.parts.heads * (2 if self.parts.gated else 1)
        q, k, *values = qkv.view(*shape[:2], -1, self.parts.head_size).tensor_split(
            (queries, queries + self.parts.kv_heads), dim=2
        )
        return (q[:, :, ::2] if self.parts.gated else q), k, (k if self.parts.shared_values else values[0])

    def _turn(self, qkv: Tensor, shape: torch.Size, *, back: bool = False) -> None:
        """Rotate queries and keys of ``qkv`` in place, and scale the queries."""
        heads = qkv.view(*shape[:2], -1, self.parts.head_size)
        q, k, _ = self._split(qkv, shape)
        apart = self.parts.gated or self.parts.by_head
        turned = (q, k) if apart else (heads[:, :, : self.parts.heads + self.parts.kv_heads],)
        if self.rotary is not None:
            for each in turned:
                self.rotary.rotate_(each, back=back)
        if self.factors is not None:
            q.mul_(self.factors)

    def _gated(self, output: Tensor, qkv: Tensor) -> Tensor:
        """The output ``[B, T, Nq, D]`` times the sigmoid of its gate, if it has one."""
        return output * self._gate(output, qkv).sigmoid() if self.parts.gated else output

    def _gated_backward(self, dgated: Tensor, output: Tensor, qkv: Tensor, dqkv: Tensor) -> Tensor:
        """Return the gradient of the output before its gate, and write that of the gate."""
        if not self.parts.gated:
            return dgated
        share = self._gate(output, qkv).sigmoid()
        self._gate(output, dqkv).copy_(dgated * output * share * (1 - share))
        return dgated * share

    def _gate(self, output: Tensor, qkv: Tensor) -> Tensor:
        heads = qkv.view(*output.shape[:2], -1, self.parts.head_size)
        return heads[:, :, 1 : 2 * self.parts.heads : 2]


def _as_normed(norm: Norm, heads: Tensor) -> Tensor:
    """Heads ``[B, T, N, D]``, side by side where the norm is of all of them."""
    wide = norm.weight is not None and norm.weight.numel() != heads.shape[-1]
    return heads.flatten(2) if wide else heads


def _heads_normed(norm: Norm | None, heads: Tensor) -> tuple[Tensor, Tensor]:
    """Heads ``[B, T, N, D]`` after their norm, and its statistics."""
    if norm is None:
        return heads, heads.new_empty(0)
    y, statistics = norm.forward(_as_normed(norm, heads))
    return y.view(heads.shape), statistics
