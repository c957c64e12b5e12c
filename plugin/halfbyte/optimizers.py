"""Optimizers for adapters: paged on CUDA, their named equivalents on other devices, LoRA+ where requested."""

from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from halfbyte.errors import UserError
from halfbyte.terminal.wording import first_line

DEFAULT = "paged_adamw_32bit"
_ANY_STEPS = 10_000

# bitsandbytes pages optimizer state through CUDA's unified memory; elsewhere it warns and drops the paging.
_OFF_CUDA = {
    "paged_adamw_32bit": "adamw_torch",
    "paged_adamw": "adamw_torch",
    "paged_adamw_8bit": "adamw_8bit",
    "paged_ademamix_32bit": "ademamix",
    "paged_ademamix_8bit": "ademamix_8bit",
    "paged_lion_32bit": "lion_32bit",
    "paged_lion_8bit": "lion_8bit",
}


def resolve(optim: str, device_type: str) -> tuple[str, str | None]:
    """Return the optimizer to use on this device, and the line to print if it is not the requested one."""
    substitute = _OFF_CUDA.get(optim) if device_type != "cuda" else None
    if substitute is None:
        return optim, None
    return (
        substitute,
        f"optim: {optim} pages through CUDA memory; on {device_type} this run uses {substitute}",
    )


def check(args: TrainingArguments, model: nn.Module) -> None:
    """Raise :class:`UserError` if the optimizer of ``args`` or its schedule cannot be built; before the run begins."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, model)
    except (ImportError, ValueError) as error:
        name = getattr(args.optim, "value", args.optim)
        raise UserError(f"{name}: {first_line(error)}", option="optim") from error
    nothing = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        get_scheduler(args.lr_scheduler_type, nothing, 1, _ANY_STEPS, args.lr_scheduler_kwargs)
    except (ValueError, TypeError) as error:
        name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise UserError(
            f"{name}: {first_line(error)}; see lr_scheduler_kwargs", option="lr_scheduler_type"
        ) from error


def create(model: nn.Module, *, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters of ``model``, its 32-bit state paged on CUDA."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(parameter.is_cuda for parameter in parameters):
        return bnb.optim.PagedAdamW32bit(parameters, lr=lr, weight_decay=weight_decay)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)


def loraplus(args: TrainingArguments, model: PeftModel, ratio: float) -> torch.optim.Optimizer:
    """Return the optimizer of ``args`` over ``model``, with B's learning rate ``ratio`` times A's.

    LoRA+, arXiv 2402.12354.
    """
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    options: dict[str, Any] = {**kwargs, "weight_decay": args.weight_decay}
    return create_loraplus_optimizer(model, cls, loraplus_lr_ratio=ratio, **options)
