"""Causal attention over padded batches or a forest of sequences, with a gradient of its own outside autograd.

A fused layer keeps the output and the log-sum of each query's weights instead of an autograd graph, so that it can
discard queries, keys and values and still run the backward without a second attention. Heads come after tokens here:
queries are ``[B, T, Nq, D]``, keys ``[B, T, Nkv, D]``; values ``[B, T, Nkv, Dv]`` and outputs ``[B, T, Nq, Dv]`` may be
of another size.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte.fast import attention_cpu
from halfbyte.fast.attention_graph import GraphAttention
from halfbyte.fast.forest import Forest
from halfbyte.fast.head_sizes import alike, own
from halfbyte.fast.spans import additive, gather, path_mask, scatter_add

_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# What an attention keeps of its forward for its backward: log-sums (float32 [B, Nq, T]), a graph, or nothing.
Kept = Any

# Keys from which products are faster than PyTorch's CPU kernel in float32.
_LONG = 256


class Attention(Protocol):
    """One attention, forward and backward, of ``q``, ``k``, ``v`` and ``o``."""

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
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Attention:
    """Return the attention of one batch: along the paths of ``forest``, or under ``mask``, or causal.

    ``mask`` is ``[B, 1, T, T]``, bool or of ``dtype``: True or 0 where a query attends, False or -inf where not. With a
    ``window`` a query of a forest attends to so many tokens of its path, itself the last of them. A soft ``cap`` bounds
    the scores: ``cap * tanh(score / cap)``. ``sinks``, which are frozen, are ``[Nq]``: a score of each head that takes
    part in its softmax and has no value. Queries, and outputs, are those of the tokens of ``forest`` whose output is
    read.
    """
    if forest is None or not window or window >= forest.longest:  # some models write none as 0
        window = None
    sinks = None if sinks is None else sinks.detach()
    if device.type == "cpu" and (cap is None or mask is None):
        added = additive(mask, _working_dtype(dtype)) if mask is not None else None
        return CpuAttention(scale, added, forest, window, cap, sinks)
    return GraphAttention(scale, mask, forest, window, cap, sinks)


@dataclass(frozen=True)
class CpuAttention:
    """Attention whose backward needs the output and each query's log-sum only: PyTorch's kernel or matrix products.

    Both compute in float32, except bfloat16 where the CPU multiplies tiles of it (AMX). Milliseconds forward and
    backward on an EPYC with AVX512-BF16, one thread, 8 heads of 64 over 4 (the last column with a window of 64):

    ======================= ==== ==== ==== ==== ==== =======
    bfloat16 tokens           64  128  192  256  512 512, 64
    ======================= ==== ==== ==== ==== ==== =======
    the kernel, in bfloat16  1.6  4.1  5.1  8.1 24.7    29.0
    the kernel, in float32   0.8  2.2  4.1  7.1 26.3    30.5
    products                 1.1  2.6  4.5  6.6 18.7    12.3
    ======================= ==== ==== ==== ==== ==== =======

    The log-sums of queries that are computed by products are left at zero where there are no ``sinks``: their backward
    does not read them. A sink takes a share of each query's weights and has no value, so that what is left to the keys
    is a factor of the output, and of its gradient in a backward that is otherwise the same.
    """

    scale: float
    mask: Tensor | None
    forest: Forest | None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, keep_graph: bool = False) -> tuple[Tensor, Tensor]:
        dtype = q.dtype
        q, k, v = (x.to(self._working_dtype(dtype)) for x in (q, k, v))
        if self.forest is None:
            o, log_sum = self._forward_span(q, k, v)
            return o.to(dtype), log_sum
        o = torch.empty(*q.shape[:3], v.shape[3], dtype=dtype)
        log_sum = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        for segment in self.forest.segments:
            start, end = self.forest.queries[segment]
            keys = self.forest.keys(segment)
            o[:, start:end], log_sum[:, :, start:end] = self._forward_span(
                q[:, start:end], gather(k, keys), gather(v, keys)
            )
        return o, log_sum

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = q.dtype
        do, q, k, v, o = (x.to(self._working_dtype(dtype)) for x in (do, q, k, v, o))
        if self.forest is None:
            dq, dk, dv = self._backward_span(do, q, k, v, o, kept)
            return dq.to(dtype), dk.to(dtype), dv.to(dtype)
        dq = torch.empty(q.shape, dtype=dtype)
        # Several branches add to their prefix: in float32, rounded once.
        dk, dv = (
            torch.zeros(x.shape, dtype=torch.float32 if self.forest.branches else dtype) for x in (k, v)
        )
        for segment in self.forest.segments:
            start, end = self.forest.queries[segment]
            keys = self.forest.keys(segment)
            dq[:, start:end], *found = self._backward_span(
                do[:, start:end],
                q[:, start:end],
                gather(k, keys),
                gather(v, keys),
                o[:, start:end],
                kept[:, :, start:end].contiguous(),
            )
            for total, part in zip((dk, dv), found, strict=True):
                scatter_add(total, part, keys)
        return dq, dk.to(dtype), dv.to(dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output: Tensor = _Attend.apply(self, q, k, v)
        return output

    def _forward_span(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self._by_products(q, k):
            o, log_sum = attention_cpu.forward(
                q, k, v, self.window, self.scale, self.softcap, with_sums=self.sinks is not None
            )
        else:
            query, key, value = (x.transpose(1, 2) for x in alike(q, k, v))
            mask = self._span_mask(q, k)
            o, log_sum = _cpu_forward(query, key, value, 0.0, mask is None, attn_mask=mask, scale=self.scale)
            o = own(o.transpose(1, 2), v)
        return self._beside_sinks(o, log_sum), log_sum

    def _backward_span(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        do = self._beside_sinks(do, log_sum)
        if self._by_products(q, k):
            return attention_cpu.backward(do, q, k, v, o, self.window, self.scale, self.softcap)
        mask = self._span_mask(q, k)
        same = [x.transpose(1, 2) for x in alike(do, q, k, v, o)]
        found = _cpu_backward(*same, log_sum, 0.0, mask is None, attn_mask=mask, scale=self.scale)
        dq, dk, dv = (own(x.transpose(1, 2), head) for x, head in zip(found, (q, k, v), strict=True))
        return dq, dk, dv

    def _beside_sinks(self, x: Tensor, log_sum: Tensor) -> Tensor:
        """``x`` ``[B, T, Nq, D]`` times the share of the weights that the sinks leave to the keys."""
        if self.sinks is None:
            return x
        share = (log_sum - self.sinks.float()[:, None]).sigmoid_()
        return (x * share.transpose(1, 2).unsqueeze(-1)).to(x.dtype)

    def _by_products(self, q: Tensor, k: Tensor) -> bool:
        """Whether products are faster for these queries and keys; no kernel has a soft cap."""
        if self.softcap is not None:
            return True
        return self.mask is None and q.dtype == torch.float32 and k.shape[1] >= _LONG

    def _span_mask(self, q: Tensor, k: Tensor) -> Tensor | None:
        if self.mask is not None:
            return self.mask
        return path_mask(q.shape[1], k.shape[1], self.window, q.dtype)

    def _working_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return _working_dtype(dtype) if self.softcap is None else torch.float32


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


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a CPU computes attention of ``dtype`` in."""
    native = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    return dtype if native else torch.float32
