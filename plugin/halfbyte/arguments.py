"""Training arguments for a 4-bit base: their defaults, and what must change in those that are given."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import is_liger_kernel_available

from halfbyte import distributed, optimizers, quantization
from halfbyte.errors import UserError

# Training arguments a QLoRA run wants other than upstream's, for any TRL config class.
DEFAULTS: dict[str, Any] = {
    "optim": optimizers.DEFAULT,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    # Adapters take part in every step; looking for unused ones breaks non-reentrant checkpointing under DDP.
    "ddp_find_unused_parameters": False,
    "report_to": "wandb",
}


def mend(args: Any, *, dtype: str | None, use_peft: bool) -> tuple[str, list[str]]:
    """Change in ``args`` what 4-bit training must have.

    Returns the dtype for the base to compute in, which is that of the arguments where ``dtype`` is not set, and a
    line for each change.
    """
    lines = []
    optim, line = optimizers.resolve(str(getattr(args.optim, "value", args.optim)), args.device.type)
    if line is not None:
        args.optim = type(args.optim)(optim)
        lines.append(line)
    if args.ddp_find_unused_parameters is None and use_peft:
        args.ddp_find_unused_parameters = False
        if args.world_size > 1:
            lines.append("ddp_find_unused_parameters: false, since adapters take part in every step")
    checkpointing = {"use_reentrant": False, **(args.gradient_checkpointing_kwargs or {})}
    if args.gradient_checkpointing:
        args.gradient_checkpointing_kwargs = args.activation_checkpointing_kwargs = checkpointing
        if checkpointing["use_reentrant"] and args.world_size > 1:
            raise UserError(
                "gradient_checkpointing_kwargs: use_reentrant: true fails under DDP with adapters "
                "(a parameter is marked ready twice); take it out"
            )
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise UserError(
            "use_liger_kernel: liger-kernel is not installed; `pip install liger-kernel`, or take it out"
        )
    wanted, line = _precision(args, dtype)
    return wanted, lines if line is None else [*lines, line]


def _precision(args: Any, dtype: str | None) -> tuple[str, str | None]:
    """The dtype that goes with the arguments' autocast, and what to say of it."""
    autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    if dtype is not None and dtype != "auto":
        if autocast not in (None, dtype):
            return dtype, f"dtype: the base is in {dtype}, and computes in {autocast} as the arguments say"
        return dtype, None
    chosen = autocast or "float32"
    best = str(distributed.agree(quantization.choose_compute_dtype(args.device))).removeprefix("torch.")
    slower = "" if chosen == best else f"; {best} would be faster on this {args.device.type}"
    return chosen, f"compute dtype: {chosen} (bf16 {args.bf16}, fp16 {args.fp16}{slower})"


@contextmanager
def hidden(args: Any, *fields: str) -> Iterator[None]:
    """Hide options that halfbyte has acted on from TRL, which would act on them again or warn."""
    kept = {name: getattr(args, name) for name in fields if hasattr(args, name)}
    for name in kept:
        setattr(args, name, None)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(args, name, value)
