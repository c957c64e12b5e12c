"""What the experts of one layer work with, beside what the rest of the layer does."""

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from halfbyte.fast import experts as fused
from halfbyte.quantization import experts

_FLOAT32 = 4
# Products of an expert in a step, and those of the adapter of a stack; the numbers of rows that experts have, fitted.
_PRODUCTS, _OF_ADAPTER, _NUMBERS_OF_ROWS = 6, 5, 7
# How often a router keeps what it gives of all experts; bytes of each choice: indices, weights, order.
_OF_ROUTER, _OF_A_CHOICE = 3, 48
# What configurations call the experts of a token.
_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")


def of_experts(
    layer: nn.Module, config: Any, tokens: int, size: int, device: str, *, kept: bool = False
) -> int:
    """Return the bytes that the experts of ``layer`` work with for ``tokens``, in a dtype of ``size`` bytes.

    Fused, one expert is dequantized at a time (on a GPU one stack), and what its first map gives is there for the
    backward of the layer, unless it was ``kept`` from the forward; else all are, and what goes through them is kept,
    with gradients. Their adapters' gradients count with the others.
    """
    found = 0
    for _, module, held in fused.within(layer):
        shapes = list(experts.shapes(held).values())
        pairs = tokens * experts_of_a_token(config)
        hidden, inner = _widths(held, shapes)
        is_fused = fused.is_fused(module)
        if is_fused and device == "cuda":  # in groups: one stack is dequantized after the other
            whole = max(shape.numel() for shape in shapes)
            values = (2 * hidden + (3 - kept) * inner) * size + hidden * _FLOAT32
            found = max(found, whole * size + pairs * values)
        elif is_fused:
            largest = max(shape[1:].numel() for shape in shapes)
            share = -(-pairs // shapes[0][0]) * 4  # of one expert, if four times the mean reach it
            values = share * (2 * hidden + 3 * inner) * size + tokens * hidden * (2 * _FLOAT32 + size)
            kernels = _kernels(layer) if device == "cpu" and size < _FLOAT32 else 0
            found = max(found, (not kept) * pairs * inner * size + values + 2 * largest * size + kernels)
        else:
            whole = sum(shape.numel() for shape in shapes)
            found = max(found, whole * size + pairs * (3 * hidden + 4 * inner) * size)
    return found


def kept_of_experts(layer: nn.Module, config: Any, size: int) -> int:
    """Return the bytes of a token that the experts of ``layer``, fused, and its router keep for the backward."""
    found = 0
    for _, _, held in fused.within(layer):
        shapes = list(experts.shapes(held).values())
        hidden, inner = _widths(held, shapes)
        # The probabilities of all experts, a few times; of each that is taken its index, weight and place.
        routed = _OF_ROUTER * shapes[0][0] * _FLOAT32 + experts_of_a_token(config) * _OF_A_CHOICE
        found += hidden * size + experts_of_a_token(config) * inner * size + routed
    return found


def _kernels(layer: nn.Module) -> int:
    """Bytes that oneDNN keeps of products in 16 bits: about a mebibyte for each number of rows, as measured."""
    adapted = sum(isinstance(module, ParamWrapper) for module in layer.modules())
    return (_PRODUCTS + _OF_ADAPTER * adapted) * _NUMBERS_OF_ROWS * 2**20


def experts_of_a_token(config: Any) -> int:
    """Return how many experts a token goes to, as the configuration of a model says it."""
    config = config.get_text_config()
    return next((value for name in _TOP_K if isinstance(value := getattr(config, name, None), int)), 2)


def _widths(module: Any, shapes: list[torch.Size]) -> tuple[int, int]:
    """H of the stream, and the width of what the first map gives."""
    _, one, other = shapes[0]
    return (one, other) if getattr(module, "is_transposed", False) else (other, one)
