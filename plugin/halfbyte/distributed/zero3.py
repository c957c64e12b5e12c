"""DeepSpeed ZeRO-3 for 4-bit models: what the launcher may ask of it."""

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from halfbyte.errors import UserError


def requested(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher asked for DeepSpeed, of any stage."""
    return environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true", "yes")


def refuse_unsupported(environment: Mapping[str, str] = os.environ) -> None:
    """Raise :class:`UserError` for a stage other than 3, and for parameters or optimizers kept off the device."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("DeepSpeed was asked for and is not installed: pip install 'halfbyte[deepspeed]'")
    stage = _stage(environment)
    if stage != "3":
        raise UserError(
            f"DeepSpeed ZeRO-{stage} keeps the whole 4-bit base on every rank, as DDP does without DeepSpeed; write "
            f"`zero_stage: 3`, as in launch/zero3.yaml, or launch with launch/ddp.yaml"
        )
    for key in ("OFFLOAD_PARAM", "OFFLOAD_OPTIMIZER"):
        device = environment.get(f"ACCELERATE_DEEPSPEED_{key}_DEVICE", "none").lower()
        if device != "none":
            raise UserError(
                f"{key.lower()}_device: {device}: offloading a 4-bit model is not proven; write "
                f"`{key.lower()}_device: none`, as in launch/zero3.yaml"
            )


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


def refuse_adapters(*, tokens: Sequence[str], dora: bool, loraplus: bool) -> None:
    """Raise :class:`UserError` for adapters that are wrong under DeepSpeed.

    PEFT 0.21 makes some from the base's weights, which fails when those are divided. LoRA+ trains, and its losses
    are not those of one process (0.08 apart after one step of a tiny model, DeepSpeed 0.19.8).
    """
    if loraplus:
        raise UserError(
            "loraplus_lr_ratio: its learning rates are not followed under DeepSpeed; take it out, or launch with "
            "launch/fsdp2.yaml or launch/ddp.yaml"
        )
    if dora:
        raise UserError(
            "use_dora: true fails under DeepSpeed (it reads base weights that are not gathered); take it out, or "
            "launch with launch/fsdp2.yaml or launch/ddp.yaml"
        )
    if tokens:
        raise UserError(
            f"additional_special_tokens: {list(tokens)} need trained embedding rows, which are not proven under "
            f"DeepSpeed; launch with launch/ddp.yaml"
        )


def _stage(environment: Mapping[str, str]) -> str:
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file.lower() == "none":
        return environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if not Path(file).is_file():
        raise UserError(f"deepspeed_config_file: {file!r} is not a file (it cannot be read in base64 here)")
    written = json.loads(Path(file).read_text(encoding="utf-8"))
    return str(written.get("zero_optimization", {}).get("stage", 0))
