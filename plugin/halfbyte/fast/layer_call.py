"""One call of a fused decoder layer, or of a half alone, forward and backward, as one autograd function.

Autograd keeps every intermediate of a layer, and activation checkpointing none. Here a save level says how much:

===== ============================================ =======================================
level kept beside the layer's input                recomputed in the backward
===== ============================================ =======================================
0     nothing                                      everything
1     attention output, stream between the halves  norms, query-key-value, gate-up
2     and query-key-value, with latents            norms, gate-up
3     and gate-up                                  norms, activation
===== ============================================ =======================================

With an output it keeps the adapters' inner values ``x A'``, which are few, and what a norm that closes a half read.
The stream is ``[B, T, H]``; behind the last layer that of the K tokens whose output is read is enough, ``[1, K, H]``,
and all but keys and values is computed for these.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte.fast.attention_half import Attended, AttentionHalf
from halfbyte.fast.mlp_half import MlpHalf, Transformed

LEVELS = (0, 1, 2, 3)


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer: its halves, one after the other or side by side, and what its output is multiplied by."""

    attention: AttentionHalf
    mlp: MlpHalf
    parallel: bool
    layer_scale: Tensor | None
    level: int

    def apply(self, stream: Tensor) -> Tensor:
        """Return the layer's output ``[B, T or K, H]`` for ``stream`` ``[B, T, H]``, as autograd sees it."""
        output: Tensor = _FusedLayer.apply(self, stream, *self.parameters())
        return output

    def parameters(self) -> list[Tensor]:
        """Return the active adapters' A and B in the order of the gradients that the halves return."""
        return self.attention.parameters() + self.mlp.parameters()


class _FusedLayer(torch.autograd.Function):
    """The layer as autograd sees it: the stream and the adapters' parameters in, the stream out."""

    @staticmethod
    def forward(ctx: Any, call: LayerCall, stream: Tensor, *parameters: Tensor) -> Tensor:
        with torch.autocast(stream.device.type, enabled=False):
            around = call.attention.those_read(stream)
            middle, attended = call.attention.forward(stream, around, keep_graph=call.level >= 2)
            out, transformed = call.mlp.forward(around if call.parallel else middle, middle)
            if call.layer_scale is not None:
                out.mul_(call.layer_scale)
        level = call.level
        graph = None if isinstance(attended.kept, Tensor) else attended.kept
        log_sums = attended.kept if isinstance(attended.kept, Tensor) else None
        outputs: tuple[Tensor | None, ...] = (None,) * 6
        if level >= 1:
            between = None if call.parallel else middle
            outputs = (between, attended.output, log_sums, attended.projected, attended.out_inner)
            outputs = (*outputs, transformed.projected)
        down_inner = transformed.down_inner if level >= 1 else None
        made = attended.made if level >= 2 else None
        gated = (transformed.gate_up, transformed.inner) if level >= 3 else (None, None)
        ctx.call, ctx.graph, ctx.made = call, graph, None if made is None else len(made)
        ctx.save_for_backward(stream, *outputs, *gated, down_inner, *(made or ()), *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        call: LayerCall = ctx.call
        stream, middle, output, log_sums, projected, out_inner, closed, *rest = ctx.saved_tensors
        gate_up, inner, down_inner, *rest = rest
        made = None if ctx.made is None else tuple(rest[: ctx.made])
        with torch.autocast(stream.device.type, enabled=False):
            if call.layer_scale is not None:
                dout = dout * call.layer_scale
            if output is None:
                middle, attended = call.attention.forward(
                    stream, call.attention.those_read(stream), keep_graph=True
                )
            else:
                kept = ctx.graph if log_sums is None else log_sums
                attended = Attended(made, output, kept, projected, out_inner)
            transformed = Transformed(gate_up, inner, closed, down_inner)
            read = call.attention.those_read(stream) if call.parallel else middle
            around, mlp_gradients = call.mlp.backward(dout, read, transformed, around=dout)
            dmiddle = dout if call.parallel else around
            dstream, gradients = call.attention.backward(
                dmiddle, stream, attended, around, ctx.needs_input_grad[1]
            )
        typed = _typed(gradients + mlp_gradients, call.parameters())
        return None, dstream, *typed


class FusedAttention(torch.autograd.Function):
    """The attention half alone, without norms and residual, as autograd sees it; it keeps all intermediates."""

    @staticmethod
    def forward(ctx: Any, half: AttentionHalf, x: Tensor, *parameters: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y, attended = half.forward(x, None, keep_graph=True)
        ctx.half, ctx.graph = half, None if isinstance(attended.kept, Tensor) else attended.kept
        log_sums = attended.kept if isinstance(attended.kept, Tensor) else None
        assert attended.made is not None
        ctx.made = len(attended.made)
        ctx.save_for_backward(x, attended.output, log_sums, attended.out_inner, *attended.made, *parameters)
        # No view: a layer may change what its attention returns in place.
        return torch.ops.aten._unsafe_view(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        half: AttentionHalf = ctx.half
        x, output, log_sums, out_inner, *rest = ctx.saved_tensors
        kept = ctx.graph if log_sums is None else log_sums
        with torch.autocast(x.device.type, enabled=False):
            attended = Attended(tuple(rest[: ctx.made]), output, kept, None, out_inner)
            dx, gradients = half.backward(dy, x, attended, None, ctx.needs_input_grad[1])
        return None, dx, *_typed(gradients, half.parameters())


class FusedMlp(torch.autograd.Function):
    """The MLP half alone, without norms and residual, as autograd sees it; it keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, half: MlpHalf, x: Tensor, *parameters: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y, transformed = half.forward(x, None)
        ctx.half = half
        ctx.save_for_backward(x, transformed.gate_up, transformed.inner, transformed.down_inner, *parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        half: MlpHalf = ctx.half
        x, gate_up, inner, down_inner = ctx.saved_tensors[:4]
        with torch.autocast(x.device.type, enabled=False):
            dx, gradients = half.backward(dy, x, Transformed(gate_up, inner, None, down_inner), None)
        return None, dx, *_typed(gradients, half.parameters())


def _typed(gradients: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    return [g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True)]
