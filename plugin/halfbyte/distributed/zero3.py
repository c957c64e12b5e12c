"""DeepSpeed ZeRO-3 for 4-bit models: what is not supported."""

import importlib.util
import os

from halfbyte.distributed.launcher import is_on
from halfbyte.errors import UserError


def requested() -> bool:
    """Whether the launcher requested DeepSpeed, of any stage."""
    return is_on(os.environ, "ACCELERATE_USE_DEEPSPEED")


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
