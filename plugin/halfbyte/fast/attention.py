"""Causal attention over padded or padding-free batches, with a gradient of its own outside autograd.

A fused layer keeps the output and the log-sum of each query's weights instead of an autograd graph, so that it can
discard queries, keys and values and still run the backward without a second attention. Heads come after tokens here:
queries and outputs are ``[B, T, Nq, D]``, keys and values ``[B, T, Nkv, D]``.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# What an attention keeps of its forward for its backward: log-sums (float32 [B, Nq, T]), a graph, or nothing.
Kept = Any


class Attention(Protocol):
    """One attention, forward and backward: ``q``, ``o`` ``[B, T, Nq, D]``; ``k``, ``v`` ``[B, T, Nkv, D]``."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, keep_graph: bool) -> tuple[Tensor, Kept]:
        """Return the output and what :meth:`backward` needs of this call."""

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, kept: Kept
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of ``q``, ``k`` and ``v`` for ``do``, that of the output ``o``."""


@dataclass(frozen=True)
class Boundaries:
    """Where the sequences (boundaries) that are packed into one row of tokens begin and end.

    ``cumulative`` is int32 ``[sequences + 1]``, from 0 to T, as variable-length kernels read it (``cu_seqlens``);
    ``bounds`` are its values on the host.
    """

    cumulative: Tensor
    bounds: Sequence[int]

    @classmethod
    def of(cls, cumulative: Tensor) -> "Boundaries":
        """Read cumulative lengths, a tensor of any shape, off the device once for all layers of a forward."""
        return _boundaries(cumulative)

    @classmethod
    def of_positions(cls, positions: Tensor) -> "Boundaries | None":
        """Read boundaries off positions ``[1, T]``, which begin again in each sequence; None for one sequence."""
        return _positioned(positions)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(end - start for start, end in self.spans)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First and past-the-last token of each sequence that is not empty."""
        return [(a, b) for a, b in zip(self.bounds, self.bounds[1:], strict=False) if b > a]


def attention(
    device: torch.device, dtype: torch.dtype, scale: float, mask: Tensor | None, boundaries: Boundaries | None
) -> Attention:
    """Return the attention of one batch: causal within ``boundaries``, or under ``mask``, or causal.

    ``mask`` is ``[B, 1, T, T]``, bool or of ``dtype``: True or 0 where a query attends, False or -inf where not.
    """
    if device.type == "cpu":
        return CpuAttention(scale, _additive(mask, dtype) if mask is not None else None, boundaries)
    return GraphAttention(scale, mask, boundaries)


@dataclass(frozen=True)
class CpuAttention:
    """PyTorch's blocked CPU attention, whose backward needs the output and each query's log-sum only."""

    scale: float
    mask: Tensor | None
    boundaries: Boundaries | None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, keep_graph: bool = False) -> tuple[Tensor, Tensor]:
        parts = [self._forward_span(q, k, v, span) for span in self._spans(q)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([o for o, _ in parts], dim=1), torch.cat([log_sum for _, log_sum in parts], dim=2)

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = [self._backward_span(do, q, k, v, o, kept, span) for span in self._spans(q)]
        if len(parts) == 1:
            return parts[0]
        dq, dk, dv = (torch.cat(gradients, dim=1) for gradients in zip(*parts, strict=True))
        return dq, dk, dv

    def _forward_span(self, q: Tensor, k: Tensor, v: Tensor, span: slice) -> tuple[Tensor, Tensor]:
        query, key, value = self._heads_first(q, k, v, span)
        o, log_sum = _cpu_forward(
            query, key, value, 0.0, self.mask is None, attn_mask=self.mask, scale=self.scale
        )
        return o.transpose(1, 2), log_sum

    def _backward_span(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor, span: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self._heads_first(q, k, v, span)
        dq, dk, dv = _cpu_backward(
            do[:, span].transpose(1, 2),
            query,
            key,
            value,
            o[:, span].transpose(1, 2),
            log_sum[:, :, span].contiguous(),
            0.0,
            self.mask is None,
            attn_mask=self.mask,
            scale=self.scale,
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    def _heads_first(self, q: Tensor, k: Tensor, v: Tensor, span: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The span with heads first, ``[B, N, T, D]``; the kernel shares each key between its query heads."""
        query, key, value = (x[:, span].transpose(1, 2) for x in (q, k, v))
        return query, key, value

    def _spans(self, q: Tensor) -> list[slice]:
        if self.boundaries is None:
            return [slice(0, q.shape[1])]
        return [slice(start, end) for start, end in self.boundaries.spans]


@dataclass(frozen=True)
class GraphAttention:
    """Attention through PyTorch's public functions, with an autograd graph of its own for the gradient.

    The graph is kept where queries, keys and values are kept anyway, and rebuilt elsewhere.
    """

    scale: float
    mask: Tensor | None
    boundaries: Boundaries | None

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

    def _graph(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            return self._attend(*inputs), inputs

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.boundaries is None:
            return self._attend_rows(q, k, v)
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            cumulative, longest = self.boundaries.cumulative, self.boundaries.longest
            out = varlen_attn(
                q[0],
                k[0],
                v[0],
                cumulative,
                cumulative,
                longest,
                longest,
                scale=self.scale,
                window_size=(-1, 0),
                enable_gqa=q.shape[2] != k.shape[2],
            )
            assert isinstance(out, Tensor)
            return out.unsqueeze(0)
        lengths = [end - start for start, end in self.boundaries.spans]
        # Split, not sliced: the gradient of each slice would be as long as the row.
        parts = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([self._attend_rows(*part) for part in parts], dim=1)

    def _attend_rows(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        groups = q.shape[2] // k.shape[2]
        if groups > 1 and self.mask is not None:  # no kernel takes both a mask and shared keys
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=self.mask,
            is_causal=self.mask is None,
            scale=self.scale,
            enable_gqa=key.shape[1] != query.shape[1],
        ).transpose(1, 2)


def _once_per_tensor(function: Callable[..., Any]) -> Callable[..., Any]:
    """Remember the last result: every layer of a forward passes the same tensor."""
    last: list[tuple[weakref.ref[Tensor], tuple[Any, ...], Any]] = []

    def remembered(tensor: Tensor, *others: Any) -> Any:
        if last and last[0][0]() is tensor and last[0][1] == others:
            return last[0][2]
        result = function(tensor, *others)
        last[:] = [(weakref.ref(tensor), others, result)]
        return result

    return remembered


@_once_per_tensor
def _boundaries(cumulative: Tensor) -> Boundaries:
    lengths = cumulative.flatten()
    return Boundaries(lengths, lengths.tolist())


@_once_per_tensor
def _positioned(positions: Tensor) -> Boundaries | None:
    row = positions.flatten()
    begins = [0, *((row[1:] != row[:-1] + 1).nonzero().flatten() + 1).tolist(), len(row)]
    if len(begins) == 2:
        return None
    return Boundaries(torch.tensor(begins, dtype=torch.int32, device=row.device), begins)


@_once_per_tensor
def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as values added to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
