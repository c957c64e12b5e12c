"""Frozen linear maps with LoRA that read the same input, computed as one.

    y_i = x W_i' + b_i + s_i d_i(x) A_i' B_i'        (' transposes; d_i is the dropout of adapter i)

The weights of all maps and their A are stacked, so that the three projections of attention cost the large matrix
products of one; each B adds to its own columns. Inputs ``x`` are ``[B*T, I]``, outputs side by side ``[B*T, O]`` with
O summed over the maps, inner values ``d_i(x) A_i'`` ``[B*T, r]`` with r summed over the adapters; all in the compute
dtype, the adapters' parameters in float32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Adapter:
    """LoRA of one map: ``a`` ``[r, I]`` and ``b`` ``[O, r]``, PEFT's own parameters."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout: "Dropout | None"

    @classmethod
    def of(cls, module: LoraLayer, name: str) -> "Adapter":
        """Read the adapter ``name`` of ``module`` as it is now: without dropout in evaluation."""
        dropout = module.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        a: Tensor = module.lora_A[name].weight
        b: Tensor = module.lora_B[name].weight
        return cls(a, b, module.scaling[name], Dropout(p) if p > 0 else None)


class Dropout:
    """One dropout mask, which can be drawn again: it remembers the state of the generator.

    Drawn where PEFT draws it, the mask equals PEFT's.
    """

    def __init__(self, p: float) -> None:
        self.p = p
        self.state: Tensor | None = None

    def factors(self, x: Tensor) -> Tensor:
        """Return 0 or ``1 / (1 - p)`` for each element of ``x``, the same at every call; shape and dtype of ``x``."""
        generator = torch.cuda if x.is_cuda else torch.random
        if self.state is None:
            self.state = generator.get_rng_state()
            return self._draw(x)
        now = generator.get_rng_state()
        generator.set_rng_state(self.state)
        try:
            return self._draw(x)
        finally:
            generator.set_rng_state(now)

    def _draw(self, x: Tensor) -> Tensor:
        return functional.dropout(torch.ones_like(x), self.p, training=True)


