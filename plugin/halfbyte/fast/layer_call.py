"""One call of a fused decoder layer, forward and backward, as one autograd function.

Autograd keeps every intermediate of a layer, and activation checkpointing none. Here a save level says how much:

===== ============================================ =======================================
level kept beside the layer's input                recomputed in the backward
===== ============================================ =======================================
0     nothing                                      everything
1     attention output, stream between the halves  norms, query-key-value, gate-up
2     and query-key-value                          norms, gate-up
3     and gate-up                                  norms, activation
===== ============================================ =======================================

With an output it keeps the adapters' inner values ``x A'``, which are few. The stream is ``[B, T, H]``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte.fast.attention import Attention, Kept
from halfbyte.fast.family import Decoder
from halfbyte.fast.projections import Projections
from halfbyte.fast.rope import Rotary

LEVELS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Attended:
    """Intermediates of the attention half: what its backward starts from.

    ``qkv`` is ``[B*T, (Nq+2*Nkv)*D]``, ``qkv_inner`` and ``out_inner`` ``[B*T, sum of r]``, ``output``
    ``[B, T, Nq, D]``; None is recomputed.
    """

    qkv: Tensor | None
    qkv_inner: Tensor | None
    output: Tensor
    kept: Kept
    out_inner: Tensor | None


@dataclass(frozen=True)
class Transformed:
    """Intermediates of the MLP half: what its backward starts from.

    ``gate_up`` is ``[B*T, 2F]``, ``inner`` and ``down_inner`` ``[B*T, sum of r]``; None is recomputed.
    """

    gate_up: Tensor | None
    inner: Tensor | None
    down_inner: Tensor | None


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer: its parts, the adapters active now, the batch's rotation and attention."""

    decoder: Decoder
    qkv: Projections
    out: Projections
    gate_up: Projections
    down: Projections
    rotary: Rotary
    attention: Attention
    level: int

    def apply(self, stream: Tensor) -> Tensor:
        """Return the layer's output for ``stream``, both ``[B, T, H]``, as autograd sees it."""
        output: Tensor = _FusedLayer.apply(self, stream, *self.parameters())
        return output

    def parameters(self) -> list[Tensor]:
        """Return the active adapters' A and B in the order of the gradients that the halves return."""
        groups = (self.qkv, self.out, self.gate_up, self.down)
        return [parameter for group in groups for parameter in group.parameters()]

    def attend(self, stream: Tensor, *, keep_graph: bool) -> tuple[Tensor, Attended]:
        """Return ``stream + out(attention(rotated heads of qkv(norm(stream))))``, ``[B, T, H]``, and intermediates."""
        qkv, qkv_inner = self._make_qkv(self.decoder.input_norm.forward(stream)[0])
        q, k, v = self._heads(qkv, stream.shape)
        output, kept = self.attention.forward(q, k, v, keep_graph=keep_graph)
        flat, rows = _rows(output.flatten(2)), _rows(stream)
        middle, out_inner = self.out.forward(flat, self.out.weight(flat.dtype), residual=rows)
        return middle.view(stream.shape), Attended(qkv, qkv_inner, output, kept, out_inner)

    def attend_backward(
        self, dmiddle: Tensor, stream: Tensor, attended: Attended, need_dstream: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return the gradients of ``stream`` (None without ``need_dstream``) and of the half's adapters.

        ``dmiddle`` is the gradient of what :meth:`attend` returned, ``[B, T, H]``.
        """
        x, inverse = self.decoder.input_norm.forward(stream)
        qkv, qkv_inner = attended.qkv, attended.qkv_inner
        if qkv is None:
            qkv, qkv_inner = self._make_qkv(x)
        flat = _rows(attended.output.flatten(2))
        dflat, out_gradients = self.out.backward(
            _rows(dmiddle), flat, attended.out_inner, self.out.weight(flat.dtype)
        )
        assert dflat is not None
        q, k, v = self._heads(qkv, stream.shape)
        doutput = dflat.view(attended.output.shape)
        gradients = self.attention.backward(doutput, q, k, v, attended.output, attended.kept)
        dqkv = self._heads_backward(gradients, qkv)
        weight = self.qkv.weight(x.dtype) if need_dstream else None
        dx, qkv_gradients = self.qkv.backward(dqkv, _rows(x), qkv_inner, weight)
        if dx is None:
            return None, qkv_gradients + out_gradients
        dstream = self.decoder.input_norm.backward(dx, stream, inverse, residual=dmiddle)
        return dstream, qkv_gradients + out_gradients

    def transform(self, stream: Tensor) -> tuple[Tensor, Transformed]:
        """Return ``stream + down(act(gate) * up)``, ``[B, T, H]``, and intermediates; gate and up are of the norm."""
        x, _ = self.decoder.mlp_norm.forward(stream)
        gate_up, inner = self.gate_up.forward(_rows(x), self.gate_up.weight(x.dtype))
        product = self.decoder.gate.forward(gate_up)
        y, down_inner = self.down.forward(product, self.down.weight(x.dtype), residual=_rows(stream))
        # No view: autograd refuses to change a view that a function returns in place.
        return torch.ops.aten._unsafe_view(y, stream.shape), Transformed(gate_up, inner, down_inner)

    def transform_backward(
        self, dy: Tensor, stream: Tensor, transformed: Transformed
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the gradients of ``stream`` and of the half's adapters; ``dy``, ``[B, T, H]``, is the output's."""
        x, inverse = self.decoder.mlp_norm.forward(stream)
        weight = self.gate_up.weight(x.dtype)
        gate_up, inner, down_inner = transformed.gate_up, transformed.inner, transformed.down_inner
        if gate_up is None:
            gate_up, inner = self.gate_up.forward(_rows(x), weight)
        dproduct, dinner = self.down.input_gradient(_rows(dy), self.down.weight(x.dtype))
        dgate_up, product = self.decoder.gate.backward(dproduct, gate_up)  # which takes dproduct's place
        if down_inner is None:
            down_inner = self.down.inner(product)
        down_gradients = self.down.parameter_gradients(_rows(dy), dinner, product, down_inner)
        dx, gate_up_gradients = self.gate_up.backward(dgate_up, _rows(x), inner, weight)
        assert dx is not None
        dstream = self.decoder.mlp_norm.backward(dx, stream, inverse, residual=dy)
        return dstream, gate_up_gradients + down_gradients

    def _make_qkv(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return queries, keys and values side by side, rotated unless the heads have norms of their own.

        A head norm's gradient needs its input, so there the rotation waits until the heads are split.
        """
        qkv, inner = self.qkv.forward(_rows(x), self.qkv.weight(x.dtype))
        if self.decoder.query_norm is None:
            self.rotary.rotate_(self._turning(qkv, x.shape))
        return qkv, inner

    def _heads(self, qkv: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Split ``qkv`` into what attention reads, normed and rotated: ``[B, T, Nq, D]``, twice ``[B, T, Nkv, D]``."""
        q, k, v = self._split(qkv, shape)
        if self.decoder.query_norm is None or self.decoder.key_norm is None:
            return q, k, v
        q, k = self.decoder.query_norm.forward(q)[0], self.decoder.key_norm.forward(k)[0]
        return self.rotary.rotate_(q), self.rotary.rotate_(k), v

    def _heads_backward(self, gradients: tuple[Tensor, Tensor, Tensor], qkv: Tensor) -> Tensor:
        """Return the gradient of ``qkv`` before rotation and norms, side by side."""
        shape = gradients[0].shape
        dqkv = torch.empty_like(qkv)
        for part, gradient in zip(self._split(dqkv, shape), gradients, strict=True):
            part.copy_(gradient)
        self.rotary.rotate_(self._turning(dqkv, shape), back=True)
        norms = (self.decoder.query_norm, self.decoder.key_norm)
        for norm, dhead, head in zip(norms, self._split(dqkv, shape), self._split(qkv, shape), strict=False):
            if norm is not None:
                dhead.copy_(norm.backward(dhead, head, norm.forward(head)[1]))
        return dqkv

    def _split(self, qkv: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
        sizes = (self.decoder.heads, self.decoder.kv_heads, self.decoder.kv_heads)
        return qkv.view(*shape[:2], sum(sizes), self.decoder.head_size).split(sizes, dim=2)

    def _turning(self, qkv: Tensor, shape: torch.Size) -> Tensor:
        """The heads that are rotated, queries and keys, as one view ``[B, T, Nq+Nkv, D]``."""
        heads = qkv.view(*shape[:2], -1, self.decoder.head_size)
        return heads[:, :, : self.decoder.heads + self.decoder.kv_heads]


class _FusedLayer(torch.autograd.Function):
    """The layer as autograd sees it: the stream and the adapters' parameters in, the stream out."""

    @staticmethod
    def forward(ctx: Any, call: LayerCall, stream: Tensor, *parameters: Tensor) -> Tensor:
        with torch.autocast(stream.device.type, enabled=False):
            middle, attended = call.attend(stream, keep_graph=call.level >= 2)
            out, transformed = call.transform(middle)
        level = call.level
        graph = None if isinstance(attended.kept, Tensor) else attended.kept
        log_sums = attended.kept if isinstance(attended.kept, Tensor) else None
        halfway = (middle, attended.output, log_sums, attended.out_inner) if level >= 1 else (None,) * 4
        down_inner = transformed.down_inner if level >= 1 else None
        heads = (attended.qkv, attended.qkv_inner) if level >= 2 else (None, None)
        gated = (transformed.gate_up, transformed.inner) if level >= 3 else (None, None)
        ctx.call, ctx.graph = call, graph
        ctx.save_for_backward(stream, *halfway, *heads, *gated, down_inner, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        call: LayerCall = ctx.call
        stream, middle, output, log_sums, out_inner, qkv, qkv_inner, *transformed = ctx.saved_tensors[:10]
        with torch.autocast(stream.device.type, enabled=False):
            if middle is None:
                middle, attended = call.attend(stream, keep_graph=True)
            else:
                kept = ctx.graph if log_sums is None else log_sums
                attended = Attended(qkv, qkv_inner, output, kept, out_inner)
            dmiddle, mlp_gradients = call.transform_backward(dout, middle, Transformed(*transformed))
            dstream, gradients = call.attend_backward(dmiddle, stream, attended, ctx.needs_input_grad[1])
        parameters = call.parameters()
        typed = [g.to(p.dtype) for g, p in zip(gradients + mlp_gradients, parameters, strict=True)]
        return None, dstream, *typed


def _rows(x: Tensor) -> Tensor:
    """``[B, T, width]`` as ``[B*T, width]``."""
    return x.reshape(-1, x.shape[-1])
