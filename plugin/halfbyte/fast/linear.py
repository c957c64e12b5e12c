"""An NF4 linear with its LoRA adapter as one autograd function, on any architecture.

PEFT computes base and adapter as separate autograd graphs: it clones the base output, casts, scales and adds in
full-size temporaries, and keeps an input per branch. Here :class:`Projections` adds the adapter in place to the base
output, and the backward computes all three gradients from one dequantized weight.
"""

from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte.fast.projections import Adapter, Projections, compute_dtype, quantization_state


class FusedLinear4bit(Linear4bit):
    """PEFT's 4-bit LoRA linear with a fused forward and backward; all state stays PEFT's.

    What the fused function does not cover (several or no active adapters, DoRA and other variants, merged or
    disabled adapters, an adapter per row, a bias on B) runs PEFT's own forward, decided at each call.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``x`` ``[..., I]`` to ``[..., O]`` in the dtype of ``x``."""
        adapter = None if args or kwargs else fusable_adapter(self)
        if adapter is None or _is_one_token(x):
            return super().forward(x, *args, **kwargs)
        map_ = Projections([self.base_layer], [Adapter.of(self, adapter)])
        return _Linear.apply(x, map_, compute_dtype(self.base_layer, x), *map_.parameters())


def fuse(module: torch.nn.Module) -> bool:
    """Make ``module`` compute fused if it is a PEFT 4-bit LoRA linear; return whether it is one."""
    if type(module) is Linear4bit:
        # The class, not the instance's forward: a copied module stays fused, and its methods are its own.
        module.__class__ = FusedLinear4bit
    return isinstance(module, FusedLinear4bit)


def unfuse(module: torch.nn.Module) -> None:
    """Undo :func:`fuse`."""
    if type(module) is FusedLinear4bit:
        module.__class__ = Linear4bit


def fusable_adapter(module: Linear4bit) -> str | None:
    """Return the name of the one active adapter that the fused function covers now, else None."""
    if module.disable_adapters or module.merged or not module.base_layer.compute_type_is_set:
        return None
    if getattr(quantization_state(module.base_layer), "packing_format_for_cpu", False):
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) != 1:
        return None
    (name,) = active
    if name in module.lora_variant or module.lora_bias[name]:
        return None
    return name


class _Linear(torch.autograd.Function):
    """The linear as autograd sees it: the input and the adapter's A and B in, the output out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, map_: Projections, dtype: torch.dtype, *parameters: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            y, inner = map_.forward(rows, map_.weight(dtype))
        ctx.map, ctx.dtype_in = map_, x.dtype
        ctx.save_for_backward(rows, inner, *parameters)
        # No view: a model may multiply the output in place (Gemma 3n does), which autograd refuses for a view.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1])).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, *parameters = ctx.saved_tensors
        map_: Projections = ctx.map
        with torch.autocast(grad.device.type, enabled=False):
            dy = grad.reshape(-1, grad.shape[-1]).to(rows.dtype)
            weight = map_.weight(rows.dtype) if ctx.needs_input_grad[0] else None
            dx, gradients = map_.backward(dy, rows, inner, weight)
        if dx is not None:
            dx = dx.view(*grad.shape[:-1], -1).to(ctx.dtype_in)
        return dx, None, None, *(g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True))


def _is_one_token(x: Tensor) -> bool:
    """Whether this is one token without gradients, as in generation: bitsandbytes multiplies the packed weight."""
    return x.numel() == x.shape[-1] and not torch.is_grad_enabled()
