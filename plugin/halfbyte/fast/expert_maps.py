"""What one expert computes: two linear maps with LoRA, read from packed stacks, and the activation between them.

Beside these, what a forward of all experts keeps for its backward, and the gradients that the backward returns.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.fast.gate import Gate
from halfbyte.quantization import experts
from halfbyte.quantization.experts import Stack


@dataclass(frozen=True)
class ExpertAdapter:
    """LoRA of one stack as PEFT keeps it: ``a`` ``[E*r, I]`` and ``b`` ``[O, r*E]``, where E runs fastest."""

    a: Tensor
    b: Tensor
    scaling: float
    experts: int

    def of(self, index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the A ``[r, I]`` and B ``[O, r]`` of expert ``index``."""
        a, b = self.split(self.a.detach(), self.b.detach())
        return a[index].to(dtype), b[:, :, index].to(dtype)

    def whole(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A ``[E, r, I]`` and B ``[E, O, r]`` of all experts."""
        a, b = self.split(self.a.detach(), self.b.detach())
        return a.to(dtype), b.permute(2, 0, 1).to(dtype).contiguous()

    def split(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return views of tensors like A and B by expert: ``[E, r, I]`` and ``[O, r, E]``."""
        return a.view(self.experts, -1, a.shape[1]), b.view(b.shape[0], -1, self.experts)


@dataclass(frozen=True)
class Weights:
    """The packed weights of all experts as one pass reads them."""

    stack: Stack
    scales: Tensor
    transposed: bool

    @property
    def outputs(self) -> int:
        """O, the width of the result."""
        return self.stack.shape[2 if self.transposed else 1]

    def of(self, index: int, dtype: torch.dtype) -> Tensor:
        """Return the weight of expert ``index``, ``[O, I]``."""
        weight = self.stack.expert(index, self.scales, dtype)
        return weight.t() if self.transposed else weight


class Map:
    """One linear map an expert: a packed stack, its bias ``[E, O]``, and the adapter that is active now."""

    def __init__(self, held: Any, name: str, adapter: ExpertAdapter | None) -> None:
        self.held, self.name, self.adapter = held, name, adapter

    def read(self) -> Weights:
        """Return the weights, for one pass: a sharded model holds them around a layer's forward and backward only."""
        stack = self._stack
        return Weights(stack, stack.scales(), self.held.is_transposed)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are dequantized to."""
        return self._stack.dtype

    @property
    def experts(self) -> int:
        """E, the number of experts."""
        return self._stack.shape[0]

    @property
    def widths(self) -> tuple[int, ...]:
        """I and O in the order they are stored, and the rank of the adapter."""
        rank = () if self.adapter is None else (self.adapter.a.shape[0] // self.adapter.experts,)
        return (*self._stack.shape[1:], *rank)

    @property
    def _stack(self) -> Stack:
        stack = experts.packed(self.held, self.name)
        assert stack is not None
        return stack

    def whole(self, dtype: torch.dtype) -> Tensor:
        """Return the weights of all experts, dequantized, ``[E, O, I]``."""
        weight = self._stack.whole(dtype)
        return weight.transpose(1, 2) if self.held.is_transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """``[E, O]``, or None."""
        return getattr(self.held, f"{self.name}_bias").detach() if self.held.has_bias else None

    def parameters(self) -> list[Tensor]:
        """A and B, if there is an adapter."""
        return [self.adapter.a, self.adapter.b] if self.adapter is not None else []

    def gradients(self) -> list[Tensor]:
        """Return zeros for the gradients of :meth:`parameters`: an expert without tokens has none."""
        return [torch.zeros_like(parameter) for parameter in self.parameters()]

    def forward(self, x: Tensor, index: int, weight: Tensor) -> Tensor:
        """Map the tokens ``x`` ``[n, I]`` of expert ``index``."""
        bias = self.bias
        y = functional.linear(x, weight, None if bias is None else bias[index].to(x.dtype))
        if self.adapter is not None:
            a, b = self.adapter.of(index, x.dtype)
            y.addmm_(torch.mm(x, a.t()), b.t(), alpha=self.adapter.scaling)
        return y

    def backward(self, dy: Tensor, x: Tensor, index: int, weight: Tensor, gradients: list[Tensor]) -> Tensor:
        """Return the gradient of ``x`` for ``dy`` ``[n, O]``; put those of the expert's adapter into ``gradients``."""
        dx = torch.mm(dy, weight)
        if self.adapter is not None:
            a, b = self.adapter.of(index, x.dtype)
            dinner = torch.mm(dy, b).mul_(self.adapter.scaling)
            dx.addmm_(dinner, a)
            da, db = self.adapter.split(*gradients)
            da[index].copy_(torch.mm(dinner.t(), x))
            db[:, :, index].copy_(torch.mm(dy.t(), torch.mm(x, a.t())).mul_(self.adapter.scaling))
        return dx


class Activation:
    """The activation between the two maps of an expert, and its gradient."""

    def __init__(self, held: Any) -> None:
        self.function = held._apply_gate if held.has_gate else held.act_fn
        own = getattr(type(held), "_apply_gate", None)
        plain = held.has_gate and own is not None and own.__module__ == "transformers.integrations.moe"
        self.gate = Gate.of(held.act_fn) if plain else None

    def forward(self, inner: Tensor) -> Tensor:
        """Return the activations ``[n, F]`` of ``inner``, ``[n, 2F]`` with a gate."""
        result: Tensor = self.gate.forward(inner) if self.gate is not None else self.function(inner)
        return result

    def backward(self, dy: Tensor, inner: Tensor) -> Tensor:
        """Return the gradient of ``inner`` for ``dy``, which may be overwritten."""
        if self.gate is not None:
            return self.gate.backward(dy, inner)[0]
        with torch.enable_grad():
            leaf = inner.detach().requires_grad_()
            result = self.function(leaf)
        (gradient,) = torch.autograd.grad(result, leaf, dy)
        return gradient


@dataclass(frozen=True)
class Pass:
    """What a backward reads of its forward; S are the pairs of a token and an expert, rows are ordered by expert.

    Tokens ``x`` ``[N, H]``; experts ``index`` ``[N, K]``; routing ``weights`` float32 ``[S]``; ``order`` ``[S]``, the
    pair of each row; ``offsets`` int32 ``[E]``, where the rows of each expert end; ``inner`` ``[S, O]``, results of the
    first map.
    """

    x: Tensor
    index: Tensor
    weights: Tensor
    order: Tensor
    offsets: Tensor
    inner: Tensor

    @property
    def tokens(self) -> Tensor:
        """The token of each row, ``[S]``."""
        return self.order // self.index.shape[1]


@dataclass(frozen=True)
class Gradients:
    """Gradients of tokens ``[N, H]`` and of routing weights ``[S]``, both float32, and of the adapters of both maps."""

    x: Tensor
    weights: Tensor
    up: list[Tensor]
    down: list[Tensor]


def by_expert(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return the pairs of ``index`` ``[N, K]`` ordered by expert, and int32 ``[E]``, where those of each expert end."""
    flat = index.reshape(-1)
    counts = torch.bincount(flat, minlength=experts)[:experts]
    return torch.argsort(flat, stable=True), counts.cumsum(0).to(torch.int32)
