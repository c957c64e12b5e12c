"""An NF4 linear with its LoRA adapter as one autograd function, on any architecture.

    y = x W' + bias + scaling * drop(x) A' B'        (' transposes; W is dequantized once per pass)

PEFT computes the two terms as separate autograd graphs: it clones the base output, casts, scales and adds
in full-size temporaries, and keeps an input per branch. Here the adapter is added in place into the
base output, and the backward pass makes all three gradients from one dequantized weight.
"""

from typing import Any

import bitsandbytes.functional as bnb
import torch
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor
from torch.autograd.function import once_differentiable


class FusedLinear4bit(Linear4bit):
    """PEFT's 4-bit LoRA linear with a fused forward and backward; all state stays PEFT's.

    What the fused function does not cover (several or no active adapters, DoRA and other variants, merged or
    disabled adapters, an adapter per row, a bias on B) runs PEFT's own forward, decided at each call.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = None if args or kwargs else fusable_adapter(self)
        if adapter is None or _is_one_token(x):
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        return _Linear.apply(
            x,
            base.weight,
            quantization_state(base),
            base.bias,
            self.lora_A[adapter].weight,
            self.lora_B[adapter].weight,
            self.scaling[adapter],
            dropout_probability(self, adapter),
            compute_dtype(base, x),
        )


def fuse(module: torch.nn.Module) -> bool:
    """Make ``module`` run fused if it is a PEFT 4-bit LoRA linear; return whether it is one."""
    if type(module) is Linear4bit:
        # The class and not the forward: a copied module stays fused, and its methods are its own.
        module.__class__ = FusedLinear4bit
    return isinstance(module, FusedLinear4bit)


def unfuse(module: torch.nn.Module) -> None:
    """Undo :func:`fuse`."""
    if type(module) is FusedLinear4bit:
        module.__class__ = Linear4bit


def fusable_adapter(module: Linear4bit) -> str | None:
    """Name of the one active adapter the fused function covers as ``module`` stands now, else None."""
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


def quantization_state(base: Any) -> bnb.QuantState:
    """The quantization state of ``base``, which the weight loses where FSDP2 replaces it."""
    state = getattr(base.weight, "quant_state", None)
    return base.quant_state if state is None else state


def dropout_probability(module: Linear4bit, adapter: str) -> float:
    """The probability with which ``adapter`` drops its input now: 0 in evaluation."""
    dropout = module.lora_dropout[adapter]
    return dropout.p if isinstance(dropout, torch.nn.Dropout) and dropout.training else 0.0


def compute_dtype(base: Any, x: Tensor) -> torch.dtype:
    """The dtype ``base`` multiplies in: autocast's where it is on, else the one the base was loaded for."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return base.compute_dtype or x.dtype


def dequantize(packed: Tensor, state: bnb.QuantState, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that ``packed`` stands for, rounded as bitsandbytes rounds it.

    Scales that are quantized themselves are restored at each pass: a cached copy would cost half a bit a
    weight and saves 1% of the matrix product.
    """
    weight = bnb.dequantize_4bit(packed.data, state)
    return weight if weight.dtype == dtype else weight.to(dtype)


def forward(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    *,
    lora_input: Tensor | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``into + x W' + scaling * lora_input A' B'`` [tokens, out] and ``lora_input A'`` [tokens, r].

    ``x`` is [tokens, in], ``weight`` [out, in], ``a`` [r, in], ``b`` [out, r], all of one dtype. ``into`` is
    a residual [tokens, out] or a bias [out] and is not written to; ``lora_input`` is ``x`` after dropout.
    """
    y = torch.mm(x, weight.t()) if into is None else torch.addmm(into, x, weight.t())
    t = torch.mm(x if lora_input is None else lora_input, a.t())
    y.addmm_(t, b.t(), alpha=scaling)
    return y, t


def backward(
    dy: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    *,
    kept: Tensor | None = None,
    dropout: float = 0.0,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` [tokens, in] and of ``lora_input A'`` [tokens, r].

    ``kept`` [tokens, in] is the boolean mask of what dropout with probability ``dropout`` let through;
    ``into`` [tokens, in] is added to the first gradient and not written to.
    """
    dx = torch.mm(dy, weight) if into is None else torch.addmm(into, dy, weight)
    dt = torch.mm(dy, b).mul_(scaling)
    if kept is None:
        dx.addmm_(dt, a)
    else:
        dx.add_(torch.mm(dt, a).mul_(kept), alpha=1 / (1 - dropout) if dropout < 1 else 0.0)
    return dx, dt


def adapter_gradients(
    dy: Tensor, dt: Tensor, lora_input: Tensor, t: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The gradients of A [r, in] and B [out, r], given what :func:`forward` and :func:`backward` returned."""
    return torch.mm(dt.t(), lora_input), torch.mm(dy.t(), t).mul_(scaling)


def drop(x: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Dropout that draws what ``nn.Dropout`` draws for the same input, and also returns the mask it drew."""
    dropped, kept = torch.native_dropout(x, probability, True)
    return dropped, kept


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        state: bnb.QuantState,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dropout: float,
        dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1])
            lora_input, kept = drop(rows, dropout) if dropout else (rows, None)
            lora_input = lora_input.to(dtype)
            y, t = forward(
                rows.to(dtype),
                dequantize(packed, state, dtype),
                a.to(dtype),
                b.to(dtype),
                scaling,
                lora_input=lora_input,
                into=None if bias is None else bias.to(dtype),
            )
        # x itself is not needed again: W is frozen, and A saw it only after dropout.
        ctx.save_for_backward(packed, lora_input, t, kept, a, b)
        ctx.state, ctx.scaling, ctx.dropout = state, scaling, dropout
        ctx.dtype_in = x.dtype
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed, lora_input, t, kept, a, b = ctx.saved_tensors
        dtype = lora_input.dtype
        with torch.autocast(grad.device.type, enabled=False):
            dy = grad.reshape(-1, grad.shape[-1]).to(dtype)
            dx, da, db = None, None, None
            if ctx.needs_input_grad[0]:
                weight = dequantize(packed, ctx.state, dtype)
                dx, dt = backward(
                    dy, weight, a.to(dtype), b.to(dtype), ctx.scaling, kept=kept, dropout=ctx.dropout
                )
                dx = dx.view(*grad.shape[:-1], -1).to(ctx.dtype_in)
            else:
                dt = torch.mm(dy, b.to(dtype)).mul_(ctx.scaling)
            if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
                da, db = adapter_gradients(dy, dt, lora_input, t, ctx.scaling)
                da, db = da.to(a.dtype), db.to(b.dtype)
        return dx, None, None, None, da, db, None, None, None


def _is_one_token(x: Tensor) -> bool:
    """One token without gradients, as in generation: bitsandbytes multiplies the packed weight directly."""
    return x.numel() == x.shape[-1] and not torch.is_grad_enabled()
