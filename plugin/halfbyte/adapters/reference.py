"""What TRL's trainers do to the adapters they are given, and how it is kept from changing them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn


@contextmanager
def kept_in_float32(model: nn.Module) -> Iterator[None]:
    """Undo what a block does to the values of trainable parameters.

    TRL 1.16 rounds the adapters of a quantized model to bfloat16 while it constructs a trainer
    (trainer/sft_trainer.py:908, trainer/dpo_trainer.py:726); their float32 values come back afterwards.
    """
    kept = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data = kept[name].to(parameter.device)


@contextmanager
def whole_reference(model: nn.Module) -> Iterator[None]:
    """Make the reference that TRL's preference trainers copy from an adapter a copy of all of it, and frozen.

    TRL 1.16 copies the parameters that have ``.default.`` in their name (trainer/dpo_trainer.py:690), which
    passes over trained embedding rows, whose names end in ``.default``.
    """
    if not isinstance(model, PeftModel):
        yield
        return

    def add_adapter(name: str, config: LoraConfig, *args: Any, **kwargs: Any) -> None:
        PeftModel.add_adapter(model, name, config, *args, **kwargs)
        for path, parameter in list(model.named_parameters()):
            parts = path.split(".")
            if "default" in parts:
                copied = ".".join(name if part == "default" else part for part in parts)
                model.get_parameter(copied).data.copy_(parameter.data)
                model.get_parameter(copied).requires_grad_(False)

    model.__dict__["add_adapter"] = add_adapter
    try:
        yield
    finally:
        del model.__dict__["add_adapter"]


def drop_reference_copy(model: nn.Module) -> None:
    """Take away the frozen copy that TRL's preference trainers make of any adapter they are given.

    A fresh adapter needs none: its reference is the base with the adapter off, which TRL falls back to.
    """
    if isinstance(model, PeftModel) and "ref" in model.peft_config:
        model.delete_adapter("ref")