class Projections:
    """Linear maps of the same input, each with the adapter that is active now, or none.

    ``bases`` are ``bitsandbytes`` 4-bit or plain linear modules, frozen; weights are read off them at each
    use, because a sharded model holds them only around a layer's forward and backward.
    """

    def __init__(self, bases: list[nn.Linear], adapters: list[Adapter | None]) -> None:
        self.bases, self.adapters = bases, adapters

    def parameters(self) -> list[Tensor]:
        """Return A and B of every map that has an adapter, in the order of the gradients."""
        return [parameter for _, adapter in self._adapted() for parameter in (adapter.a, adapter.b)]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weights of all maps, dequantized to ``dtype`` and stacked: ``[O, I]``."""
        stacked = _stacked(self.bases) if len(self.bases) > 1 else None
        if stacked is not None:
            return bnb.dequantize_4bit(*stacked).to(dtype)
        weights = [dequantized(base, dtype) for base in self.bases]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    def forward(
        self, x: Tensor, weight: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Map ``x`` ``[B*T, I]``; return the outputs ``[B*T, O]`` plus ``residual``, and the inner values.

        :meth:`backward` takes the inner values (:meth:`inner`) back.
        """
        y = functional.linear(x, weight, self._bias(x.dtype))
        inner = self.inner(x)
        for adapter, part, out in self._parts(inner, y):
            out.addmm_(part, adapter.b.detach().to(x.dtype).t(), alpha=adapter.scaling)
        # Added last: in bfloat16 the sum with the large residual may be rounded only once.
        return y if residual is None else y.add_(residual), inner

    def backward(
        self, dy: Tensor, x: Tensor, inner: Tensor | None, weight: Tensor | None
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return the gradients of ``x`` (None without ``weight``) and of :meth:`parameters` for ``dy`` ``[B*T, O]``."""
        dx = torch.mm(dy, weight) if weight is not None else None
        dinner = self._inner_gradient(dy)
        if dinner is None or inner is None:
            return dx, []
        return dx, self._pairs(self._through_a(dinner, x, dx), self._b_gradients(dy, inner))

    def input_gradient(self, dy: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of input and inner values: the half of :meth:`backward` that needs no input."""
        dx, dinner = torch.mm(dy, weight), self._inner_gradient(dy)
        if dinner is not None:
            self._through_a(dinner, None, dx)
        return dx, dinner

    def parameter_gradients(
        self, dy: Tensor, dinner: Tensor | None, x: Tensor, inner: Tensor | None
    ) -> list[Tensor]:
        """Return the gradients of :meth:`parameters`: the half of :meth:`backward` after :meth:`input_gradient`."""
        if dinner is None or inner is None:
            return []
        return self._pairs(self._through_a(dinner, x, None), self._b_gradients(dy, inner))

    def inner(self, x: Tensor) -> Tensor | None:
        """Return ``d_i(x) A_i'`` of every adapter side by side, ``[B*T, sum of r]``; None without adapters."""
        if not self.parameters():
            return None
        if not self._dropped():
            return torch.mm(x, self._stacked_a(x.dtype).t())
        parts = [
            torch.mm(_dropped_out(x, each), each.a.detach().to(x.dtype).t()) for _, each in self._adapted()
        ]
        return torch.cat(parts, dim=1)

    def _inner_gradient(self, dy: Tensor) -> Tensor | None:
        """The gradient of the inner values; None without adapters."""
        if not self.parameters():
            return None
        dinner = dy.new_empty(len(dy), sum(self._ranks()))
        for adapter, part, dout in self._parts(dinner, dy):
            part.addmm_(dout, adapter.b.detach().to(dy.dtype), beta=0, alpha=adapter.scaling)
        return dinner

    def _through_a(self, dinner: Tensor, x: Tensor | None, dx: Tensor | None) -> list[Tensor]:
        """The gradients of every A, where ``x`` is given; the gradient of the input is added to ``dx``, where given."""
        if not self._dropped():
            if dx is not None:
                dx.addmm_(dinner, self._stacked_a(dinner.dtype))
            return list(torch.mm(dinner.t(), x).split(self._ranks())) if x is not None else []
        gradients = []
        for (_, adapter), part in zip(self._adapted(), dinner.split(self._ranks(), dim=1), strict=True):
            # In the layout of what the forward drew it for: random numbers fill memory in its order.
            like = dx if x is None else x
            factors = None if adapter.dropout is None or like is None else adapter.dropout.factors(like)
            if dx is not None:
                through = torch.mm(part, adapter.a.detach().to(part.dtype))
                dx.add_(through if factors is None else through.mul_(factors))
            if x is not None:
                gradients.append(torch.mm(part.t(), x if factors is None else factors.mul_(x)))
        return gradients

    def _b_gradients(self, dy: Tensor, inner: Tensor) -> list[Tensor]:
        return [
            torch.mm(dout.t(), part).mul_(adapter.scaling) for adapter, part, dout in self._parts(inner, dy)
        ]

    def _pairs(self, a_gradients: list[Tensor], b_gradients: list[Tensor]) -> list[Tensor]:
        """In the order of :meth:`parameters`."""
        return [gradient for pair in zip(a_gradients, b_gradients, strict=True) for gradient in pair]

    def _parts(self, inner: Tensor | None, outputs: Tensor) -> Iterator[tuple[Adapter, Tensor, Tensor]]:
        """Every adapter with its columns of ``inner``, a view, and of ``outputs``."""
        if inner is None:
            return
        widths = outputs.split([base.out_features for base in self.bases], dim=1)
        parts = inner.split(self._ranks(), dim=1)
        for (i, adapter), part in zip(self._adapted(), parts, strict=True):
            yield adapter, part, widths[i]

    def _stacked_a(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([adapter.a.detach().to(dtype) for _, adapter in self._adapted()])

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        """The biases side by side, zero where a map has none; None where none has one."""
        if all(base.bias is None for base in self.bases):
            return None
        device = self.bases[0].weight.device
        return torch.cat(
            [
                torch.zeros(base.out_features, dtype=dtype, device=device)
                if base.bias is None
                else base.bias.detach().to(dtype)
                for base in self.bases
            ]
        )

    def _adapted(self) -> Iterator[tuple[int, Adapter]]:
        return ((i, adapter) for i, adapter in enumerate(self.adapters) if adapter is not None)

    def _ranks(self) -> list[int]:
        return [len(adapter.a) for _, adapter in self._adapted()]

    def _dropped(self) -> bool:
        return any(adapter.dropout is not None for _, adapter in self._adapted())


def dequantized(base: nn.Linear, dtype: torch.dtype) -> Tensor:
    """Return the weight of ``base`` in ``dtype``, ``[O, I]``, exactly as bitsandbytes computes with it.

    Double-quantized scales are dequantized at each call: a cached copy would cost half a bit a weight and saves 1% of
    the matrix product.
    """
    if not isinstance(base, Linear4bit):
        return base.weight.detach().to(dtype)
    weight: Tensor = bnb.dequantize_4bit(_packed(base), quantization_state(base))
    return weight.to(dtype)


def _packed(base: Linear4bit) -> Tensor:
    packed: Tensor = base.weight.data
    # FSDP2 gathers a sharded weight around its layer, DeepSpeed when it is read; bitsandbytes would read past the end
    # of one that is not gathered.
    assert 2 * packed.numel() * packed.element_size() >= quantization_state(base).shape.numel(), (
        "a shard of a weight that was not gathered"
    )
    return packed


def _stacked(bases: Sequence[nn.Linear]) -> tuple[Tensor, bnb.QuantState] | None:
    """The packed weights of all maps as those of one; None where they cannot be concatenated.

    Copying them packed moves a fraction of the bytes of copying them dequantized, and makes one call of several.
    """
    if not all(isinstance(base, Linear4bit) for base in bases):
        return None
    states = [quantization_state(base) for base in bases]
    first = states[0]
    kinds = {(s.quant_type, s.blocksize, s.dtype, s.shape[1:]) for s in states}
    stored = {base.weight.dtype for base in bases}
    if len(kinds) > 1 or len(stored) > 1 or any(state.shape.numel() % first.blocksize for state in states):
        return None
    scales = torch.cat([_scales(state) for state in states])
    packed = torch.cat([_packed(base).reshape(-1, 1) for base in bases])
    shape = torch.Size((sum(state.shape[0] for state in states), *first.shape[1:]))
    assert 2 * packed.numel() * packed.element_size() == shape.numel(), (
        "packed weights are not contiguous in their storage dtype"
    )
    kind = {"quant_type": first.quant_type, "blocksize": first.blocksize, "dtype": first.dtype}
    return packed, bnb.QuantState(absmax=scales, shape=shape, code=first.code, **kind)


def _scales(state: bnb.QuantState) -> Tensor:
    """The scale of each block in float32."""
    if not state.nested:
        return state.absmax.float()
    scales: Tensor = bnb.dequantize_blockwise(state.absmax, state.state2)
    return scales.add_(state.offset).float()


def quantization_state(base: Any) -> bnb.QuantState:
    """Return the quantization state of ``base``, which the weight loses where FSDP2 replaces it."""
    state = getattr(base.weight, "quant_state", None)
    return base.quant_state if state is None else state


def compute_dtype(base: Any, x: Tensor) -> torch.dtype:
    """Return the dtype ``base`` multiplies in: autocast's where it is on, else the one the base was loaded for."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return base.compute_dtype or x.dtype


def _dropped_out(x: Tensor, adapter: Adapter) -> Tensor:
    return x if adapter.dropout is None else adapter.dropout.factors(x).mul_(x)
