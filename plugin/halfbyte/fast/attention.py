"""Causal attention over padded batches or a forest of sequences, with a gradient of its own outside autograd.

A fused layer keeps the output and the log-sum of each query's weights instead of an autograd graph, so that it can
discard queries, keys and values and still run the backward without a second attention. Heads come after tokens here:
queries and outputs are ``[B, T, Nq, D]``, keys and values ``[B, T, Nkv, D]``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from halfbyte.fast import products
from halfbyte.fast.forest import Forest, once_per_tensor, varlen_layout

_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# What an attention keeps of its forward for its backward: log-sums (float32 [B, Nq, T]), a graph, or nothing.
Kept = Any
Spans = Sequence[tuple[int, int]]


class Attention(Protocol):
    """One attention, forward and backward: ``q``, ``o`` ``[B, T, Nq, D]``; ``k``, ``v`` ``[B, T, Nkv, D]``."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, keep_graph: bool) -> tuple[Tensor, Kept]:
        """Return the output and what :meth:`backward` needs of this call."""

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, kept: Kept
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of ``q``, ``k`` and ``v`` for ``do``, that of the output ``o``."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the output as autograd sees it."""


def attention(
    device: torch.device,
    dtype: torch.dtype,
    scale: float,
    mask: Tensor | None,
    forest: Forest | None,
    window: int | None = None,
    *,
    autograd: bool = False,
) -> Attention:
    """Return the attention of one batch: along the paths of ``forest``, or under ``mask``, or causal.

    ``mask`` is ``[B, 1, T, T]``, bool or of ``dtype``: True or 0 where a query attends, False or -inf where not. With a
    ``window`` a query of a forest attends to so many tokens of its path, itself the last of them. ``autograd`` asks for
    the general form, which takes values of another size than queries.
    """
    if forest is None or not window or window >= forest.longest:  # some models write none as 0
        window = None
    if device.type == "cpu" and not autograd:
        return CpuAttention(scale, _additive(mask, dtype) if mask is not None else None, forest, window)
    return GraphAttention(scale, mask, forest, window)


