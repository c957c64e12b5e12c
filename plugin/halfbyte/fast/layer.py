"""A decoder layer as one autograd function that decides itself what to keep and what to compute again.

Autograd keeps every intermediate of a layer, and checkpointing none. Here a save level says how much:

===== ============================================ =======================================
level kept beside the layer's input                computed again in the backward
===== ============================================ =======================================
0     nothing                                      everything
1     attention output, stream between the halves  norms, query-key-value, gate-up
2     and query-key-value                          norms, gate-up
3     and gate-up                                  norms, activation
===== ============================================ =======================================

With an output it keeps the adapters' inner values, which are few.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from halfbyte.fast import family
from halfbyte.fast.attention import Attention, Documents, Kept, attention
from halfbyte.fast.family import Decoder, Uncovered
from halfbyte.fast.projections import Projections
from halfbyte.fast.rope import Rotary

LEVELS = (0, 1, 2, 3)


def fuse(layer: nn.Module, adapter: str = "default", level: int = 0) -> str | None:
    """Compute ``layer`` fused from now on, at save ``level``; return None, or why it is not covered.

    Only the instance's ``forward`` changes: modules, parameters and their names stay PEFT's, and gradients go
    to the PEFT parameters. A call that the fused form does not cover (a KV cache, several active adapters,
    attention weights wanted) goes to the original ``forward``, with gradient checkpointing if the model has
    it on. Transformers checkpoints inside a layer class's ``forward``, so the fused form does not see that
    switch: it does its own recomputation.
    """
    assert level in LEVELS, level
    try:
        decoder = family.read(layer)
        family.check_adapter(layer, decoder, adapter)
    except Uncovered as reason:
        return str(reason)
    layer.forward = FusedForward(layer, decoder, level)
    return None


def unfuse(layer: nn.Module) -> None:
    """Give ``layer`` its own forward back."""
    layer.__dict__.pop("forward", None)


def fell_back(model: nn.Module) -> dict[str, int]:
    """Why fused layers of ``model`` ran their original forward while training, and how many times in all."""
    reasons: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module.forward, FusedForward):
            reasons += module.forward.reasons
    return dict(reasons)


class FusedForward:
    """The ``forward`` of a fused decoder layer.

    ``reason`` says why the latest call went to the original forward, None if it did not; ``reasons`` counts
    those calls that a gradient was wanted of.
    """

    def __init__(self, layer: nn.Module, decoder: Decoder, level: int) -> None:
        self.layer, self.decoder, self.level = layer, decoder, level
        self.reason: str | None = None
        self.reasons: Counter[str] = Counter()

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        try:
            if past_key_values is not None or kwargs.get("output_attentions"):
                raise Uncovered("a KV cache or attention weights are wanted")
            documents = _documents(hidden_states, attention_mask, kwargs.get("cu_seq_lens_q"))
            if documents is None and attention_mask is None and self._positions_tell(position_ids):
                documents = Documents.of_positions(position_ids)
            step = self._step(hidden_states, attention_mask, position_embeddings, documents)
        except Uncovered as reason:
            self.reason = str(reason)
            self.reasons[self.reason] += torch.is_grad_enabled()
            return type(self.layer).forward(
                self.layer,
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        self.reason = None
        return _FusedLayer.apply(step, hidden_states, *step.parameters())

    def _step(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
        documents: Documents | None,
    ) -> "_Step":
        decoder = self.decoder
        family.check_call(decoder, self.layer.training, hidden)
        if mask is not None and mask.dim() != 4:
            raise Uncovered("a mask for flash attention")
        if mask is None and self._beyond_window(hidden, documents):
            raise Uncovered("a document longer than the sliding window, and no mask")
        if position_embeddings is None or position_embeddings[0].shape[-1] != decoder.head_size:
            raise Uncovered("rotary positions on a part of the head")
        if mask is not None and mask.dtype != torch.int32 and self._beyond_window(hidden, documents):
            documents = None  # the model's mask has both the documents and the window
        if documents is not None:
            mask = None
        qkv, out, gate_up, down = family.projections(decoder)
        return _Step(
            decoder,
            qkv,
            out,
            gate_up,
            down,
            rotary=Rotary(*position_embeddings, hidden.dtype),
            attention=attention(hidden.device, hidden.dtype, decoder.scale, mask, documents),
            level=self.level,
        )

    def _positions_tell(self, positions: Tensor | None) -> TypeGuard[Tensor]:
        """Whether one row of positions says where documents begin: to flash attention, which gets no mask."""
        implementation: str = self.decoder.attention.config._attn_implementation
        return implementation.startswith("flash") and positions is not None and len(positions) == 1

    def _beyond_window(self, hidden: Tensor, documents: Documents | None) -> bool:
        longest = hidden.shape[1] if documents is None else documents.longest
        return self.decoder.window is not None and longest > self.decoder.window


def _documents(hidden: Tensor, mask: Tensor | None, cumulative: Tensor | None) -> Documents | None:
    """The documents of a row without padding, from TRL's cumulative lengths or from a mask that holds them.

    A mask of whole numbers is :func:`halfbyte.fast.batches.mask`'s and says nothing else.
    """
    if mask is not None and mask.dtype == torch.int32:
        cumulative = mask
    return Documents.of(cumulative) if cumulative is not None and len(hidden) == 1 else None


@dataclass(frozen=True)
class _Attended:
    """What the attention half computed on its way: what its backward starts from."""

    qkv: Tensor | None
    qkv_inner: Tensor | None
    output: Tensor
    kept: Kept
    out_inner: Tensor | None


@dataclass(frozen=True)
class _Transformed:
    """What the MLP half computed on its way: what its backward starts from."""

    gate_up: Tensor | None
    inner: Tensor | None
    down_inner: Tensor | None


@dataclass(frozen=True)
class _Step:
    """One call of a layer: its parts, the adapters active now, the batch's rotation and attention."""

    decoder: Decoder
    qkv: Projections
    out: Projections
    gate_up: Projections
    down: Projections
    rotary: Rotary
    attention: Attention
    level: int

    def parameters(self) -> list[Tensor]:
        groups = (self.qkv, self.out, self.gate_up, self.down)
        return [parameter for group in groups for parameter in group.parameters()]

    # The attention half: stream + out(attention(rotated heads of qkv(norm(stream)))).

    def attend(self, stream: Tensor, *, keep_graph: bool) -> tuple[Tensor, _Attended]:
        qkv, qkv_inner = self._make_qkv(self.decoder.input_norm.forward(stream)[0])
        q, k, v = self._heads(qkv, stream.shape)
        output, kept = self.attention.forward(q, k, v, keep_graph=keep_graph)
        flat, rows = _rows(output.flatten(2)), _rows(stream)
        middle, out_inner = self.out.forward(flat, self.out.weight(flat.dtype), residual=rows)
        return middle.view(stream.shape), _Attended(qkv, qkv_inner, output, kept, out_inner)

    def attend_backward(
        self, dmiddle: Tensor, stream: Tensor, attended: _Attended, need_dstream: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
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

    # The MLP half: stream + down(act(gate) * up), with gate and up of norm(stream).

    def transform(self, stream: Tensor) -> tuple[Tensor, _Transformed]:
        x, _ = self.decoder.mlp_norm.forward(stream)
        gate_up, inner = self.gate_up.forward(_rows(x), self.gate_up.weight(x.dtype))
        product = self.decoder.gate.forward(gate_up)
        y, down_inner = self.down.forward(product, self.down.weight(x.dtype), residual=_rows(stream))
        return y.view(stream.shape), _Transformed(gate_up, inner, down_inner)

    def transform_backward(
        self, dy: Tensor, stream: Tensor, transformed: _Transformed
    ) -> tuple[Tensor, list[Tensor]]:
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

    # Queries, keys and values.

    def _make_qkv(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries, keys and values side by side, rotated unless the heads have norms of their own.

        A head norm's gradient needs its input, so there the rotation waits until the heads are taken.
        """
        qkv, inner = self.qkv.forward(_rows(x), self.qkv.weight(x.dtype))
        if self.decoder.query_norm is None:
            self.rotary.rotate_(self._turning(qkv, x.shape))
        return qkv, inner

    def _heads(self, qkv: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """What attention reads: (batch, length, heads, size) each, normed and rotated."""
        q, k, v = self._split(qkv, shape)
        if self.decoder.query_norm is None or self.decoder.key_norm is None:
            return q, k, v
        q, k = self.decoder.query_norm.forward(q)[0], self.decoder.key_norm.forward(k)[0]
        return self.rotary.rotate_(q), self.rotary.rotate_(k), v

    def _heads_backward(self, gradients: tuple[Tensor, Tensor, Tensor], qkv: Tensor) -> Tensor:
        """The gradient of the unrotated, unnormed ``qkv``, side by side."""
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
        """The heads that are rotated, queries and keys, as one view."""
        heads = qkv.view(*shape[:2], -1, self.decoder.head_size)
        return heads[:, :, : self.decoder.heads + self.decoder.kv_heads]


class _FusedLayer(torch.autograd.Function):
    """The layer as autograd sees it: the stream and the adapters' parameters in, the stream out."""

    @staticmethod
    def forward(ctx: Any, step: _Step, stream: Tensor, *parameters: Tensor) -> Tensor:
        with torch.autocast(stream.device.type, enabled=False):
            middle, attended = step.attend(stream, keep_graph=step.level >= 2)
            out, transformed = step.transform(middle)
        level = step.level
        graph = None if isinstance(attended.kept, Tensor) else attended.kept
        log_sums = attended.kept if isinstance(attended.kept, Tensor) else None
        halfway = (middle, attended.output, log_sums, attended.out_inner) if level >= 1 else (None,) * 4
        down_inner = transformed.down_inner if level >= 1 else None
        heads = (attended.qkv, attended.qkv_inner) if level >= 2 else (None, None)
        gated = (transformed.gate_up, transformed.inner) if level >= 3 else (None, None)
        ctx.step, ctx.graph = step, graph
        ctx.save_for_backward(stream, *halfway, *heads, *gated, down_inner, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        step: _Step = ctx.step
        stream, middle, output, log_sums, out_inner, qkv, qkv_inner, *transformed = ctx.saved_tensors[:10]
        with torch.autocast(stream.device.type, enabled=False):
            if middle is None:
                middle, attended = step.attend(stream, keep_graph=True)
            else:
                kept = ctx.graph if log_sums is None else log_sums
                attended = _Attended(qkv, qkv_inner, output, kept, out_inner)
            dmiddle, mlp_gradients = step.transform_backward(dout, middle, _Transformed(*transformed))
            dstream, gradients = step.attend_backward(dmiddle, stream, attended, ctx.needs_input_grad[1])
        parameters = step.parameters()
        typed = [g.to(p.dtype) for g, p in zip(gradients + mlp_gradients, parameters, strict=True)]
        return None, dstream, *typed


def _rows(x: Tensor) -> Tensor:
    """(batch, length, width) as (tokens, width)."""
    return x.reshape(-1, x.shape[-1])
