"""Attention through PyTorch's functions for any device, with an autograd graph of its own for the gradient."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from halfbyte.fast import attention_scores
from halfbyte.fast.forest import Forest, varlen_layout
from halfbyte.fast.head_sizes import alike, own
from halfbyte.fast.spans import gather, path_mask


@dataclass(frozen=True)
class GraphAttention:
    """Attention of which the graph is kept where queries, keys and values are kept anyway, and rebuilt elsewhere.

    ``mask`` is bool or added to the scores; ``sinks`` are ``[Nq]``.
    """

    scale: float
    mask: Tensor | None
    forest: Forest | None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, keep_graph: bool = False) -> tuple[Tensor, Any]:
        if not keep_graph or (self._by_scores and not self._by_kernel(q)):  # whose graph has all scores
            with torch.no_grad():
                return self._attend(q, k, v), None
        graph = self._graph(q, k, v)
        return graph[0].detach(), graph

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, kept: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, inputs = kept if kept is not None else self._graph(q, k, v)
        dq, dk, dv = torch.autograd.grad(out, inputs, do)
        return dq, dk, dv

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(q, k, v)

    @property
    def _by_scores(self) -> bool:
        """Whether PyTorch's attention functions lack something."""
        return self.softcap is not None or self.sinks is not None

    def _by_kernel(self, q: Tensor) -> bool:
        """Whether one variable-length kernel computes all segments; it has no soft cap."""
        sixteen = q.dtype in (torch.bfloat16, torch.float16)
        return self.forest is not None and sixteen and self.softcap is None and has_varlen(q.device)

    def _graph(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            return self._attend(*inputs), inputs

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.forest is None:
            return self._attend_rows(q, k, v, self.mask)
        if self._by_kernel(q):
            return self._attend_varlen(q, k, v, self.forest)
        parts = []
        for segment in self.forest.segments:
            start, end = self.forest.queries[segment]
            key, value = (gather(x, self.forest.keys(segment)) for x in (k, v))
            mask = path_mask(end - start, key.shape[1], self.window, q.dtype, q.device)
            parts.append(self._attend_rows(q[:, start:end], key, value, mask))
        return torch.cat(parts, dim=1)

    def _attend_varlen(self, q: Tensor, k: Tensor, v: Tensor, forest: Forest) -> Tensor:
        """One kernel for all segments; a query is aligned with the last of its keys."""
        layout = varlen_layout(forest, q.device)
        query, key, value = alike(q[0], k[0], v[0])  # the kernel takes one size
        if layout.gathered is not None:
            key, value = key[layout.gathered], value[layout.gathered]
        given = (layout.queries, layout.keys, layout.longest_queries, layout.longest_keys)
        window = (-1 if self.window is None else self.window - 1, 0)
        if self.sinks is not None:
            out: Any = _VarlenWithSinks.apply(query, key, value, self.sinks, *given, self.scale, window)
        else:
            out = varlen_attn(
                query,
                key,
                value,
                *given,
                scale=self.scale,
                window_size=window,
                enable_gqa=q.shape[2] != k.shape[2],
            )
        assert isinstance(out, Tensor)  # a tuple only where log-sums are requested
        return own(out, v).unsqueeze(0)

    def _attend_rows(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        groups = q.shape[2] // k.shape[2]
        if groups > 1 and (mask is not None or self._by_scores):  # no kernel takes a mask and shared keys
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        if self._by_scores:
            return attention_scores.attend(
                query, key, value, mask, self.scale, self.softcap, self.sinks
            ).transpose(1, 2)
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=key.shape[1] != query.shape[1],
        ).transpose(1, 2)


class _VarlenWithSinks(torch.autograd.Function):
    """Variable-length attention whose log-sums count a sink for each head: ``q``, ``k``, ``v`` are ``[T, N, D]``.

    The kernel knows no sinks, but its backward computes the weights from the log-sums, and with the sinks in these and
    in the output they are those of the values, and their gradient is that beside the sinks.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, *given: Any) -> Tensor:
        *layout, scale, window = given
        out, log_sums = varlen_attn(
            q,
            k,
            v,
            *layout,
            return_aux=AuxRequest(lse=True),
            scale=scale,
            window_size=window,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        assert log_sums.shape == (q.shape[1], q.shape[0]), log_sums.shape
        with_sinks = torch.logaddexp(log_sums, sinks.float()[:, None])
        share = (log_sums - with_sinks).exp_().t().unsqueeze(-1)
        out = (out * share).to(q.dtype)
        ctx.layout, ctx.scale, ctx.window = layout, scale, window
        ctx.save_for_backward(q, k, v, out, with_sinks)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums = ctx.saved_tensors
        # Without dropout no random numbers are drawn: the state of none.
        state, unused = (torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0))
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            do.contiguous(),
            q,
            k,
            v,
            out,
            log_sums,
            *ctx.layout,
            0.0,
            ctx.window == (-1, 0),
            state,
            unused,
            scale=ctx.scale,
            window_size_left=ctx.window[0],
            window_size_right=ctx.window[1],
        )
        return dq, dk, dv, *(None,) * 7


def has_varlen(device: torch.device) -> bool:
    """Whether PyTorch's variable-length attention runs on ``device``."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
