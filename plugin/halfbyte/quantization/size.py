"""The bytes of a weight in four bits, packed already or, on meta, as it will be packed.

Half a byte a weight and a scale for each block, in float32 or, with double quantization, in a byte, with a float32
scale for every 256 of those and their mean (QLoRA, arXiv 2305.14314, section 3); and the codes, 16 and 256 float32.
"""

import math

import bitsandbytes as bnb
import torch

NESTED_BLOCK = 256
_CODE = 16 * 4
_NESTED_CODE = 256 * 4 + 4


def count_of(parameter: bnb.nn.Params4bit) -> int:
    """Return how many weights ``parameter`` holds."""
    state = parameter.quant_state
    count: int = parameter.numel() if state is None else state.shape.numel()
    return count


def packed_bytes(parameter: bnb.nn.Params4bit) -> int:
    """Return the bytes of the packed weights."""
    if parameter.quant_state is not None:
        size: int = parameter.nbytes
        return size
    return math.ceil(count_of(parameter) / 2)


def state_bytes(parameter: bnb.nn.Params4bit) -> int:
    """Return the bytes of what dequantizes them: scales and, with double quantization, the scales of the scales."""
    state = parameter.quant_state
    if state is None:
        blocks = math.ceil(count_of(parameter) / parameter.blocksize)
        if not parameter.compress_statistics:
            return 4 * blocks + _CODE
        return blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + _CODE + _NESTED_CODE
    tensors = [state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
