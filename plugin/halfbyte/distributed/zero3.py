"""DeepSpeed ZeRO-3 for 4-bit models: what the launcher may ask of it."""

import importlib.util
import os
from collections.abc import Mapping

from halfbyte.distributed.launcher import is_on
from halfbyte.errors import UserError


def requested(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher asked for DeepSpeed, of any stage."""
    return is_on(environment, "ACCELERATE_USE_DEEPSPEED")


def require_installed() -> None:
    """Raise :class:`UserError` where the optional extra is missing."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("DeepSpeed was asked for and is not installed: pip install 'halfbyte[deepspeed]'")


def refuse_precision(dtype: str | None, *, bf16: bool, fp16: bool) -> None:
    """Raise :class:`UserError` if DeepSpeed is to run the model in 16 bits itself: it would round the adapters.

    The base computes in its own ``dtype`` without that, and the adapters stay float32. float16 would need
    DeepSpeed's loss scaling, which comes with the rounding.
    """
    if dtype == "float16":
        raise UserError(
            "dtype: float16 is not proven under DeepSpeed; write `dtype: float32`, or use launch/ddp.yaml"
        )
    if bf16 or fp16:
        name = "bf16" if bf16 else "fp16"
        raise UserError(
            f"{name}: true under DeepSpeed casts the float32 adapters to 16 bits; write `{name}: false` and choose the "
            f"base's dtype with `dtype: {'bfloat16' if bf16 else 'float32'}`"
        )


def refuse_loraplus(ratio: float | None) -> None:
    """Raise :class:`UserError` for LoRA+: it trains under DeepSpeed, but its losses are not those of one process.

    0.08 apart after one step of a tiny model, DeepSpeed 0.19.8.
    """
    if ratio is not None:
        raise UserError(
            f"loraplus_lr_ratio: {ratio}: its learning rates are not followed under DeepSpeed; take it out, or launch "
            f"with launch/fsdp2.yaml or launch/ddp.yaml"
        )
