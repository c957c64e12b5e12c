"""What TRL's constructors do to adapters: the values to keep, and the reference adapter."""

from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import nn

_POLICY, _REFERENCE = "default", "ref"  # TRL's names for the two adapters


def trained_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the values of the trainable parameters of ``model`` by name, sharing their storage."""
    return {name: p.data for name, p in model.named_parameters() if p.requires_grad}


def restore(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Give the parameters of ``model`` the dtype and ``values`` from :func:`trained_values`, in place.

    A reference adapter becomes a frozen copy of all of them. TRL 1.16 copies only parameters that have
    ``.default.`` in their name (trainer/dpo_trainer.py:691), which leaves out trained embedding rows: their names
    end in ``.default``.
    """
    has_reference = isinstance(model, PeftModel) and _REFERENCE in model.peft_config
    parameters = dict(model.named_parameters())
    for name in values.keys() & parameters.keys():
        parameter = parameters[name]
        parameter.data = values[name].to(parameter.device)
        parts = name.split(".")
        if has_reference and _POLICY in parts:
            copy = parameters[".".join(_REFERENCE if part == _POLICY else part for part in parts)]
            copy.data.copy_(parameter.data)
            copy.requires_grad_(False)


def drop_reference_copy(model: nn.Module) -> None:
    """Delete the frozen copy that TRL's preference trainers make of any adapter they are given.

    A fresh adapter needs none: its reference is the base with adapters disabled, which TRL then uses.
    """
    if isinstance(model, PeftModel) and _REFERENCE in model.peft_config:
        model.delete_adapter(_REFERENCE)
