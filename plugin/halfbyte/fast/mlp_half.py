"""The MLP half of a decoder layer, forward and backward, outside autograd.

It adds its output to a residual where one is given. What a backward starts from is kept or None, which is recomputed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.fast.around import close, normed, normed_backward, reopen, rows
from halfbyte.fast.parts import MlpParts
from halfbyte.fast.projections import Projections


@dataclass(frozen=True)
class Transformed:
    """Intermediates of the MLP half: what its backward starts from.

    ``gate_up`` is ``[B*T, 2F]``, ``inner`` and ``down_inner`` ``[B*T, sum of r]``, ``projected`` ``[B*T, H]`` as of
    :class:`Attended`; None is recomputed.
    """

    gate_up: Tensor | None
    inner: Tensor | None
    projected: Tensor | None
    down_inner: Tensor | None


@dataclass(frozen=True)
class MlpHalf:
    """One call of an MLP half: its parts and the adapters active now."""

    parts: MlpParts
    gate_up: Projections
    down: Projections

    def forward(self, stream: Tensor, residual: Tensor | None) -> tuple[Tensor, Transformed]:
        """Return ``residual + down(act(gate) * up)``, ``[..., H]``, and intermediates; gate and up are of the norm."""
        x, _ = normed(self.parts.norm, stream)
        gate_up, inner = self.gate_up.forward(rows(x), self.gate_up.weight(x.dtype))
        y, projected, down_inner = close(self.down, self.parts, self.parts.gate.forward(gate_up), residual)
        # No view: autograd refuses to change a view that a function returns in place.
        y = torch.ops.aten._unsafe_view(y, stream.shape)
        return y, Transformed(gate_up, inner, projected, down_inner)

    def backward(
        self, dy: Tensor, stream: Tensor, transformed: Transformed, around: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the gradients of ``stream`` and of the half's adapters; ``dy``, ``[..., H]``, is the output's.

        ``around`` is what else reaches ``stream``.
        """
        x, statistics = normed(self.parts.norm, stream)
        weight = self.gate_up.weight(x.dtype)
        gate_up, inner, down_inner = transformed.gate_up, transformed.inner, transformed.down_inner
        if gate_up is None:
            gate_up, inner = self.gate_up.forward(rows(x), weight)
        made = gate_up
        dprojected = reopen(
            self.down, self.parts, rows(dy), transformed.projected, lambda: self.parts.gate.forward(made)
        )
        dproduct, dinner = self.down.input_gradient(dprojected, self.down.weight(x.dtype))
        dgate_up, product = self.parts.gate.backward(dproduct, gate_up)  # which takes dproduct's place
        if down_inner is None:
            down_inner = self.down.inner(product)
        down_gradients = self.down.parameter_gradients(dprojected, dinner, product, down_inner)
        dx, gate_up_gradients = self.gate_up.backward(dgate_up, rows(x), inner, weight)
        assert dx is not None
        dstream = normed_backward(self.parts.norm, dx, stream, statistics, around)
        return dstream, gate_up_gradients + down_gradients

    def parameters(self) -> list[Tensor]:
        """Return the active adapters' A and B in the order of the gradients."""
        return self.gate_up.parameters() + self.down.parameters()
