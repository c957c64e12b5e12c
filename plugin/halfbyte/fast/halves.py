"""The two halves of a decoder layer, attention and MLP, forward and backward, outside autograd.

Each half adds its output to a residual where one is given. What a backward starts from is kept or None, which is
recomputed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.fast.attention import Attention, Kept
from halfbyte.fast.norm import Norm
from halfbyte.fast.parts import AttentionParts, MlpParts
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
class Transformed:
    """Intermediates of the MLP half: what its backward starts from.

    ``gate_up`` is ``[B*T, 2F]``, ``inner`` and ``down_inner`` ``[B*T, sum of r]``, ``projected`` ``[B*T, H]`` as of
    :class:`Attended`; None is recomputed.
    """

    gate_up: Tensor | None
    inner: Tensor | None
    projected: Tensor | None
    down_inner: Tensor | None


@dataclass(frozen=True)
class AttentionHalf:
    """One call of an attention half: its parts, the adapters active now, the batch's rotation and attention.

    ``factors`` of the queries are ``[B, T, 1, 1]``.
    """

    parts: AttentionParts
    qkv: Projections
    out: Projections
    rotary: Rotary | None
    attention: Attention
    factors: Tensor | None = None

    def forward(
        self, stream: Tensor, residual: Tensor | None, *, keep_graph: bool
    ) -> tuple[Tensor, Attended]:
        """Return ``residual + out(attention(turned heads of qkv(norm(stream))))``, ``[B, T, H]``, and intermediates."""
        qkv, qkv_inner = self._make_qkv(_normed(self.parts.norm, stream)[0])
        q, k, v = self._heads(qkv, stream.shape)
        output, kept = self.attention.forward(q, k, v, keep_graph=keep_graph)
        flat = rows(self._gated(output, qkv).flatten(2))
        y, projected, out_inner = _close(self.out, self.parts, flat, residual)
        return y.view(stream.shape), Attended(qkv, qkv_inner, output, kept, projected, out_inner)

    def backward(
        self, dy: Tensor, stream: Tensor, attended: Attended, around: Tensor | None, need_dstream: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return the gradients of ``stream`` (None without ``need_dstream``) and of the half's adapters.

        ``dy`` is the gradient of what :meth:`forward` returned, ``around`` what else reaches ``stream``, both
        ``[B, T, H]``.
        """
        x, statistics = _normed(self.parts.norm, stream)
        qkv, qkv_inner = attended.qkv, attended.qkv_inner
        if qkv is None:
            qkv, qkv_inner = self._make_qkv(x)
        flat = rows(self._gated(attended.output, qkv).flatten(2))
        dprojected = _open(self.out, self.parts, rows(dy), attended.projected, lambda: flat)
        dflat, out_gradients = self.out.backward(
            dprojected, flat, attended.out_inner, self.out.weight(flat.dtype)
        )
        assert dflat is not None
        q, k, v = self._heads(qkv, stream.shape)
        dqkv = torch.empty_like(qkv)
        doutput = self._gated_backward(dflat.view(attended.output.shape), attended.output, qkv, dqkv)
        gradients = self.attention.backward(doutput, q, k, v, attended.output, attended.kept)
        self._heads_backward(gradients, qkv, dqkv)
        weight = self.qkv.weight(x.dtype) if need_dstream else None
        dx, qkv_gradients = self.qkv.backward(dqkv, rows(x), qkv_inner, weight)
        if dx is None:
            return None, qkv_gradients + out_gradients
        dstream = _normed_backward(self.parts.norm, dx, stream, statistics, around)
        return dstream, qkv_gradients + out_gradients

    def parameters(self) -> list[Tensor]:
        """Return the active adapters' A and B in the order of the gradients."""
        return self.qkv.parameters() + self.out.parameters()

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
        queries = self.parts.heads * (2 if self.parts.gated else 1)
        q, k, *v = qkv.view(*shape[:2], -1, self.parts.head_size).tensor_split(
            (queries, queries + self.parts.kv_heads), dim=2
        )
        return (q[:, :, ::2] if self.parts.gated else q), k, (k if self.parts.shared_values else v[0])

    def _turn(self, qkv: Tensor, shape: torch.Size, *, back: bool = False) -> None:
        """Rotate queries and keys of ``qkv`` in place, and scale the queries."""
        heads = qkv.view(*shape[:2], -1, self.parts.head_size)
        q, k, _ = self._split(qkv, shape)
        turned = (q, k) if self.parts.gated else (heads[:, :, : self.parts.heads + self.parts.kv_heads],)
        for each in turned if self.rotary is not None else ():
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


