"""DeepSpeed ZeRO-3 for 4-bit models: what is not supported, and weights that are read outside of the engine."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from halfbyte.distributed.launcher import is_on
from halfbyte.errors import UserError


def requested() -> bool:
    """Whether the launcher requested DeepSpeed, of any stage."""
    return is_on(os.environ, "ACCELERATE_USE_DEEPSPEED")


@contextmanager
def in_forward(model: nn.Module) -> Iterator[None]:
    """Have DeepSpeed gather every weight that is read, as in a forward of its engine; nothing for another model.

    Outside it gathers those of a module for the module's own forward only; a fused layer reads those of its parts.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        yield
        return
    parameters: list[Any] = [module._parameters for module in model.modules()]
    before = [each._in_forward for each in parameters]
    for each in parameters:
        each._in_forward = True
    try:
        yield
    finally:
        for each, flag in zip(parameters, before, strict=True):
            each._in_forward = flag


def require_installed() -> None:
    """Raise :class:`UserError` if DeepSpeed, an optional extra, is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("DeepSpeed was requested and is not installed: pip install 'halfbyte[deepspeed]'")


def refuse_precision(dtype: str | None, *, bf16: bool, fp16: bool) -> None:
    """Raise :class:`UserError` if DeepSpeed would run the model in 16 bits itself, which rounds the adapters.

    Without that the base computes in its own ``dtype``, and the adapters stay float32. float16 would require
    DeepSpeed's loss scaling, which comes with the rounding.
    """
    if dtype == "float16":
        raise UserError(
            "float16 is not tested under DeepSpeed; write `dtype: float32`, or use launch/ddp.yaml",
            option="dtype",
        )
    if bf16 or fp16:
        name = "bf16" if bf16 else "fp16"
        raise UserError(
            f"true under DeepSpeed casts the float32 adapters to 16 bits; write `{name}: false` and choose the base's "
            f"dtype with `dtype: {'bfloat16' if bf16 else 'float32'}`",
            option=name,
        )


def refuse_loraplus(ratio: float | None) -> None:
    """Raise :class:`UserError` for LoRA+: it trains under DeepSpeed, but its losses differ from one process.

    By 0.08 after one step of a tiny model, DeepSpeed 0.19.8.
    """
    if ratio is not None:
        raise UserError(
            f"{ratio}: DeepSpeed does not apply LoRA+'s learning rates; remove it, or launch with launch/fsdp2.yaml "
            f"or launch/ddp.yaml",
            option="loraplus_lr_ratio",
        )
