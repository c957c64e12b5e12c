"""Out of memory: which errors mean it, and the advice that is added to them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from halfbyte.terminal.wording import shorten


class OutOfMemoryError(torch.OutOfMemoryError):
    """Memory ran out, and the message says what to change."""


@contextmanager
def advised(advice: Callable[[str], str]) -> Iterator[None]:
    """Raise an error that means out of memory as ``advice`` words it, which gets what it says; the first advice stands.

    Raises :class:`OutOfMemoryError`.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, OutOfMemoryError) or not ran_out(error):
            raise
        raise OutOfMemoryError(advice(str(error))) from error


def ran_out(error: BaseException) -> bool:
    """Whether ``error`` is an allocation that failed: torch has a class of its own for it on accelerators only."""
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return on_cpu or isinstance(error, torch.OutOfMemoryError)


def advice(args: Any, step: int, reason: str, tokens: int | None = None) -> str:
    """What ran out in ``step``, and what to change in ``args`` (TrainingArguments), in at most six lines.

    ``tokens`` is `max_tokens_per_batch`, where it makes the micro-batches.
    """
    rows, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    lines = [f"out of memory in step {step}: {_first(reason)}"]
    if tokens is not None:
        lines.append(
            f"  the same rows in smaller micro-batches: `max_tokens_per_batch: {max(tokens // 2, 1)}` and "
            f"`gradient_accumulation_steps: {accumulation * 2}`"
        )
    elif rows > 1:
        lines.append(
            f"  the same training in less: `per_device_train_batch_size: {-(-rows // 2)}` and "
            f"`gradient_accumulation_steps: {accumulation * 2}`, as `on_oom: accumulate` does by itself"
        )
    if not args.gradient_checkpointing:
        lines.append("  `gradient_checkpointing: true` recomputes activations instead of keeping them")
    lines.append(_shorter(args))
    lines.append("  continue from the last checkpoint with `--resume_from_checkpoint auto`")
    return "\n".join(lines)


def reference_advice(args: Any, size: int, reason: str) -> str:
    """What ran out in a reference pass with batches of ``size`` rows, and what to change in ``args``."""
    lines = [f"out of memory in the reference pass: {_first(reason)}"]
    if size > 1:
        lines.append(f"  the same pass in less: `precompute_ref_batch_size: {size // 2}`")
    return "\n".join([*lines, _shorter(args)])


def _first(reason: str) -> str:
    return shorten(reason.partition("\n")[0], 300)


def _shorter(args: Any) -> str:
    return f"  or shorter rows: `max_length` is {getattr(args, 'max_length', None)}"