@dataclass(frozen=True)
class CpuAttention:
    """Attention whose backward needs the output and each query's log-sum only: products, or PyTorch's CPU kernel."""

    scale: float
    mask: Tensor | None
    forest: Forest | None
    window: int | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, keep_graph: bool = False) -> tuple[Tensor, Tensor]:
        if self.forest is None:
            return self._forward_span(q, k, v)
        o = torch.empty_like(q)
        log_sum = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        for segment in self.forest.segments:
            start, end = self.forest.spans[segment]
            keys = self.forest.keys(segment)
            o[:, start:end], log_sum[:, :, start:end] = self._forward_span(
                q[:, start:end], _gather(k, keys), _gather(v, keys)
            )
        return o, log_sum

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.forest is None:
            dq, dk, dv = self._backward_span(do, q, k, v, o, kept)
            return dq, dk.to(k.dtype), dv.to(v.dtype)
        dq = torch.empty_like(q)
        # Several branches add to their prefix: in float32, rounded once.
        dk, dv = (torch.zeros(x.shape, dtype=torch.float32) for x in (k, v))
        for segment in self.forest.segments:
            start, end = self.forest.spans[segment]
            keys = self.forest.keys(segment)
            dq[:, start:end], *found = self._backward_span(
                do[:, start:end],
                q[:, start:end],
                _gather(k, keys),
                _gather(v, keys),
                o[:, start:end],
                kept[:, :, start:end].contiguous(),
            )
            for total, part in zip((dk, dv), found, strict=True):
                _scatter_add(total, part, keys)
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output: Tensor = _Attend.apply(self, q, k, v)
        return output

    def _forward_span(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.mask is None and products.faster_forward(q.dtype, q.shape[3], k.shape[1]):
            return products.forward(q, k, v, self.scale, self.window)
        mask = self._kernel_mask(q, k)
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        o, log_sum = _cpu_forward(query, key, value, 0.0, mask is None, attn_mask=mask, scale=self.scale)
        return o.transpose(1, 2), log_sum

    def _backward_span(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.mask is None and products.faster_backward(q.dtype, q.shape[3], k.shape[1]):
            return products.backward(do, q, k, v, o, log_sum, self.scale, self.window)
        mask = self._kernel_mask(q, k)
        do, q, k, v, o = (x.transpose(1, 2) for x in (do, q, k, v, o))
        dq, dk, dv = _cpu_backward(
            do, q, k, v, o, log_sum, 0.0, mask is None, attn_mask=mask, scale=self.scale
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    def _kernel_mask(self, q: Tensor, k: Tensor) -> Tensor | None:
        """The mask of a batch of rows, or of the last tokens of a path."""
        if self.forest is None:
            return self.mask
        return _path_mask(q.shape[1], k.shape[1], self.window, q.dtype)


@dataclass(frozen=True)
class GraphAttention:
    """Attention through PyTorch's public functions, with an autograd graph of its own for the gradient.

    The graph is kept where queries, keys and values are kept anyway, and rebuilt elsewhere.
    """

    scale: float
    mask: Tensor | None
    forest: Forest | None
    window: int | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, keep_graph: bool = False) -> tuple[Tensor, Kept]:
        if not keep_graph:
            with torch.no_grad():
                return self._attend(q, k, v), None
        graph = self._graph(q, k, v)
        return graph[0].detach(), graph

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, kept: Kept
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, inputs = kept if kept is not None else self._graph(q, k, v)
        dq, dk, dv = torch.autograd.grad(out, inputs, do)
        return dq, dk, dv

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(q, k, v)

    def _graph(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            return self._attend(*inputs), inputs

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.forest is None:
            return self._attend_rows(q, k, v, self.mask)
        if q.dtype in (torch.bfloat16, torch.float16) and has_varlen(q.device):
            return self._attend_varlen(q, k, v, self.forest)
        parts = []
        for segment in self.forest.segments:
            start, end = self.forest.spans[segment]
            keys = self.forest.keys(segment)
            key, value = _gather(k, keys), _gather(v, keys)
            mask = _path_mask(end - start, key.shape[1], self.window, q.dtype, q.device)
            parts.append(self._attend_rows(q[:, start:end], key, value, mask))
        return torch.cat(parts, dim=1)

    def _attend_varlen(self, q: Tensor, k: Tensor, v: Tensor, forest: Forest) -> Tensor:
        """One kernel for all segments; a query is aligned with the last of its keys."""
        layout = varlen_layout(forest, q.device)
        key, value = k[0], v[0]
        if layout.gathered is not None:
            key, value = key[layout.gathered], value[layout.gathered]
        out = varlen_attn(
            q[0],
            key,
            value,
            layout.queries,
            layout.keys,
            layout.longest_queries,
            layout.longest_keys,
            scale=self.scale,
            window_size=(-1 if self.window is None else self.window - 1, 0),
            enable_gqa=q.shape[2] != k.shape[2],
        )
        assert isinstance(out, Tensor)  # a tuple only where log-sums are requested
        return out.unsqueeze(0)

    def _attend_rows(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        groups = q.shape[2] // k.shape[2]
        if groups > 1 and mask is not None:  # no kernel takes both a mask and shared keys
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=key.shape[1] != query.shape[1],
        ).transpose(1, 2)


class _Attend(torch.autograd.Function):
    """Attention as autograd sees it, for layers that are not fused."""

    @staticmethod
    def forward(ctx: Any, call: CpuAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, log_sum = call.forward(q, k, v)
        ctx.call = call
        ctx.save_for_backward(q, k, v, o, log_sum)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, log_sum = ctx.saved_tensors
        return None, *ctx.call.backward(do, q, k, v, o, log_sum)


def has_varlen(device: torch.device) -> bool:
    """Whether PyTorch's variable-length attention runs on ``device``."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _gather(x: Tensor, spans: Spans) -> Tensor:
    """The tokens of ``spans``, ``[B, keys, N, D]``: a view where they are neighbours."""
    if len(spans) == 1:
        return x[:, spans[0][0] : spans[0][1]]
    return torch.cat([x[:, start:end] for start, end in spans], dim=1)


def _scatter_add(total: Tensor, part: Tensor, spans: Spans) -> None:
    """Add the gradient of what :func:`_gather` returned to that of its input."""
    at = 0
    for start, end in spans:
        total[:, start:end] += part[:, at : at + end - start]
        at += end - start


def _path_mask(
    queries: int, keys: int, window: int | None, dtype: torch.dtype, device: Any = None
) -> Tensor | None:
    """The mask ``[1, 1, queries, keys]`` of the last tokens of a path; None where plain causality says the same."""
    if keys == queries and (window is None or window >= keys):
        return None
    query = torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    key = torch.arange(keys, device=device)
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    return torch.zeros(1, 1, queries, keys, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


@once_per_tensor
def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as values added to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