@dataclass(frozen=True)
class MlpHalf:
    """One call of an MLP half: its parts and the adapters active now."""

    parts: MlpParts
    gate_up: Projections
    down: Projections

    def forward(self, stream: Tensor, residual: Tensor | None) -> tuple[Tensor, Transformed]:
        """Return ``residual + down(act(gate) * up)``, ``[..., H]``, and intermediates; gate and up are of the norm."""
        x, _ = _normed(self.parts.norm, stream)
        gate_up, inner = self.gate_up.forward(rows(x), self.gate_up.weight(x.dtype))
        y, projected, down_inner = _close(self.down, self.parts, self.parts.gate.forward(gate_up), residual)
        # No view: autograd refuses to change a view that a function returns in place.
        y = torch.ops.aten._unsafe_view(y, stream.shape)
        return y, Transformed(gate_up, inner, projected, down_inner)

    def backward(
        self, dy: Tensor, stream: Tensor, transformed: Transformed, around: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the gradients of ``stream`` and of the half's adapters; ``dy``, ``[..., H]``, is the output's.

        ``around`` is what else reaches ``stream``.
        """
        x, statistics = _normed(self.parts.norm, stream)
        weight = self.gate_up.weight(x.dtype)
        gate_up, inner, down_inner = transformed.gate_up, transformed.inner, transformed.down_inner
        if gate_up is None:
            gate_up, inner = self.gate_up.forward(rows(x), weight)
        made = gate_up
        dprojected = _open(
            self.down, self.parts, rows(dy), transformed.projected, lambda: self.parts.gate.forward(made)
        )
        dproduct, dinner = self.down.input_gradient(dprojected, self.down.weight(x.dtype))
        dgate_up, product = self.parts.gate.backward(dproduct, gate_up)  # which takes dproduct's place
        if down_inner is None:
            down_inner = self.down.inner(product)
        down_gradients = self.down.parameter_gradients(dprojected, dinner, product, down_inner)
        dx, gate_up_gradients = self.gate_up.backward(dgate_up, rows(x), inner, weight)
        assert dx is not None
        dstream = _normed_backward(self.parts.norm, dx, stream, statistics, around)
        return dstream, gate_up_gradients + down_gradients

    def parameters(self) -> list[Tensor]:
        """Return the active adapters' A and B in the order of the gradients."""
        return self.gate_up.parameters() + self.down.parameters()


def rows(x: Tensor) -> Tensor:
    """``[..., width]`` as ``[rows, width]``."""
    return x.reshape(-1, x.shape[-1])


def _close(
    map_: Projections, parts: AttentionParts | MlpParts, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the output of a half that ends with ``map_(x)``, the input of its closing norm, and inner values."""
    around = None if residual is None else rows(residual)
    if parts.closing is None and parts.factor == 1:
        y, inner = map_.forward(x, map_.weight(x.dtype), residual=around)
        return y, None, inner
    y, inner = map_.forward(x, map_.weight(x.dtype))
    projected = None
    if parts.closing is not None:
        projected, y = y, parts.closing.forward(y)[0]
    return (y if around is None else torch.add(around, y, alpha=parts.factor)), projected, inner


def _open(
    map_: Projections,
    parts: AttentionParts | MlpParts,
    dy: Tensor,
    projected: Tensor | None,
    input_: Callable[[], Tensor],
) -> Tensor:
    """Return the gradient of what ``map_`` returned, for ``dy`` of the half's output; ``input_`` makes its input."""
    if parts.factor != 1:
        dy = dy * parts.factor
    if parts.closing is None:
        return dy
    if projected is None:
        x = input_()
        projected = map_.forward(x, map_.weight(x.dtype))[0]
    return parts.closing.backward(dy, projected, parts.closing.forward(projected)[1])


def _normed(norm: Norm | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    return (x, None) if norm is None else norm.forward(x)


def _normed_backward(
    norm: Norm | None, dx: Tensor, stream: Tensor, statistics: Tensor | None, around: Tensor | None
) -> Tensor:
    """The gradient of ``stream``, through the norm and around the half."""
    if norm is None or statistics is None:
        dstream = dx.view(stream.shape)
        return dstream if around is None else dstream.add_(around)
    return norm.backward(dx, stream, statistics, residual=around)


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
