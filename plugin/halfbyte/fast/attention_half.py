"""The attention half of a decoder layer, forward and backward, outside autograd.

It adds its output to a residual where one is given. What a backward starts from is kept or None, which is recomputed.
"""

from dataclasses import dataclass

from torch import Tensor

from halfbyte.fast.around import close, normed, normed_backward, reopen, rows
from halfbyte.fast.attention import Attention, Kept
from halfbyte.fast.heads import Heads, Made
from halfbyte.fast.parts import AttentionParts
from halfbyte.fast.projections import Projections


@dataclass(frozen=True)
class Attended:
    """Intermediates of the attention half: what its backward starts from.

    ``made`` are what the heads are made of, ``output`` is ``[B, T, Nq, Dv]``, ``projected`` ``[B*T, H]``, the input of
    the norm that closes the half, ``out_inner`` ``[B*T, sum of r]``; None is recomputed.
    """

    made: Made | None
    output: Tensor
    kept: Kept
    projected: Tensor | None
    out_inner: Tensor | None


@dataclass(frozen=True)
class AttentionHalf:
    """One call of an attention half: its parts, the adapters active now, the batch's rotation and attention.

    ``read`` are the tokens whose output is read, int64 ``[K]``, where not all are: queries, outputs and their gradients
    are of these K, keys and values of all T.
    """

    parts: AttentionParts
    heads: Heads
    out: Projections
    attention: Attention
    read: Tensor | None = None

    def forward(
        self, stream: Tensor, residual: Tensor | None, *, keep_graph: bool
    ) -> tuple[Tensor, Attended]:
        """Return ``residual + out(attention(heads of norm(stream)))``, ``[B, T, H]``, and intermediates.

        ``residual`` is of the tokens that are read.
        """
        made = self.heads.make(normed(self.parts.norm, stream)[0])
        q, k, v = self.heads.split(made, stream.shape)
        q = self.those_read(q)
        output, kept = self.attention.forward(q, k, v, keep_graph=keep_graph)
        flat = rows(_gated(output, self.heads.gate(made, stream.shape)).flatten(2))
        y, projected, out_inner = close(self.out, self.parts, flat, residual)
        return y.view(*output.shape[:2], -1), Attended(made, output, kept, projected, out_inner)

    def backward(
        self, dy: Tensor, stream: Tensor, attended: Attended, around: Tensor | None, need_dstream: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return the gradients of ``stream`` (None without ``need_dstream``) and of the half's adapters.

        ``dy`` is the gradient of what :meth:`forward` returned, ``around`` what else reaches ``stream``, both
        ``[B, T, H]``.
        """
        x, statistics = normed(self.parts.norm, stream)
        made = self.heads.make(x) if attended.made is None else attended.made
        gate = self.heads.gate(made, stream.shape)
        flat = rows(_gated(attended.output, gate).flatten(2))
        dprojected = reopen(self.out, self.parts, rows(dy), attended.projected, lambda: flat)
        dflat, out_gradients = self.out.backward(
            dprojected, flat, attended.out_inner, self.out.weight(flat.dtype)
        )
        assert dflat is not None
        q, k, v = self.heads.split(made, stream.shape)
        q = self.those_read(q)
        doutput, dgate = _gated_backward(dflat.view(attended.output.shape), attended.output, gate)
        dq, dk, dv = self.attention.backward(doutput, q, k, v, attended.output, attended.kept)
        dx, gradients = self.heads.backward((self._of_all(dq, stream), dk, dv), dgate, made, x, need_dstream)
        gradients += out_gradients
        if dx is None:
            return None, gradients
        around = None if around is None else self._of_all(around, stream)
        return normed_backward(self.parts.norm, dx, stream, statistics, around), gradients

    def parameters(self) -> list[Tensor]:
        """Return the active adapters' A and B in the order of the gradients."""
        return self.heads.parameters() + self.out.parameters()

    def those_read(self, x: Tensor) -> Tensor:
        """Return of ``x`` ``[B, T, ...]`` the tokens whose output is read, ``[B, K, ...]``."""
        return x if self.read is None else x[:, self.read]

    def _of_all(self, dx: Tensor, stream: Tensor) -> Tensor:
        """The gradient ``[B, T, ...]`` of what :meth:`those_read` was given, for ``dx`` of what it returned."""
        if self.read is None:
            return dx
        return dx.new_zeros(*stream.shape[:2], *dx.shape[2:]).index_copy_(1, self.read, dx)


def _gated(output: Tensor, gate: Tensor | None) -> Tensor:
    """The output ``[B, T, Nq, D]`` times the sigmoid of its gate, if it has one."""
    return output if gate is None else output * gate.sigmoid()


def _gated_backward(dgated: Tensor, output: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the output before its gate, and of the gate."""
    if gate is None:
        return dgated, None
    share = gate.sigmoid()
    return dgated * share, dgated * output * share * (1 - share)
