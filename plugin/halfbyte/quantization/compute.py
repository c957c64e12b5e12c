"""The dtype that a model computes in: its linear layers in four bits, and its stacks of experts."""

import bitsandbytes as bnb
import torch
from torch import nn

from halfbyte.quantization import experts


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Fix the dtype that packed weights are dequantized to and computed in, and keep bitsandbytes from repacking them.

    A checkpoint that was packed in another dtype would have its weights rounded to that one first. On CPUs with
    AVX512-BF16, bitsandbytes 0.50 (nn/modules.py, Linear4bit.forward) repacks a weight in place for inference at the
    first evaluation without gradients. Gradients computed through it afterwards are wrong, and so is what is saved.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = dtype
            module.compute_type_is_set = True
            if (state := getattr(module.weight, "quant_state", None)) is not None:
                state.dtype = dtype
    experts.compute_in(model, dtype)


def compute_in_float32(model: nn.Module) -> None:
    """Have ``model`` compute in float32 with the weights that it has."""
    # transformers refuses it for a quantized model, whose packed weights it leaves alone.
    nn.Module.float(model)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = torch.float32
    experts.compute_in(model, torch.float32)
