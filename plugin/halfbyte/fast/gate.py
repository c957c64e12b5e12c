"""The activation of an MLP, with a gate (``act(gate) * up``: SwiGLU, GeGLU) or without, and its gradient."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from halfbyte.fast.device import blocks, kernels

# transformers' activation modules whose gradient is one or two operations in torch, and our name for them.
_NAMES = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUTanh": "tanh",
    "NewGELUActivation": "tanh",
    "FastGELUActivation": "tanh",
    "GELUActivation": "none",
    "GELU": "none",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}
_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "none": functional.gelu,
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square_(),
}


@dataclass(frozen=True)
class Gate:
    """``act(gate) * up`` of ``gate_up`` ``[B*T, 2F]``, side by side; ``act`` of ``[B*T, F]`` if plain."""

    name: str
    plain: bool = False

    @classmethod
    def of(cls, module: nn.Module, *, plain: bool = False) -> "Gate | None":
        """Return the gate with the activation ``module``; None for an activation that is not covered."""
        name = _NAMES.get(type(module).__name__)
        return cls(name, plain) if name is not None else None

    def forward(self, gate_up: Tensor) -> Tensor:
        """Return ``act(gate) * up``, ``[B*T, F]``."""
        if self.plain:
            return self._activate(gate_up)
        fused = kernels(gate_up)
        if fused is not None and self.name == "silu":
            return fused.swiglu_forward(gate_up)
        product = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        for rows in blocks(gate_up):
            gate, up = gate_up[rows].chunk(2, dim=1)
            torch.mul(self._activate(gate), up, out=product[rows])
        return product

    def backward(self, dy: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of ``gate_up`` for ``dy`` ``[B*T, F]``, and the product, which overwrites ``dy``."""
        fused = kernels(gate_up)
        if fused is not None and self.name == "silu" and not self.plain:
            return fused.swiglu_backward(dy, gate_up)
        gradient = torch.empty_like(gate_up)
        for rows in blocks(gate_up):
            if self.plain:
                self._derivative(dy[rows], gate_up[rows], gradient[rows])
                dy[rows] = self._activate(gate_up[rows])
                continue
            gate, up = gate_up[rows].chunk(2, dim=1)
            dgate, dup = gradient[rows].chunk(2, dim=1)
            activated = self._activate(gate)
            torch.mul(dy[rows], activated, out=dup)
            self._derivative(dy[rows] * up, gate, dgate)
            torch.mul(activated, up, out=dy[rows])  # the product overwrites dy: no second buffer to write
        return gradient, dy

    def _activate(self, gate: Tensor) -> Tensor:
        return _FORWARD[self.name](gate)

    def _derivative(self, dy: Tensor, gate: Tensor, out: Tensor) -> None:
        if self.name == "silu":
            torch.ops.aten.silu_backward.grad_input(dy, gate, grad_input=out)
        elif self.name == "relu":
            torch.mul(dy, gate > 0, out=out)
        elif self.name == "relu2":
            torch.mul(dy, functional.relu(gate).mul_(2), out=out)
        else:
            torch.ops.aten.gelu_backward.grad_input(dy, gate, approximate=self.name, grad_input=out)
