"""MXFP4, in which gpt-oss is published: what its tensors are called in files, and the weights that they stand for."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer

METHOD = "mxfp4"
# The tensors of a stack of experts in files, by its name in the model.
NAMES: Mapping[str, list[str]] = Mxfp4HfQuantizer.serialized_names
_STACKS = {part: stack for stack, parts in NAMES.items() for part in parts}
_BLOCKS, _SCALES = "_blocks", "_scales"


def parameter_of(name: str) -> str:
    """The stack that a tensor in a file belongs to: its own name for one that is not in MXFP4."""
    path, dot, leaf = name.rpartition(".")
    return f"{path}{dot}{_STACKS.get(leaf, leaf)}"


def is_mxfp4(parts: Mapping[str, Tensor]) -> bool:
    """Whether the tensors of a parameter, by what follows its name, are those of a stack in MXFP4."""
    return parts.keys() == {_BLOCKS, _SCALES}


def unpack(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Return the stack ``[E, I, O]`` in ``dtype`` that ``parts`` stand for, made expert by expert: indices are large.

    Blocks are ``[E, O, I / 32, 16]``, two weights a byte, with scales ``[E, O, I / 32]``.
    """
    blocks, scales = parts[_BLOCKS], parts[_SCALES]
    count, outputs, groups, size = blocks.shape
    stack = torch.empty(count, 2 * groups * size, outputs, dtype=dtype)
    for index in range(count):
        one = slice(index, index + 1)
        stack[one] = convert_moe_packed_tensors(blocks[one], scales[one], dtype=dtype)
    return stack
