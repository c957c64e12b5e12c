"""What TRL's constructors do to adapters: the values to keep, and the reference adapter."""

import types
from collections.abc import Mapping
from typing import Any

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
            copy.data = parameter.data.clone()  # of trained rows TRL's copy has the dtype of the base
            copy.requires_grad_(False)


def keep_float32(model: nn.Module) -> None:
    """Have adapters and buffers of ``model`` keep their dtype, and every bit, when something casts the model.

    TRL's online trainers cast it to the dtype they generate in (trainer/grpo_trainer.py:1798), and train on: adapters
    would be rounded, and rotary frequencies. The base's weights are cast as requested.
    """
    apply = type(model)._apply

    def kept(module: nn.Module) -> dict[str, torch.Tensor]:
        adapters = {name: p for name, p in module.named_parameters() if _is_adapters(name, p)}
        return {**adapters, **dict(module.named_buffers())}

    def keeping(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        before = {name: tensor.data for name, tensor in kept(self).items()}
        apply(self, *args, **kwargs)
        for name, tensor in kept(self).items():
            if tensor.dtype != before[name].dtype:
                tensor.data = before[name].to(tensor.device)
        return self

    model._apply = types.MethodType(keeping, model)  # type: ignore[method-assign]


def _is_adapters(name: str, parameter: nn.Parameter) -> bool:
    return parameter.requires_grad or _REFERENCE in name.split(".")


def drop_reference_copy(model: nn.Module) -> None:
    """Delete the frozen copy that TRL's preference trainers make of any adapter they are given.

    A fresh adapter needs none: its reference is the base with adapters disabled, which TRL then uses.
    """
    if isinstance(model, PeftModel) and _REFERENCE in model.peft_config:
        model.delete_adapter(_REFERENCE)
