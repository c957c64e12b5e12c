"""Out of memory: what to change, said where it happened."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import Trainer


@contextmanager
def advised(trainer: Trainer) -> Iterator[None]:
    """Add to an out-of-memory error the step, the batch and what to change; the run still ends by it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(advice(trainer, str(error))) from error


def advice(trainer: Trainer, told: str) -> str:
    """What ran out where, and what to change, in at most six lines."""
    args = trainer.args
    rows, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    lines = [f"out of memory in step {trainer.state.global_step + 1}: {(told.splitlines() or [''])[0][:300]}"]
    if rows > 1:
        lines.append(
            f"  the same training in less: `per_device_train_batch_size: {-(-rows // 2)}` and "
            f"`gradient_accumulation_steps: {accumulation * 2}`, as `on_oom: accumulate` does by itself"
        )
    if not args.gradient_checkpointing:
        lines.append("  `gradient_checkpointing: true` recomputes activations instead of keeping them")
    length = getattr(args, "max_length", None)
    lines.append(f"  or shorter rows: `max_length` is {length}")
    lines.append("  continue from the last checkpoint with `--resume_from_checkpoint auto`")
    return "\n".join(lines)
