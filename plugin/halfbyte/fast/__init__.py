"""The fast step: fused NF4+LoRA layers and linears, chunked LM head, padding-free batches; the numbers are plain TRL's.

Shapes in this room are written with one letter a dimension, slowest first: B batch, T tokens of a row, H hidden size,
N heads, D head size, F feed-forward size, V vocabulary, r rank. ``[B, T, H]`` is the residual stream. Where rows do
not matter, tokens of all rows are flattened to ``[B*T, H]``; ``Nq`` and ``Nkv`` are the heads of queries and of keys
and values, ``I`` and ``O`` the input and output features of any linear map. Tensors have the dtype of the stream
(the compute dtype) unless another one is named.
"""

from halfbyte.fast.fusion import fuse, refusal, unfuse
from halfbyte.fast.layer import fell_back
from halfbyte.fast.report import FusionReport
from halfbyte.fast.scope import PARTS, Scope, scope

__all__ = [
    "PARTS",
    "FusionReport",
    "Scope",
    "fell_back",
    "fuse",
    "refusal",
    "scope",
    "unfuse",
]
